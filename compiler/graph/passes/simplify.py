"""Removing work that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kedge.compiler.dtypes import FLOATS, HALVES
from kedge.compiler.graph.builder import call, make_call
from kedge.compiler.graph.dims import same_shape, same_type
from kedge.compiler.graph.interp import Array
from kedge.compiler.graph.ir import Call, Constant, Module, Value
from kedge.compiler.graph.passes.base import Context, rewrite
from kedge.compiler.graph.passes.moves import as_one_move
from kedge.compiler.ops.common import is_one
from kedge.compiler.ops.movement import permutation, slice_plan


@dataclass(frozen=True, slots=True)
class Simplify:
    """Remove identities, neutral elements, and chains of moves that cancel or combine.

    transpose(transpose(x)) -> transpose(x);  mul(x, 1) -> x;  conv(pad(x)) -> conv(x) {pads: …}

    Adding a zero counts as changing nothing, though it makes -0.0 positive.
    """

    name: str = "simplify"

    def __call__(self, module: Module) -> Module:
        """The module with the rules of this file applied until none fits."""
        return rewrite(module, _simplify)


def _simplify(context: Context, old: Value, new: Value) -> Value | None:
    result: Value | None = None
    value = new
    while isinstance(value, Call) and value.op in _RULES:
        better = _RULES[value.op](context, value)
        if better is None:
            break
        result = value = better
    return result


def _same(context: Context, value: Call) -> Value | None:
    """An operator that gives its input back where the type stays the same."""
    return value.inputs[0] if same_type(value.inputs[0].type, value.type) else None


def _identity(context: Context, value: Call) -> Value | None:
    return value.inputs[0]


def _reshape(context: Context, value: Call) -> Value | None:
    source = value.inputs[0]
    if same_shape(source.type.shape, value.type.shape):
        return source
    if isinstance(source, Call) and source.op == "reshape":
        attrs = {"shape": value.type.shape}
        return make_call("reshape", source.inputs, attrs, (*source.origin, *value.origin))
    return None


def _transpose(context: Context, value: Call) -> Value | None:
    source, perm = value.inputs[0], permutation(value.attrs, value.type.rank)
    if perm == tuple(range(len(perm))):
        return source
    if isinstance(source, Call) and source.op == "transpose":
        inner = permutation(source.attrs, source.type.rank)
        attrs = {"perm": tuple(inner[axis] for axis in perm)}
        return make_call("transpose", source.inputs, attrs, (*source.origin, *value.origin))
    moved = [axis for axis in perm if not is_one(source.type.shape[axis])]
    if moved == sorted(moved):  # only dims of 1 move: the same elements in the same order
        return call("reshape", source, shape=value.type.shape, origin=value.origin)
    return as_one_move(value)


def _slice(context: Context, value: Call) -> Value | None:
    plan = slice_plan(value.inputs[0].type.shape, value.attrs)
    return _same(context, value) if all(step > 0 for _, step, _ in plan) else None


def _concat(context: Context, value: Call) -> Value | None:
    return value.inputs[0] if len(value.inputs) == 1 else None


def _filled_with(context: Context, value: Value, number: float) -> bool:
    data: Array | None = context.known(value)
    return data is not None and data.size > 0 and bool(np.all(data == number))


def _neutral(number: float, *, both: bool) -> Callable[[Context, Call], Value | None]:
    """A rule for a binary operator that gives its first (with `both`: either) operand back for `number`."""

    def rule(context: Context, value: Call) -> Value | None:
        a, b = value.inputs
        if same_type(a.type, value.type) and _filled_with(context, b, number):
            return a
        if both and same_type(b.type, value.type) and _filled_with(context, a, number):
            return b
        return _without_broadcast(context, value)

    return rule


def _without_broadcast(context: Context, value: Call) -> Value | None:
    """add(x, broadcast_to(y)) -> add(x, y), where the result's shape stays."""
    for index, operand in enumerate(value.inputs):
        if isinstance(operand, Call) and operand.op == "broadcast_to":
            inputs = [*value.inputs[:index], operand.inputs[0], *value.inputs[index + 1 :]]
            other = make_call(value.op, inputs, value.attrs, value.origin)
            if same_type(other.type, value.type):
                return other
    return None


