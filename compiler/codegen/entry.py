"""The ahead-of-time entry of each function, and the descriptor `kedge_module` that says what a lib.so holds.

An entry calls its kernels in order over the frame that the runtime hands it; between kernels it looks at the cancel
flag, and tells the runtime where it is if the frame has marks. Structs are those of kedge.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.compiler.codegen.builder import ModuleBuilder, Value
from kedge.compiler.codegen.constants import Constants, size_of
from kedge.compiler.codegen.expr import ExprEmitter
from kedge.compiler.codegen.external import emit_external
from kedge.compiler.codegen.parallel import API, API_FIELDS, FRAME, FRAME_FIELDS
from kedge.compiler.codegen.shapes import Program as ShapeProgram
from kedge.compiler.codegen.shapes import decode, encode
from kedge.compiler.errors import CodegenError
from kedge.compiler.lower.program import Entry, Equality, Port, Program, Slot, Step
from kedge.compiler.target import AnyTarget
from kedge.compiler.tir.expr import Binary, Dim, Expr, Var, as_expr, const, maximum
from kedge.compiler.tir.simplify import Simplifier, simplify_dim
from kedge.rpc import abi

ABI_VERSION = abi.ABI_VERSION
MAGIC = 0x4547444B
MODULE_SYMBOL = "kedge_module"
_DEVICES = {"llvm": abi.DEVICE_CPU, "opencl": abi.DEVICE_OPENCL, "cuda": abi.DEVICE_CUDA}
_CANCELLED = 7
_NO_UPPER = 2**63 - 1

_EXPR = "{ ptr, i64 }"
_PORT = "{ ptr, ptr, i32, { i8, i8, i16 } }"
_SYMBOL = "{ ptr, i64, i64, i32, i32 }"
_EQUALITY = f"{{ {_EXPR}, {_EXPR}, ptr }}"
_FUNCTION = f"{{ i64, ptr, ptr, ptr, ptr, ptr, {_EXPR}, i32, i32, i32, i32, ptr, i64 }}"
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
    program: Program, target: AnyTarget, kernels: Mapping[str, CompiledKernel], weights: Sequence[WeightPlace],
    weights_size: int, launches: Sequence[str] = (),
) -> str:  # fmt: skip
    """LLVM IR of all entries of `program` and of the descriptor; `kernels` by their names in the program.

    `launches` are the linker symbols of the device's kernels, which the descriptor lists.
    """
    module = ModuleBuilder(target.host)
    constants = Constants(module)
    for kernel in dict.fromkeys(kernels.values()):
        _declare_kernel(module, program, kernels, kernel)
    callees = {**kernels, **_emit_externals(module, constants, program)}
    functions = []
    for number, entry in enumerate(program.entries):
        arena = _emit_entry(module, entry, f"kedge_entry_{number}", callees, weights)
        functions.append(_describe_function(constants, entry, f"kedge_entry_{number}", arena))
    _describe_module(constants, target, functions, weights, weights_size, launches)
    return module.text()


def _declare_kernel(
    module: ModuleBuilder, program: Program, kernels: Mapping[str, CompiledKernel], kernel: CompiledKernel
) -> None:
    steps = (step for entry in program.entries for step in entry.steps)
    call = next(step for step in steps if kernels.get(step.kernel) == kernel)
    types = ["ptr"] * (1 + len(call.args)) + ["i64"] * len(call.symbols) + ["ptr"] * kernel.needs_workspace
    module.add(f"declare hidden i32 @{kernel.symbol}({', '.join(types)})")


def _emit_externals(module: ModuleBuilder, constants: Constants, program: Program) -> dict[str, CompiledKernel]:
    """The functions that call external code, by their names in the program: to an entry they are kernels."""
    made = {}
    for number, (name, kernel) in enumerate(program.externals.items()):
        made[name] = CompiledKernel(f"kedge_external_{number}", encode(kernel.call.workspace, kernel.symbols))
        emit_external(module, constants, kernel, made[name].symbol)
    return made


# Entries --------------------------------------------------------------------------------------------------------


def _emit_entry(
    module: ModuleBuilder, entry: Entry, name: str, kernels: Mapping[str, CompiledKernel],
    weights: Sequence[WeightPlace],
) -> Dim:  # fmt: skip
    """Emit the entry function; gives the bytes of arena it needs, workspace of its kernels included."""
    emitter = _EntryEmitter(module, entry, weights)
    emitter.prologue()
    needs: list[Dim] = []
    for number, step in enumerate(entry.steps):
        kernel = kernels[step.kernel]
        if kernel.needs_workspace:
            needs.append(decode(kernel.workspace, step.symbols))
        emitter.mark(number)
        emitter.step(step, kernel)
    emitter.mark(len(entry.steps))
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
    arena, total = (as_expr(simplify_dim(size)) for size in (_aligned(entry.arena_size), total))
    # Of a symbol that may be 0 after all, the simplifier does not know it: what is no workspace may be less than none.
    return arena + (Binary("max", total, const(0)) if entry.may_be_zero else total)


class _EntryEmitter(ExprEmitter):
    """One entry function."""

    def __init__(self, module: ModuleBuilder, entry: Entry, weights: Sequence[WeightPlace]) -> None:
        from kedge.compiler.codegen.builder import FunctionBuilder

        super().__init__(FunctionBuilder(module))
        self.entry = entry
        self.weights = weights
        self._pools: dict[str, Value] = {}
        self._marked = Value("false", "i1")

    def prologue(self) -> None:
        """Read what stays the same for the whole call."""
        for field in ("inputs", "outputs", "arena", "weights", "cancel"):
            self._pools[field] = self._field(field)
        marks = self._field("marks")
        self._marked = self.b.compare("icmp ne", marks, Value("null", "ptr"))
        symbols = self._field("symbols")
        for number, var in enumerate(self.entry.symbols):
            self.bind_symbol(var, self._element(symbols, "i64", number))
        for var in self.entry.may_be_zero:
            self._leave_if(self.b.compare("icmp eq", self.materialize(self.index(var)), self.b.index(0)), "0")

    def _field(self, name: str) -> Value:
        slot = f"getelementptr inbounds {FRAME}, ptr %frame, i32 0, i32 {FRAME_FIELDS[name]}"
        return self.b.result(f"load ptr, ptr {self.b.result(slot, 'ptr').ref}", "ptr")

    def _element(self, array: Value, type_: str, index: int) -> Value:
        slot = self.b.result(f"getelementptr inbounds {type_}, ptr {array.ref}, i32 {index}", "ptr")
        return self.b.result(f"load {type_}, ptr {slot.ref}", type_)

    def mark(self, number: int) -> None:
        """Have the runtime note the time, where it asked for that."""
        mark, go_on = self.b.fresh("mark"), self.b.fresh("next")
        self.b.branch(self._marked, mark, go_on)
        self.b.label(mark)
        api = self._field("api")
        slot = f"getelementptr inbounds {API}, ptr {api.ref}, i32 0, i32 {API_FIELDS['mark']}"
        function = self.b.result(f"load ptr, ptr {self.b.result(slot, 'ptr').ref}", "ptr")
        self.b.emit(f"call void {function.ref}(ptr %frame, i64 {number})")
        self.b.emit(f"br label %{go_on}")
        self.b.label(go_on)

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


def _describe_function(constants: Constants, entry: Entry, symbol: str, arena: Dim) -> str:
    inputs = constants.array(_PORT, [_describe_port(constants, port, entry.symbols) for port in entry.inputs])
    outputs = constants.array(_PORT, [_describe_port(constants, port, entry.symbols) for port in entry.outputs])
    symbols = constants.array(
        _SYMBOL, [_describe_symbol(constants, var, least, entry) for var, least in entry.least().items()]
    )
    equalities = constants.array(_EQUALITY, [_describe_equality(constants, each, entry) for each in entry.equalities])
    name = constants.text(entry.name)
    return constants.constant(
        _FUNCTION,
        f"{{ i64 {size_of(_FUNCTION)}, ptr {name}, ptr @{symbol}, ptr {inputs}, ptr {outputs}, ptr {symbols}, "
        f"{_EXPR} {constants.expr(arena, entry.symbols)}, i32 {len(entry.inputs)}, i32 {len(entry.outputs)}, "
        f"i32 {len(entry.symbols)}, i32 {len(entry.steps)}, ptr {equalities}, i64 {len(entry.equalities)} }}",
    )


def _describe_equality(constants: Constants, equality: Equality, entry: Entry) -> str:
    a, b = (constants.expr(dim, entry.symbols) for dim in (equality.a, equality.b))
    return f"{{ {_EXPR} {a}, {_EXPR} {b}, ptr {constants.text(equality.of)} }}"


def _describe_port(constants: Constants, port: Port, symbols: Sequence[Var]) -> str:
    code, bits = abi.dtype_code(port.type.dtype)
    shape = constants.array(_EXPR, [constants.expr(dim, symbols) for dim in port.type.shape])
    head = f"ptr {constants.text(port.name)}, ptr {shape}, i32 {len(port.type.shape)}"
    return f"{{ {head}, {{ i8, i8, i16 }} {{ i8 {code}, i8 {bits}, i16 1 }} }}"


def _describe_symbol(constants: Constants, var: Var, least: int, entry: Entry) -> str:
    for number, port in enumerate(entry.inputs):
        for axis, dim in enumerate(port.type.shape):
            if dim is var:
                upper = _NO_UPPER if var.upper is None else var.upper
                name = constants.text(var.name)
                return f"{{ ptr {name}, i64 {least}, i64 {upper}, i32 {number}, i32 {axis} }}"
    raise CodegenError(
        f"{entry.name}: the dim {var.name!r} cannot be read off any input", hint="give an input that has it as a dim"
    )


def _describe_module(
    constants: Constants, target: AnyTarget, functions: Sequence[str], weights: Sequence[WeightPlace],
    weights_size: int, launches: Sequence[str],
) -> None:  # fmt: skip
    table = constants.array("ptr", functions)
    for symbol in launches:
        constants.module.add(f"@{symbol} = external hidden constant i8")
    kernels = constants.array("ptr", [f"@{symbol}" for symbol in launches])
    places = constants.array(
        _WEIGHT, [f"{{ ptr {constants.text(w.name)}, i64 {w.offset}, i64 {w.size} }}" for w in weights]
    )
    text, features = constants.text(str(target)), constants.text(",".join(target.required_features))
    value = (
        f"{{ i32 {MAGIC}, i32 {ABI_VERSION}, i64 {size_of(_MODULE)}, ptr {text}, ptr {features}, ptr {table}, "
        f"ptr {places}, i64 {weights_size}, i32 {len(functions)}, i32 {len(weights)}, "
        f"i32 {_DEVICES[target.kind]}, i32 {len(launches)}, ptr {kernels} }}"
    )
    constants.module.add(f"@{MODULE_SYMBOL} = constant {_MODULE} {value}")
