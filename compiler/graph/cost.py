"""How much arithmetic and memory traffic a value costs, as dims (numbers, or expressions over symbols)."""

from __future__ import annotations

import numpy as np

from kedge.compiler.graph.dims import product, total
from kedge.compiler.graph.ir import Call, Constant, Fused, TensorType, Value
from kedge.compiler.ops import registry
from kedge.compiler.ops.registry import FusionKind
from kedge.compiler.ops.winograd import KERNEL
from kedge.compiler.tir.expr import Dim

#: Operators that only move or rename elements.
_FREE = frozenset({"reshape", "flatten", "squeeze", "unsqueeze", "identity", "split", "broadcast_to", "cast"})


def flops(value: Value) -> Dim:
    """Floating point (or integer) operations of a call or a fused group; a multiply-add counts as two.

    They are those that the model asks for, whatever algorithm or layout a pass has chosen.
    """
    if isinstance(value, Fused):
        return total(flops(inner) for inner in value.body.values())
    if not isinstance(value, Call) or value.op in _FREE:
        return 0
    inputs = [operand.type for operand in value.inputs]
    if value.op == "conv":
        return product([2, *value.type.shape, *inputs[1].shape[1:]])
    if value.op == "conv_transpose":
        return product([2, *inputs[0].shape, *inputs[1].shape[1:]])
    if value.op in ("conv_blocked", "depthwise_blocked"):
        return product([2, *value.type.shape, *inputs[1].shape[1:-1]])
    if value.op == "conv_winograd":
        # Those of the convolution that it replaces: the algorithm takes fewer, which is its gain.
        return product([2, *value.type.shape, KERNEL**2, *inputs[1].shape[3:5]])
    if value.op in ("matmul", "packed_matmul", "gemm"):
        inner = inputs[0].shape[-2 if value.attrs.get("trans_a") else -1]
        return product([2, *value.type.shape, inner])
    if value.op in ("max_pool", "avg_pool"):
        return product([*value.type.shape, *value.attrs["kernel"]])
    if value.op in ("softmax", "log_softmax"):
        return product([5, *value.type.shape])
    kind = registry.get(value.op).kind
    if kind is FusionKind.REDUCTION:
        return elements(inputs[0])
    return 0 if kind is FusionKind.INJECTIVE else elements(value.type)


def elements(type_: TensorType) -> Dim:
    """The number of elements of a tensor."""
    return product(type_.shape)


def nbytes(type_: TensorType) -> Dim:
    """The bytes of a tensor, densely packed."""
    return product([*type_.shape, np.dtype(type_.dtype).itemsize])


def traffic(value: Value) -> Dim:
    """The bytes that a call or fused group reads and writes at least: its inputs and its results, once each."""
    if not isinstance(value, (Call, Fused)):
        return 0
    operands = {id(operand): operand for operand in value.inputs if not isinstance(operand, Constant)}
    read = [nbytes(operand.type) for operand in operands.values()]
    return total([*read, *map(nbytes, value.types)])
