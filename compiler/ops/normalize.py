"""Normalization at inference time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.registry import Array, FusionKind, OpDef


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x = types[0]
    common.require_same_dtype(types)
    common.require_dtype(x, FLOATS)
    common.require(x.rank >= 2, "the input must have rank 2 or more: batch, channels, …")
    for name, type_ in zip(("scale", "bias", "mean", "var"), types[1:], strict=True):
        common.require(
            type_.rank == 1 and same_dim(type_.shape[0], x.shape[1]), f"{name} must have one number per channel"
        )
    return (x,)


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, scale, bias, mean, var = map(common.wide, arrays)
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    factor = scale / np.sqrt(var + x.dtype.type(attrs["epsilon"]))
    result = (x - mean.reshape(per_channel)) * factor.reshape(per_channel) + bias.reshape(per_channel)
    return (result.astype(arrays[0].dtype),)


registry.register(
    OpDef("batch_norm", FusionKind.BROADCAST, _infer, _reference, None, {"epsilon": 1e-5}, (5, 5), uniform=False)
)  # fmt: skip
