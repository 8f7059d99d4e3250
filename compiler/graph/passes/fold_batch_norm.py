"""Batch normalization at inference is a factor and a shift per channel: the weights before it can carry both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.compiler import pages
from kedge.compiler.graph.builder import make_call
from kedge.compiler.graph.interp import Array
from kedge.compiler.graph.ir import Call, Constant, Module, Param, Value
from kedge.compiler.graph.passes.base import Context, rewrite, value_key


@dataclass(frozen=True, slots=True)
class FoldBatchNorm:
    """Fold batch norms with known statistics into the convolution or matrix product whose only user they are.

    batch_norm(conv(x, @w, @b), @scale, @bias, @mean, @var) -> conv(x, @w.folded, @b.folded)

    The same for conv_transpose, gemm, matmul, and add(matmul, bias). Computed in float64.
    """

    name: str = "fold-batch-norm"

    def __call__(self, module: Module) -> Module:
        """The module with such batch norms folded."""
        return rewrite(module, _fold)


def _fold(context: Context, old: Value, new: Value) -> Value | None:
    if not isinstance(new, Call) or new.op != "batch_norm" or not isinstance(old, Call):
        return None
    producer = new.inputs[0]
    statistics = [context.known(value) for value in new.inputs[1:]]
    if not isinstance(producer, Call) or context.uses(old.inputs[0]) != 1:
        return None
    wide = [array.astype(np.float64) for array in statistics if array is not None]
    if len(wide) < 4:
        return None
    scale, bias, mean, var = wide
    factor = scale / np.sqrt(var + new.attrs["epsilon"])
    folder = _Folder(context, new, factor, bias - mean * factor)
    if producer.op in ("conv", "conv_transpose", "gemm"):
        return folder.into_weights(producer)
    if producer.op == "matmul":
        return folder.into_matmul(producer, None)
    if producer.op == "add":
        return _through_add(context, folder, old, producer)
    return None


def _through_add(context: Context, folder: _Folder, old: Call, producer: Call) -> Value | None:
    before = old.inputs[0]
    assert isinstance(before, Call)  # rewriting keeps operators
    for index in (0, 1):
        product, addend = producer.inputs[index], producer.inputs[1 - index]
        if isinstance(product, Call) and product.op == "matmul" and context.uses(before.inputs[index]) == 1:
            return folder.into_matmul(product, addend)
    return None


class _Folder:
    def __init__(self, context: Context, norm: Call, factor: Array, shift: Array) -> None:
        self._context = context
        self._norm = norm
        self._factor = factor
        self._shift = shift

    def into_weights(self, call: Call) -> Value | None:
        """conv, conv_transpose or gemm: channels are the outputs of the weight, and the addend is per channel."""
        weight = self._context.known(call.inputs[1])
        addend = self._context.known(call.inputs[2]) if len(call.inputs) == 3 else None
        if weight is None or (len(call.inputs) == 3 and addend is None):
            return None
        beta = call.attrs.get("beta", 1.0)
        if addend is None or beta == 0:
            beta, addend = 1.0, np.zeros(1)
        axis = 0 if call.op == "conv" or call.attrs.get("trans_b") else 1
        if call.op == "gemm" and addend.ndim == 2 and addend.shape[0] != 1:
            return None
        attrs = {**call.attrs, "beta": beta} if call.op == "gemm" else dict(call.attrs)
        bias = addend.reshape(-1).astype(np.float64) * self._factor + self._shift / beta
        was = call.inputs[2] if len(call.inputs) == 3 else None
        groups = call.attrs["groups"] if call.op == "conv_transpose" else 1
        new_weight = self._param(self._scaled(weight, axis, groups), call.inputs[1], weight, ("weight", axis))
        new_bias = self._param(bias, was, weight, ("bias", beta))
        return make_call(call.op, (call.inputs[0], new_weight, new_bias), attrs, (*call.origin, *self._norm.origin))

    def into_matmul(self, call: Call, addend: Value | None) -> Value | None:
        """matmul of rank 2, with the addend that was between."""
        weight = self._context.known(call.inputs[1])
        known = np.zeros(1) if addend is None else self._context.known(addend)
        if weight is None or known is None or weight.ndim != 2 or call.type.rank != 2:
            return None
        if self._norm.inputs[0].type.rank != 2 or (known.ndim == 2 and known.shape[0] != 1):
            return None
        origin = (*call.origin, *self._norm.origin)
        new_weight = self._param(self._scaled(weight, 1), call.inputs[1], weight, ("weight", 1))
        bias = known.reshape(-1).astype(np.float64) * self._factor + self._shift
        product = make_call("matmul", (call.inputs[0], new_weight), {}, origin)
        return make_call("add", (product, self._param(bias, addend, weight, ("bias", 1.0))), {}, origin)

    def _scaled(self, weight: Array, axis: int, groups: int = 1) -> Array:
        """The weight with its outputs, along `axis`, scaled: each of `groups` parts of axis 0 has its own.

        Factors and products are float64, a cache's worth at a time; results are rounded to the weight's dtype.
        """
        shape = [groups, *(1 for _ in weight.shape)]
        shape[1 + axis] = -1
        parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        result = pages.empty(parts.shape, parts.dtype)
        factor = np.broadcast_to(self._factor.reshape(shape), parts.shape)
        rows = max(1, parts.shape[1] * pages.PIECE_BYTES // max(1, parts.nbytes))

        def scale(first: int) -> None:
            own = np.s_[:, first : first + rows]
            np.multiply(parts[own], factor[own], out=result[own], dtype=np.float64, casting="same_kind")

        pages.spread(scale, range(0, parts.shape[1], rows))
        return result.reshape(weight.shape)

    def _param(self, data: Array, was: Value | None, weight: Array, what: tuple[str, float]) -> Value:
        data = data.astype(weight.dtype, copy=False)
        like = was if was is not None else self._norm.inputs[2]  # the norm's own bias lends its name
        if not isinstance(like, Param):
            return Constant(data)
        # Functions that share parameters share what becomes of them.
        key = (what, was is None, self._norm.attrs["epsilon"], value_key(like), *map(value_key, self._norm.inputs[1:]))
        return self._context.new_param(data, like.name, key=key)
