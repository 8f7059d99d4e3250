"""Which concatenations cost nothing: their operands are computed where they belong in the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kedge.compiler.graph.cost import nbytes
from kedge.compiler.graph.dims import product
from kedge.compiler.graph.ir import Call, Function, Fused, Value, operands
from kedge.compiler.ops import registry
from kedge.compiler.ops.common import axis_of
from kedge.compiler.ops.registry import FusionKind

#: They rename memory: they cost nothing on their own, and index arithmetic inside a kernel.
VIEWS = frozenset({"reshape", "expect_shape"})
#: A part begins at a multiple of this many bytes, as everything in an arena does.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lives inside of another one: `offset` bytes from its begin."""

    whole: Value
    offset: int


def base(value: Value) -> Value:
    """The value whose memory `value` is: views share that of their operand."""
    while isinstance(value, Call) and value.op in VIEWS:
        value = value.inputs[0]
    return value


def concats_in_place(function: Function) -> Mapping[int, tuple[Place, ...]]:
    """The places of the operands, by the `id` of each concatenation that needs no copy.

    Such a one puts blocks of memory one after the other: nothing but ones comes before its axis, and sizes are known.
    Every operand is computed by a kernel, for this concatenation only, and is no result of the function; nor is the
    whole. Where element-wise operators follow, copying is left to their kernel, which reads the parts themselves.
    """
    users: dict[int, list[Value]] = {}
    for value in function.values():
        for operand in operands(value):
            users.setdefault(id(operand), []).append(value)
    taken = {id(base(value)) for value in function.outputs}
    found: dict[int, tuple[Place, ...]] = {}
    for value in function.values():
        if isinstance(value, Call) and value.op == "concat" and id(value) not in taken:
            places = _places(value) if _is_read_by_anchors(users.get(id(value), [])) else None
            if places is not None and not taken & {id(base(part)) for part in value.inputs}:
                taken |= {id(base(part)) for part in value.inputs}
                found[id(value)] = places
    return found


def _places(concat: Call) -> tuple[Place, ...] | None:
    axis = axis_of(concat.attrs["axis"], concat.type.rank)
    parts = [base(part) for part in concat.inputs]
    computed = all(isinstance(part, (Call, Fused)) and len(part.types) == 1 for part in parts)
    if product(concat.type.shape[:axis]) != 1 or not computed or len(set(map(id, parts))) < len(parts):
        return None
    places, offset = [], 0
    for part in parts:
        size = nbytes(part.type)
        if not isinstance(size, int) or size == 0 or size % _ALIGNMENT:
            return None
        places.append(Place(concat, offset))
        offset += size
    return tuple(places)


def _is_read_by_anchors(users: list[Value]) -> bool:
    """Whether all users read the whole as it is: contractions and windows, or groups that begin with one."""
    return bool(users) and all(_is_anchor(user) for user in users)


def _is_anchor(user: Value) -> bool:
    calls = [user] if not isinstance(user, Fused) else [each for each in user.body.values() if isinstance(each, Call)]
    kinds = [registry.get(call.op).kind for call in calls if isinstance(call, Call)]
    return any(kind in (FusionKind.REDUCTION, FusionKind.CONTRACTION) for kind in kinds)
