"""Operators for use inside `forward`: `nn.op.relu(x)`, `nn.op.matmul(a, b)`, …

Names and argument order follow numpy and PyTorch; images are (N, C, H, W). Every function takes tensors and
parameters, and raises `ShapeError` where they do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from kedge.compiler.errors import ShapeError
from kedge.compiler.frontend.nn.core import Parameter, Tensor, TensorLike, as_value, binary, emit, per_dim
from kedge.compiler.graph.builder import call, make_call
from kedge.compiler.graph.dims import product
from kedge.compiler.graph.ir import Item
from kedge.compiler.tir.expr import Dim

Operand: TypeAlias = Tensor | Parameter


def relu(x: Operand) -> Tensor:
    """max(x, 0)."""
    return emit("relu", x)


def leaky_relu(x: Operand, negative_slope: float = 0.01) -> Tensor:
    """x above zero, negative_slope * x below."""
    return emit("leaky_relu", x, alpha=negative_slope)


def sigmoid(x: Operand) -> Tensor:
    """1 / (1 + exp(-x))."""
    return emit("sigmoid", x)


def tanh(x: Operand) -> Tensor:
    """The hyperbolic tangent."""
    return emit("tanh", x)


def silu(x: Operand) -> Tensor:
    """x * sigmoid(x)."""
    return binary("mul", x, sigmoid(x))


def gelu(x: Operand) -> Tensor:
    """x * Φ(x), Φ the standard normal distribution function, through erf."""
    return binary("mul", binary("mul", x, 0.5), erf(binary("mul", x, 0.5**0.5)) + 1.0)


def exp(x: Operand) -> Tensor:
    """e to the power of x."""
    return emit("exp", x)


def log(x: Operand) -> Tensor:
    """The natural logarithm."""
    return emit("log", x)


def sqrt(x: Operand) -> Tensor:
    """The square root."""
    return emit("sqrt", x)


def rsqrt(x: Operand) -> Tensor:
    """1 / sqrt(x)."""
    return emit("rsqrt", x)


def erf(x: Operand) -> Tensor:
    """The error function."""
    return emit("erf", x)


def abs(x: Operand) -> Tensor:  # noqa: A001 - numpy's name
    """The absolute value."""
    return emit("abs", x)


def neg(x: Operand) -> Tensor:
    """-x."""
    return emit("neg", x)


def clip(x: Operand, low: float | None = None, high: float | None = None) -> Tensor:
    """min(max(x, low), high)."""
    return emit("clip", x, min=low, max=high)


def astype(x: Operand, dtype: str) -> Tensor:
    """x converted to `dtype`; floats are cut off towards zero."""
    return emit("cast", x, dtype=dtype)


def add(a: TensorLike, b: TensorLike) -> Tensor:
    """a + b."""
    return binary("add", a, b)


def subtract(a: TensorLike, b: TensorLike) -> Tensor:
    """a - b."""
    return binary("sub", a, b)


def multiply(a: TensorLike, b: TensorLike) -> Tensor:
    """a * b."""
    return binary("mul", a, b)


def divide(a: TensorLike, b: TensorLike) -> Tensor:
    """a / b; integers round towards zero."""
    return binary("div", a, b)


def minimum(a: TensorLike, b: TensorLike) -> Tensor:
    """The smaller of each pair of elements."""
    return binary("minimum", a, b)


def maximum(a: TensorLike, b: TensorLike) -> Tensor:
    """The larger of each pair of elements."""
    return binary("maximum", a, b)


def less(a: TensorLike, b: TensorLike) -> Tensor:
    """a < b, as bool."""
    return binary("less", a, b)


def greater(a: TensorLike, b: TensorLike) -> Tensor:
    """a > b, as bool."""
    return binary("greater", a, b)


def equal(a: TensorLike, b: TensorLike) -> Tensor:
    """a == b, as bool."""
    return binary("equal", a, b)


def where(condition: Operand, a: TensorLike, b: TensorLike) -> Tensor:
    """a where `condition` holds, else b."""
    like = next((operand for operand in (a, b) if isinstance(operand, Tensor)), None)
    return Tensor(call("where", as_value(condition), as_value(a, like), as_value(b, like)))


def matmul(a: Operand, b: Operand) -> Tensor:
    """numpy's matrix product: batch dims broadcast."""
    return emit("matmul", a, b)


def linear(x: Operand, weight: Operand, bias: Operand | None = None) -> Tensor:
    """x @ weight.T + bias, over the last dim of x; weight is (out_features, in_features)."""
    x_rank = as_value(x).type.rank
    if x_rank == 2:
        operands = [x, weight] if bias is None else [x, weight, bias]
        return emit("gemm", *operands, trans_b=True)
    product = emit("matmul", x, permute(weight, (1, 0)))
    return product if bias is None else binary("add", product, bias)


