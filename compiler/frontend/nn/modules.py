"""The layers. Parameters have PyTorch's names and layouts, so that its state dicts load as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from kedge.compiler.frontend.nn import op
from kedge.compiler.frontend.nn.core import Module, Parameter, Tensor, constant_init, per_dim, uniform_init


class Linear(Module):
    """y = x @ weight.T + bias over the last dim of x; weight is (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: str = "float32") -> None:
        init = uniform_init(1 / math.sqrt(in_features))
        self.weight = Parameter((out_features, in_features), dtype, init)
        self.bias = Parameter((out_features,), dtype, init) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return op.linear(x, self.weight, self.bias)


class Conv2d(Module):
    """Convolution of (N, in_channels, H, W); weight is (out_channels, in_channels / groups, KH, KW)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: str = "float32",
    ) -> None:
        kernel = per_dim(kernel_size, 2)
        shape = (out_channels, in_channels // groups, *kernel)
        init = uniform_init(1 / math.sqrt(math.prod(shape[1:])))
        self.weight = Parameter(shape, dtype, init)
        self.bias = Parameter((out_channels,), dtype, init) if bias else None
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        return op.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ConvTranspose2d(Module):
    """Transposed convolution of (N, in_channels, H, W); weight is (in_channels, out_channels / groups, KH, KW)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        dtype: str = "float32",
    ) -> None:
        shape = (in_channels, out_channels // groups, *per_dim(kernel_size, 2))
        init = uniform_init(1 / math.sqrt(math.prod(shape[1:])))
        self.weight = Parameter(shape, dtype, init)
        self.bias = Parameter((out_channels,), dtype, init) if bias else None
        self.stride, self.padding, self.output_padding = stride, padding, output_padding
        self.groups, self.dilation = groups, dilation

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        sizes = (self.stride, self.padding, self.output_padding)
        return op.conv_transpose2d(x, self.weight, self.bias, *sizes, self.groups, self.dilation)


class Upsample(Module):
    """Height and width multiplied by `scale_factor`."""

    def __init__(
        self,
        scale_factor: int | Sequence[int],
        mode: Literal["nearest", "bilinear", "bicubic"] = "nearest",
        align_corners: bool = False,
    ) -> None:
        self.scale_factor, self.align_corners = scale_factor, align_corners
        self.mode: Literal["nearest", "bilinear", "bicubic"] = mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        return op.interpolate(x, self.scale_factor, self.mode, self.align_corners)


class BatchNorm2d(Module):
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, per channel, as at inference."""

    def __init__(self, num_features: int, eps: float = 1e-5, dtype: str = "float32") -> None:
        shape = (num_features,)
        self.weight = Parameter(shape, dtype, constant_init(1.0))
        self.bias = Parameter(shape, dtype, constant_init(0.0))
        self.running_mean = Parameter(shape, dtype, constant_init(0.0))
        self.running_var = Parameter(shape, dtype, constant_init(1.0))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return op.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)


class MaxPool2d(Module):
    """The largest element of each window."""

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        return op.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class AvgPool2d(Module):
    """The mean of each window."""

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        arguments = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return op.avg_pool2d(x, *arguments)


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return op.relu(x)


class Sigmoid(Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return op.sigmoid(x)


class Tanh(Module):
    """The hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return op.tanh(x)


class Softmax(Module):
    """Probabilities along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The shape of x."""
        return op.softmax(x, self.dim)


class Flatten(Module):
    """The dims from `start_dim` to `end_dim` (inclusive) as one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C * H * W) by default."""
        return op.flatten(x, self.start_dim, self.end_dim)


class Dropout(Module):
    """Nothing: kedge compiles for inference. It is here so that models carry over unchanged."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class Sequential(Module):
    """Modules one after the other; parameters are named `0.weight`, `1.weight`, … as in PyTorch."""

    def __init__(self, *modules: Module) -> None:
        for index, module in enumerate(modules):
            setattr(self, str(index), module)

    def forward(self, x: Any) -> Any:
        """What the last module gives."""
        for module in vars(self).values():
            x = module(x)
        return x
