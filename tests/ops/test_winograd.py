"""Winograd's convolution: its transforms, the reference, and the lowered form on sizes with and without tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import ShapeError
from kedge.compiler.ops import registry
from kedge.compiler.ops.blocked import block, unblock
from support.graphs import check_op, module_of
from support.pieces import counted_pieces

rng = np.random.default_rng(11)
Array = np.ndarray[Any, Any]


def array(*shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def plain_conv(x: Array, w: Array, pads: tuple[int, ...]) -> Array:
    attrs = {"strides": None, "dilations": None, "groups": 1, "pads": pads}
    result: Array = registry.get("conv").reference([x, w], attrs)[0]
    return result


def transformed(w: Array, m: int, lanes: tuple[int, int]) -> Array:
    (u,) = check_op("winograd_weights", w, m=m, lanes=lanes)
    return u


@settings(max_examples=8, deadline=None)
@given(data=st.data(), m=st.sampled_from((2, 4)), free=st.sampled_from(("none", "batch", "all")))
def test_it_is_the_convolution(data: st.DataObject, m: int, free: str) -> None:
    pads = tuple(data.draw(st.integers(0, 2)) for _ in range(4))
    size = [data.draw(st.integers(3, 20 if free == "none" else 9)) for _ in range(2)]
    inner, blocks = (data.draw(st.integers(1, 2)) for _ in range(2))
    batch = data.draw(st.integers(1, 3))
    x, w = array(batch, inner * 4, *size), array(blocks * 8, inner * 4, 3, 3)
    symbolic = {"none": None, "batch": {0: [0]}, "all": {0: [0, 2, 3]}}[free]
    u = transformed(w, m, (4, 8))
    (got,) = check_op("conv_winograd", block(x, 4), u, free=symbolic, rtol=1e-3, atol=1e-3, m=m, pads=pads)
    np.testing.assert_allclose(unblock(got), plain_conv(x, w, pads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [2, 4])
def test_weights_are_rounded_once(m: int) -> None:
    """G g Gᵀ with the matrices of Lavin and Gray, whose rows and columns may have another sign or order."""
    g = {
        2: [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
        4: [
            [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
        ],
    }[m]  # fmt: skip
    w = array(8, 4, 3, 3)
    u = transformed(w, m, (4, 8))
    want = np.einsum("kp,oipq,lq->kloi", np.array(g), w.astype(np.float64), np.array(g))
    got = u.transpose(0, 1, 2, 5, 3, 4).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=2**-23)


@pytest.mark.parametrize("m", [2, 4])
def test_weights_are_transformed_in_pieces(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, attrs = array(56, 12, 3, 3), {"m": m, "lanes": (4, 8)}
    (whole,) = registry.get("winograd_weights").reference([w], attrs)
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: 3)
    monkeypatch.setattr("kedge.compiler.ops.winograd._WEIGHTS_AT_ONCE", 2 * 12 * 8)
    counts = counted_pieces(monkeypatch)
    (pieces,) = registry.get("winograd_weights").reference([w], attrs)
    np.testing.assert_allclose(pieces, whole, rtol=2**-23)
    assert len(counts) == 1 and counts[0] > 1


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "said"),
    [
        ("winograd_weights", [(8, 4, 3, 3)], {"m": 3, "lanes": (4, 8)}, "tiles have 2 or 4"),
        ("winograd_weights", [(8, 4, 5, 5)], {"m": 2, "lanes": (4, 8)}, "the kernel is 3x3, not 5x5"),
        ("winograd_weights", [(6, 4, 3, 3)], {"m": 2, "lanes": (4, 8)}, "must divide the 4 channels and 6 filters"),
        ("conv_winograd", [(1, 1, 6, 6, 4), (6, 6, 1, 1, 4, 8)], {"m": 2}, "m=2 wants weights of 4x4, not 6x6"),
        ("conv_winograd", [(1, 2, 6, 6, 4), (4, 4, 1, 1, 4, 8)], {"m": 2}, "wants 1 blocks of 4 channels"),
        ("conv_winograd", [(1, 1, 6, 6), (4, 4, 1, 1, 4, 8)], {"m": 2}, "x has rank 4, not 5"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, shapes: list[Any], attrs: dict[str, Any], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        module_of(op, shapes, ["float32"] * len(shapes), **attrs)
