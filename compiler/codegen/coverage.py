"""Whether an iteration reads of a buffer only what it has written itself, so that each may have a buffer of its own.

A store under loops writes, for all values of those loops where the conditions around it hold, the element at its
indices. A later read of that iteration is covered if the loops' values at which the store wrote the element can be
told: each dim of the store (or several as one, by their address) counts in mixed radix, from some start on, with
loops that no other dim counts with, so that quotients and remainders of the read's distance from the start are those
values. Then they must lie in the
loops' ranges and fulfil the store's conditions. That an access is inside its buffer is taken for granted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kedge.compiler.tir.expr import Binary, Call, Const, Expr, Load, Select, Var, as_expr, const
from kedge.compiler.tir.simplify import Simplifier, conjuncts, lasting, negated, over
from kedge.compiler.tir.stmt import Buffer, For, If, Range, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import children, free_vars, loads, stmt_exprs, substitute_expr, walk_expr


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """The element at `indices` holds a value, for all values of `loops` with which `guards` hold."""

    indices: tuple[Expr, ...]
    loops: tuple[tuple[Var, Expr], ...] = ()
    guards: tuple[Expr, ...] = ()

    def at(self, values: Mapping[Var, Expr]) -> _Written:
        """This with other variables replaced."""
        return _Written(
            tuple(substitute_expr(i, values) for i in self.indices),
            tuple((var, substitute_expr(extent, values)) for var, extent in self.loops),
            tuple(substitute_expr(g, values) for g in self.guards),
        )

    def form(self) -> Key:
        """What is the same where the same elements are written, whatever the loops' variables and the conditions."""
        numbers = {var: number for number, (var, _) in enumerate(self.loops)}
        extents = (extent for _, extent in self.loops)
        return (len(self.loops), *(expr_key(expr, numbers) for expr in (*self.indices, *extents)))


def written_before_read(loop: For, buffer: Buffer, outer: Mapping[Var, Range]) -> bool:
    """Whether each iteration of `loop` surely stores to every element of `buffer` that it reads, before it does.

    `outer` are the ranges of the variables around the loop.
    """
    return _Iteration(buffer).run(loop.body, Simplifier({**outer, loop.var: over(loop.extent)}), ()) is not None


