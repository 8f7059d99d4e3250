"""Blocks of channels: what the pass makes of networks, for several targets, and that it changes no result."""

from __future__ import annotations

import re

import numpy as np
import pytest
from graph.test_passes import N, Net, ops, same_meaning
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.graph.ir import Constant, Module, Value
from kedge.compiler.graph.passes import BlockChannels, FoldConstants, Legalize, Simplify, default_passes, run_passes
from kedge.compiler.graph.passes.layout import block_of, block_sizes, padded_block
from kedge.compiler.target import parse

AVX512 = parse("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v4")
TARGETS = [
    AVX512, *(parse(f"llvm -mtriple=x86_64-linux-gnu -mcpu={cpu}") for cpu in ("x86-64-v3", "x86-64")),
    parse("raspberry-pi/4b"),
]  # fmt: skip


def laid_out(module: Module, target=AVX512) -> Module:
    """The module after the layout pass and what cleans up behind it."""
    return run_passes(module, (BlockChannels(target), FoldConstants(), Simplify()))


def blocked(module: Module, expected: list[str], target=AVX512) -> Module:
    after = laid_out(module, target)
    assert ops(after) == expected
    same_meaning(module, after)
    assert BlockChannels(target)(after) is after
    return after


def test_without_a_target_and_on_gpus_nothing_changes() -> None:
    net = Net()
    module = net.module(net.conv(net.input("x", 1, 32, 8, 8), net.param("w", 32, 32, 3, 3)))
    assert BlockChannels()(module) is module
    assert BlockChannels().for_target(parse("opencl"))(module) is module


def test_a_chain_is_packed_and_unpacked_once() -> None:
    net = Net()
    x = net.input("x", N, 32, 8, 8)
    y = net.relu(net.conv(x, net.param("w", 48, 32, 3, 3), net.param("b", 48), pads=[1] * 4))
    y = net.max_pool(y, kernel=[2, 2], strides=[2, 2])
    y = net.conv(y, net.param("v", 16, 48, 1, 1))
    pack, unpack = ["reshape", "transpose"], ["transpose", "reshape"]
    middle = ["conv_blocked", "add", "relu", "max_pool", "conv_blocked"]
    blocked(net.module(y), [*pack, *middle, *unpack])


def test_an_image_of_few_channels_is_read_as_it_is() -> None:
    net = Net()
    y = net.relu(net.conv(net.input("x", N, 3, 9, 9), net.param("w", 32, 3, 3, 3), strides=[2, 2]))
    y = net.reshape(net.reduce_mean(y, axes=[2, 3], keepdims=True), shape=(N, 32))
    blocked(net.module(y), ["conv_blocked", "relu", "reduce_mean", "reshape"])


def test_a_residual_joins_in_blocks() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", 1, 3, 8, 8), net.param("w", 16, 3, 1, 1)))
    y = net.conv(x, net.param("v", 16, 16, 3, 3), pads=[1] * 4)
    after = laid_out(net.module(net.reduce_max(net.relu(net.add(y, x)), axes=[2, 3])))
    assert ops(after) == ["conv_blocked", "relu", "conv_blocked", "add", "relu", "reduce_max", "reshape"]


def test_squeeze_and_excite_scales_in_blocks() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 8, 8), net.param("w", 32, 3, 1, 1))
    s = net.relu(net.conv(net.reduce_mean(x, axes=[2, 3], keepdims=True), net.param("v", 8, 32, 1, 1)))
    s = net.sigmoid(net.conv(s, net.param("u", 32, 8, 1, 1)))
    module = net.module(net.mul(x, s))
    middle = ["conv_blocked", "reduce_mean", "conv_blocked", "relu"]
    # One half of a register for the 8 channels; what is scaled and what scales it have blocks of 16.
    blocked(module, [*middle, "conv_blocked", "sigmoid", "mul", "transpose", "reshape"])


