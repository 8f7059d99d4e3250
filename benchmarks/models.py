"""The networks that the CPU benchmarks run: well-known architectures with seeded random weights; nothing is downloaded.

python benchmarks/models.py                                     # the names, with operations and weights
python benchmarks/models.py resnet18 -o resnet18.onnx           # one of them, as the benchmarks build it
python benchmarks/models.py unet --size 96x160 --batch 2 -o unet.onnx

Layers have the shapes and names of torchvision's exports. While a network is built, the expected mean square of every
tensor is followed, and each layer's weights are scaled by it (He et al. 2015, arXiv:1502.01852, for whatever comes
before a layer), so that activations stay near 1 however deep it is. Batch normalization has the statistics that a
trained network would have there, up to some chance.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
OPSET = 21


@dataclass(frozen=True)
class Model:
    """A network: `build(net, image, width)` returns its result.

    `size` is (height, width) of an image of `channels`, or what the network takes instead; `()` means no image.
    """

    name: str
    title: str
    build: Callable[[Net, str, float], str]
    size: tuple[int, ...] = (224, 224)
    batch: int = 1
    channels: int = 3

    @property
    def input_name(self) -> str:
        return "image" if self.size else "x"

    def shape(self, size: tuple[int, ...] | None = None, batch: int | None = None) -> tuple[int, ...]:
        """Shape of the input; another size is for images only."""
        return (batch or self.batch, *((self.channels, *(size or self.size)) if self.size else (784,)))

    def make(self, size: tuple[int, ...] | None = None, batch: int | None = None, width: float = 1.0) -> Net:
        """The network. `width` multiplies the channels of all layers, for quick runs."""
        net = Net(self.name)
        shape = self.shape(size, batch)
        net.finish(self.build(net, net.input(self.input_name, shape), width))
        return net

    def inputs(self, size: tuple[int, ...] | None = None, batch: int | None = None) -> dict[str, Array]:
        """Seeded inputs with a mean square of 1."""
        rng = np.random.default_rng(1)
        return {self.input_name: rng.standard_normal(self.shape(size, batch), np.float32)}


class Net:
    """An ONNX graph in the making: each method adds a layer, and gives the name of its result.

    `shapes` are known for all tensors, `power` is the mean square that each is expected to have; `flops` counts a
    multiply-add of convolutions and matrix products as two.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.power: dict[str, float] = {}
        self.flops = 0
        self.parameters = 0
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[str] = []
        self._outputs: list[str] = []

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        self._inputs.append(name)
        self.shapes[name], self.power[name] = shape, 1.0
        return name

    def finish(self, output: str) -> None:
        self._outputs.append(output)

    def proto(self) -> onnx.ModelProto:
        ports = ([self._value(name) for name in names] for names in (self._inputs, self._outputs))
        graph = helper.make_graph(self._nodes, self.name, *ports, self._weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)

    def save(self, path: Path) -> Path:
        onnx.save(self.proto(), path)
        return path

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])

    def constant(self, name: str, array: Array) -> str:
        self._weights.append(numpy_helper.from_array(array, name))
        self.parameters += array.size if array.dtype == np.float32 else 0
        return name

    def normal(self, name: str, shape: Sequence[int], deviation: float, mean: float = 0.0) -> str:
        values = self._rng.standard_normal(shape, np.float32)
        return self.constant(name, values * np.float32(deviation) + np.float32(mean))

    def uniform(self, name: str, shape: Sequence[int], low: float, high: float) -> str:
        return self.constant(name, self._rng.uniform(low, high, shape).astype(np.float32))

    def node(
        self, kind: str, name: str, inputs: Sequence[str], shape: tuple[int, ...], power: float, **attributes: Any
    ) -> str:
        """Any operator with one result, which has the node's name."""
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        self.shapes[name], self.power[name] = shape, power
        return name

    # Layers with weights ----------------------------------------------------------------------------------------

    def conv(
        self, name: str, x: str, channels: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False,
        pad: int | None = None, dilation: int = 1,
    ) -> str:  # fmt: skip
        """A convolution of as many dims as `x` has; padded to keep the size unless `pad` is given."""
        batch, channels_in, *size = self.shapes[x]
        rank, reach = len(size), (kernel - 1) * dilation + 1
        pad = reach // 2 if pad is None else pad
        out = tuple((edge + 2 * pad - reach) // stride + 1 for edge in size)
        taps = channels_in // groups * kernel**rank
        weights = (channels, channels_in // groups, *[kernel] * rank)
        inputs = [x, self.normal(f"{name}.weight", weights, 1 / math.sqrt(taps * self.power[x]))]
        if bias:
            inputs.append(self.normal(f"{name}.bias", (channels,), 0.1))
        self.flops += 2 * batch * channels * math.prod(out) * taps
        return self.node(
            "Conv", name, inputs, (batch, channels, *out), 1.0, kernel_shape=[kernel] * rank, strides=[stride] * rank,
            pads=[pad] * 2 * rank, group=groups, dilations=[dilation] * rank,
        )  # fmt: skip

    def up_conv(
        self, name: str, x: str, channels: int, kernel: int = 2, stride: int = 2, pad: int = 0, *, bias: bool = True
    ) -> str:
        """A transposed convolution; one that doubles the size unless told otherwise."""
        batch, channels_in, *size = self.shapes[x]
        out = tuple((edge - 1) * stride + kernel - 2 * pad for edge in size)
        shape = (channels_in, channels, *[kernel] * len(size))
        taps = channels_in * (kernel / stride) ** len(size)  # that add to each result
        inputs = [x, self.normal(f"{name}.weight", shape, 1 / math.sqrt(taps * self.power[x]))]
        if bias:
            inputs.append(self.normal(f"{name}.bias", (channels,), 0.1))
        self.flops += 2 * batch * channels * math.prod(size) * channels_in * kernel ** len(size)
        return self.node(
            "ConvTranspose", name, inputs, (batch, channels, *out), 1.0, kernel_shape=[kernel] * len(size),
            strides=[stride] * len(size), pads=[pad] * 2 * len(size), group=1, dilations=[1] * len(size),
        )  # fmt: skip

    def gemm(self, name: str, x: str, features: int) -> str:
        """A fully connected layer of a matrix, its weights as PyTorch keeps them: [out, in]."""
        batch, size = self.shapes[x]
        deviation = 1 / math.sqrt(size * self.power[x])
        inputs = [
            x,
            self.normal(f"{name}.weight", (features, size), deviation),
            self.normal(f"{name}.bias", (features,), 0.1),
        ]
        self.flops += 2 * batch * size * features
        return self.node("Gemm", name, inputs, (batch, features), 1.0, alpha=1.0, beta=1.0, transB=1)

    def linear(self, name: str, x: str, features: int) -> str:
        """A fully connected layer over the last dim of any rank: MatMul, then Add."""
        *outer, size = self.shapes[x]
        shape = (*outer, features)
        weight = self.normal(f"{name}.weight", (size, features), 1 / math.sqrt(size * self.power[x]))
        self.flops += 2 * math.prod(shape) * size
        product = self.node("MatMul", f"{name}.matmul", [x, weight], shape, 1.0)
        return self.node("Add", name, [product, self.normal(f"{name}.bias", (features,), 0.1)], shape, 1.0)

    def batch_norm(self, name: str, x: str, gain: float = 1.0) -> str:
        """Batch normalization in inference; its scale is near `gain`."""
        channels, power = (self.shapes[x][1],), self.power[x]
        inputs = [
            x,
            self.uniform(f"{name}.weight", channels, 0.8 * gain, 1.2 * gain),
            self.normal(f"{name}.bias", channels, 0.1 * gain),
            self.normal(f"{name}.running_mean", channels, 0.1 * math.sqrt(power)),
            self.uniform(f"{name}.running_var", channels, 0.8 * power, 1.2 * power),
        ]
        return self.node("BatchNormalization", name, inputs, self.shapes[x], gain**2, epsilon=1e-5, momentum=0.9)

    def layer_norm(self, name: str, x: str) -> str:
        """Over the last dim."""
        size = self.shapes[x][-1:]
        inputs = [x, self.uniform(f"{name}.weight", size, 0.8, 1.2), self.normal(f"{name}.bias", size, 0.1)]
        return self.node("LayerNormalization", name, inputs, self.shapes[x], 1.0, axis=-1, epsilon=1e-6)

    # Functions of one element -----------------------------------------------------------------------------------

    def relu(self, name: str, x: str, power: float | None = None) -> str:
        """Half of the power is left, unless it is known better."""
        return self.node("Relu", name, [x], self.shapes[x], self.power[x] / 2 if power is None else power)

    def relu6(self, name: str, x: str) -> str:
        bounds = [self.scalar("relu6.min", 0.0), self.scalar("relu6.max", 6.0)]
        return self.node("Clip", name, [x, *bounds], self.shapes[x], self.power[x] / 2)

    def scalar(self, name: str, value: float) -> str:
        """One number, kept once for all its users."""
        if all(weight.name != name for weight in self._weights):
            self.constant(name, np.float32(value)[()].reshape(()))
        return name

    def swish(self, name: str, x: str) -> str:
        """x · sigmoid(x), in two operators, as PyTorch exports SiLU."""
        gate = self.node("Sigmoid", f"{name}.sigmoid", [x], self.shapes[x], 0.3)
        return self.node("Mul", name, [x, gate], self.shapes[x], 0.36 * self.power[x])

    def gelu(self, name: str, x: str) -> str:
        return self.node("Gelu", name, [x], self.shapes[x], 0.43 * self.power[x])

    def add(self, name: str, a: str, b: str) -> str:
        return self.node("Add", name, [a, b], self.shapes[a], self.power[a] + self.power[b])

    # Moving and gathering ---------------------------------------------------------------------------------------

    def pool(self, kind: str, name: str, x: str, kernel: int, stride: int, pad: int = 0) -> str:
        """MaxPool or AveragePool."""
        batch, channels, *size = self.shapes[x]
        out = tuple((edge + 2 * pad - kernel) // stride + 1 for edge in size)
        power = self.power[x] * ((1.7 if kernel == 2 else 4) if kind == "MaxPool" else 0.7)
        return self.node(
            kind, name, [x], (batch, channels, *out), power, kernel_shape=[kernel] * len(size),
            strides=[stride] * len(size), pads=[pad] * 2 * len(size),
        )  # fmt: skip

    def global_pool(self, name: str, x: str) -> str:
        batch, channels, *size = self.shapes[x]
        return self.node("GlobalAveragePool", name, [x], (batch, channels, *[1] * len(size)), 0.9 * self.power[x])

    def flatten(self, name: str, x: str) -> str:
        batch, *rest = self.shapes[x]
        return self.node("Flatten", name, [x], (batch, math.prod(rest)), self.power[x], axis=1)

    def transpose(self, name: str, x: str, perm: Sequence[int]) -> str:
        shape = tuple(self.shapes[x][axis] for axis in perm)
        return self.node("Transpose", name, [x], shape, self.power[x], perm=list(perm))

    def reshape(self, name: str, x: str, shape: tuple[int, ...]) -> str:
        target = self.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.node("Reshape", name, [x, target], shape, self.power[x])

    def upsample(self, name: str, x: str) -> str:
        """Twice the size, each place four times."""
        batch, channels, *size = self.shapes[x]
        scales = self.constant(f"{name}.scales", np.array([1, 1, 2, 2], np.float32))
        return self.node(
            "Resize", name, [x, "", scales], (batch, channels, *(2 * edge for edge in size)), self.power[x],
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    def concat(self, name: str, parts: Sequence[str]) -> str:
        """Along the channels."""
        batch, _, *size = self.shapes[parts[0]]
        channels = [self.shapes[part][1] for part in parts]
        power = sum(count * self.power[part] for count, part in zip(channels, parts, strict=True)) / sum(channels)
        return self.node("Concat", name, parts, (batch, sum(channels), *size), power, axis=1)

    def halves(self, name: str, x: str) -> tuple[str, str]:
        """The first and the second half of the channels."""
        batch, count, *size = self.shapes[x]
        names = (f"{name}.0", f"{name}.1")
        self._nodes.append(helper.make_node("Split", [x], list(names), name=name, axis=1, num_outputs=2))
        for half in names:
            self.shapes[half], self.power[half] = (batch, count // 2, *size), self.power[x]
        return names

    def shuffle(self, name: str, x: str) -> str:
        """Channels of both halves in turn: reshape, transpose, reshape."""
        batch, count, height, width = self.shapes[x]
        for step, shape in (
            ("apart", (batch, 2, count // 2, height, width)),
            ("together", (batch, count, height, width)),
        ):
            sizes = self.constant(f"{name}.{step}.shape", np.array(shape, np.int64))
            x = self.node("Reshape", f"{name}.{step}", [x, sizes], shape, self.power[x])
            x = self.transpose(f"{name}.turned", x, (0, 2, 1, 3, 4)) if step == "apart" else x
        return x


def channels(count: int, width: float) -> int:
    """A layer's channels in a network of another width: multiples of 8, at least 8."""
    return count if width == 1 else max(8, round(count * width / 8) * 8)


def mlp(net: Net, x: str, width: float) -> str:
    hidden = net.relu("relu", net.gemm("fc1", x, channels(256, width)))
    return net.gemm("fc2", hidden, 10)


def classifier(net: Net, x: str, name: str = "fc", classes: int = 1000) -> str:
    return net.gemm(name, net.flatten("flatten", net.global_pool("avgpool", x)), classes)


def resnet(
    net: Net, x: str, width: float, depths: Sequence[int], *, bottleneck: bool, groups: int = 1
) -> str:  # fmt: skip
    """ResNet v1.5 (He et al., arXiv:1512.03385; the stride is in the 3x3 convolution).

    With `groups` ResNeXt (Xie et al., arXiv:1611.05431): 3x3 convolutions in groups, over twice as many channels.
    """
    x = net.batch_norm("bn1", net.conv("conv1", x, channels(64, width), 7, 2))
    x = net.pool("MaxPool", "maxpool", net.relu("relu", x), 3, 2, 1)
    for stage, depth in enumerate(depths):
        inner = channels(64 << stage, width)
        for number in range(depth):
            stride = 2 if stage and not number else 1
            x = residual(net, f"layer{stage + 1}.{number}", x, inner, stride, bottleneck=bottleneck, groups=groups)
    return classifier(net, x)


def residual(net: Net, name: str, x: str, inner: int, stride: int, *, bottleneck: bool, groups: int = 1) -> str:
    outer = 4 * inner if bottleneck else inner
    if groups > 1:
        inner *= 2
        groups = min(groups, inner // 4)  # in narrow networks, too, a group has four channels or more
    steps = [(inner, 1, 1), (inner, 3, stride), (outer, 1, 1)] if bottleneck else [(inner, 3, stride), (inner, 3, 1)]
    y = x
    for number, (size, kernel, step) in enumerate(steps, 1):
        last = number == len(steps)
        y = net.conv(f"{name}.conv{number}", y, size, kernel, step, groups=groups if kernel == 3 else 1)
        y = net.batch_norm(f"{name}.bn{number}", y, 0.5 if last else 1.0)
        y = y if last else net.relu(f"{name}.relu{number}", y)
    power = net.power[x] + net.power[y] / 2  # x is nowhere negative: none of it is lost
    if stride != 1 or net.shapes[x][1] != outer:
        x = net.batch_norm(f"{name}.downsample.1", net.conv(f"{name}.downsample.0", x, outer, 1, stride))
        power = (net.power[x] + net.power[y]) / 2
    return net.relu(f"{name}.relu", net.add(f"{name}.add", y, x), power)


def resnet18(net: Net, x: str, width: float) -> str:
    return resnet(net, x, width, (2, 2, 2, 2), bottleneck=False)


def resnet50(net: Net, x: str, width: float) -> str:
    return resnet(net, x, width, (3, 4, 6, 3), bottleneck=True)


def resnext50(net: Net, x: str, width: float) -> str:
    return resnet(net, x, width, (3, 4, 6, 3), bottleneck=True, groups=32)


def mobilenet_v2(net: Net, x: str, width: float) -> str:
    """MobileNetV2 (Sandler et al., arXiv:1801.04381)."""

    def block(name: str, x: str, size: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        x = net.conv(f"{name}.0", x, size, kernel, stride, groups=groups)
        return net.relu6(f"{name}.2", net.batch_norm(f"{name}.1", x))

    x = block("features.0", x, channels(32, width), 3, 2)
    number = 0
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    for expand, size, repeats, first in settings:
        for repeat in range(repeats):
            number += 1
            name, before, stride = f"features.{number}", x, 1 if repeat else first
            inner, size_now = net.shapes[x][1] * expand, channels(size, width)
            if expand != 1:
                x = block(f"{name}.conv.expand", x, inner, 1)
            x = block(f"{name}.conv.depthwise", x, inner, 3, stride, inner)
            x = net.batch_norm(f"{name}.conv.bn", net.conv(f"{name}.conv.project", x, size_now, 1))
            if stride == 1 and net.shapes[before] == net.shapes[x]:
                x = net.add(f"{name}.add", before, x)
    return classifier(net, block("features.18", x, channels(1280, width), 1), "classifier.1")


def shufflenet_v2(net: Net, x: str, width: float) -> str:
    """ShuffleNetV2 x1.0 (Ma et al., arXiv:1807.11164): half of the channels at a time, 58 of them and multiples."""

    def layer(name: str, x: str, size: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> str:
        x = net.conv(f"{name}.conv", x, size, kernel, stride, groups=size if depthwise else 1)
        x = net.batch_norm(f"{name}.bn", x)
        return x if depthwise else net.relu(f"{name}.relu", x)

    x = net.pool("MaxPool", "maxpool", layer("conv1", x, channels(24, width), 3, 2), 3, 2, 1)
    for stage, depth in enumerate((4, 8, 4)):
        half = channels(58 << stage, width)
        for number in range(depth):
            name, stride = f"stage{stage + 2}.{number}", 1 if number else 2
            if number:
                kept, y = net.halves(f"{name}.split", x)
            else:
                kept = layer(f"{name}.branch1.0", x, net.shapes[x][1], 3, 2, depthwise=True)
                kept, y = layer(f"{name}.branch1.2", kept, half), x
            y = layer(f"{name}.branch2.0", y, half)
            y = layer(f"{name}.branch2.3", y, half, 3, stride, depthwise=True)
            y = layer(f"{name}.branch2.5", y, half)
            x = net.shuffle(f"{name}.shuffle", net.concat(f"{name}.concat", [kept, y]))
    return classifier(net, layer("conv5", x, channels(1024, width)))


def efficientnet_b0(net: Net, x: str, width: float) -> str:
    """EfficientNet-B0 (Tan and Le, arXiv:1905.11946): inverted residuals with squeeze-and-excite and swish."""

    def block(name: str, x: str, size: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        x = net.conv(f"{name}.0", x, size, kernel, stride, groups=groups)
        return net.swish(f"{name}.2", net.batch_norm(f"{name}.1", x))

    x = block("features.0", x, channels(32, width), 3, 2)
    settings = (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    )  # fmt: skip
    for stage, (expand, kernel, first, size, repeats) in enumerate(settings, 1):
        for repeat in range(repeats):
            name, before, stride = f"features.{stage}.{repeat}", x, 1 if repeat else first
            inner, squeezed = net.shapes[x][1] * expand, max(1, net.shapes[x][1] // 4)
            if expand != 1:
                x = block(f"{name}.expand", x, inner, 1)
            x = block(f"{name}.depthwise", x, inner, kernel, stride, inner)
            x = squeeze_excite(net, f"{name}.se", x, squeezed)
            x = net.batch_norm(f"{name}.bn", net.conv(f"{name}.project", x, channels(size, width), 1))
            if net.shapes[before] == net.shapes[x]:
                x = net.add(f"{name}.add", before, x)
    return classifier(net, block("features.8", x, channels(1280, width), 1), "classifier.1")


def squeeze_excite(net: Net, name: str, x: str, squeezed: int) -> str:
    """Channels weighed by a small network over their means (Hu et al., arXiv:1709.01507)."""
    gate = net.conv(f"{name}.fc1", net.global_pool(f"{name}.avgpool", x), squeezed, 1, bias=True)
    gate = net.conv(f"{name}.fc2", net.swish(f"{name}.activation", gate), net.shapes[x][1], 1, bias=True)
    gate = net.node("Sigmoid", f"{name}.sigmoid", [gate], net.shapes[gate], 0.3)
    return net.node("Mul", f"{name}.mul", [gate, x], net.shapes[x], 0.3 * net.power[x])


def convnext_tiny(net: Net, x: str, width: float) -> str:
    return convnext(net, x, width, (3, 3, 9, 3))


def convnext(net: Net, x: str, width: float, depths: Sequence[int]) -> str:
    """ConvNeXt (Liu et al., arXiv:2201.03545): depthwise 7x7, layer normalization, GELU."""
    to_last, to_first = (0, 2, 3, 1), (0, 3, 1, 2)

    def norm(name: str, x: str) -> str:
        x = net.layer_norm(name, net.transpose(f"{name}.to_last", x, to_last))
        return net.transpose(f"{name}.to_first", x, to_first)

    def block(name: str, x: str, size: int) -> str:
        y = net.conv(f"{name}.dwconv", x, size, 7, groups=size, bias=True)
        y = net.layer_norm(f"{name}.norm", net.transpose(f"{name}.to_last", y, to_last))
        y = net.gelu(f"{name}.gelu", net.linear(f"{name}.pwconv1", y, 4 * size))
        y = net.linear(f"{name}.pwconv2", y, size)
        scale = net.uniform(f"{name}.layer_scale", (size,), 0.2, 0.4)
        y = net.node("Mul", f"{name}.scaled", [y, scale], net.shapes[y], 0.09)
        return net.add(f"{name}.add", x, net.transpose(f"{name}.to_first", y, to_first))

    sizes = [channels(size, width) for size in (96, 192, 384, 768)]
    for stage, (size, depth) in enumerate(zip(sizes, depths, strict=True)):
        if stage:
            x = norm(f"downsample.{stage}.0", x)
        x = net.conv(f"downsample.{stage}.1", x, size, 2 if stage else 4, 2 if stage else 4, bias=True, pad=0)
        x = x if stage else norm("stem.norm", x)
        for number in range(depth):
            x = block(f"stages.{stage}.{number}", x, size)
    x = net.layer_norm("norm", net.flatten("flatten", net.global_pool("avgpool", x)))
    return net.gemm("head", x, 1000)


def densenet121(net: Net, x: str, width: float) -> str:
    return densenet(net, x, channels(32, width))


def densenet(net: Net, x: str, growth: int) -> str:
    """DenseNet (Huang et al., arXiv:1608.06993): each layer reads the results of all before it."""

    def activated(name: str, x: str) -> str:
        return net.relu(f"{name}.relu", net.batch_norm(f"{name}.norm", x))

    x = activated("features.0", net.conv("features.conv0", x, 2 * growth, 7, 2))
    x = net.pool("MaxPool", "features.pool0", x, 3, 2, 1)
    for stage, depth in enumerate((6, 12, 24, 16), 1):
        parts = [x]
        for number in range(1, depth + 1):
            name = f"features.denseblock{stage}.denselayer{number}"
            y = net.concat(f"{name}.concat", parts) if len(parts) > 1 else x
            y = net.conv(f"{name}.conv1", activated(f"{name}.1", y), 4 * growth, 1)
            parts.append(net.conv(f"{name}.conv2", activated(f"{name}.2", y), growth, 3))
        x = net.concat(f"features.denseblock{stage}.concat", parts)
        if stage < 4:
            name = f"features.transition{stage}"
            x = net.conv(f"{name}.conv", activated(name, x), net.shapes[x][1] // 2, 1)
            x = net.pool("AveragePool", f"{name}.pool", x, 2, 2)
    return classifier(net, activated("features.5", x), "classifier")


def unet(net: Net, x: str, width: float) -> str:
    """U-Net (Ronneberger et al., arXiv:1505.04597), padded, half as wide; two classes for each pixel."""

    def double(name: str, x: str, size: int) -> str:
        for number in (1, 2):
            x = net.batch_norm(f"{name}.bn{number}", net.conv(f"{name}.conv{number}", x, size, 3))
            x = net.relu(f"{name}.relu{number}", x)
        return x

    sizes = [channels(32 << level, width) for level in range(5)]
    skips = []
    for level, size in enumerate(sizes):
        if level:
            x = net.pool("MaxPool", f"pool{level}", x, 2, 2)
        x = double(f"down{level}", x, size)
        skips.append(x)
    for level in reversed(range(4)):
        x = net.up_conv(f"up{level}", x, sizes[level])
        x = double(f"merge{level}", net.concat(f"concat{level}", [skips[level], x]), sizes[level])
    return net.conv("out", x, 2, 1, bias=True)


def vgg16(net: Net, x: str, width: float) -> str:
    return vgg(net, x, width, (2, 2, 3, 3, 3))


def vgg(net: Net, x: str, width: float, depths: Sequence[int]) -> str:
    """VGG (Simonyan and Zisserman, arXiv:1409.1556), with its large fully connected layers."""
    number = 0
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            x = net.conv(f"features.{number}", x, channels(min(64 << stage, 512), width), 3, bias=True)
            x = net.relu(f"features.{number + 1}", x)
            number += 2
        x = net.pool("MaxPool", f"features.{number}", x, 2, 2)
        number += 1
    x = net.flatten("flatten", x)
    for layer in (0, 3):
        x = net.relu(f"classifier.{layer + 1}", net.gemm(f"classifier.{layer}", x, channels(4096, width)))
    return net.gemm("classifier.6", x, 1000)


def detector(net: Net, x: str, width: float) -> str:
    """A one-stage detector like YOLOv5 (Redmon et al., arXiv:1506.02640, and after): SiLU, cross-stage parts (Wang et
    al., arXiv:1911.11929), pooling in three sizes, a pyramid down and up, boxes of three scales in one result."""

    def block(name: str, x: str, size: int, kernel: int = 1, stride: int = 1) -> str:
        x = net.conv(f"{name}.conv", x, size, kernel, stride)
        return net.swish(f"{name}.act", net.batch_norm(f"{name}.bn", x))

    def parts(name: str, x: str, size: int, depth: int, *, shortcut: bool) -> str:
        y, half = block(f"{name}.cv1", x, size // 2), size // 2
        for number in range(depth):
            z = block(f"{name}.m.{number}.cv2", block(f"{name}.m.{number}.cv1", y, half), half, 3)
            y = net.add(f"{name}.m.{number}.add", y, z) if shortcut else z
        return block(f"{name}.cv3", net.concat(f"{name}.concat", [y, block(f"{name}.cv2", x, half)]), size)

    def boxes(name: str, x: str) -> str:
        """85 numbers (a box, how sure it is one, 80 classes) for each of three boxes at each place."""
        x = net.conv(name, x, 3 * 85, 1, bias=True)
        batch, _, height, breadth = net.shapes[x]
        x = net.reshape(f"{name}.apart", x, (batch, 3, 85, height * breadth))
        x = net.transpose(f"{name}.last", x, (0, 1, 3, 2))
        x = net.node("Sigmoid", f"{name}.sigmoid", [x], net.shapes[x], 0.3)
        return net.reshape(f"{name}.boxes", x, (batch, 3 * height * breadth, 85))

    c8, c16, c32 = sizes = [channels(size, width) for size in (128, 256, 512)]
    x = block("model.1", block("model.0", x, channels(32, width), 3, 2), channels(64, width), 3, 2)
    x = parts("model.2", x, channels(64, width), 1, shortcut=True)
    found = []
    for level, (size, depth) in enumerate(zip(sizes, (2, 3, 1), strict=True)):
        x = parts(f"model.{4 + 2 * level}", block(f"model.{3 + 2 * level}", x, size, 3, 2), size, depth, shortcut=True)
        found.append(x)
    pooled = [block("model.9.cv1", x, c16)]
    for number in range(3):
        pooled.append(net.pool("MaxPool", f"model.9.m{number}", pooled[-1], 5, 1, 2))
    top = block("model.10", block("model.9.cv2", net.concat("model.9.concat", pooled), c32), c16)
    x = net.concat("model.12", [net.upsample("model.11", top), found[1]])
    middle = block("model.14", parts("model.13", x, c16, 1, shortcut=False), c8)
    x = net.concat("model.16", [net.upsample("model.15", middle), found[0]])
    outputs = [parts("model.17", x, c8, 1, shortcut=False)]
    for number, (size, other) in enumerate(((c16, middle), (c32, top))):
        x = block(f"model.{18 + 3 * number}", outputs[-1], net.shapes[other][1], 3, 2)
        x = net.concat(f"model.{19 + 3 * number}", [x, other])
        outputs.append(parts(f"model.{20 + 3 * number}", x, size, 1, shortcut=False))
    scales = [boxes(f"model.24.m.{number}", x) for number, x in enumerate(outputs)]
    batch, count = net.shapes[scales[0]][0], sum(net.shapes[each][1] for each in scales)
    return net.node("Concat", "boxes", scales, (batch, count, 85), 0.3, axis=1)


MODELS = {
    model.name: model
    for model in (
        Model("mlp", "MLP 784-256-10", mlp, ()),
        Model("mlp-64", "MLP 784-256-10, batch 64", mlp, (), batch=64),
        Model("resnet18", "ResNet-18", resnet18),
        Model("resnet50", "ResNet-50", resnet50),
        Model("resnext50", "ResNeXt-50 32x4d", resnext50),
        Model("mobilenetv2", "MobileNetV2", mobilenet_v2, (192, 192)),
        Model("shufflenetv2", "ShuffleNetV2 x1.0", shufflenet_v2),
        Model("efficientnet", "EfficientNet-B0", efficientnet_b0),
        Model("convnext", "ConvNeXt-T", convnext_tiny),
        Model("densenet121", "DenseNet-121", densenet121),
        Model("unet", "U-Net", unet, (192, 256)),
        Model("vgg16", "VGG-16", vgg16),
        Model("detector", "YOLO-like detector", detector, (416, 352)),
    )
}


def parse_size(text: str) -> tuple[int, int]:
    """ "224x160" as (224, 160): height, then width."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give HEIGHTxWIDTH, for instance 224x160")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, help="which one; all are listed unless given")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.onnx", help="where to write it")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="of the image, where it is one")
    parser.add_argument("--batch", type=int, help="images at once")
    options = parser.parse_args()
    if options.output and not options.model:
        parser.error("say which model to write")
    for name in [options.model] if options.model else MODELS:
        model = MODELS[name]
        net = model.make(options.size, options.batch)
        shape = "x".join(map(str, model.shape(options.size, options.batch)))
        print(f"{name:13} {shape:14} {net.flops / 1e9:8.3f} GFLOP {net.parameters / 1e6:8.2f} M weights")
        if options.output:
            net.save(options.output)


if __name__ == "__main__":
    main()
