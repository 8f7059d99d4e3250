"""Rewriting operators that have no lowering of their own into those that have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from kedge.compiler.graph.builder import call
from kedge.compiler.graph.dims import total
from kedge.compiler.graph.ir import Call, Constant, Item, Module, Value
from kedge.compiler.graph.passes.base import Context, rewrite
from kedge.compiler.graph.passes.separate import separate
from kedge.compiler.graph.passes.subpixel import applied_before_order, subpixel
from kedge.compiler.ops import registry
from kedge.compiler.ops.registry import FusionKind


@dataclass(frozen=True, slots=True)
class Legalize:
    """Rewrite gemm, batch_norm, flatten, squeeze, unsqueeze and split into operators that can be lowered, and
    conv_transpose into conv and resize into resample where they can be.

    gemm(a, b, c) {trans_b: true} -> add(matmul(a, transpose(b)), c)
    """

    name: str = "legalize"

    def __call__(self, module: Module) -> Module:
        """The module without such operators."""
        return rewrite(module, _legalize)


def _legalize(context: Context, old: Value, new: Value) -> Value | None:
    if isinstance(new, Item) and isinstance(new.source, Call) and new.source.op == "split":
        return _split_item(new.source, new.index)
    if isinstance(new, Call) and new.op in _RULES:
        return _RULES[new.op](new)
    if isinstance(old, Call) and isinstance(new, Call) and _follows_transposed(context, old):
        return applied_before_order(new)
    return None


def _follows_transposed(context: Context, old: Call) -> bool:
    """Whether a call works element by element on a transposed convolution that nothing else uses."""
    operator = registry.get(old.op)
    if operator.kind is not FusionKind.ELEMENTWISE or not operator.uniform:
        return False
    (source,) = old.inputs
    return isinstance(source, Call) and source.op == "conv_transpose" and context.uses(source) == 1


def _scalar(value: float, like: Value) -> Constant:
    return Constant(np.asarray(value, like.type.dtype))


def _gemm(gemm: Call) -> Value:
    origin, attrs = gemm.origin, gemm.attrs
    a, b = gemm.inputs[:2]
    if attrs["trans_a"]:
        a = call("transpose", a, perm=(1, 0), origin=origin)
    if attrs["trans_b"]:
        b = call("transpose", b, perm=(1, 0), origin=origin)
    result = call("matmul", a, b, origin=origin)
    if attrs["alpha"] != 1:
        result = call("mul", result, _scalar(attrs["alpha"], result), origin=origin)
    if len(gemm.inputs) == 2 or attrs["beta"] == 0:
        return result
    addend = gemm.inputs[2]
    if attrs["beta"] != 1:
        addend = call("mul", addend, _scalar(attrs["beta"], addend), origin=origin)
    return call("add", result, addend, origin=origin)


def _batch_norm(norm: Call) -> Value:
    """x · f + (bias - mean · f) with f = scale / sqrt(var + epsilon), all per channel."""
    origin = norm.origin
    x, scale, bias, mean, var = norm.inputs
    shifted = call("add", var, _scalar(norm.attrs["epsilon"], var), origin=origin)
    factor = call("mul", scale, call("rsqrt", shifted, origin=origin), origin=origin)
    shift = call("sub", bias, call("mul", mean, factor, origin=origin), origin=origin)
    shape = (x.type.shape[1], *[1] * (x.type.rank - 2))
    if len(shape) > 1:
        factor = call("reshape", factor, shape=shape, origin=origin)
        shift = call("reshape", shift, shape=shape, origin=origin)
    return call("add", call("mul", x, factor, origin=origin), shift, origin=origin)


def _reshape(old: Call) -> Value:
    return call("reshape", old.inputs[0], shape=old.type.shape, origin=old.origin)


def _split_item(split: Call, index: int) -> Value:
    sizes = split.attrs["sizes"]
    start, end = total(sizes[:index]), total(sizes[: index + 1])
    axis = split.attrs["axis"]
    return call("slice", split.inputs[0], starts=(start,), ends=(end,), axes=(axis,), origin=split.origin)


_RULES: Mapping[str, Callable[[Call], Value | None]] = {
    "gemm": _gemm,
    "batch_norm": _batch_norm,
    "conv_transpose": subpixel,
    "resize": separate,
    "flatten": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
}
