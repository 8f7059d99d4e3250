"""Two transposes with a reshape between them as one."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.graph.builder import call, reshaped
from kedge.compiler.graph.ir import Call, Value, same_dim
from kedge.compiler.ops.movement import permutation
from kedge.compiler.tir.expr import Dim


def as_one_move(second: Call) -> Value | None:
    """transpose(reshape(transpose(x))) -> reshape(transpose(reshape(x))), a reshape being free; None for other chains,
    and where what the first transpose puts side by side is merged and split otherwise.

    So blocks of channels are moved once where channels are to be last, or in other blocks.
    """
    reshape = second.inputs[0]
    if not isinstance(reshape, Call) or reshape.op != "reshape":
        return None
    first = reshape.inputs[0]
    if not isinstance(first, Call) or first.op != "transpose":
        return None
    found = _common_factors(first.type.shape, reshape.type.shape)
    if found is None:
        return None
    factors, before, after = found
    x, inner = first.inputs[0], permutation(first.attrs, first.type.rank)
    given = [number for axis in range(x.type.rank) for number in before[inner.index(axis)]]
    wanted = [number for axis in permutation(second.attrs, second.type.rank) for number in after[axis]]
    origin = (*first.origin, *reshape.origin, *second.origin)
    split = reshaped(x, [factors[number] for number in given], origin)
    perm = tuple(given.index(number) for number in wanted)
    moved = split if perm == tuple(sorted(perm)) else call("transpose", split, perm=perm, origin=origin)
    return reshaped(moved, second.type.shape, origin)


def _common_factors(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[list[Dim], list[list[int]], list[list[int]]] | None:
    """Dims that both shapes are made of by merging neighbours, and which of them each dim of `a` and of `b` is.

    (n, 6, 4), (n, 2, 12) -> (n, 2, 3, 4): [0], [1, 2], [3] and [0], [1], [2, 3]
    """
    factors: list[Dim] = []
    parts: tuple[list[list[int]], list[list[int]]] = ([[] for _ in a], [[] for _ in b])
    left, right = (list(enumerate(shape))[::-1] for shape in (a, b))
    while left and right:
        (i, one), (j, other) = left.pop(), right.pop()
        factor = one
        if not same_dim(one, other):
            if not isinstance(one, int) or not isinstance(other, int):
                return None
            factor = min(one, other)
            if factor == 0 or max(one, other) % factor:
                return None
            if one > factor:
                left.append((i, one // factor))
            else:
                right.append((j, other // factor))
        parts[0][i].append(len(factors))
        parts[1][j].append(len(factors))
        factors.append(factor)
    rest_is_one = all(isinstance(dim, int) and dim == 1 for _, dim in (*left, *right))
    return (factors, *parts) if rest_is_one else None