def _pow(context: Context, value: Call) -> Value | None:
    base, exponent = value.inputs
    if not same_type(base.type, value.type):
        return None
    if _filled_with(context, exponent, 1):
        return base
    if _filled_with(context, exponent, 2):
        return call("mul", base, base, origin=value.origin)
    if value.type.dtype in HALVES:
        return None  # a power is rounded once, the others more often
    if _filled_with(context, exponent, 3):
        return call("mul", call("mul", base, base, origin=value.origin), base, origin=value.origin)
    if _filled_with(context, exponent, 0.5):
        return _root(base, value)
    return None


def _root(base: Value, value: Call) -> Value:
    """The power of 0.5 that `value` is: IEEE 754 has square roots differ from it for -inf and -0.0."""
    least, most = (Constant(np.array(x, base.type.dtype)) for x in (-np.inf, np.inf))
    positive = call("abs", call("sqrt", base, origin=value.origin), origin=value.origin)
    return call("where", call("equal", base, least, origin=value.origin), most, positive, origin=value.origin)


def _conv(context: Context, value: Call) -> Value | None:
    """conv(pad(x)) -> conv with more padding, where pad adds zeros to spatial axes only."""
    source = value.inputs[0]
    if not isinstance(source, Call) or source.op != "pad":
        return None
    rank, added = source.type.rank, source.attrs["pads"]
    spatial = rank - 2
    begins, ends = added[:rank], added[rank:]
    lead = (*begins[:2], *ends[:2])
    if source.attrs["mode"] != "constant" or source.attrs["value"] != 0:
        return None
    if not all(isinstance(pad, int) for pad in added) or any(lead):
        return None
    own = value.attrs["pads"] or (0,) * (2 * spatial)
    pads = tuple(a + b for a, b in zip(own, (*begins[2:], *ends[2:]), strict=True))
    attrs = {**value.attrs, "pads": pads}
    return make_call("conv", (source.inputs[0], *value.inputs[1:]), attrs, (*source.origin, *value.origin))


def _idempotent(context: Context, value: Call) -> Value | None:
    source = value.inputs[0]
    return source if isinstance(source, Call) and source.op == value.op else None


def _reduce(context: Context, value: Call) -> Value | None:
    return value.inputs[0] if value.attrs["axes"] == () else None


def _cast(context: Context, value: Call) -> Value | None:
    """A cast to the same dtype goes; of two, the first goes where it loses nothing."""
    same = _same(context, value)
    source = value.inputs[0]
    if same is not None or not isinstance(source, Call) or source.op != "cast":
        return same
    before, between = source.inputs[0].type.dtype, source.type.dtype
    # numpy calls 64-bit integers to float64 safe; the largest are rounded.
    rounds = before in ("int64", "uint64") and between in FLOATS
    if np.can_cast(before, between, "safe") and not rounds:
        return make_call("cast", source.inputs, value.attrs, (*source.origin, *value.origin))
    return None


_RULES: Mapping[str, Callable[[Context, Call], Value | None]] = {
    "identity": _identity,
    "cast": _cast,
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "concat": _concat,
    "pad": _same,
    "broadcast_to": _same,
    "add": _neutral(0, both=True),
    "sub": _neutral(0, both=False),
    "mul": _neutral(1, both=True),
    "div": _neutral(1, both=False),
    "pow": _pow,
    "conv": _conv,
    "relu": _idempotent,
    "abs": _idempotent,
    **dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"), _reduce),
    **dict.fromkeys(
        ("minimum", "maximum", "where", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
        _without_broadcast,
    ),
}
