"""Parallel loops: the body becomes a function of a range of iterations, which the runtime's thread pool calls.

i32 kernel.loop.body(captured…, i64 begin, i64 end)      the iterations [begin, end)
i32 kernel.loop(ptr closure, i64 begin, i64 end)         kedge.h's `kedge_loop_body`, which takes the closure apart
"""

from __future__ import annotations

from collections.abc import Callable

from kedge.compiler.codegen.affine import Linear
from kedge.compiler.codegen.alloc import Alloc, statements_of
from kedge.compiler.codegen.builder import FunctionBuilder, ModuleBuilder, Value
from kedge.compiler.codegen.expr import ExprEmitter
from kedge.compiler.tir.expr import Dim, Expr, Load, Var
from kedge.compiler.tir.stmt import Buffer, For, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, stmt_exprs, walk_expr

#: Struct layouts of kedge.h, as far as compiled code reads them.
FRAME = "{ i64, ptr, ptr, ptr, ptr, ptr, ptr, ptr, ptr, ptr }"
API = "{ i64, ptr, ptr, ptr, ptr, ptr }"
FRAME_FIELDS = {"api": 1, "inputs": 3, "outputs": 4, "symbols": 5, "arena": 6, "weights": 7, "cancel": 8, "marks": 9}
API_FIELDS = {"parallel_for": 1, "parallel_for_dynamic": 2, "launch": 3, "fail": 4, "mark": 5}


def call_runtime(b: FunctionBuilder, frame: str, member: str, args: str) -> None:
    """Call a member of `kedge_runtime_api` with the frame and `args`; its failure is the function's."""
    api_slot = b.result(f"getelementptr inbounds {FRAME}, ptr {frame}, i32 0, i32 {FRAME_FIELDS['api']}", "ptr")
    api = b.result(f"load ptr, ptr {api_slot.ref}", "ptr")
    slot = b.result(f"getelementptr inbounds {API}, ptr {api.ref}, i32 0, i32 {API_FIELDS[member]}", "ptr")
    function = b.result(f"load ptr, ptr {slot.ref}", "ptr")
    status = b.result(f"call i32 {function.ref}(ptr {frame}, {args})", "i32")
    failed, go_on = b.fresh("failed"), b.fresh("ok")
    b.branch(b.compare("icmp ne", status, b.const(0, "i32")), failed, go_on)
    b.label(failed)
    b.emit(f"ret {status.typed}")
    b.label(go_on)


class _Uses:
    """What a statement uses from around it: variables it does not bind, and buffers it does not allocate."""

    def __init__(self, stmt: Stmt) -> None:
        used: dict[Var, None] = {}
        bound: set[Var] = set()
        buffers: dict[Buffer, None] = {}
        own: set[Buffer] = set()
        todo = [stmt]
        while todo:
            one = todo.pop()
            todo.extend(statements_of(one))
            if isinstance(one, For):
                bound.add(one.var)
            elif isinstance(one, Alloc):
                own.add(one.buffer)
            elif isinstance(one, Store):
                buffers[one.buffer] = None
            exprs = () if isinstance(one, Alloc) else stmt_exprs(one)
            for node in (node for expr in exprs for node in walk_expr(expr)):
                if isinstance(node, Load):
                    buffers[node.buffer] = None
                elif isinstance(node, Var):
                    used[node] = None
        dims = (dim for buffer in buffers for dim in buffer.shape if isinstance(dim, Expr))
        used |= dict.fromkeys(var for dim in dims for var in free_vars(dim))
        self.free = tuple(var for var in used if var not in bound)
        self.buffers = tuple(buffer for buffer in buffers if buffer not in own)


