"""Where the threads of a group must wait for one another, and how their conditions are put together again.

Threads of one loop do not disturb one another: `bind` refuses that. But one loop's threads may need what another
loop's threads made, and then a barrier must stand between. Each store carries its *owners*: for every axis the loop
whose iterations the threads are, or "first" or "all" where it stands outside of such loops. Two accesses to one
buffer, one of them a store, are safe without a barrier only if their owners are the same.

A barrier must be reached by all threads. So conditions are kept at the stores while barriers are placed, and loops
stay whole; afterwards what neighbours have in common is put around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kedge.compiler.codegen.gpu.counting import counted_apart
from kedge.compiler.codegen.gpu.ir import GROUP_AXES, THREAD_AXES, Barrier, exprs, parts, walk
from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.dependence import keeps_apart
from kedge.compiler.tir.expr import Const, Expr, Load, Var, logical_and
from kedge.compiler.tir.simplify import over
from kedge.compiler.tir.stmt import Buffer, For, If, Seq, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, loads, seq

Owners = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Unit(Stmt):
    """`stmt`, run by its owners where all `guards` hold; no thread waits inside."""

    stmt: Stmt
    owners: Owners
    guards: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class _Touch:
    """One access that no barrier has come after yet, and the loops that went on to another iteration since."""

    buffer: Buffer
    indices: tuple[Expr, ...]
    is_write: bool
    owners: Owners
    crossed: frozenset[Var] = frozenset()


def place_barriers(stmt: Stmt, axes: Mapping[str, Var]) -> Stmt:
    """`stmt`, made of units, with barriers where they are needed and conditions where they belong.

    `axes` are the variables that hold a thread's position. Loops keep their variables.

    Raises:
        CodegenError: a barrier would be needed where not all threads come by, or between groups.
    """
    placer = _Placer(stmt, axes)
    placer.check_groups()
    placed, _ = placer.place(stmt, ())
    return _gather(placed)


def _stores(stmt: Stmt) -> Iterable[Store]:
    for each in _walk(stmt):
        if isinstance(each, Store):
            yield each


def _walk(stmt: Stmt) -> Iterable[Stmt]:
    for each in walk(stmt):
        if isinstance(each, Unit):
            yield from walk(each.stmt)
        else:
            yield each


class _Placer:
    def __init__(self, stmt: Stmt, axes: Mapping[str, Var]) -> None:
        self.stmt = stmt
        self.axes = axes
        self.written = {each.buffer for each in _stores(stmt) if each.buffer.scope in ("global", "shared")}
        self.positions = {var for axis, var in axes.items() if axis in THREAD_AXES}
        self.loops = {each.var: over(each.extent) for each in walk(stmt) if isinstance(each, For)}
        self.own: dict[tuple[Buffer, Owners, str], bool] = {}
        self.inner: dict[For, frozenset[Var]] = {}

    def place(self, stmt: Stmt, pending: tuple[_Touch, ...]) -> tuple[Stmt, tuple[_Touch, ...]]:
        """`stmt` with its barriers, and what is pending after it."""
        match stmt:
            case Unit():
                return self.at(stmt, self.touches(stmt), pending)
            case Seq(stmts=stmts):
                placed = []
                for one in stmts:
                    new, pending = self.place(one, pending)
                    placed.append(new)
                return seq(*placed) if placed else stmt, pending
            case For() if self.is_whole(stmt):
                touched = self.touches_under(stmt)
                self.check_whole(stmt, touched)
                return self.at(stmt, touched, pending)
            case For():
                return self.loop(stmt, pending)
            case Barrier():
                return stmt, ()
        raise CodegenError(f"internal error: {type(stmt).__name__} among the units of a kernel")

    def loop(self, loop: For, before: tuple[_Touch, ...]) -> tuple[Stmt, tuple[_Touch, ...]]:
        """Through the body twice: an iteration comes after the one before it, too.

        What the loop needs from before is waited for once, in front of it, unless a barrier inside comes in time.
        """
        body, pending = self.place(loop.body, ())
        if not (isinstance(loop.extent, Const) and loop.extent.value <= 1):
            body, pending = self.place(body, tuple(dict.fromkeys(_crossing(loop.var, each) for each in pending)))
        new = replace(loop, body=body)
        first, waits = self.leading(new)
        if self.must_wait(before, first):
            return seq(Barrier(), new), pending
        return new, pending if waits else tuple(dict.fromkeys((*before, *pending)))

    def leading(self, stmt: Stmt) -> tuple[tuple[_Touch, ...], bool]:
        """What may be touched before the first barrier inside, and whether there surely is one."""
        match stmt:
            case Barrier():
                return (), True
            case Seq(stmts=stmts):
                found: tuple[_Touch, ...] = ()
                for one in stmts:
                    more, waits = self.leading(one)
                    found += more
                    if waits:
                        return found, True
                return found, False
            case For(extent=extent, body=body):
                found, waits = self.leading(body)
                return found, waits and isinstance(extent, Const) and extent.value >= 1
        return self.touches_under(stmt), False

    def at(
        self, stmt: Stmt, touched: tuple[_Touch, ...], pending: tuple[_Touch, ...]
    ) -> tuple[Stmt, tuple[_Touch, ...]]:
        """`stmt` behind a barrier, if it needs what is pending."""
        if self.must_wait(pending, touched):
            return seq(Barrier(), stmt), touched
        return stmt, tuple(dict.fromkeys((*pending, *touched)))

    def must_wait(self, pending: tuple[_Touch, ...], touched: tuple[_Touch, ...]) -> bool:
        """Whether a barrier must stand between `pending` and `touched`."""
        return any(self.clash(old, new) for old in pending for new in touched)

    def clash(self, old: _Touch, new: _Touch, axes: tuple[str, ...] = THREAD_AXES) -> bool:
        """Whether different threads may meet in an element that one of them writes."""
        if old.buffer is not new.buffer or not (old.is_write or new.is_write):
            return False
        for (axis, mine), (_, theirs) in zip(old.owners, new.owners, strict=True):
            if axis in axes and (mine is not theirs or mine == "all"):
                return True
            # `bind` has looked at one iteration of the loops around.
            around = isinstance(mine, For) and not old.crossed <= self.loops_in(mine)
            if axis in axes and around and not self.keeps_to_own(new.buffer, new.owners, axis):
                return True
        return False

    def keeps_to_own(self, buffer: Buffer, owners: Owners, axis: str) -> bool:
        """Whether what a thread (or group) touches of the buffer no other on the axis does, whenever it does so."""
        key = (buffer, owners, axis)
        if key not in self.own:
            found = (touch for touch, _ in self.touched_along(self.stmt, ()))
            touching = [each for each in found if each.buffer is buffer and each.owners == owners]
            sizes = {name: {self.axes[name]: over(loop.extent)} for name, loop in owners if isinstance(loop, For)}
            inside, ranges = dict(self.loops), dict(sizes[axis])
            for name, size in sizes.items():
                if name != axis:
                    # Threads of one group have its position in common.
                    (ranges if axis in THREAD_AXES and name in GROUP_AXES else inside).update(size)
            (position,) = sizes[axis]
            apart = keeps_apart(position, inside, ranges, touching)
            self.own[key] = apart or counted_apart(position, {**inside, **sizes[axis]}, touching)
        return self.own[key]

    def loops_in(self, loop: For) -> frozenset[Var]:
        if loop not in self.inner:
            self.inner[loop] = frozenset(each.var for each in walk(loop.body) if isinstance(each, For))
        return self.inner[loop]

    def check_groups(self) -> None:
        """Refuse what one group would have to wait for another for: no barrier helps there."""
        found = [(touch, path) for touch, path in self.touched_along(self.stmt, ()) if touch.buffer.scope == "global"]
        for old, path in found:
            crossed = replace(old, crossed=frozenset(path))
            for new, _ in found:
                apart = (axis for axis in GROUP_AXES if axis in self.axes)
                axis = next((axis for axis in apart if self.clash(crossed, new, (axis,))), None)
                if axis is not None:
                    raise CodegenError(
                        f"{new.buffer.name!r} passes from one group of {axis} to another within a kernel",
                        hint="groups cannot wait for one another: put the two nests one after the other, outside of "
                        "the loops bound to blockIdx, or compute what is needed inside them",
                    )

    def is_whole(self, loop: For) -> bool:
        """Whether no thread may wait inside: lanes run together, and threads run differently often."""
        if loop.kind in ("vectorized", "tensorized"):
            return True
        own = ("local", "register")
        return bool(self.positions & set(free_vars(loop.extent))) or any(
            load.buffer in self.written or load.buffer.scope in own for load in loads(loop.extent)
        )

    def check_whole(self, loop: For, touched: tuple[_Touch, ...]) -> None:
        wrong = next((new.buffer for old in touched for new in touched if self.clash(old, new)), None)
        if wrong is not None:
            raise CodegenError(
                f"threads would have to wait for one another over {wrong.name!r} inside loop {loop.var.name!r}, "
                f"through which not all of them go equally often",
                hint="move the loop inside what is bound to threads, or give it a constant extent",
            )

    def touches_under(self, stmt: Stmt) -> tuple[_Touch, ...]:
        return tuple(dict.fromkeys(touch for touch, _ in self.touched_along(stmt, ())))

    def touched_along(self, stmt: Stmt, path: tuple[Var, ...]) -> Iterator[tuple[_Touch, tuple[Var, ...]]]:
        """The accesses under `stmt`, and the loops around each."""
        if isinstance(stmt, Unit):
            for touch in self.touches(stmt):
                yield touch, path
        inside = (*path, stmt.var) if isinstance(stmt, For) else path
        for part in parts(stmt):
            yield from self.touched_along(part, inside)

    def touches(self, unit: Unit) -> tuple[_Touch, ...]:
        """The accesses of a unit to what some thread of the launch writes."""
        found: list[_Touch] = []
        for each in walk(unit.stmt):
            if isinstance(each, Store) and each.buffer in self.written:
                found.append(_Touch(each.buffer, each.indices, True, unit.owners))
            read = (node for node in exprs(each) if isinstance(node, Load) and node.buffer in self.written)
            found.extend(_Touch(node.buffer, node.indices, False, unit.owners) for node in read)
        return tuple(found)


def _crossing(loop: Var, touch: _Touch) -> _Touch:
    return replace(touch, crossed=touch.crossed | {loop})


# Conditions -----------------------------------------------------------------------------------------------------


def _gather(stmt: Stmt) -> Stmt:
    guards, body = _lift(stmt)
    return _guarded(guards, body)


def _lift(stmt: Stmt) -> tuple[tuple[Expr, ...], Stmt]:
    """Conditions that hold for all of `stmt`, and `stmt` without them."""
    match stmt:
        case Unit(stmt=inner, guards=guards):
            return _distinct(guards), inner
        case For(var=var, body=body):
            guards, inner = _lift(body)
            outside = tuple(guard for guard in guards if var not in free_vars(guard))
            inside = tuple(guard for guard in guards if var in free_vars(guard))
            return outside, replace(stmt, body=_guarded(inside, inner))
        case Seq(stmts=stmts):
            return _lift_seq([_lift(one) for one in stmts])
    return (), stmt


def _lift_seq(lifted: list[tuple[tuple[Expr, ...], Stmt]]) -> tuple[tuple[Expr, ...], Stmt]:
    """Runs of neighbours share an `if`; what all share goes on outwards."""
    runs: list[tuple[tuple[Expr, ...], list[tuple[tuple[Expr, ...], Stmt]]]] = []
    for guards, stmt in lifted:
        if runs and (common := _common(runs[-1][0], guards)):
            runs[-1] = (common, [*runs[-1][1], (guards, stmt)])
        else:
            runs.append((guards, [(guards, stmt)]))
    whole = []
    for common, members in runs:
        inner = seq(*(_guarded(_without(guards, common), stmt) for guards, stmt in members))
        if len(runs) == 1:
            return common, inner
        whole.append(_guarded(common, inner))
    return (), seq(*whole) if whole else Seq(())


def _distinct(guards: tuple[Expr, ...]) -> tuple[Expr, ...]:
    return tuple({expr_key(guard): guard for guard in guards}.values())


def _common(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> tuple[Expr, ...]:
    keys = {expr_key(guard) for guard in b}
    return tuple(guard for guard in a if expr_key(guard) in keys)


def _without(guards: tuple[Expr, ...], common: tuple[Expr, ...]) -> tuple[Expr, ...]:
    keys = {expr_key(guard) for guard in common}
    return tuple(guard for guard in guards if expr_key(guard) not in keys)


def _guarded(guards: tuple[Expr, ...], stmt: Stmt) -> Stmt:
    return If(logical_and(*guards), stmt) if guards else stmt
