"""Convolutions and pooling over blocks of channels: reference, lowered form, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.ops import registry
from kedge.compiler.ops.blocked import block, unblock
from support.graphs import check_op, module_of

rng = np.random.default_rng(5)


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def plain_weight(packed: np.ndarray) -> np.ndarray:
    """(O/o, I/i, K…, i, o) as (O, I, K…), written as loops would."""
    blocks, inner, *kernel, lanes_in, lanes_out = packed.shape
    result = np.empty((blocks * lanes_out, inner * lanes_in, *kernel), packed.dtype)
    for o in range(result.shape[0]):
        for i in range(result.shape[1]):
            result[o, i] = packed[o // lanes_out, i // lanes_in, ..., i % lanes_in, o % lanes_out]
    return result


def plain_conv(x: np.ndarray, w: np.ndarray, **attrs) -> np.ndarray:
    given = {"strides": None, "pads": None, "dilations": None, "groups": 1, **attrs}
    return registry.get("conv").reference([x, w], given)[0]


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(), spatial=st.integers(1, 2), blocked=st.booleans(), groups=st.integers(1, 2),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), free=st.booleans(),
)  # fmt: skip
def test_convolution(data, spatial: int, blocked: bool, groups: int, stride: int, dilation: int, free: bool) -> None:
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    pads = [data.draw(st.integers(0, 1)) for _ in range(2 * spatial)]
    size = [dilation * (k - 1) + 1 + data.draw(st.integers(0, 5)) for k in kernel]
    lanes_in = 4 if blocked else 1
    w = array(2 * groups, 2 if blocked else 3, *kernel, lanes_in, 8)
    x = array(2, w.shape[1] * groups * lanes_in, *size)
    attrs = {"strides": (stride,) * spatial, "pads": tuple(pads), "dilations": (dilation,) * spatial, "groups": groups}
    symbolic = {0: [0, *range(2, 2 + spatial)]} if free else None
    (got,) = check_op("conv_blocked", block(x, 4) if blocked else x, w, free=symbolic, rtol=1e-4, atol=1e-4, **attrs)
    np.testing.assert_allclose(unblock(got), plain_conv(x, plain_weight(w), **attrs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_lanes_without_a_channel_are_not_read(kernel: tuple[int, int]) -> None:
    x, w = array(2, 6, 5, 5), array(2, 2, *kernel, 4, 8)
    packed = block(np.pad(x, [(0, 0), (0, 2), (0, 0), (0, 0)], constant_values=np.nan), 4)
    (got,) = check_op("conv_blocked", packed, w, rtol=1e-4, atol=1e-4, channels=6, pads=(1, 1, 0, 1))
    wanted = plain_conv(x, plain_weight(w)[:, :6], pads=(1, 1, 0, 1))
    np.testing.assert_allclose(unblock(got), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "lanes"), [(6, 4), (8, 4), (3, 16), (58, 16)])
def test_blocks_that_do_not_divide_the_channels(channels: int, lanes: int) -> None:
    x = array(2, channels, 3, 5)
    (packed,) = check_op("to_blocks", x, lanes=lanes)
    assert packed.shape == (2, -(-channels // lanes), 3, 5, lanes)
    np.testing.assert_array_equal(unblock(packed)[:, channels:], 0)
    (plain,) = check_op("from_blocks", packed, channels=channels)
    np.testing.assert_array_equal(plain, x)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), spatial=st.integers(1, 2), stride=st.integers(1, 2), dilation=st.integers(1, 2))
def test_depthwise(data, spatial: int, stride: int, dilation: int) -> None:
    kernel = [data.draw(st.integers(1, 3)) for _ in range(spatial)]
    pads = [data.draw(st.integers(0, 1)) for _ in range(2 * spatial)]
    size = [dilation * (k - 1) + 1 + data.draw(st.integers(0, 5)) for k in kernel]
    x, w = array(2, 8, *size), array(2, *kernel, 4)
    attrs = {"strides": (stride,) * spatial, "pads": tuple(pads), "dilations": (dilation,) * spatial}
    (got,) = check_op("depthwise_blocked", block(x, 4), w, rtol=1e-4, atol=1e-4, **attrs)
    plain = np.moveaxis(w, -1, 1).reshape(8, 1, *kernel)
    np.testing.assert_allclose(unblock(got), plain_conv(x, plain, groups=8, **attrs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["max_pool", "avg_pool"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_pooling_of_blocks(op: str, ceil_mode: bool, strides: tuple[int, int]) -> None:
    x = array(2, 8, 7, 9)
    attrs = {"kernel": (3, 2), "strides": strides, "pads": (1, 0, 1, 1), "ceil_mode": ceil_mode}
    (got,) = check_op(op, block(x, 4), lanes=True, **attrs)
    (plain,) = check_op(op, x, **attrs)
    np.testing.assert_allclose(unblock(got), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "shapes", "said"),
    [
        ("conv_blocked", [(1, 2, 5, 5, 4), (2, 3, 3, 3, 4, 8)], "want 3 blocks of 4 channels"),
        ("conv_blocked", [(1, 2, 5, 5, 8), (2, 2, 3, 3, 4, 8)], "want 2 blocks of 4 channels"),
        ("conv_blocked", [(1, 2, 5), (2, 2, 3, 3, 4, 8)], "x has rank 3"),
        ("depthwise_blocked", [(1, 2, 5, 5, 4), (3, 3, 3, 4)], "wants 3 blocks of 4 channels"),
        ("depthwise_blocked", [(1, 2, 5, 5), (2, 3, 3, 4)], "x has rank 4"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, shapes: list[tuple[int, ...]], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        module_of(op, shapes, ["float32"] * 2)


def test_the_rank_of_blocked_pooling() -> None:
    with pytest.raises(ShapeError, match="wants an input of rank 5"):
        registry.get("max_pool").infer(
            [TensorType((1, 2, 5, 5), "float32")],
            {"kernel": (2, 2), "strides": None, "pads": None, "dilations": None, "ceil_mode": False, "lanes": True},
        )


@pytest.mark.parametrize("blocks", [(2, 2), (3, 1), (2,), (1, 2, 3)])
@pytest.mark.parametrize("lanes", [False, True])
def test_depth_to_space(blocks: tuple[int, ...], lanes: bool) -> None:
    spatial = [2 + axis for axis in range(len(blocks))]
    phases = int(np.prod(blocks))
    x = array(2, 8 * phases, *spatial)
    (got,) = check_op("depth_to_space", block(x, 4) if lanes else x, free={0: [0]}, blocks=blocks, lanes=lanes)
    got = unblock(got) if lanes else got
    expected = np.empty((2, 8, *(s * b for s, b in zip(spatial, blocks, strict=True))), np.float32)
    for index in np.ndindex(*expected.shape[2:]):
        phase = 0
        for place, size in zip(index, blocks, strict=True):
            phase = phase * size + place % size
        source = tuple(place // size for place, size in zip(index, blocks, strict=True))
        expected[(slice(None), slice(None), *index)] = x[(slice(None), slice(phase * 8, phase * 8 + 8), *source)]
    np.testing.assert_array_equal(got, expected)


def test_depth_to_space_wants_enough_channels() -> None:
    with pytest.raises(ShapeError, match="do not divide the 6 channels"):
        module_of("depth_to_space", [(1, 6, 2, 2)], ["float32"], blocks=(2, 2))
