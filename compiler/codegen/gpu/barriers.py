"""Where the threads of a group must wait for one another, and how their conditions are put together again.

Threads of one loop do not disturb one another: `bind` refuses that. But one loop's threads may need what another
loop's threads made, and then a barrier must stand between. Each store carries its *owners*: for every axis the loop
whose iterations the threads are, or "first" or "all" where it stands outside of such loops. Two accesses to one
buffer, one of them a store, are safe without a barrier only if their owners are the same.

A barrier must be reached by all threads. So conditions are kept at the stores while barriers are placed, and loops
stay whole; afterwards what neighbours have in common is put around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kedge.compiler.codegen.gpu.ir import GROUP_AXES, Barrier, exprs, parts, walk
from kedge.compiler.errors import CodegenError
from kedge.compiler.tir.expr import Const, Expr, Load, Var, logical_and
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
    """One access that no barrier has come after yet."""

    buffer: Buffer
    is_write: bool
    owners: Owners


def place_barriers(stmt: Stmt, positions: frozenset[Var]) -> Stmt:
    """`stmt`, made of units, with barriers where they are needed and conditions where they belong.

    `positions` are the variables that differ between threads of a group.

    Raises:
        CodegenError: a barrier would be needed where not all threads come by, or between groups.
    """
    written = {each.buffer for each in _stores(stmt) if each.buffer.scope in ("global", "shared")}
    placer = _Placer(frozenset(written), positions)
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


@dataclass(frozen=True, slots=True)
class _Placer:
    written: frozenset[Buffer]
    positions: frozenset[Var]

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

        What any iteration needs from before the loop is waited for once, in front of it.
        """
        waits = self.must_wait(before, self.touches_under(loop))
        if waits:
            before = ()
        body, pending = self.place(loop.body, before)
        if not (isinstance(loop.extent, Const) and loop.extent.value <= 1):
            body, pending = self.place(body, pending)
        if not (isinstance(loop.extent, Const) and loop.extent.value >= 1):
            pending = (*before, *pending)  # perhaps there is no iteration at all
        new = replace(loop, body=body)
        return seq(Barrier(), new) if waits else new, pending

    def at(
        self, stmt: Stmt, touched: tuple[_Touch, ...], pending: tuple[_Touch, ...]
    ) -> tuple[Stmt, tuple[_Touch, ...]]:
        """`stmt` behind a barrier, if it needs what is pending."""
        if self.must_wait(pending, touched):
            return seq(Barrier(), stmt), touched
        return stmt, (*pending, *touched)

    def must_wait(self, pending: tuple[_Touch, ...], touched: tuple[_Touch, ...]) -> bool:
        """Whether a barrier must stand between `pending` and `touched`; refuses where one would not help."""
        clashing = [(old, new) for old in pending for new in touched if _clash(old, new)]
        for old, new in clashing:
            theirs = dict(new.owners)
            group = next((axis for axis, one in old.owners if axis in GROUP_AXES and one is not theirs[axis]), None)
            if group is not None and new.buffer.scope == "global":
                raise CodegenError(
                    f"{new.buffer.name!r} passes from one group of {group} to another within a kernel",
                    hint="groups cannot wait for one another: put the two nests one after the other, outside of "
                    "the loops bound to blockIdx, or compute what is needed inside them",
                )
        return bool(clashing)

    def is_whole(self, loop: For) -> bool:
        """Whether no thread may wait inside: lanes run together, and threads run differently often."""
        if loop.kind in ("vectorized", "tensorized"):
            return True
        return bool(self.positions & set(free_vars(loop.extent))) or any(
            load.buffer in self.written for load in loads(loop.extent)
        )

    def check_whole(self, loop: For, touched: tuple[_Touch, ...]) -> None:
        wrong = next((new.buffer for old in touched for new in touched if _clash(old, new)), None)
        if wrong is not None:
            raise CodegenError(
                f"threads would have to wait for one another over {wrong.name!r} inside loop {loop.var.name!r}, "
                f"through which not all of them go equally often",
                hint="move the loop inside what is bound to threads, or give it a constant extent",
            )

    def touches_under(self, stmt: Stmt) -> tuple[_Touch, ...]:
        if isinstance(stmt, Unit):
            return self.touches(stmt)
        return tuple(touch for part in parts(stmt) for touch in self.touches_under(part))

    def touches(self, unit: Unit) -> tuple[_Touch, ...]:
        """The accesses of a unit to what some thread of the launch writes."""
        found: list[_Touch] = []
        for each in walk(unit.stmt):
            if isinstance(each, Store) and each.buffer in self.written:
                found.append(_Touch(each.buffer, True, unit.owners))
            read = (node.buffer for node in exprs(each) if isinstance(node, Load))
            found.extend(_Touch(buffer, False, unit.owners) for buffer in read if buffer in self.written)
        return tuple(found)


def _clash(old: _Touch, new: _Touch) -> bool:
    return old.buffer is new.buffer and (old.is_write or new.is_write) and not _same(old.owners, new.owners)


def _same(a: Owners, b: Owners) -> bool:
    """Whether what one of them touches, only the same thread touches for the other."""
    return all(one is other and one != "all" for (_, one), (_, other) in zip(a, b, strict=True))


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
