"""The ahead-of-time entry of each function, and the descriptor `kedge_module` that says what a lib.so holds.

An entry calls its kernels in order over the frame that the runtime hands it; between kernels it looks at the cancel
flag. Structs are those of kedge.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.compiler.codegen.affine import Linear
from kedge.compiler.codegen.builder import ModuleBuilder, Value
from kedge.compiler.codegen.expr import ExprEmitter
from kedge.compiler.codegen.parallel import FRAME, FRAME_FIELDS
from kedge.compiler.codegen.shapes import Program as ShapeProgram
from kedge.compiler.codegen.shapes import decode, encode
from kedge.compiler.errors import CodegenError
from kedge.compiler.lower.program import Entry, Port, Program, Slot, Step
from kedge.compiler.target.model import Target
from kedge.compiler.tir.expr import Binary, Dim, Expr, Var, as_expr, const, maximum
from kedge.compiler.tir.simplify import Simplifier, simplify_dim
from kedge.rpc import abi

ABI_VERSION = abi.ABI_VERSION
MAGIC = 0x4547444B
MODULE_SYMBOL = "kedge_module"
_CANCELLED = 7
_NO_UPPER = 2**63 - 1

_EXPR_OP = "{ i64, i64 }"
_EXPR = "{ ptr, i64 }"
_PORT = "{ ptr, ptr, i32, { i8, i8, i16 } }"
_SYMBOL = "{ ptr, i64, i64, i32, i32 }"
_FUNCTION = f"{{ i64, ptr, ptr, ptr, ptr, ptr, {_EXPR}, i32, i32, i32, i32 }}"
_WEIGHT = "{ ptr, i64, i64 }"
_MODULE = "{ i32, i32, i64, ptr, ptr, ptr, ptr, i64, i32, i32, i32, i32, ptr }"


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What an entry must know of a kernel: its linker symbol, and the workspace it takes over its own symbols."""

    symbol: str
    workspace: ShapeProgram

    @property
    def needs_workspace(self) -> bool:
        """Whether the kernel takes a workspace pointer."""
        return self.workspace != ((0, 0),)


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Where a weight is in the weights' data: byte offset and size."""

    name: str
    offset: int
    size: int


def emit_module(
    program: Program, target: Target, kernels: Mapping[str, CompiledKernel], weights: Sequence[WeightPlace],
    weights_size: int,
) -> str:  # fmt: skip
    """LLVM IR of all entries of `program` and of the descriptor; `kernels` by their names in the program."""
    module = ModuleBuilder(target)
    globals_ = _Globals(module)
    for kernel in dict.fromkeys(kernels.values()):
        _declare_kernel(module, program, kernels, kernel)
    functions = []
    for number, entry in enumerate(program.entries):
        arena = _emit_entry(module, entry, f"kedge_entry_{number}", kernels, weights)
        functions.append(_describe_function(globals_, entry, f"kedge_entry_{number}", arena))
    _describe_module(globals_, target, functions, weights, weights_size)
    return module.text()


def _declare_kernel(
    module: ModuleBuilder, program: Program, kernels: Mapping[str, CompiledKernel], kernel: CompiledKernel
) -> None:
    func = next(program.kernels[name].func for name, one in kernels.items() if one == kernel)
    types = ["ptr"] * (1 + len(func.params)) + ["i64"] * len(func.symbols) + ["ptr"] * kernel.needs_workspace
    module.add(f"declare hidden i32 @{kernel.symbol}({', '.join(types)})")


# Entries --------------------------------------------------------------------------------------------------------


def _emit_entry(
    module: ModuleBuilder, entry: Entry, name: str, kernels: Mapping[str, CompiledKernel],
    weights: Sequence[WeightPlace],
) -> Dim:  # fmt: skip
    """Emit the entry function; gives the bytes of arena it needs, workspace of its kernels included."""
    emitter = _EntryEmitter(module, entry, weights)
    emitter.prologue()
    needs: list[Dim] = []
    for step in entry.steps:
        kernel = kernels[step.kernel]
        if kernel.needs_workspace:
            needs.append(decode(kernel.workspace, step.symbols))
        emitter.step(step, kernel)
    emitter.b.emit("ret i32 0")
    module.add(emitter.b.finish(f"define hidden i32 @{name}(ptr noalias %frame) {module.attributes}"))
    return _arena_size(entry, needs)


