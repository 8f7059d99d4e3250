"""Converters of matrix products, and of normalisation by statistics that are known or of neighbours."""

from __future__ import annotations

from kedge.compiler.dtypes import HALVES
from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.graph.dims import product
from kedge.compiler.graph.ir import Value

_INFERENCE = "export the model for inference: model.eval() in PyTorch, training=TrainingMode.EVAL"


@converter("MatMul")
def _matmul(node: Node) -> Value:
    return node.emit("matmul", node.value(0), node.value(1))


@converter("Gemm")
def _gemm(node: Node) -> Value:
    operands = [node.value(index) for index in range(3) if node.has(index)]
    return node.emit(
        "gemm", *operands, alpha=float(node.attr("alpha", 1.0)), beta=float(node.attr("beta", 1.0)),
        trans_a=bool(node.attr("transA", 0)), trans_b=bool(node.attr("transB", 0)),
    )  # fmt: skip


@converter("BatchNormalization")
def _batch_normalization(node: Node) -> Value:
    if node.attr("training_mode", 0) or node.wants(1):
        raise node.error("it is in training mode and updates its statistics", hint=_INFERENCE)
    x, *statistics = node.values()
    # Since opset 15 the statistics may have another dtype than the data.
    statistics = [s if s.type.dtype == x.type.dtype else node.emit("cast", s, dtype=x.type.dtype) for s in statistics]
    return node.emit("batch_norm", x, *statistics, epsilon=float(node.attr("epsilon", 1e-5)))


@converter("LRN")
def _local_response_normalization(node: Node) -> Value:
    """x / (bias + alpha / size * sum of x² over `size` neighbouring channels) ** beta."""
    x = node.value(0)
    size = int(node.attr("size"))
    if x.type.rank < 2:
        raise node.error(f"its second dim has the channels, and there are {x.type.rank} dims")
    # The window runs over the channels: they become the rows of a picture whose columns are all other dims.
    n, c, *rest = x.type.shape
    rows = node.emit("reshape", node.emit("mul", x, x), shape=(n, 1, c, product(rest)))
    pads = ((size - 1) // 2, 0, size // 2, 0)
    mean = node.emit("avg_pool", rows, kernel=(size, 1), strides=(1, 1), pads=pads, count_include_pad=True)
    mean = node.emit("reshape", mean, shape=x.type.shape)
    scaled = node.emit("mul", mean, node.constant(node.attr("alpha", 1e-4), x.type.dtype))
    base = node.emit("add", scaled, node.constant(node.attr("bias", 1.0), x.type.dtype))
    beta = float(node.attr("beta", 0.75))
    if beta == 0.75 and x.type.dtype not in HALVES:  # what every network has; roots cost a tenth of a power
        root = node.emit("sqrt", base)
        return node.emit("div", x, node.emit("mul", root, node.emit("sqrt", root)))
    return node.emit("div", x, node.emit("pow", base, node.constant(beta, x.type.dtype)))


@converter("Dropout")
def _dropout(node: Node) -> tuple[Value, ...]:
    """Nothing at inference; the mask, where it is asked for, keeps everything."""
    if node.has(2) and bool(node.const(2, "training_mode").reshape(())):
        raise node.error("it is in training mode", hint=_INFERENCE)
    x = node.value(0)
    if not node.wants(1):
        return (x,)
    return x, node.emit("broadcast_to", node.constant(True, "bool"), shape=x.type.shape)
