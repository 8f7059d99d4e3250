"""Loops over threads become launches: which kernels run, over what grid, and what one thread of each does.

Loops that are bound to one axis become one variable, the thread's position. What stands outside of some axis's loops
is done by the axis's first thread, and by all of them where it writes their private memory. So this nest, in which
one loop over threads is inside another of the same axis,

    for i in thread(16, 'threadIdx.x'):                  x = threadIdx.x
      for k in range(8):                                 for k in range(8):
        for c in thread(16, 'threadIdx.x'):       ->       tile[x] = a[k * 16 + x]
          tile[c] = a[k * 16 + c]                          barrier
        for j in range(16): y[i] += tile[j]                for j in range(16): y[x] += tile[j]
                                                           barrier

fetches the tile with all threads: the inner loop does not depend on the outer one (`bind` sees to that), so that what
every outer iteration would do over again is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kedge.compiler.codegen.coverage import written_before_read
from kedge.compiler.codegen.gpu.barriers import Unit, place_barriers
from kedge.compiler.codegen.gpu.ir import (
    GROUP_AXES,
    THREAD_AXES,
    Launch,
    buffers_of,
    exprs,
    used_vars,
    walk,
)
from kedge.compiler.codegen.gpu.shrink import shrink_arrays
from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.expr import Call, Const, Expr, Var, const, eq
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import over, simplify, simplify_stmt
from kedge.compiler.tir.stmt import Buffer, For, If, Seq, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt, map_stmt_exprs, seq, substitute_expr

#: Scopes of which every thread has its own.
PRIVATE = frozenset({"local", "register"})


def split_launches(body: Stmt, name: str, func: str) -> Stmt:
    """`body` (without blocks) as the host runs it: loops and conditions of the host around `Launch` statements.

    Kernels are called after `name`; messages speak of function `func`.

    Raises:
        CodegenError: a loop is on no axis of threads, or groups would have to wait for one another.
    """
    return _Host(name, func).stmt(body, ())


@dataclass(slots=True)
class _Host:
    name: str
    func: str
    count: int = 0
    homes: dict[Buffer, int] = field(default_factory=dict)

    def stmt(self, stmt: Stmt, around: tuple[For, ...]) -> Stmt:
        """`stmt` as the host runs it, inside its loops `around`."""
        match stmt:
            case For(kind="thread"):
                return self.launch(stmt, around)
            case Seq(stmts=stmts):
                return Seq(tuple(self.stmt(one, around) for one in stmts))
            case Store():
                return self.launch(stmt, around)
            case For() if _has_threads(stmt):
                return replace(stmt, kind="serial", body=self.stmt(stmt.body, (*around, stmt)))
            case If() if not any(True for _ in loads(stmt.condition)) and (_has_threads(stmt) or _is_flat(stmt)):
                orelse = None if stmt.orelse is None else self.stmt(stmt.orelse, around)
                return replace(stmt, then=self.stmt(stmt.then, around), orelse=orelse)
            case For(var=var, kind=kind):
                hint = f'sch.bind({var.name}, "blockIdx.x")'
                if kind == "parallel":
                    hint = f'sch.bind({var.name}, "blockIdx.x") in place of sch.parallel({var.name}), in a new Schedule'
                raise CodegenError(
                    f"{self.func}: in the nest of loop {var.name!r} that computes {_written(stmt)}, no loop is bound "
                    "to threads, and a GPU runs nothing else",
                    hint=hint,
                )
        assert isinstance(stmt, If)
        raise CodegenError(
            f"{self.func}: {_written(stmt)} is computed under the condition {print_expr(stmt.condition)} on values in "
            "memory, which only threads can read",
            hint="bind a loop outside of the condition",
        )

    def launch(self, stmt: Stmt, around: tuple[For, ...]) -> Launch:
        number = self.count
        self.count += 1
        outer = {loop.var: over(loop.extent) for loop in around}
        for buffer in buffers_of(stmt):
            if buffer.scope == "global":
                continue
            once = For(Var("launch"), const(1), "serial", stmt)
            elsewhere = self.homes.setdefault(buffer, number) != number
            if elsewhere or (around and not written_before_read(once, buffer, outer)):
                raise CodegenError(
                    f"{self.func}: buffer {buffer.name!r} in {buffer.scope} scope does not last from one kernel to "
                    "the next",
                    hint="put all that uses it under one loop bound to blockIdx, or, for the block that writes it, "
                    'sch.set_scope(block, "global")',
                )
        return _Kernel(self.func, stmt).launch(f"{self.name}_{number}" if number else self.name)


def _has_threads(stmt: Stmt) -> bool:
    return any(isinstance(each, For) and each.kind == "thread" for each in walk(stmt))


def _written(stmt: Stmt) -> str:
    """The buffers that a nest writes, as messages name them."""
    return ", ".join(dict.fromkeys(repr(each.buffer.name) for each in walk(stmt) if isinstance(each, Store)))


def _is_flat(stmt: Stmt) -> bool:
    return not any(isinstance(each, For) for each in walk(stmt))


@dataclass(slots=True)
class _Kernel:
    """One launch in the making."""

    func: str
    nest: Stmt
    loops: dict[str, list[For]] = field(default_factory=dict)
    axes: dict[str, Var] = field(default_factory=dict)
    extents: dict[str, Expr] = field(default_factory=dict)

    def launch(self, name: str) -> Launch:
        """The launch under the kernel's `name`."""
        for loop in (each for each in walk(self.nest) if isinstance(each, For) and each.kind == "thread"):
            assert loop.thread is not None
            self.loops.setdefault(loop.thread, []).append(loop)
        for axis, loops in self.loops.items():
            self.axes[axis] = Var(axis.replace(".", "_"))
            self.extents[axis] = self.size(axis, loops)
        ranges = {var: over(self.extents[axis]) for axis, var in self.axes.items()}
        units = self.body(self.nest, _Here({}, {}, {}, ()))
        body = simplify_stmt(place_barriers(units, self.axes), ranges)
        inner = {each.var for each in walk(body) if isinstance(each, For)}
        fixed = frozenset(var for var in used_vars(body) if var not in inner)
        in_group = fixed - self.position()
        body = shrink_arrays(body, {"shared": in_group, "local": fixed, "register": fixed}, ranges)
        touched = buffers_of(body)
        in_global = tuple(b for b in touched if b.scope == "global")
        for buffer in touched:
            if buffer.scope != "global" and not all(isinstance(dim, int) for dim in buffer.shape):
                raise CodegenError(
                    f"{self.func}: buffer {buffer.name!r} in {buffer.scope} scope has no constant size, as a GPU needs",
                    hint="cache in a loop whose part is constant: outer, inner = sch.split(loop, [None, 8]), then "
                    "sch.cache_read, sch.cache_write or sch.compute_at at outer",
                )
        sizes = [self.extents.get(axis, const(1)) for axis in (*GROUP_AXES, *THREAD_AXES)]
        threads = [int(size.value) for size in sizes[3:] if isinstance(size, Const)]
        positions = set(self.axes.values())
        needed = dict.fromkeys(var for size in sizes[:3] for var in free_vars(size))
        return Launch(
            name,
            (sizes[0], sizes[1], sizes[2]),
            (threads[0], threads[1], threads[2]),
            dict(self.axes),
            body,
            tuple(b for b in touched if b.scope == "shared"),
            tuple(b for b in touched if b.scope in PRIVATE),
            in_global,
            tuple(var for var in dict.fromkeys((*used_vars(body), *needed)) if var not in positions),
        )

    def position(self) -> frozenset[Var]:
        """The variables that differ between threads of one group."""
        return frozenset(var for axis, var in self.axes.items() if axis in THREAD_AXES)

    def size(self, axis: str, loops: list[For]) -> Expr:
        """The extent of an axis: the largest of its loops."""
        if axis in THREAD_AXES:
            for loop in loops:
                if not isinstance(loop.extent, Const):
                    raise CodegenError(
                        f"{self.func}: loop {loop.var.name!r} over {axis} has no constant extent",
                        hint=f"in a new Schedule: outer, inner = sch.split({loop.var.name}, [None, 256]); "
                        f'sch.bind(outer, "blockIdx.x"); sch.bind(inner, "{axis}")',
                    )
            return const(max(int(loop.extent.value) for loop in loops if isinstance(loop.extent, Const)))
        if axis not in GROUP_AXES:
            return const(1)
        first = loops[0]
        for other in loops[1:]:
            if expr_key(simplify(other.extent)) != expr_key(simplify(first.extent)):
                raise CodegenError(
                    f"{self.func}: loops {first.var.name!r} and {other.var.name!r} over {axis} differ in extent",
                    hint="a launch has one grid: make separate nests of them",
                )
        if any(var in self.bound() for var in free_vars(first.extent)):
            others = ", ".join(repr(var.name) for var in free_vars(first.extent) if var in self.bound())
            raise CodegenError(
                f"{self.func}: the extent {print_expr(first.extent)} of loop {first.var.name!r}, bound to {axis}, "
                f"differs from iteration to iteration of loop {others}, and a launch has one grid",
                hint=f"leave loop {first.var.name!r} serial and bind loop {others} only",
            )
        return first.extent

    def bound(self) -> set[Var]:
        """The variables of loops inside the launch."""
        return {each.var for each in walk(self.nest) if isinstance(each, For)}

    # The body of one thread -------------------------------------------------------------------------------------

    def body(self, stmt: Stmt, here: _Here) -> Stmt:
        """`stmt` in terms of the thread's position, its stores as units that say who runs them."""
        match stmt:
            case Seq(stmts=stmts):
                return Seq(tuple(self.body(one, here) for one in stmts))
            case Store():
                return self.unit(map_stmt(stmt, expr=here.substitute), here)
            case For(kind="thread"):
                return self.thread_loop(stmt, here)
            case For():
                loop = map_stmt_exprs(stmt, here.substitute)
                assert isinstance(loop, For)
                return replace(loop, body=self.body(stmt.body, here))
            case If():
                return self.condition(stmt, here)
        raise CodegenError(f"internal error: {type(stmt).__name__} in a kernel for a GPU")

    def thread_loop(self, loop: For, here: _Here) -> Stmt:
        axis = loop.thread
        assert axis is not None
        if axis not in GROUP_AXES and axis not in THREAD_AXES:  # virtual threads: one after the other
            inner = self.body(loop.body, here)
            return replace(
                loop, kind="unrolled" if isinstance(loop.extent, Const) else "serial", thread=None, body=inner
            )
        position, outer = self.axes[axis], here.owners.get(axis)
        if outer is not None and (outer.var in used_vars(loop.body) or _uses(here.conditions, position)):
            raise CodegenError(
                f"{self.func}: loop {loop.var.name!r}, bound to {axis}, is inside loop {outer.var.name!r}, bound to "
                "it, too, and is not the same in all iterations of that",
                hint="in a new Schedule, bind one of them to another axis, or sch.fuse the two before sch.bind",
            )
        guards = {key: guard for key, guard in here.guards.items() if key != axis}
        size = self.extents[axis]
        if isinstance(size, Const) and isinstance(loop.extent, Const) and loop.extent.value < size.value:
            guards[axis] = position < loop.extent
        values = {**here.values, loop.var: position}
        return self.body(loop.body, _Here(values, {**here.owners, axis: loop}, guards, here.conditions))

    def condition(self, stmt: If, here: _Here) -> Stmt:
        condition = here.substitute(stmt.condition)
        if any(True for _ in loads(condition)):
            if _has_threads(stmt):
                raise CodegenError(
                    f"{self.func}: the condition {print_expr(stmt.condition)} on values in memory decides whether a "
                    f"loop over threads runs, which computes {_written(stmt)}",
                    hint="bind loops outside of the condition, and leave those inside serial",
                )
            return self.unit(map_stmt(stmt, expr=here.substitute), here)
        then = self.body(stmt.then, here.where(condition))
        if stmt.orelse is None:
            return then
        return seq(then, self.body(stmt.orelse, here.where(Call("not", (condition,), "bool"))))

    def unit(self, stmt: Stmt, here: _Here) -> Unit:
        """A store (or what hangs on data) with its owners, and the conditions under which a thread runs it."""
        stored = [each for each in walk(stmt) if isinstance(each, Store)]
        scopes = {store.buffer.scope for store in stored}
        written = [each for each in stored if each.buffer.scope not in PRIVATE]
        owners: list[tuple[str, object]] = []
        guards = [*here.guards.values(), *here.conditions]
        for axis, position in self.axes.items():
            if axis not in GROUP_AXES and axis not in THREAD_AXES:
                continue
            loop = here.owners.get(axis)
            own = scopes <= PRIVATE or (axis in GROUP_AXES and "global" not in scopes)
            if own:  # each thread, or each group, has an array of its own
                owners.append((axis, "all" if loop is None else loop))
            elif loop is not None and all(_uses(store.indices, position) for store in written):
                owners.append((axis, loop))
            else:
                self.check_alike(stmt, stored, position, loop, here.conditions)
                owners.append((axis, "first"))
                guards = [guard for guard in guards if not _uses((guard,), position)]
                if not _is_one(self.extents[axis]):
                    guards.append(eq(position, 0))
        return Unit(stmt, tuple(owners), tuple(guards))

    def check_alike(
        self, stmt: Stmt, written: list[Store], position: Var, loop: For | None, conditions: tuple[Expr, ...]
    ) -> None:
        """Refuse if threads of an axis would store different values to one element, or only one what is each one's."""
        private = next((store.buffer for store in written if store.buffer.scope in PRIVATE), None)
        if private is not None:
            raise CodegenError(
                f"{self.func}: under a condition on values in memory, {private.name!r} in {private.scope} scope, of "
                "which each thread has its own, is written together with what all threads share",
                hint="write the two in blocks of their own",
            )
        if loop is None:
            return
        depends = any(_uses((node,), position) for each in walk(stmt) for node in exprs(each) if isinstance(node, Var))
        if depends or _uses(conditions, position):
            raise CodegenError(
                f"{self.func}: threads of loop {loop.var.name!r}, bound to {loop.thread}, write the same element of "
                f"{written[0].buffer.name!r}",
                hint=f"leave loop {loop.var.name!r} serial, and bind loops over the dims of {written[0].buffer.name!r}",
            )


def _uses(found: tuple[Expr, ...], var: Var) -> bool:
    return any(var in free_vars(expr) for expr in found)


def _is_one(size: Expr) -> bool:
    return isinstance(size, Const) and size.value == 1


@dataclass(frozen=True, slots=True)
class _Here:
    """What holds at a place: values of variables, the innermost loop of each axis and its guard, conditions."""

    values: Mapping[Var, Expr]
    owners: Mapping[str, For]
    guards: Mapping[str, Expr]
    conditions: tuple[Expr, ...]

    def substitute(self, expr: Expr) -> Expr:
        """`expr` in terms of the thread's position."""
        return substitute_expr(expr, self.values)

    def where(self, condition: Expr) -> _Here:
        """The same place under one more condition."""
        return replace(self, conditions=(*self.conditions, condition))