def _aligned(size: Dim) -> Expr:
    return Binary("mul", Binary("floordiv", Binary("add", as_expr(size), const(63)), const(64)), const(64))


def _arena_size(entry: Entry, workspaces: Sequence[Dim]) -> Dim:
    if not workspaces:
        return entry.arena_size
    simplifier = Simplifier()
    largest: list[Expr] = []
    for size in map(as_expr, workspaces):
        if any(simplifier.prove(Binary("le", size, other)) for other in largest):
            continue
        largest = [other for other in largest if not simplifier.prove(Binary("le", other, size))]
        largest.append(size)
    total = largest[0]
    for size in largest[1:]:
        total = maximum(total, size)
    return simplify_dim(Binary("add", _aligned(entry.arena_size), total))


class _EntryEmitter(ExprEmitter):
    """One entry function."""

    def __init__(self, module: ModuleBuilder, entry: Entry, weights: Sequence[WeightPlace]) -> None:
        from kedge.compiler.codegen.builder import FunctionBuilder

        super().__init__(FunctionBuilder(module))
        self.entry = entry
        self.weights = weights
        self._pools: dict[str, Value] = {}

    def prologue(self) -> None:
        """Read what stays the same for the whole call."""
        for field in ("inputs", "outputs", "arena", "weights", "cancel"):
            self._pools[field] = self._field(field)
        symbols = self._field("symbols")
        for number, var in enumerate(self.entry.symbols):
            raw = self._element(symbols, "i64", number)
            index = self.b.convert("trunc", raw, self.b.index_type) if self.b.index_type != "i64" else raw
            self.env[var] = Linear.atom(index)
            self.known[index] = (var.lower or 0, var.upper)

    def _field(self, name: str) -> Value:
        slot = f"getelementptr inbounds {FRAME}, ptr %frame, i32 0, i32 {FRAME_FIELDS[name]}"
        return self.b.result(f"load ptr, ptr {self.b.result(slot, 'ptr').ref}", "ptr")

    def _element(self, array: Value, type_: str, index: int) -> Value:
        slot = self.b.result(f"getelementptr inbounds {type_}, ptr {array.ref}, i32 {index}", "ptr")
        return self.b.result(f"load {type_}, ptr {slot.ref}", type_)

    def step(self, step: Step, kernel: CompiledKernel) -> None:
        """Stop if the call was cancelled, then run one kernel; its failure is the entry's."""
        flag = self.b.result(f"load volatile i32, ptr {self._pools['cancel'].ref}", "i32")
        self._leave_if(self.b.compare("icmp ne", flag, self.b.const(0, "i32")), str(_CANCELLED))
        args = [Value("%frame", "ptr"), *(self._slot(slot) for slot in step.args)]
        args += [self._widen(self.materialize(self.index(symbol))) for symbol in step.symbols]
        if kernel.needs_workspace:
            args.append(self._at(self._pools["arena"], _aligned(self.entry.arena_size)))
        status = self.b.call(kernel.symbol, Value("", "i32"), args)
        self._leave_if(self.b.compare("icmp ne", status, self.b.const(0, "i32")), status.ref)

    def _leave_if(self, condition: Value, status: str) -> None:
        leave, go_on = self.b.fresh("leave"), self.b.fresh("next")
        self.b.branch(condition, leave, go_on)
        self.b.label(leave)
        self.b.emit(f"ret i32 {status}")
        self.b.label(go_on)

    def _slot(self, slot: Slot) -> Value:
        match slot.kind:
            case "input":
                return self._element(self._pools["inputs"], "ptr", slot.index)
            case "output":
                return self._element(self._pools["outputs"], "ptr", slot.index)
            case "weight":
                return self._at(self._pools["weights"], const(self.weights[slot.index].offset))
            case "arena":
                return self._at(self._pools["arena"], as_expr(slot.offset))

    def _at(self, base: Value, offset: Expr) -> Value:
        at = self.materialize(self.index(offset))
        return self.b.result(f"getelementptr inbounds i8, ptr {base.ref}, {at.typed}", "ptr")


# The descriptor -------------------------------------------------------------------------------------------------


