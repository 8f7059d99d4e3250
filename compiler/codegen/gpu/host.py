"""The host's half of a function for a GPU: native code that works out grids and launches kernels.

It has the signature of any kernel of a CPU (see `codegen.kernel`), but the pointers it gets are addresses of the
device, which it only computes with and hands on through the runtime's `launch`. The device's code lies in it as data.
"""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.codegen.address import Pointer
from kedge.compiler.codegen.affine import Linear
from kedge.compiler.codegen.builder import FunctionBuilder, ModuleBuilder, Value
from kedge.compiler.codegen.constants import c_string, size_of
from kedge.compiler.codegen.expr import ExprEmitter
from kedge.compiler.codegen.gpu.ir import Launch
from kedge.compiler.codegen.parallel import call_runtime
from kedge.compiler.codegen.types import byte_size
from kedge.compiler.errors import CodegenError
from kedge.compiler.target.model import Target
from kedge.compiler.tir.expr import Binary, Dim, Expr, as_expr, const
from kedge.compiler.tir.simplify import simplify, simplify_dim
from kedge.compiler.tir.stmt import Buffer, For, If, PrimFunc, Seq, Stmt

#: Structs of kedge.h.
KERNEL = "{ i64, ptr, ptr, i64, ptr, i32, i32 }"
LAUNCH = "{ i64, ptr, [3 x i64], [3 x i64], ptr }"


def emit_host(
    func: PrimFunc, body: Stmt, code: str, features: Sequence[str], target: Target, symbol: str
) -> tuple[str, Dim, tuple[str, ...]]:
    """LLVM IR of the function `symbol`, the bytes of workspace it needs, and the symbols of its kernels.

    `body` is what `split_launches` gave, `code` the text that holds all its kernels, `features` what they need.
    """
    module = ModuleBuilder(target)
    emitter = _HostEmitter(module, symbol)
    params = ["ptr %frame"]
    for number, buffer in enumerate(func.params):
        emitter.pointers[buffer] = Pointer(f"%arg{number}", byte_size(buffer.dtype))
        params.append(f"ptr %arg{number}")
    for number, var in enumerate(func.symbols):
        params.append(f"i64 %arg.s{number}")
        emitter.bind_symbol(var, Value(f"%arg.s{number}", "i64"))
    emitter.place(func.allocs)
    if not (isinstance(emitter.workspace, int) and emitter.workspace == 0):
        params.append("ptr %arg.ws")
    emitter.stmt(body)
    emitter.b.emit("ret i32 0")
    module.add(emitter.b.finish(f"define hidden i32 @{symbol}({', '.join(params)}) {module.attributes}"))
    texts = {"code": code, "features": ",".join(features)} | {
        f"name{i}": one.name for i, one in enumerate(emitter.launches)
    }
    for name, text in texts.items():
        module.add(f"@{symbol}.{name} = private unnamed_addr constant {c_string(text)}")
    for number, launch in enumerate(emitter.launches):
        counts = f"i32 {len(launch.buffers)}, i32 {len(launch.scalars)}"
        module.add(
            f"@{symbol}.k{number} = hidden constant {KERNEL} {{ i64 {size_of(KERNEL)}, ptr @{symbol}.name{number}, "
            f"ptr @{symbol}.code, i64 {len(code.encode())}, ptr @{symbol}.features, {counts} }}"
        )
    kernels = tuple(f"{symbol}.k{number}" for number in range(len(emitter.launches)))
    return module.text(), emitter.workspace, kernels