def test_a_dense_block_concatenates_in_blocks() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 8, 8), net.param("w", 32, 3, 1, 1))
    y = net.conv(x, net.param("v", 16, 32, 3, 3), pads=[1] * 4)
    z = net.conv(net.concat(x, y, axis=1), net.param("u", 16, 48, 1, 1))
    blocked(net.module(z), ["conv_blocked", "conv_blocked", "concat", "conv_blocked", "transpose", "reshape"])


def test_what_is_concatenated_has_the_blocks_that_fit_all() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 8, 8), net.param("w", 16, 3, 1, 1))
    y = net.conv(x, net.param("v", 8, 16, 3, 3), pads=[1] * 4)
    after = laid_out(net.module(net.conv(net.concat(x, y, axis=1), net.param("u", 16, 24, 1, 1))))
    change = ["reshape", "transpose", "reshape"]  # of 16 channels in one block to two of 8
    middle = ["conv_blocked", *change, "conv_blocked", "concat", "conv_blocked"]
    assert sorted(ops(after)) == sorted([*middle, "transpose", "reshape"])


def test_resizing_keeps_blocks() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 8, 6), net.param("w", 16, 3, 1, 1))
    wide = net.resample(x, Constant(np.arange(12).reshape(12, 1) // 2), axis=-1)
    tall = net.resize(wide, sizes=(1, 16, 16, 12), scales=(1.0, 1.0, 2.0, 1.0), mode="linear")
    y = net.conv(net.resize(tall, sizes=(1, 16, 8, 24)), net.param("v", 16, 16, 1, 1))
    middle = ["conv_blocked", "resample", "resize", "resize", "conv_blocked"]
    blocked(net.module(y), [*middle, "transpose", "reshape"])
    more = net.module(net.resize(x, sizes=(1, 32, 8, 6)))
    blocked(more, ["conv_blocked", "transpose", "reshape", "resize"])


def test_filters_that_fill_no_block_are_padded_and_cut() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 4, 4), net.param("w", 16, 3, 1, 1))
    module = net.module(net.conv(x, net.param("v", 21, 16, 1, 1), net.param("b", 21)))
    blocked(module, ["conv_blocked", "conv_blocked", "add", "from_blocks"])


def test_channels_that_no_block_divides_stay_in_blocks() -> None:
    net = Net()
    x = net.relu(net.conv(net.input("x", N, 58, 5, 5), net.param("w", 58, 58, 1, 1), net.param("b", 58)))
    y = net.conv(net.sigmoid(x), net.param("d", 58, 1, 3, 3), net.param("c", 58), pads=[1] * 4, groups=58)
    y = net.add(net.conv(y, net.param("v", 58, 58, 3, 3), pads=[1] * 4), x)
    y = net.mul(y, net.sigmoid(net.reduce_mean(y, axes=[2, 3], keepdims=True)))
    chain = ["conv_blocked", "add", "relu", "sigmoid", "depthwise_blocked", "add", "conv_blocked", "add"]
    after = blocked(net.module(y), ["to_blocks", *chain, "reduce_mean", "sigmoid", "mul", "from_blocks"])
    assert after.functions["main"].outputs[0].inputs[0].type.shape[1:] == (4, 5, 5, 16)


def test_narrow_blocks_are_for_what_is_concatenated() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 4, 4), net.param("w", 36, 3, 1, 1))
    alone = laid_out(net.module(net.conv(x, net.param("v", 32, 36, 1, 1))))
    assert alone.functions["main"].outputs[0].inputs[0].inputs[0].inputs[0].type.shape == (1, 3, 4, 4, 16)
    both = net.concat(x, net.relu(x), axis=1)
    blocked(net.module(net.conv(both, net.param("u", 32, 72, 1, 1))),
            ["conv_blocked", "relu", "concat", "conv_blocked", "transpose", "reshape"])  # fmt: skip


