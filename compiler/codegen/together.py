"""Scalars for all lanes that lie together: unrolled code loads them as one vector, for multiply-adds by element.

    for k in unrolled(4):                             v = a[i, 0:4]
      for j in vectorized(4):                         c[0:4] += v[0] * b[0, 0:4]
        c[j] += a[i, k] * b[k, j]            ->       c[0:4] += v[1] * b[1, 0:4]
                                                      …

ARM's multiply-adds take an element of a register for all lanes, and nothing from memory: one load then stands for
four. x86's take the other operand from memory, and where each element meets no vector twice, as in a product of one
row, loads are what takes the time. Only what the unrolled loops surely read is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kedge.compiler.codegen.alloc import expressions_of, statements_of
from kedge.compiler.schedule.rules.analysis import Access, extent_of
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Select, Var, const
from kedge.compiler.tir.simplify import Ranges, Simplifier, conjuncts, over
from kedge.compiler.tir.stmt import For, If, Range, Stmt, Store
from kedge.compiler.tir.visitor import children, free_vars, loads, substitute_expr

#: Loops are unrolled up to so many iterations.
MAX_UNROLL = 512
#: Vectors are looked for among so many elements at most.
_MOST_ELEMENTS = 512


@dataclass(frozen=True, slots=True)
class Together:
    """The elements that a load reads in all iterations of the unrolled loops around it.

    `steps` are the elements by which it moves with each of their variables. `vectors` has for each element, as its
    distance from that of the first iteration, the vector that holds it: the distance of its first element, and its
    size.
    """

    steps: Mapping[Var, int]
    vectors: Mapping[int, tuple[int, int]]


def together(
    loop: For, ranges: Ranges, lanes: Mapping[str, int], *, vectors_read_once: bool = False
) -> dict[Load, Together]:
    """The loads under an unrolled loop of which several iterations read neighbours.

    `ranges` are those of the variables around; `lanes` the elements of a vector, for each dtype that comes in vectors.
    `vectors_read_once`: only elements beside which all vectors are read once.
    """
    found: dict[Load, list[_Place]] = {}
    for place in _places(loop, _Around()):
        if place.load.buffer.dtype in lanes and (not vectors_read_once or place.vectors_read_once):
            found.setdefault(place.load, []).append(place)
    result = {}
    for load, (place, *others) in found.items():
        if not others:  # an expression in two places may be read in one of them only
            plan = _plan(place, ranges, lanes[load.buffer.dtype])
            if plan is not None:
                result[load] = plan
    return result


@dataclass(frozen=True, slots=True)
class _Around:
    """What is around a load: unrolled loops, conditions, and variables that decide in other ways whether it happens."""

    loops: tuple[For, ...] = ()
    conditions: tuple[Expr, ...] = ()
    guards: frozenset[Var] = frozenset()
    lanes: tuple[For, ...] = ()  # loops that are vectors
    beside: tuple[Load, ...] = ()  # what the statement reads but the buffer that it stores to

    def where(self, condition: Expr) -> _Around:
        """The same where a condition holds."""
        if _reads_data(condition):
            return replace(self, loops=())
        return replace(self, conditions=(*self.conditions, *conjuncts(condition)))

    def unless(self, condition: Expr) -> _Around:
        """The same where a condition does not hold."""
        if _reads_data(condition):
            return replace(self, loops=())
        return replace(self, guards=self.guards | set(free_vars(condition)))


@dataclass(frozen=True, slots=True)
class _Place:
    """A load, and what is around it."""

    load: Load
    around: _Around

    @property
    def vectors_read_once(self) -> bool:
        """Whether it is one element for all lanes, and all that is beside it moves with lanes and unrolled loops."""
        lanes = {loop.var for loop in self.around.lanes}
        moving = {*lanes, *(loop.var for loop in self.around.loops if extent_of(loop.extent) != 1)}
        used = [_used(load) for load in self.around.beside if load is not self.load]
        return bool(used) and lanes.isdisjoint(_used(self.load)) and all(moving <= each for each in used)


def _used(load: Load) -> set[Var]:
    return {var for index in load.indices for var in free_vars(index)}


def _places(stmt: Stmt, around: _Around) -> Iterator[_Place]:
    if isinstance(stmt, Store):
        around = replace(around, beside=tuple(load for load in loads(stmt.value) if load.buffer is not stmt.buffer))
    for expr in expressions_of(stmt):
        yield from _read(expr, around)
    match stmt:
        case If(condition=condition, then=then, orelse=orelse):
            yield from _places(then, around.where(condition))
            if orelse is not None:
                yield from _places(orelse, around.unless(condition))
            return
        case For(kind="unrolled", extent=Const(value=count)) if count <= MAX_UNROLL:
            around = replace(around, loops=(*around.loops, stmt))
        case For(kind="vectorized"):
            around = replace(around, lanes=(*around.lanes, stmt))
        case For():
            around = replace(around, loops=())
    for child in statements_of(stmt):
        yield from _places(child, around)


def _read(expr: Expr, around: _Around) -> Iterator[_Place]:
    match expr:
        case Load():
            yield _Place(expr, around)
        case Select(condition=condition, a=first, b=second):
            yield from _read(condition, around)
            yield from _read(first, around.where(condition))
            yield from _read(second, around.unless(condition))
            return
        case Binary(op="and" | "or" as op, a=first, b=second):
            yield from _read(first, around)
            yield from _read(second, around.where(first) if op == "and" else around.unless(first))
            return
    for child in children(expr):
        yield from _read(child, around)


def _reads_data(condition: Expr) -> bool:
    """Whether it may change with every iteration, whatever its variables are."""
    return any(True for _ in loads(condition))


def _plan(place: _Place, ranges: Ranges, lanes: int) -> Together | None:
    load, around = place.load, place.around
    known: dict[Var, Range] = {**ranges, **{loop.var: over(loop.extent) for loop in (*around.loops, *around.lanes)}}
    steps: dict[Var, int] = {}
    counts: dict[Var, int] = {}
    simplifier = Simplifier(known)
    access = Access(load.indices, load.buffer.shape, simplifier)
    for loop in around.loops:
        if loop.var in around.guards:
            continue
        step = access.stride(loop.var)
        if step is None:
            return None
        assert isinstance(loop.extent, Const)
        counts[loop.var] = int(loop.extent.value)
        if step:
            steps[loop.var] = step
    # What does not depend on the loops is the same in all iterations: the load happens in all of them, or in none.
    conditions = [each for each in around.conditions if not counts.keys().isdisjoint(free_vars(each))]
    moving = steps if not conditions else counts
    if math.prod(counts[var] for var in moving) > _MOST_ELEMENTS:
        return None
    elements = set()
    for values in itertools.product(*(range(counts[var]) for var in moving)):
        at = {var: const(value) for var, value in zip(moving, values, strict=True)}
        if all(simplifier.prove(substitute_expr(each, at)) for each in conditions):
            elements.add(sum(steps.get(var, 0) * value for var, value in zip(moving, values, strict=True)))
    vectors = dict(_vectors(sorted(elements), lanes))
    return Together(steps, vectors) if vectors else None


def _vectors(elements: list[int], lanes: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """The vector for each element that has neighbours: whole ones if possible, the last of a run may overlap."""
    runs: list[list[int]] = []
    for element in elements:
        if runs and runs[-1][-1] == element - 1:
            runs[-1].append(element)
        else:
            runs.append([element])
    for run in runs:
        size = lanes if len(run) >= lanes else 2
        if len(run) < size:
            continue
        for element in run:
            start = run[0] + (element - run[0]) // size * size
            yield element, (min(start, run[-1] + 1 - size), size)
