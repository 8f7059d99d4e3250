"""Where intermediate tensors live: offsets in one arena, so that two that live at one time never overlap.

Sizes are bytes: numbers, or expressions over symbolic dims. Sizes that are multiples of one product of symbols, such
as the 4096·n and 640·n bytes of two activations of a batch of n, are packed together as if n were 1: offsets are then
multiples of that product too. Each such class has a region of its own; memory is never shared between classes, whose
sizes cannot be compared. Within a class blocks are placed greedily, the largest first, each in the smallest gap that
takes it (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, greedy by size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kedge.compiler.graph.dims import plain, product, total
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, as_expr
from kedge.compiler.tir.structural import Key, expr_key

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tensor of `size` bytes that lives from step `start` to step `end`, both included."""

    size: Dim
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The byte offset of each tenant, a multiple of 64, and the bytes of the whole arena."""

    offsets: tuple[Dim, ...]
    size: Dim


@dataclass(frozen=True, slots=True)
class _Size:
    """`count` times the product `unit`; `count · unit` is a multiple of the alignment."""

    count: int
    unit: Dim
    key: tuple[Key, ...]


def plan_memory(tenants: Sequence[Tenant]) -> Plan:
    """Offsets for all tenants; see the module."""
    order: dict[Key, int] = {}
    sizes = [_size(tenant.size, order) for tenant in tenants]
    classes: dict[tuple[Key, ...], list[int]] = {}
    for index, size in enumerate(sizes):
        classes.setdefault(size.key, []).append(index)
    offsets: list[Dim] = [0] * len(tenants)
    end: Dim = 0
    for key in sorted(classes, key=len):  # known sizes first: their offsets stay numbers
        members = classes[key]
        spans = [(tenants[i].start, tenants[i].end) for i in members]
        places, room = pack([sizes[i].count for i in members], spans)
        unit = sizes[members[0]].unit
        for index, place in zip(members, places, strict=True):
            offsets[index] = total([end, product([place, unit])])
        end = total([end, product([room, unit])])
    return Plan(tuple(offsets), end)


def pack(sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets for blocks of known sizes that live over inclusive spans of steps, and the room they take together."""
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], spans[i])):
        start, end = spans[index]
        busy = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in placed
            if spans[other][0] <= end and start <= spans[other][1]
        )
        offsets[index] = _smallest_gap(busy, sizes[index])
        placed.append(index)
    return offsets, max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)


def _smallest_gap(busy: Sequence[tuple[int, int]], size: int) -> int:
    best: tuple[int, int] | None = None
    cursor = 0
    for start, end in busy:
        gap = start - cursor
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, cursor)
        cursor = max(cursor, end)
    return cursor if best is None else best[1]


def align(size: Dim) -> Dim:
    """`size` rounded up to the alignment."""
    if isinstance(size, int):
        return -(-size // ALIGNMENT) * ALIGNMENT
    return plain((as_expr(size) + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT)


def _size(size: Dim, order: dict[Key, int]) -> _Size:
    """A size with its factors in `order`, that of their first appearance, which they are entered in."""
    count, symbolic = 1, list[Expr]()
    for factor in _factors(size):
        if isinstance(factor, int):
            count *= factor
        else:
            symbolic.append(factor)
    if len(symbolic) == 1 and isinstance(symbolic[0], Binary) and symbolic[0].op in ("add", "sub"):
        # A sum: its multiples are classes of their own, rounded up as a whole.
        unit = align(size)
        return _Size(1, unit, (expr_key(as_expr(unit)),))
    symbolic.sort(key=lambda factor: order.setdefault(expr_key(factor), len(order)))
    aligned = align(count)
    assert isinstance(aligned, int)  # of an int
    return _Size(aligned, product(symbolic), tuple(map(expr_key, symbolic)))


def _factors(size: Dim) -> list[Dim]:
    if isinstance(size, Binary) and size.op == "mul":
        return _factors(size.a) + _factors(size.b)
    return [int(size.value) if isinstance(size, Const) else size]