def conv2d(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of (N, C, H, W) with (O, C / groups, KH, KW); the same padding at both ends of a dim."""
    operands = [x, weight] if bias is None else [x, weight, bias]
    strides, dilations = per_dim(stride, 2), per_dim(dilation, 2)
    pads = per_dim(padding, 2) * 2
    return emit("conv", *operands, strides=strides, pads=pads, dilations=dilations, groups=groups)


def conv_transpose2d(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The transpose of `conv2d`: (N, C, H, W) with (C, O / groups, KH, KW); `padding` cuts elements off all around."""
    operands = [x, weight] if bias is None else [x, weight, bias]
    return emit(
        "conv_transpose", *operands, strides=per_dim(stride, 2), pads=per_dim(padding, 2) * 2,
        dilations=per_dim(dilation, 2), groups=groups, output_padding=per_dim(output_padding, 2),
    )  # fmt: skip


def interpolate(
    x: Operand,
    scale_factor: int | Sequence[int],
    mode: Literal["nearest", "bilinear", "bicubic"] = "nearest",
    align_corners: bool = False,
) -> Tensor:
    """(N, C, H, W) with H and W multiplied by `scale_factor`, as PyTorch's function of that name has it."""
    shape, factors = as_value(x).type.shape, per_dim(scale_factor, 2)
    coordinates = "asymmetric" if mode == "nearest" else "align_corners" if align_corners else "half_pixel"
    names = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}
    if mode not in names or (mode == "nearest" and align_corners):
        raise ShapeError(
            f"interpolate: mode {mode!r} with align_corners={align_corners}",
            hint=f"mode is one of {', '.join(names)}; nearest has no corners to align",
        )
    sizes = (*shape[:2], *(product(pair) for pair in zip(shape[2:], factors, strict=True)))
    scales = (1.0, 1.0, *map(float, factors))
    return emit(
        "resize", x, sizes=sizes, scales=scales, mode=names[mode], coordinates=coordinates, rounding="floor",
    )  # fmt: skip


def max_pool2d(
    x: Operand,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window; the stride is the window's size unless given."""
    kernel = per_dim(kernel_size, 2)
    strides = kernel if stride is None else per_dim(stride, 2)
    pads, dilations = per_dim(padding, 2) * 2, per_dim(dilation, 2)
    return emit("max_pool", x, kernel=kernel, strides=strides, pads=pads, dilations=dilations, ceil_mode=ceil_mode)


def avg_pool2d(
    x: Operand,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window; the stride is the window's size unless given."""
    kernel = per_dim(kernel_size, 2)
    strides = kernel if stride is None else per_dim(stride, 2)
    return emit(
        "avg_pool", x, kernel=kernel, strides=strides, pads=per_dim(padding, 2) * 2, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
    )  # fmt: skip


def batch_norm(x: Operand, weight: Operand, bias: Operand, mean: Operand, var: Operand, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, per channel (axis 1)."""
    return emit("batch_norm", x, weight, bias, mean, var, epsilon=eps)


def softmax(x: Operand, dim: int = -1) -> Tensor:
    """Probabilities along `dim`."""
    return emit("softmax", x, axis=dim)


def log_softmax(x: Operand, dim: int = -1) -> Tensor:
    """The logarithm of `softmax`."""
    return emit("log_softmax", x, axis=dim)


def sum(x: Operand, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The sum over `axis` (None: all)."""
    return _reduce("reduce_sum", x, axis, keepdims)


def mean(x: Operand, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """The mean over `axis` (None: all)."""
    return _reduce("reduce_mean", x, axis, keepdims)


def max(x: Operand, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The largest element over `axis` (None: all)."""
    return _reduce("reduce_max", x, axis, keepdims)


def min(x: Operand, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:  # noqa: A001
    """The smallest element over `axis` (None: all)."""
    return _reduce("reduce_min", x, axis, keepdims)


def _reduce(op: str, x: Operand, axis: int | Sequence[int] | None, keepdims: bool) -> Tensor:
    axes = None if axis is None else per_dim(axis, 1)
    return emit(op, x, axes=axes, keepdims=keepdims)


def argmax(x: Operand, axis: int, keepdims: bool = False) -> Tensor:
    """The index (int64) of the largest element along `axis`, the first one where there are several."""
    return emit("argmax", x, axis=axis, keepdims=keepdims)


def reshape(x: Operand, shape: Sequence[Dim]) -> Tensor:
    """The same elements in another shape; one dim may be -1."""
    return emit("reshape", x, shape=tuple(shape))


def flatten(x: Operand, start_dim: int = 1, end_dim: int = -1) -> Tensor:
    """The dims from `start_dim` to `end_dim` (inclusive) as one."""
    shape = as_value(x).type.shape
    start, end = start_dim % len(shape), end_dim % len(shape)
    merged = product(shape[start : end + 1])
    return reshape(x, (*shape[:start], merged, *shape[end + 1 :]))


def permute(x: Operand, axes: Sequence[int]) -> Tensor:
    """The dims in another order."""
    return emit("transpose", x, perm=tuple(axes))


def squeeze(x: Operand, axis: int | Sequence[int]) -> Tensor:
    """Without the dims `axis`, each of size 1."""
    return emit("squeeze", x, axes=per_dim(axis, 1))


def unsqueeze(x: Operand, axis: int | Sequence[int]) -> Tensor:
    """With new dims of size 1 at `axis` of the result."""
    return emit("unsqueeze", x, axes=per_dim(axis, 1))


def concat(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """The tensors one after the other along `axis`."""
    return emit("concat", *tensors, axis=axis)


def split(x: Operand, sizes: Sequence[int], axis: int = 0) -> tuple[Tensor, ...]:
    """Parts of these sizes along `axis`."""
    source = make_call("split", (as_value(x),), {"axis": axis, "sizes": tuple(sizes)})
    return tuple(Tensor(Item(source, index)) for index in range(len(source.types)))


def broadcast_to(x: Operand, shape: Sequence[Dim]) -> Tensor:
    """x repeated along its dims of size 1 to fill `shape`."""
    return emit("broadcast_to", x, shape=tuple(shape))


def pad(
    x: Operand,
    pads: Sequence[int],
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant",
    value: float = 0.0,
) -> Tensor:
    """x with elements added around it; `pads` are all begins and then all ends."""
    return emit("pad", x, pads=tuple(pads), mode=mode, value=value)


def take(x: Operand, indices: Operand, axis: int = 0) -> Tensor:
    """The elements at `indices` along `axis` (an embedding is take(weight, indices))."""
    return emit("gather", x, indices, axis=axis)