def test_what_lanes_without_a_channel_hold_spreads_to_no_other() -> None:
    """1 / 0 in them, say: the next convolution would multiply it by zeros."""
    net = Net()
    x = net.conv(net.input("x", 1, 3, 4, 4), net.param("w", 21, 3, 1, 1))
    y = net.div(net.param("one", 1), net.mul(x, x))
    module = net.module(net.conv(y, net.param("v", 16, 21, 1, 1)))
    blocked(module, ["conv_blocked", "mul", "div", "conv_blocked", "transpose", "reshape"])


def test_groups_that_share_a_block_stay_plain() -> None:
    net = Net()
    x = net.input("x", 1, 6, 4, 4)
    module = net.module(net.conv(x, net.param("w", 6, 3, 1, 1), groups=2))
    assert laid_out(module) is module


def test_weights_that_are_inputs_stay_plain() -> None:
    net = Net()
    module = net.module(net.conv(net.input("x", 1, 16, 4, 4), net.input("w", 16, 16, 1, 1)))
    assert laid_out(module) is module


def test_values_without_channels_stay_as_they_are() -> None:
    net = Net()
    x = net.conv(net.input("x", 1, 3, 4, 4), net.param("w", 16, 3, 1, 1))
    row = net.concat(net.input("a", 3), net.input("b", 4), axis=0)
    total = net.reduce_sum(row, axes=[0], keepdims=True)
    blocked(net.module(net.mul(x, total)), ["conv_blocked", "concat", "reduce_sum", "mul", "transpose", "reshape"])


@pytest.mark.parametrize(("channels", "block"), [(64, 16), (24, 8), (20, 4), (21, None), (3, None)])
def test_blocks_of_512_bits(channels: int, block: int | None) -> None:
    assert block_of(channels, block_sizes(AVX512, "float32")) == block


@pytest.mark.parametrize(("channels", "block"), [(21, 8), (2, 4), (1000, 16), (17, 8), (31, 16)])
def test_padding_wastes_little(channels: int, block: int) -> None:
    assert padded_block(channels, block_sizes(AVX512, "float32")) == block


def test_doubles_and_narrow_machines_have_smaller_blocks() -> None:
    assert block_sizes(AVX512, "float64") == (8, 4)
    assert block_sizes(parse("raspberry-pi/4b"), "float32") == (4,)
    assert block_sizes(parse("raspberry-pi/4b"), "float16") == (4,)


_UNARY = ("relu", "sigmoid", "neg")


