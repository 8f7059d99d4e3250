"""Which convolutions become Winograd's, that networks mean the same then, and how exact they stay."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.cost import flops
from kedge.compiler.graph.ir import Call, Module, TensorType
from kedge.compiler.graph.passes import BlockChannels, FoldConstants, Simplify, run_passes
from kedge.compiler.graph.passes.winograd import winograd_tile
from kedge.compiler.graph.verify import verify
from kedge.compiler.target import Target, parse
from kedge.compiler.tir.expr import Dim, Var
from support.nets import N, Net, ops

ZEN4 = parse("llvm -mtriple=x86_64-linux-gnu -mcpu=znver4 -num-cores=2")
H = Var("h", lower=3)
#: Weights of a network that no cache holds, in bytes.
NETWORK = 64 << 20


def conv(
    x: tuple[Dim, ...], filters: int, kernel: int = 3, *, dtype: str = "float32", **attrs: object
) -> Call:  # fmt: skip
    b = Builder("main")
    weight = (filters, int(str(x[1])) // int(str(attrs.get("groups", 1))), kernel, kernel)
    value = b.call("conv", b.input("x", TensorType(x, dtype)), b.input("w", TensorType(weight, dtype)), **attrs)
    assert isinstance(value, Call)
    return value


@pytest.mark.parametrize(
    ("x", "m"),
    [
        ((1, 64, 56, 56), 4),
        ((1, 256, 14, 14), 4),
        ((1, 512, 7, 7), 2),  # tiles of 4 waste more, and four times the weights would come from memory
        ((16, 512, 7, 7), 4),  # many images share the weights
        ((N, 64, 56, 56), 4),
        ((1, 64, H, H), 4),
        ((1, 64, 2, 2), None),  # a tile of 4 x 4 for 4 outputs
        ((1, 16, 8, 8), None),  # over in microseconds
    ],
)
def test_what_costs_least(x: tuple[Dim, ...], m: int | None) -> None:
    assert isinstance(ZEN4, Target)
    assert winograd_tile(conv(x, int(str(x[1])), pads=[1] * 4), ZEN4, NETWORK) == m


@pytest.mark.parametrize(
    "other",
    [
        conv((1, 64, 56, 56), 64, 5),
        conv((1, 64, 56, 56), 64, strides=[2, 2]),
        conv((1, 64, 56, 56), 64, dilations=[1, 2]),
        conv((1, 64, 56, 56), 64, groups=2),
        conv((1, 64, 56, 56), 64, dtype="float64"),
    ],
)
def test_other_convolutions_stay_direct(other: Call) -> None:
    assert isinstance(ZEN4, Target)
    assert winograd_tile(other, ZEN4, NETWORK) is None


def error(module: Module, after: Module) -> float:
    """The largest difference of what two modules compute, as a part of the largest value."""
    inputs = {}
    for value in module.functions["main"].inputs:
        shape = [dim if isinstance(dim, int) else 2 for dim in value.type.shape]
        inputs[value.name] = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    (got,), (want,) = (interp.run(each, inputs).values() for each in (verify(after), module))
    return float(np.abs(got - want).max() / np.abs(want).max())


def laid_out(module: Module) -> Module:
    return run_passes(module, (BlockChannels(ZEN4), FoldConstants(), Simplify()))


def test_a_network_as_text(golden) -> None:
    net = Net()
    x = net.input("x", N, 32, 28, 28)
    y = net.conv(x, net.param("w", 40, 32, 3, 3), net.param("b", 40), pads=[1] * 4)
    module = net.module(net.relu(y))
    after = laid_out(module)
    assert "conv_winograd" in ops(after)
    assert "winograd_weights" not in ops(after)  # folded
    assert error(module, after) < 1e-5  # sums of 288 products in float32, in an order that is the library's
    golden("winograd.txt", re.sub(r"sha256 \w+", "sha256 …", after.show()))


def test_operations_are_those_of_the_convolution_that_is_asked_for() -> None:
    """Not the fewer ones of the algorithm: profiles compare kernels by them."""
    net = Net()
    x = net.input("x", 1, 32, 28, 28)
    after = laid_out(net.module(net.conv(x, net.param("w", 32, 32, 3, 3), pads=[1] * 4)))
    values = after.functions["main"].values()
    (call,) = [value for value in values if isinstance(value, Call) and value.op == "conv_winograd"]
    assert flops(call) == 2 * 9 * 32 * 32 * 28 * 28


def test_deep_chains_stay_exact() -> None:
    """Ten layers initialised as He et al. do: what is stated of F(4, 3) beside direct convolution in float32."""
    rng = np.random.default_rng(7)
    net = Net()
    x = net.input("x", 1, 32, 28, 28)
    for layer in range(10):
        weight = net.param(f"w{layer}", 32, 32, 3, 3)
        net.params[f"w{layer}"] = (rng.standard_normal((32, 32, 3, 3)) * np.sqrt(2 / (9 * 32))).astype(np.float32)
        x = net.relu(net.conv(x, weight, pads=[1] * 4))
    module = net.module(x)
    after = laid_out(module)
    assert ops(after).count("conv_winograd") == 10
    assert error(module, after) < 1e-4