class _HostEmitter(ExprEmitter):
    """Loops and conditions of the host, and launches."""

    def __init__(self, module: ModuleBuilder, symbol: str) -> None:
        super().__init__(FunctionBuilder(module))
        self.symbol = symbol
        self.workspace: Dim = 0
        self.launches: list[Launch] = []

    def place(self, buffers: Sequence[Buffer]) -> None:
        """Give every array of global memory its part of the workspace."""
        for buffer in buffers:
            if buffer.scope != "global":
                continue
            size: Expr = const(byte_size(buffer.dtype))
            for dim in buffer.shape:
                size = Binary("mul", size, as_expr(dim))
            size = simplify(Binary("mul", Binary("floordiv", Binary("add", size, const(63)), const(64)), const(64)))
            at = self.materialize(self.index(as_expr(self.workspace)))
            ref = self.b.result(f"getelementptr i8, ptr %arg.ws, {at.typed}", "ptr").ref
            self.pointers[buffer] = Pointer(ref, 64)
            self.workspace = simplify_dim(Binary("add", as_expr(self.workspace), size))

    def stmt(self, stmt: Stmt) -> None:
        """Emit a statement of the host."""
        match stmt:
            case Seq(stmts=stmts):
                for one in stmts:
                    self.stmt(one)
            case For():
                self.loop(stmt)
            case If():
                self.condition(stmt)
            case Launch():
                self.launch(stmt)
            case _:
                raise CodegenError(f"internal error: {type(stmt).__name__} among the host's statements")

    def loop(self, loop: For) -> None:
        b = self.b
        end = self.materialize(self.index(loop.extent))
        before, header, inside, done = b.block, b.fresh("loop"), b.fresh("body"), b.fresh("done")
        b.jump(header)
        b.label(header)
        counter = Value(f"%{b.fresh('i')}", b.index_type)
        at = len(b.lines)
        b.lines.append("")  # the phi, once the last block is known
        b.branch(b.compare("icmp slt", counter, end), inside, done)
        b.label(inside)
        self.env[loop.var] = Linear.atom(counter)
        self.known[counter] = (0, None)
        with self.scope():
            self.stmt(loop.body)
        following = b.op("add nuw nsw", counter, b.index(1))
        b.lines[at] = (
            f"  {counter.ref} = phi {counter.type} [ 0, %{before} ], [ {following.ref}, %{b.block} ]"
        )  # fmt: skip
        b.jump(header)
        b.label(done)

    def condition(self, stmt: If) -> None:
        b = self.b
        yes, no, done = b.fresh("then"), b.fresh("else"), b.fresh("join")
        b.branch(self.value(stmt.condition), yes, no)
        for label, part in ((yes, stmt.then), (no, stmt.orelse)):
            b.label(label)
            if part is not None:
                with self.scope():
                    self.stmt(part)
            b.jump(done)
        b.label(done)

    def launch(self, launch: Launch) -> None:
        """Fill in a `kedge_launch` and hand it to the runtime; its failure is the function's."""
        b = self.b
        number = len(self.launches)
        self.launches.append(launch)
        count = len(launch.buffers) + len(launch.scalars)
        args, record = f"%{b.fresh('args')}", f"%{b.fresh('launch')}"
        b.emit_entry(f"{args} = alloca [{max(count, 1)} x i64], align 8")
        b.emit_entry(f"{record} = alloca {LAUNCH}, align 8")
        values = [b.convert("ptrtoint", Value(self._pointer(one).ref, "ptr"), "i64") for one in launch.buffers]
        values += [self._widen(self.materialize(self.index(var))) for var in launch.scalars]
        for position, value in enumerate(values):
            slot = b.result(f"getelementptr inbounds i64, ptr {args}, i32 {position}", "ptr")
            b.emit(f"store {value.typed}, ptr {slot.ref}, align 8")
        self.set_field(record, "i32 0", f"i64 {size_of(LAUNCH)}")
        self.set_field(record, "i32 1", f"ptr @{self.symbol}.k{number}")
        for axis in range(3):
            groups = self._widen(self.materialize(self.index(launch.grid[axis])))
            self.set_field(record, f"i32 2, i32 {axis}", groups.typed)
            self.set_field(record, f"i32 3, i32 {axis}", f"i64 {launch.block[axis]}")
        self.set_field(record, "i32 4", f"ptr {args}")
        call_runtime(b, "%frame", "launch", f"ptr {record}")

    def set_field(self, record: str, path: str, value: str) -> None:
        slot = self.b.result(f"getelementptr inbounds {LAUNCH}, ptr {record}, i32 0, {path}", "ptr")
        self.b.emit(f"store {value}, ptr {slot.ref}, align 8")