class Drawn:
    """A random network, grown operator by operator; all values have batch 2 or `n`."""

    def __init__(self, data, batch) -> None:
        self.net, self.data = Net(), data
        self.values: list[Value] = [self.net.input("x", batch, self.pick([3, 8, 16, 24]), 6, 7)]
        self.count = 0

    def pick(self, options):
        return self.data.draw(st.sampled_from(options))

    def param(self, *shape: int) -> Value:
        self.count += 1
        return self.net.param(f"w{self.count}", *shape)

    def step(self) -> None:
        net, x = self.net, self.pick(self.values)
        channels, height = x.type.shape[1], x.type.shape[2]
        kind = self.pick([
            "conv", "conv", "depthwise", "transposed", "unary", "scale", "join", "concat", "pool", "mean", "slice",
            "pad", "resize", "last",
        ])  # fmt: skip
        if kind == "conv":
            groups = self.pick([1, 1, 2]) if channels % 2 == 0 else 1
            filters = self.pick([4, 8, 16, 32, 6, 22, 36])
            k = 3 if height >= 3 else 1
            args = [x, self.param(filters, channels // groups, k, k)]
            args += [self.param(filters)] if self.pick([True, False]) else []
            value = net.conv(*args, pads=[k // 2] * 4, groups=groups)
        elif kind == "depthwise":
            value = net.conv(x, self.param(channels, 1, 1, 1), groups=channels)
        elif kind == "transposed":
            value = net.conv_transpose(x, self.param(channels, self.pick([3, 4, 16]), 2, 3), strides=[2, 1])
        elif kind == "unary":
            value = getattr(net, self.pick(_UNARY))(x)
        elif kind == "scale":
            shape = self.pick([(channels, 1, 1), (1, channels, 1, 1), (1,), (x.type.shape[3],), (1, 1, height, 1)])
            value = getattr(net, self.pick(["mul", "add", "sub"]))(x, self.param(*shape))
        elif kind == "join":
            same = [v for v in self.values if v.type.shape[1:] == x.type.shape[1:]]
            value = net.add(x, self.pick(same))
        elif kind == "concat":
            same = [v for v in self.values if v.type.shape[2:] == x.type.shape[2:]]
            value = net.concat(x, self.pick(same), axis=1)
        elif kind == "pool":
            value = getattr(net, self.pick(["max_pool", "avg_pool"]))(x, kernel=[1, 2], pads=[0, 1, 0, 0])
        elif kind == "mean":
            value = net.mul(x, net.reduce_mean(x, axes=self.pick([[2, 3], [1], [1, 2, 3], [3]]), keepdims=True))
        elif kind == "slice":
            axis = self.pick([1, 2, 3])
            value = net.slice(x, starts=(0,), ends=((x.type.shape[axis] + 1) // 2,), axes=(axis,))
        elif kind == "resize":
            sizes = (x.type.shape[0], self.pick([channels, channels, 5]), height + 2, x.type.shape[3])
            value = net.resize(x, sizes=sizes, mode=self.pick(["nearest", "linear"]))
        elif kind == "last":
            value = net.relu(net.transpose(x, perm=(0, 2, 3, 1)))
            value = net.transpose(net.mul(value, self.param(channels)), perm=(0, 3, 1, 2))
        else:
            value = net.pad(x, pads=[0, 0, 1, 0, 0, 0, 0, 1])
        if int(np.prod([int(str(dim)) for dim in value.type.shape[1:]])) < 6000:
            self.values.append(value)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), steps=st.integers(2, 9), target=st.sampled_from(TARGETS), free=st.booleans())
def test_random_networks_keep_their_meaning(data, steps: int, target, free: bool) -> None:
    drawn = Drawn(data, N if free else 2)
    for _ in range(steps):
        drawn.step()
    module = run_passes(drawn.net.module(*drawn.values[-2:]), (Legalize(), FoldConstants()))
    after = laid_out(module, target)
    same_meaning(module, after, rtol=1e-3)
    assert run_passes(after, [BlockChannels(target)]) is after


def test_the_layout_of_a_network_as_text(golden) -> None:
    net = Net()
    x = net.conv(net.input("image", N, 3, 16, 16), net.param("stem", 32, 3, 3, 3), net.param("b", 32), strides=[2, 2])
    x = net.relu(x)
    y = net.conv(x, net.param("deep", 32, 1, 3, 3), groups=32, pads=[1] * 4)
    y = net.add(net.conv(y, net.param("wide", 32, 32, 1, 1)), x)
    pooled = net.reshape(net.reduce_mean(y, axes=[2, 3], keepdims=True), shape=(N, 32))
    module = net.module(net.matmul(pooled, net.param("fc", 32, 10)))
    before = run_passes(module, default_passes()[: [step.name for step in default_passes()].index("layout")])
    golden("layout.txt", re.sub(r"sha256 \w+", "sha256 …", laid_out(before).show()))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [[0, 2, 3], [0], [0, 1, 2, 3], [2, 3]])
def test_channels_that_no_block_divides_come_out_of_a_reduction(axes: list[int], keepdims: bool) -> None:
    net = Net()
    y = net.conv(net.input("x", 2, 16, 6, 6), net.param("w", 7, 16, 3, 3))
    module = net.module(net.reduce_mean(y, axes=axes, keepdims=keepdims))
    after = laid_out(module)
    assert "conv_blocked" in ops(after)
    same_meaning(module, after)