class _Globals:
    """Private constants of the module, by name."""

    def __init__(self, module: ModuleBuilder) -> None:
        self.module = module
        self._count = 0

    def constant(self, type_: str, value: str) -> str:
        """A new private constant; gives its reference."""
        self._count += 1
        ref = f"@kedge.c{self._count}"
        self.module.add(f"{ref} = private unnamed_addr constant {type_} {value}")
        return ref

    def array(self, type_: str, values: Sequence[str]) -> str:
        """An array of constants; "null" when there is nothing in it."""
        if not values:
            return "null"
        inside = ", ".join(f"{type_} {value}" for value in values)
        return self.constant(f"[{len(values)} x {type_}]", f"[{inside}]")

    def text(self, text: str) -> str:
        """A C string."""
        data = text.encode() + b"\0"
        escaped = "".join(chr(c) if 32 <= c < 127 and c not in b'"\\' else f"\\{c:02X}" for c in data)
        return self.constant(f"[{len(data)} x i8]", f'c"{escaped}"')

    def expr(self, dim: Dim, symbols: Sequence[Var]) -> str:
        """A `kedge_expr`."""
        program = encode(dim, symbols)
        ops = self.array(_EXPR_OP, [f"{{ i64 {code}, i64 {value} }}" for code, value in program])
        return f"{{ ptr {ops}, i64 {len(program)} }}"


def _size_of(type_: str) -> str:
    return f"ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i64)"


def _describe_function(globals_: _Globals, entry: Entry, symbol: str, arena: Dim) -> str:
    inputs = globals_.array(_PORT, [_describe_port(globals_, port, entry.symbols) for port in entry.inputs])
    outputs = globals_.array(_PORT, [_describe_port(globals_, port, entry.symbols) for port in entry.outputs])
    symbols = globals_.array(_SYMBOL, [_describe_symbol(globals_, var, entry) for var in entry.symbols])
    name = globals_.text(entry.name)
    return globals_.constant(
        _FUNCTION,
        f"{{ i64 {_size_of(_FUNCTION)}, ptr {name}, ptr @{symbol}, ptr {inputs}, ptr {outputs}, ptr {symbols}, "
        f"{_EXPR} {globals_.expr(arena, entry.symbols)}, i32 {len(entry.inputs)}, i32 {len(entry.outputs)}, "
        f"i32 {len(entry.symbols)}, i32 0 }}",
    )


def _describe_port(globals_: _Globals, port: Port, symbols: Sequence[Var]) -> str:
    code, bits = abi.dtype_code(port.type.dtype)
    shape = globals_.array(_EXPR, [globals_.expr(dim, symbols) for dim in port.type.shape])
    head = f"ptr {globals_.text(port.name)}, ptr {shape}, i32 {len(port.type.shape)}"
    return f"{{ {head}, {{ i8, i8, i16 }} {{ i8 {code}, i8 {bits}, i16 1 }} }}"


def _describe_symbol(globals_: _Globals, var: Var, entry: Entry) -> str:
    for number, port in enumerate(entry.inputs):
        for axis, dim in enumerate(port.type.shape):
            if dim is var:
                upper = _NO_UPPER if var.upper is None else var.upper
                name = globals_.text(var.name)
                return f"{{ ptr {name}, i64 {var.lower or 0}, i64 {upper}, i32 {number}, i32 {axis} }}"
    raise CodegenError(
        f"{entry.name}: the dim {var.name!r} cannot be read off any input", hint="give an input that has it as a dim"
    )


def _describe_module(
    globals_: _Globals, target: Target, functions: Sequence[str], weights: Sequence[WeightPlace], weights_size: int
) -> None:
    table = globals_.array("ptr", functions)
    places = globals_.array(
        _WEIGHT, [f"{{ ptr {globals_.text(w.name)}, i64 {w.offset}, i64 {w.size} }}" for w in weights]
    )
    text, features = globals_.text(str(target)), globals_.text(",".join(target.required_features))
    value = (
        f"{{ i32 {MAGIC}, i32 {ABI_VERSION}, i64 {_size_of(_MODULE)}, ptr {text}, ptr {features}, ptr {table}, "
        f"ptr {places}, i64 {weights_size}, i32 {len(functions)}, i32 {len(weights)}, "
        f"i32 {abi.DEVICE_CPU}, i32 0, ptr null }}"
    )
    globals_.module.add(f"@{MODULE_SYMBOL} = constant {_MODULE} {value}")
