"""Scalars for all lanes that lie together: unrolled code loads them as one vector, for multiply-adds by element.

    for k in unrolled(4):                             v = a[i, 0:4]
      for j in vectorized(4):                         c[0:4] += v[0] * b[0, 0:4]
        c[j] += a[i, k] * b[k, j]            ->       c[0:4] += v[1] * b[1, 0:4]
                                                      …

ARM's multiply-adds take an element of a register for all lanes, and nothing from memory: one load then stands for
four. Only what the unrolled loops surely read is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kedge.compiler.codegen.alloc import expressions_of, statements_of
from kedge.compiler.schedule.rules.analysis import stride
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Select, Var
from kedge.compiler.tir.simplify import Ranges, over
from kedge.compiler.tir.stmt import For, If, Range, Stmt
from kedge.compiler.tir.visitor import children, free_vars, loads

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


def together(loop: For, ranges: Ranges, lanes: Mapping[str, int]) -> dict[Load, Together]:
    """The loads under an unrolled loop of which several iterations read neighbours.

    `ranges` are those of the variables around; `lanes` the elements of a vector, for each dtype that comes in vectors.
    """
    found: dict[Load, list[_Place]] = {}
    for place in _places(loop, (), frozenset()):
        if place.load.buffer.dtype in lanes:
            found.setdefault(place.load, []).append(place)
    result = {}
    for load, (place, *others) in found.items():
        if not others:  # an expression in two places may be read in one of them only
            plan = _plan(place, ranges, lanes[load.buffer.dtype])
            if plan is not None:
                result[load] = plan
    return result


@dataclass(frozen=True, slots=True)
class _Place:
    """A load, the unrolled loops right around it, and the variables that decide whether it happens."""

    load: Load
    loops: tuple[For, ...]
    guards: frozenset[Var]


def _places(stmt: Stmt, loops: tuple[For, ...], guards: frozenset[Var]) -> Iterator[_Place]:
    for expr in expressions_of(stmt):
        yield from _read(expr, loops, guards)
    match stmt:
        case For(kind="unrolled", extent=Const(value=count)) if count <= MAX_UNROLL:
            loops = (*loops, stmt)
        case For(kind=kind) if kind != "vectorized":
            loops = ()
        case If(condition=condition):
            loops, guards = _under(condition, loops, guards)
    for child in statements_of(stmt):
        yield from _places(child, loops, guards)


def _read(expr: Expr, loops: tuple[For, ...], guards: frozenset[Var]) -> Iterator[_Place]:
    match expr:
        case Load():
            yield _Place(expr, loops, guards)
        case Select(condition=condition):
            yield from _read(condition, loops, guards)
            for side in (expr.a, expr.b):
                yield from _read(side, *_under(condition, loops, guards))
            return
        case Binary(op="and" | "or", a=first, b=second):
            yield from _read(first, loops, guards)
            yield from _read(second, *_under(first, loops, guards))
            return
    for child in children(expr):
        yield from _read(child, loops, guards)


def _under(condition: Expr, loops: tuple[For, ...], guards: frozenset[Var]) -> tuple[tuple[For, ...], frozenset[Var]]:
    """What is known of a place that is reached under a condition; one on data may change with every iteration."""
    return () if any(True for _ in loads(condition)) else loops, guards | set(free_vars(condition))


def _plan(place: _Place, ranges: Ranges, lanes: int) -> Together | None:
    load = place.load
    known: dict[Var, Range] = {**ranges, **{loop.var: over(loop.extent) for loop in place.loops}}
    steps: dict[Var, int] = {}
    elements = {0}
    for loop in place.loops:
        if loop.var in place.guards:
            continue
        step = stride(load.indices, load.buffer.shape, loop.var, known)
        if step is None:
            return None
        assert isinstance(loop.extent, Const)
        count = int(loop.extent.value)
        if step and count * len(elements) > _MOST_ELEMENTS:
            return None
        if step:
            steps[loop.var] = step
            elements = {element + step * i for element in elements for i in range(count)}
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
