"""A scheduled `PrimFunc` as one native kernel.

    i32 kernel(ptr frame, ptr noalias arg0, …, i64 symbol0, …, ptr workspace)

Arguments are the function's parameters in order. The workspace is there only if the kernel needs one; its size is an
expression over the function's symbols. The result is a `kedge_status`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kedge.compiler.codegen.address import NotVectorizable, Pointer
from kedge.compiler.codegen.affine import LANE, Interval, Linear
from kedge.compiler.codegen.alloc import Alloc, Prefetch, same_shape, statements_of
from kedge.compiler.codegen.builder import ModuleBuilder, Value
from kedge.compiler.codegen.parallel import ParallelEmitter
from kedge.compiler.codegen.prefetch import prefetches, spread
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.codegen.runs import in_runs
from kedge.compiler.codegen.split import split_loops
from kedge.compiler.codegen.tensor import EMITTERS
from kedge.compiler.codegen.together import MAX_UNROLL, Together, together
from kedge.compiler.codegen.turned import turned
from kedge.compiler.codegen.types import byte_size, scalar_type
from kedge.compiler.codegen.unread import writes_freely
from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.intrinsics import INTRINSICS, nest_of
from kedge.compiler.target.model import Target
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, Lead, Load, Var, as_expr, const
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier, conjuncts, over, simplify, simplify_dim
from kedge.compiler.tir.stmt import Buffer, For, If, PrimFunc, Seq, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, substitute_expr

#: Bits that x86's multiply-adds do in a cycle where shuffles have a unit to themselves, and those of which one or two
#: shuffles put an element into all lanes.
_MOST_FMA_BITS, _SHUFFLED_BITS = 512, 128
#: Private buffers up to this many bytes live on the stack, all of a function's together up to four times as many.
_STACK_BUFFER = 32 * 1024
_MAX_LANES = 64
#: In lines of LLVM IR: the start of a loop, or a vector's type.
_LOOP_OR_VECTOR = re.compile(r"^loop\d+:|<\d+ x ")


@dataclass(frozen=True, slots=True)
class KernelCode:
    """LLVM IR of one kernel: its symbol, and the bytes of workspace it needs (over the function's symbols).

    `scalar_loops`: innermost loops without vectors are left, which LLVM may be able to vectorize.
    """

    symbol: str
    ir: str
    workspace: Dim
    scalar_loops: bool

    @property
    def needs_workspace(self) -> bool:
        """Whether the kernel takes a workspace pointer."""
        return not (isinstance(self.workspace, int) and self.workspace == 0)


def emit_kernel(func: PrimFunc, target: Target, symbol: str) -> KernelCode:
    """The kernel of `func` under the linker symbol `symbol`.

    Raises:
        CodegenError: a dtype or a loop kind that this back end does not have.
    """
    module = ModuleBuilder(target)
    body = prepare(func)
    if target.fma_by_element:
        body = split_loops(body)
    needs = _workspace_buffers(body)
    emitter = KernelEmitter(module, symbol)
    params = ["ptr %frame"]
    emitter.frame = "%frame"
    for number, buffer in enumerate(func.params):
        scalar_type(buffer.dtype)
        emitter.pointers[buffer] = Pointer(f"%arg{number}", byte_size(buffer.dtype))
        params.append(f"ptr noalias %arg{number}")
    for number, var in enumerate(func.sizes):
        params.append(f"i64 %arg.s{number}")
        emitter.bind_symbol(var, Value(f"%arg.s{number}", "i64"))
    leads = [symbol for symbol in func.symbols if isinstance(symbol, Lead)]
    for lead in leads:
        emitter.bind_lead(lead, next(buffer for buffer in func.params if buffer.name == lead.buffer))
    if needs:
        params.append("ptr noalias %arg.ws")
        emitter.workspace_pointer = "%arg.ws"
    emitter.stmt(body)
    emitter.b.emit("ret i32 0")
    head = f"define hidden i32 @{symbol}({', '.join(params)}) {module.attributes}"
    module.add(emitter.b.finish(head))
    most: dict[Var, Expr] = {lead: const(lead.upper or 0) for lead in leads}
    workspace = simplify_dim(substitute_expr(as_expr(emitter.workspace), most))
    if needs and isinstance(workspace, int):
        workspace = max(workspace, 64)  # the pointer is a parameter now, and that is told by the size alone
    return KernelCode(symbol, module.text(), workspace, module.scalar_loops)


def _workspace_buffers(stmt: Stmt) -> bool:
    """Whether some buffer is too large, or of unknown size, for the stack. Mirrors `KernelEmitter._alloc`."""
    total = 0
    todo = [stmt]
    while todo:
        one = todo.pop()
        if isinstance(one, Alloc):
            size = static_bytes(one.buffer)
            if size is None or size > _STACK_BUFFER:
                return True
            total += size
        todo.extend(statements_of(one))
    return total > 4 * _STACK_BUFFER


def static_bytes(buffer: Buffer) -> int | None:
    """Bytes of a buffer, or None where a dim is symbolic."""
    size = byte_size(buffer.dtype)
    for dim in buffer.shape:
        if not isinstance(dim, int):
            return None
        size *= dim
    return size


class KernelEmitter(ParallelEmitter):
    """Emits statements; expressions and the calls of parallel loops come from its bases."""

    def __init__(self, module: ModuleBuilder, symbol: str) -> None:
        super().__init__(module, symbol)
        self._stack_bytes = 0
        self._on_stack: dict[Buffer, Pointer] = {}
        self._in_workspace: dict[Buffer, Dim] = {}  # offsets in bytes
        self._idle: list[Buffer] = []  # those of a branch that is not taken where code is emitted now

    def bind_lead(self, lead: Lead, buffer: Buffer) -> None:
        """Make known how many elements of a cache line lie before a buffer: the low bits of its address tell."""
        size, b = byte_size(buffer.dtype), self.b
        address = b.result(f"ptrtoint ptr {self.pointers[buffer].ref} to i64", "i64")
        offset = b.op("and", address, b.const(size * ((lead.upper or 0) + 1) - 1, "i64"))
        self.bind_symbol(lead, b.op("lshr", offset, b.const(size.bit_length() - 1, "i64")))

    def stmt(self, stmt: Stmt) -> None:
        """Emit a statement."""
        match stmt:
            case Seq(stmts=stmts):
                for child in stmts:
                    self.stmt(child)
            case Store():
                self.store(stmt.buffer, stmt.indices, stmt.value)
            case If():
                self._if(stmt)
            case For():
                self._for(stmt)
            case Alloc():
                self._alloc(stmt)
            case Prefetch():
                self._prefetch(stmt)
            case _:
                raise CodegenError(f"no code for statement {type(stmt).__name__}")

    # Branches ---------------------------------------------------------------------------------------------------

    def _if(self, stmt: If) -> None:
        condition = self.value(stmt.condition)
        if condition.ref in ("true", "false"):
            chosen = stmt.then if condition.ref == "true" else stmt.orelse
            if chosen is not None:
                self.stmt(chosen)
        elif condition.lanes > 1:
            self._masked_if(stmt, condition)
        else:
            self._branch_if(stmt, condition)

    def _masked_if(self, stmt: If, condition: Value) -> None:
        with self.masked(condition):
            self.stmt(stmt.then)
        if stmt.orelse is not None:
            with self.masked(self.b.op("xor", condition, self.b.const(True, "i1"))):
                self.stmt(stmt.orelse)

    def _branch_if(self, stmt: If, condition: Value) -> None:
        b = self.b
        yes, join = b.fresh("then"), b.fresh("join")
        no = b.fresh("else") if stmt.orelse is not None else join
        b.branch(condition, yes, no)
        b.label(yes)
        known = {*self._on_stack, *self._in_workspace}
        with self.scope(), self._limited(stmt.condition):
            self.stmt(stmt.then)
        b.jump(join)
        if stmt.orelse is not None:
            idle = self._idle
            self._idle = [*idle, *(buffer for buffer in (*self._on_stack, *self._in_workspace) if buffer not in known)]
            b.label(no)
            with self.scope():
                self.stmt(stmt.orelse)
            b.jump(join)
            # What was taken over by a version further inside has no memory of its own any more.
            self._idle = [buffer for buffer in idle if buffer in self._on_stack or buffer in self._in_workspace]
        b.label(join)

    @contextmanager
    def _limited(self, condition: Expr) -> Iterator[None]:
        """With what `condition` tells of counters: `i < 24`, as for all tiles of rows but the last one.

        What follows from it, as for quotients of a counter, is not known any more afterwards either.
        """
        limits: dict[Value, Interval] = {}
        for term in conjuncts(condition):
            match term:
                case Binary(op="lt", a=Var() as var, b=Const(value=end)):
                    counter = self.env[var].single
                    if counter is not None and counter not in limits:
                        low, high = self.known.get(counter, (None, None))
                        limits[counter] = (low, int(end) - 1 if high is None else min(high, int(end) - 1))
        before = self.known
        self.known = {**before, **limits} if limits else before
        try:
            yield
        finally:
            self.known = before

    # Loops ------------------------------------------------------------------------------------------------------

    def _for(self, loop: For) -> None:
        extent = self.index(loop.extent)
        self.ranges.pop(loop.var, None)
        self.ranges[loop.var] = over(loop.extent)
        if extent.value == 1:
            self.env[loop.var] = Linear()
            self.stmt(loop.body)
            return
        if extent.value is not None and extent.value <= 0:
            return
        match loop.kind:
            case "unrolled" if extent.value is not None and extent.value <= MAX_UNROLL:
                self._unrolled(loop, extent.value)
            case "vectorized" if self.lanes == 1:
                self._vectorized(loop, extent)
            case "parallel" if self.parallel is None and self.lanes == 1:
                self.parallel_loop(loop, extent)
            case "tensorized":
                self._tensorized(loop)
            case "thread":
                raise CodegenError(
                    f"loop {loop.var.name!r} is bound to {loop.thread}, which a CPU does not have",
                    hint='kedge.compile(sch, target="opencl") or "cuda"; for a CPU, in a new Schedule, '
                    f"sch.parallel({loop.var.name}) in place of sch.bind",
                )
            case _:
                self.serial(loop.var, extent, lambda: self.iteration(loop), as_it_is=self.is_full(loop))

    def is_full(self, loop: For) -> bool:
        """Whether a loop is around a tile of registers as large as they allow: unrolled once more, it would spill."""
        return not self.b.target.memory_operands and _has_unrolled(loop.body)

    def _unrolled(self, loop: For, count: int) -> None:
        outer, outer_turned = self.together, self.turned
        if not outer:
            self.together = self._together(loop)
        if not outer_turned and self.lanes == 1:
            self.turned = turned(loop, self.ranges)
        around = self.runs
        by_runs = in_runs(loop, self.ranges) if self.b.target.arch.name == "armv7l" and not around else ()
        for i in range(count):
            self.env[loop.var] = Linear.of(i)
            if by_runs:
                self.runs = {self.pointers[buffer].ref: None for buffer in by_runs}
            self.iteration(loop)
        self.together, self.turned, self.runs = outer, outer_turned, around

    def _together(self, loop: For) -> dict[Load, Together]:
        """Elements that come in one load, to be taken out of it by multiply-adds or, where loads take longer, shuffles.

        Of x86's cores those that multiply 512 bits by two units shuffle by one of these: they load each element.
        """
        target = self.b.target
        if target.fma_by_element:
            return together(loop, self.ranges, self._vector_lanes(target.vector_bits))
        if target.memory_operands and 0 < target.vector_bits * target.fma_per_cycle <= _MOST_FMA_BITS:
            return together(loop, self.ranges, self._vector_lanes(_SHUFFLED_BITS), vectors_read_once=True)
        return {}

    def _vector_lanes(self, bits: int) -> dict[str, int]:
        """The elements of a vector of so many bits, for each dtype that vectors are multiplied by an element of."""
        dtypes = {"float32": 32} if self.b.target.arch.name == "armv7l" else {"float32": 32, "float64": 64}
        return {dtype: bits // size for dtype, size in dtypes.items()}

    def iteration(self, loop: For) -> None:
        """Emit the body of a loop, and what an iteration asks for ahead."""
        for ahead in prefetches(loop):
            self.stmt(ahead)
        self.stmt(spread(loop))

    def serial(
        self, var: Var, extent: Linear, body: Callable[[], None], start: Linear | None = None, *, as_it_is: bool = False
    ) -> None:
        """`for var in [start, extent)`, tested at the end; in front, too, unless it surely runs.

        One that stays `as_it_is` is not unrolled by LLVM, nor is the kernel left to its vectorizer for it.
        """
        b = self.b
        if not extent.is_uniform:
            raise NotVectorizable
        first = Linear() if start is None else start
        low = (extent - first).bounds(self.known)[0]
        begin, end = self.materialize(first), self.materialize(extent)
        header, done = b.fresh("loop"), b.fresh("done")
        if low is None or low < 1:
            some = b.compare("icmp slt", begin, end)
            enter = b.fresh("enter")
            b.branch(some, enter, done)
            b.label(enter)
        before = b.block
        b.jump(header)
        b.label(header)
        counter = Value(f"%{b.fresh('i')}", b.index_type)
        at = len(b.lines)
        b.lines.append("")  # the phi, once the last block is known
        self.env[var] = Linear.atom(counter)
        floor = first.bounds(self.known)[0]
        top = extent.bounds(self.known)[1]
        self.known[counter] = (floor, None if top is None else top - 1)
        with self.scope():
            body()
        if not as_it_is and not any(_LOOP_OR_VECTOR.search(line) for line in b.lines[at:]):
            self.module.scalar_loops = True
        following = b.op("add nuw nsw", counter, b.index(1))
        b.lines[at] = (
            f"  {counter.ref} = phi {counter.type} [ {begin.ref}, %{before} ], [ {following.ref}, %{b.block} ]"
        )
        b.branch(b.compare("icmp slt", following, end), header, done, as_it_is=as_it_is)
        b.label(done)

    # Vectors ----------------------------------------------------------------------------------------------------

    def _vectorized(self, loop: For, extent: Linear) -> None:
        lanes = extent.value
        if lanes is not None and lanes <= _MAX_LANES:
            self._lanes_or_serial(loop, lanes, Linear())
            return
        # Too many iterations for one vector, or an unknown number: whole vectors, then the rest one by one.
        width = self.b.target.vector_bits // 32
        whole = self._divide("floordiv", extent, Linear.of(width))
        chunk = Var(f"{loop.var.name}_chunk")
        self.serial(chunk, whole, lambda: self._lanes_or_serial(loop, width, self.env[chunk].scaled(width)))
        done = whole.scaled(width)
        if (extent - done).value != 0:
            # Too few to be worth vectors of LLVM's, or copies of the body.
            self.serial(loop.var, extent, lambda: self.stmt(loop.body), start=done, as_it_is=True)

    def _lanes_or_serial(self, loop: For, lanes: int, base: Linear) -> None:
        """Iterations [base, base + lanes), all at once or else one after the other."""
        if not self._all_lanes(loop, lanes, base):
            self.serial(loop.var, base + Linear.of(lanes), lambda: self.stmt(loop.body), start=base)

    def _all_lanes(self, loop: For, lanes: int, base: Linear) -> bool:
        """Emit the body once for all lanes; on failure take back what was emitted."""
        b = self.b
        kept = (len(b.lines), b.block, dict(self.env))
        self.env[loop.var] = base + Linear.atom(LANE)
        self.known[LANE] = (0, lanes - 1)
        self.lanes = lanes
        try:
            with self.scope(straight=True):
                self.stmt(loop.body)
        except NotVectorizable:
            del b.lines[kept[0] :]
            _, b.block, self.env = kept
            return False
        finally:
            self.lanes = 1
        return True

    # Instructions on tiles --------------------------------------------------------------------------------------

    def _tensorized(self, loop: For) -> None:
        """The instruction that computes the nest, on the addresses of its first elements."""
        intrin = INTRINSICS[loop.annotations["intrin"]]
        target = self.b.target
        missing = sorted(feature for feature in intrin.features if not target.has(feature))
        if target.arch.name != intrin.arch or missing:
            needs = ", ".join(missing) or intrin.arch
            raise CodegenError(
                f"loop {loop.var.name!r} is computed by {intrin.name}, which {target} does not have ({needs})",
                hint=f"compile for a target with it (-mattr=+{missing[0]})" if missing else "schedule for this target",
            )
        loops, store = nest_of(loop)
        operands = intrin.operands(store) if isinstance(store, Store) else None
        if operands is None:
            raise CodegenError(f"internal error: loop {loop.var.name!r} is no {intrin.name}")
        for each in loops:
            self.env[each.var] = Linear()
        places = {}
        for buffer, load in operands.items():
            position = self.offset(load.buffer, load.indices)
            memory = scalar_type(load.buffer.dtype).memory
            places[buffer.name] = self._address(self._pointer(load.buffer), memory, position)
        EMITTERS[intrin.name](self.b, places)

    def _prefetch(self, stmt: Prefetch) -> None:
        """For reading, into the second cache: the first has too few places for what is far ahead.

        The address is no `inbounds` one: it may be past the end of the buffer.
        """
        position = self.offset(stmt.buffer, stmt.indices)
        if not position.is_uniform:
            raise NotVectorizable
        memory, at = scalar_type(stmt.buffer.dtype).memory, self.materialize(position)
        base = self._pointer(stmt.buffer).ref
        address = self.b.result(f"getelementptr {memory}, ptr {base}, {at.typed}", "ptr")
        self.b.module.declare("llvm.prefetch.p0", "void @(ptr, i32, i32, i32)")
        self.b.emit(f"call void @llvm.prefetch.p0({address.typed}, i32 0, i32 2, i32 1)")

    # Buffers ----------------------------------------------------------------------------------------------------

    def _alloc(self, stmt: Alloc) -> None:
        """A buffer's life. All copies of it in a function, as in an unrolled loop, get the same memory in turn."""
        buffer = stmt.buffer
        if self.lanes > 1:
            raise NotVectorizable
        if buffer in self._idle:  # this branch has it, too
            self._idle.remove(buffer)
        if buffer not in self._on_stack and buffer not in self._in_workspace:
            self._reserve(buffer)
        self.pointers[buffer] = self._on_stack.get(buffer) or self._workspace(buffer)
        if buffer.scope == "register" and writes_freely(stmt):
            self.written_freely.add(buffer)
        self.stmt(stmt.body)
        self.written_freely.discard(buffer)

    def _reserve(self, buffer: Buffer) -> None:
        """Give the buffer memory: that of one like it which is not in use, or on the stack if it fits, or workspace."""
        if self._takes_over(buffer):
            return
        size = static_bytes(buffer)
        if size is not None and size <= _STACK_BUFFER and self._stack_bytes + size <= 4 * _STACK_BUFFER:
            self._stack_bytes += size
            memory = scalar_type(buffer.dtype).memory
            align = max(self.b.target.vector_bits // 8, 16)
            name = f"%{self.b.fresh('buf')}"
            count = max(1, size // byte_size(buffer.dtype))
            self.b.emit_entry(f"{name} = alloca [{count} x {memory}], align {align}")
            self._on_stack[buffer] = Pointer(name, align, private=True)
            return
        if not self.workspace_pointer:
            raise CodegenError(f"internal error: no workspace for buffer {buffer.name!r}")
        total = _rounded_bytes(buffer)
        if self.parallel is not None and self.first_iteration is not None:
            total = Binary("mul", total, self._most_iterations(buffer, self.parallel))
        self._in_workspace[buffer] = self.workspace
        self.workspace = simplify_dim(Binary("add", as_expr(self.workspace), total))

    def _takes_over(self, buffer: Buffer) -> bool:
        """Whether a version of the buffer in the branch before had memory that it can have now.

        Tiles in registers keep apart: LLVM tells them apart by their memory.
        """
        alike = (each for each in self._idle if each.dtype == buffer.dtype and each.scope == buffer.scope)
        other = next((each for each in alike if same_shape(each, buffer)), None)
        if other is None or buffer.scope == "register":
            return False
        self._idle.remove(other)
        places: dict[Buffer, Any] = self._on_stack if other in self._on_stack else self._in_workspace
        places[buffer] = places.pop(other)
        return True

    def _most_iterations(self, buffer: Buffer, extent: Expr) -> Expr:
        """The parallel loop's extent, or the largest it has in any iteration of the loops around."""
        known = Simplifier(self.ranges)
        if any(var in self.ranges for var in free_vars(extent)):
            span, most = known.span(extent, tuple(self.ranges)), known.bounds(extent)[1]
            if span is not None:
                extent = known.expr_of(span[1])
            elif most is not None:
                extent = const(most)
            else:
                raise CodegenError(
                    f"buffer {buffer.name!r} needs a place for each iteration of a parallel loop of "
                    f"{print_expr(extent)} iterations, and no bound of that is known outside of the loops around",
                    hint="make one of those loops parallel instead",
                )
        return extent if known.prove(extent >= 0) else Binary("max", extent, const(0))

    def _workspace(self, buffer: Buffer) -> Pointer:
        """Its place in the workspace; inside a parallel loop that of the first iteration of those that run in turn.

        Each of these fills it anew, and finds it in the cache; the places of the others are never touched.
        """
        offset = self.index(as_expr(self._in_workspace[buffer]))
        if self.parallel is not None and self.first_iteration is not None:
            offset = offset + self._product(self.index(_rounded_bytes(buffer)), self.first_iteration)
        at = self.materialize(offset)
        ref = self.b.result(f"getelementptr inbounds i8, ptr {self.workspace_pointer}, {at.typed}", "ptr").ref
        return Pointer(ref, 64, private=True)


def _has_unrolled(stmt: Stmt) -> bool:
    """Whether there is an unrolled loop in a statement."""
    if isinstance(stmt, For) and stmt.kind == "unrolled":
        return True
    return any(_has_unrolled(child) for child in statements_of(stmt))


def _rounded_bytes(buffer: Buffer) -> Expr:
    """Bytes of a buffer, up to whole cache lines."""
    size: Expr = const(byte_size(buffer.dtype))
    for dim in buffer.shape:
        size = Binary("mul", size, as_expr(dim))
    return simplify(Binary("mul", Binary("floordiv", Binary("add", size, const(63)), const(64)), const(64)))