class ParallelEmitter(ExprEmitter):
    """Emits parallel loops; a kernel's emitter says what their statements become."""

    def __init__(self, module: ModuleBuilder, symbol: str) -> None:
        super().__init__(FunctionBuilder(module))
        self.module = module
        self.symbol = symbol
        self.frame = ""
        self.workspace_pointer = ""
        self.workspace: Dim = 0
        self.parallel: Expr | None = None  # iterations of the parallel loop around, where there is one
        self.first_iteration: Linear | None = None  # of those that this function runs

    def stmt(self, stmt: Stmt) -> None:
        """Emit a statement."""
        raise NotImplementedError

    def iteration(self, loop: For) -> None:
        """Emit the body of a loop, and what an iteration asks for ahead."""
        raise NotImplementedError

    def serial(
        self, var: Var, extent: Linear, body: Callable[[], None], start: Linear | None = None, *, as_it_is: bool = False
    ) -> None:
        """Emit `for var in [start, extent)`; one that stays `as_it_is` is not unrolled by LLVM."""
        raise NotImplementedError

    def parallel_loop(self, loop: For, extent: Linear) -> None:
        """Outline the body as a function of a range of iterations, and hand it to the runtime's thread pool."""
        uses = _Uses(loop.body)
        captured = [var for var in uses.free if var in self.env and self.env[var].value is None]
        buffers = [buffer for buffer in uses.buffers if buffer in self.pointers]
        values = [self.materialize(self.env[var]) for var in captured]
        pointers = [Value(self.pointers[b].ref, "ptr") for b in buffers] + [Value(self.frame, "ptr")]
        if self.workspace_pointer:
            pointers.append(Value(self.workspace_pointer, "ptr"))
        fields = [*pointers, *values]
        struct = f"{{ {', '.join(f.type for f in fields)} }}"
        name = f"{self.symbol}.loop{self.b.fresh('')}"
        self._outline(name, struct, loop, extent, buffers, captured, fields)
        count = self._widen(self.materialize(extent))
        dynamic = loop.annotations.get("schedule") == "dynamic"
        chunk = loop.annotations["chunk"] if dynamic else None
        grain = loop.annotations.get("grain")
        if grain is None:
            self._call_pool(name, struct, fields, count, chunk)
        else:
            self._call_from(grain, name, struct, fields, count, chunk)

    def _call_from(
        self, grain: int, name: str, struct: str, fields: list[Value], count: Value, chunk: int | None
    ) -> None:
        """The pool where there are `grain` iterations or more, else the body itself on this thread."""
        b = self.b
        few, many, done = b.fresh("few"), b.fresh("many"), b.fresh("done")
        b.branch(b.compare("icmp slt", count, b.const(grain, "i64")), few, many)
        b.label(few)
        b.call(f"{name}.body", Value("", "i32"), [*fields, b.const(0, "i64"), count])
        b.jump(done)
        b.label(many)
        self._call_pool(name, struct, fields, count, chunk)
        b.jump(done)
        b.label(done)

    def _call_pool(self, name: str, struct: str, fields: list[Value], count: Value, chunk: int | None) -> None:
        """The runtime's parallel_for; with a chunk, its parallel_for_dynamic."""
        b = self.b
        closure = f"%{b.fresh('closure')}"
        b.emit_entry(f"{closure} = alloca {struct}, align 8")
        for number, field in enumerate(fields):
            slot = b.result(f"getelementptr inbounds {struct}, ptr {closure}, i32 0, i32 {number}", "ptr")
            b.emit(f"store {field.typed}, ptr {slot.ref}")
        args = f"ptr @{name}, ptr {closure}, {count.typed}"
        if chunk is None:
            call_runtime(b, self.frame, "parallel_for", args)
        else:
            call_runtime(b, self.frame, "parallel_for_dynamic", f"{args}, i64 {chunk}")

    def _outline(
        self, name: str, struct: str, loop: For, extent: Linear, buffers: list[Buffer], captured: list[Var],
        fields: list[Value],
    ) -> None:  # fmt: skip
        inner = type(self)(self.module, self.symbol)
        inner.parallel, inner.workspace, inner.ranges = loop.extent, self.workspace, dict(self.ranges)
        for var, form in self.env.items():
            if form.value is not None:
                inner.env[var] = form
        params = [f"{f.type}{' noalias' if f.type == 'ptr' else ''} %arg.c{i}" for i, f in enumerate(fields)]
        for number, buffer in enumerate(buffers):
            inner.pointers[buffer] = self.pointers[buffer]._replace(ref=f"%arg.c{number}", private=False)
        inner.frame = f"%arg.c{len(buffers)}"
        if self.workspace_pointer:
            inner.workspace_pointer = f"%arg.c{len(buffers) + 1}"
        first = len(fields) - len(captured)
        for number, var in enumerate(captured):
            value = Value(f"%arg.c{first + number}", fields[first + number].type)
            inner.env[var] = Linear.atom(value)
            inner.known[value] = self.env[var].bounds(self.known)
        begin = inner.b.convert("trunc", Value("%arg.begin", "i64"), inner.b.index_type)
        end = inner.b.convert("trunc", Value("%arg.end", "i64"), inner.b.index_type)
        inner.known[begin] = (0, None)
        inner.known[end] = (0, extent.bounds(self.known)[1])
        inner.run_parallel(loop, Linear.atom(begin), Linear.atom(end))
        self.workspace = inner.workspace
        inner.b.emit("ret i32 0")
        types = ", ".join([*params, "i64 %arg.begin", "i64 %arg.end"])
        # Called once, it is a part of the function that takes the closure apart; LLVM spills less there.
        placing = "alwaysinline " if loop.annotations.get("grain") is None else ""
        head = f"define internal i32 @{name}.body({types}) {placing}{self.module.attributes}"
        self.module.add(inner.b.finish(head))
        self.module.add(self._trampoline(name, struct, fields))

    def run_parallel(self, loop: For, begin: Linear, end: Linear) -> None:
        """The iterations [begin, end) of a parallel loop, in this function."""
        self.first_iteration = begin
        self.serial(loop.var, end, lambda: self.iteration(loop), start=begin)

    def _trampoline(self, name: str, struct: str, fields: list[Value]) -> str:
        """`kedge_loop_body`: takes the closure apart. The body's pointers are arguments, so they do not alias."""
        b = FunctionBuilder(self.module)
        loaded = []
        for number, field in enumerate(fields):
            slot = b.result(f"getelementptr inbounds {struct}, ptr %closure, i32 0, i32 {number}", "ptr")
            loaded.append(b.result(f"load {field.type}, ptr {slot.ref}", field.type))
        args = [*loaded, Value("%begin", "i64"), Value("%end", "i64")]
        status = b.call(f"{name}.body", Value("", "i32"), args)
        b.emit(f"ret {status.typed}")
        head = f"define internal i32 @{name}(ptr %closure, i64 %begin, i64 %end) {self.module.attributes}"
        return b.finish(head)