class _Iteration:
    """Follows one iteration: what of the buffer is surely written by then."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.loops: list[For] = []
        self.conditions: list[Expr] = []

    def run(self, stmt: Stmt, known: Simplifier, before: tuple[_Written, ...]) -> tuple[_Written, ...] | None:
        """What `stmt` writes in addition to `before`; None if it may read something else."""
        if not all(self._reads_own(expr, known, before) for expr in stmt_exprs(stmt)):
            return None
        match stmt:
            case Store():
                # What adds to an element writes nothing that was not written before it: of sums, only their
                # initialisations are followed through the conditions and loops around.
                return (_Written(stmt.indices),) if stmt.buffer is self.buffer and not _updates(stmt) else ()
            case Seq(stmts=stmts):
                return self._in_order(stmts, known, before)
            case If():
                return self._branches(stmt, known, before)
            case For(var=var, extent=extent):
                self.loops.append(stmt)
                found = self.run(stmt.body, known.within({var: over(extent)}), before)
                self.loops.pop()
                return None if found is None else tuple(_over_loop(each, var, extent) for each in found)
        return None

    def _in_order(
        self, stmts: Sequence[Stmt], known: Simplifier, before: tuple[_Written, ...]
    ) -> tuple[_Written, ...] | None:
        found: tuple[_Written, ...] = ()
        for stmt in stmts:
            more = self.run(stmt, known, (*before, *found))
            if more is None:
                return None
            found += more
        return found

    def _branches(self, stmt: If, known: Simplifier, before: tuple[_Written, ...]) -> tuple[_Written, ...] | None:
        condition = tuple(conjuncts(stmt.condition))
        self.conditions.append(stmt.condition)
        then = self.run(stmt.then, known.assuming(lasting(stmt.condition)), before)
        self.conditions[-1] = Call("not", (stmt.condition,), "bool")
        orelse = () if stmt.orelse is None else self.run(stmt.orelse, known, before)
        self.conditions.pop()
        if then is None or orelse is None:
            return None
        both = _in_either(then, orelse)
        found = (*both, *(replace(each, guards=(*each.guards, *condition)) for each in then))
        # What the first iteration of a loop around did is done for all: an initialisation guarded by `k == 0`.
        guarding = [loop.var for loop in self.loops if any(loop.var in free_vars(term) for term in condition)]
        if not guarding:
            return found
        reached = tuple(self._reaching(guarding))
        first = dict.fromkeys(guarding, const(0))
        return (*found, *(replace(each, guards=(*each.guards, *reached)).at(first) for each in found))

    def _reaching(self, loops: Sequence[Var]) -> Iterator[Expr]:
        """What decides whether other iterations of those loops come here, too, given that one does."""
        for loop in self.loops:
            if any(var in loops for var in free_vars(loop.extent)):
                yield loop.var < loop.extent
        for condition in self.conditions:
            if any(var in loops for var in free_vars(condition)) or any(True for _ in loads(condition)):
                yield condition

    def _reads_own(self, expr: Expr, known: Simplifier, before: tuple[_Written, ...]) -> bool:
        own: dict[Key, tuple[tuple[Expr, ...], list[tuple[Expr, ...]]]] = {}
        for load, chosen in _reads(expr, ()):
            if load.buffer is self.buffer:
                own.setdefault(expr_key(load), (load.indices, []))[1].append(chosen)
        return all(
            self._is_covered(indices, known, before)
            or all(chosen and self._is_covered(indices, known.assuming(chosen), before) for chosen in where)
            for indices, where in own.values()
        )

    def _is_covered(self, indices: tuple[Expr, ...], known: Simplifier, before: tuple[_Written, ...]) -> bool:
        if any(isinstance(node, Load) for index in indices for node in walk_expr(index)):
            return False
        inside = [
            fact
            for index, dim in zip(indices, self.buffer.shape, strict=True)
            for fact in (index >= 0, index < as_expr(dim))
            if not known.prove(fact)
        ]
        inner = known.assuming(inside)
        return any(self._covers(each, indices, inner) for each in before)

    def _covers(self, written: _Written, indices: tuple[Expr, ...], inner: Simplifier) -> bool:
        if any(isinstance(node, Load) for guard in written.guards for node in walk_expr(guard)):
            return False
        pairs = list(zip(written.indices, indices, strict=True))
        # A fused loop counts through several dims: those from `first` on are one by their row-major address.
        return any(
            _solved(written, [*pairs[:first], *self._flat(pairs[first:], first)], inner)
            for first in (len(pairs), *range(len(pairs) - 2, -1, -1))
        )

    def _flat(self, pairs: Sequence[tuple[Expr, Expr]], first: int) -> list[tuple[Expr, Expr]]:
        place: Expr = const(0)
        index: Expr = const(0)
        for (a, b), dim in zip(pairs, self.buffer.shape[first:], strict=True):
            place, index = place * as_expr(dim) + a, index * as_expr(dim) + b
        return [(place, index)] if pairs else []


def _reads(expr: Expr, chosen: tuple[Expr, ...]) -> Iterator[tuple[Load, tuple[Expr, ...]]]:
    """The loads in `expr`, each with the conditions of the choices under which its value counts."""
    if isinstance(expr, Select):
        yield from _reads(expr.condition, chosen)
        opposite = negated(expr.condition)
        yield from _reads(expr.a, (*chosen, *lasting(expr.condition)))
        yield from _reads(expr.b, chosen if opposite is None else (*chosen, *lasting(opposite)))
        return
    if isinstance(expr, Load):
        yield expr, chosen
    for child in children(expr):
        yield from _reads(child, chosen)


def _updates(store: Store) -> bool:
    """Whether the store reads, whatever its value chooses, the element that it replaces."""
    own = expr_key(Load(store.buffer, store.indices))
    return any(
        load.buffer is store.buffer and not chosen and expr_key(load) == own for load, chosen in _reads(store.value, ())
    )


def _in_either(then: Sequence[_Written], orelse: Sequence[_Written]) -> tuple[_Written, ...]:
    """What is written whichever of two branches runs: for each of the second's, that with the fewest conditions.

    All would be more than can be counted where tiles within tiles come in versions.
    """
    fewest: dict[Key, _Written] = {}
    for a in then:
        form = a.form()
        if form not in fewest or len(a.guards) < len(fewest[form].guards):
            fewest[form] = a
    found = []
    for b in orelse:
        alike = fewest.get(b.form())
        if alike is not None:
            names = {old: new for (old, _), (new, _) in zip(alike.loops, b.loops, strict=True)}
            guards = (substitute_expr(guard, names) for guard in alike.guards)
            found.append(replace(b, guards=(*guards, *b.guards)))
    return tuple(found)


def _over_loop(written: _Written, var: Var, extent: Expr) -> _Written:
    """What a whole loop writes, from what its iteration does. Its variable gets another name: the loop may be left."""
    renamed = Var(var.name)
    inside = written.at({var: renamed})
    return replace(inside, loops=(*inside.loops, (renamed, extent)))


def _solved(written: _Written, pairs: Sequence[tuple[Expr, Expr]], known: Simplifier) -> bool:
    """Whether there are values of the loops of `written` with which the first of each pair is the second."""
    extents = dict(written.loops)
    values: dict[Var, Expr] = {}
    tops: dict[Var, Expr] = {}  # of the highest digits: that they are below their extents, without a quotient
    storing = known.within({var: over(extent) for var, extent in written.loops})
    for place, index in pairs:
        place = storing.simplify(place)
        used = [var for var in free_vars(place) if var in extents]
        if any(var in values for var in used):
            return False
        digits = _digits(place, used, extents)
        if digits is None:
            return False
        start = substitute_expr(place, dict.fromkeys(used, const(0)))
        distance: Expr = Binary("sub", index, start)
        if not digits:
            if not known.prove_equal(index, start):
                return False
            continue
        unit = digits[0][0]
        if unit != 1 and not known.prove_equal(Binary("floormod", distance, const(unit)), const(0)):
            return False
        for position, (weight, var) in enumerate(digits):
            value: Expr = Binary("floordiv", distance, const(weight))
            if position + 1 < len(digits):
                value = Binary("floormod", value, extents[var])
            values[var] = known.simplify(value)
        weight, var = digits[-1]
        tops[var] = distance < extents[var] * weight
    # Loops that no dim counts with: their first iteration will do.
    values.update({var: const(0) for var in extents if var not in values})

    def proved(condition: Expr) -> bool:
        return known.prove(substitute_expr(condition, values))

    below = (
        known.prove(value < substitute_expr(extents[var], values)) or (var in tops and proved(tops[var]))
        for var, value in values.items()
    )
    return all(known.prove(value >= 0) for value in values.values()) and all(below) and all(map(proved, written.guards))


def _digits(place: Expr, used: Sequence[Var], extents: Mapping[Var, Expr]) -> list[tuple[int, Var]] | None:
    """`(weight, loop)` of the loops that `place` counts with, in mixed radix from the lowest; None if it does not."""
    simplifier = Simplifier({var: over(extents[var]) for var in used})
    digits: list[tuple[int, Var]] = []
    for var in used:
        step = simplifier.simplify(substitute_expr(place, {var: Binary("add", var, const(1))}) - place)
        if not isinstance(step, Const) or int(step.value) <= 0:
            return None
        digits.append((int(step.value), var))
    digits.sort(key=lambda digit: digit[0])
    for (weight, var), (following, _) in itertools.pairwise(digits):
        extent = extents[var]
        if not isinstance(extent, Const) or weight * int(extent.value) != following:
            return None
    return digits
