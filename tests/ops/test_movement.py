"""Operators that move elements, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.dims import format_type
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.tir.expr import Var
from support.graphs import check_op


def counting(*shape: int, dtype: str = "float32"):
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("perm", [None, (0, 1, 2), (2, 0, 1), (1, 0, 2), (-1, 0, 1)])
def test_transpose(perm):
    x = counting(2, 3, 4)
    np.testing.assert_array_equal(check_op("transpose", x, perm=perm, free={0: [1]})[0], np.transpose(x, perm))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(axis):
    parts = [counting(2, 3), counting(2, 3) + 10, counting(2, 3) + 20]
    np.testing.assert_array_equal(check_op("concat", *parts, axis=axis)[0], np.concatenate(parts, axis))


def test_concat_of_hundreds():
    parts = [counting(2, 1 + number % 3) + number for number in range(300)]
    np.testing.assert_array_equal(check_op("concat", *parts, axis=1)[0], np.concatenate(parts, 1))


def test_concat_of_free_dims():
    a, b = counting(2, 3), counting(4, 3)
    np.testing.assert_array_equal(check_op("concat", a, b, axis=0, free={0: [0], 1: [0]})[0], np.concatenate([a, b]))


def test_split():
    x = counting(2, 7)
    got = check_op("split", x, axis=1, sizes=[1, 4, 2], free={0: [0]})
    for part, expected in zip(got, np.split(x, [1, 5], axis=1), strict=True):
        np.testing.assert_array_equal(part, expected)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_slice_is_pythons(data):
    size = data.draw(st.integers(1, 6))
    bound = st.integers(-9, 9) | st.sampled_from([2**31 - 1, 2**63 - 1])
    start, end = data.draw(bound), data.draw(bound | st.sampled_from([-(2**31), -(2**63)]))
    step = data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    x = counting(2, size)
    free = {0: [0, 1]} if data.draw(st.booleans()) else None
    # ONNX clamps a negative end to "past the front" where Python counts from the end again: only for end < -size.
    stop = None if step < 0 and end < -size else end
    (got,) = check_op("slice", x, axes=[1], starts=[start], ends=[end], steps=[step], free=free)
    np.testing.assert_array_equal(got, x[:, start:stop:step])


def test_slice_shapes_with_symbolic_dims():
    n = Var("n", lower=4)
    b = Builder("f")
    x = b.input("x", TensorType((n, 8), "float32"))
    assert format_type(b.call("slice", x, axes=[0], starts=[1], ends=[-1]).type) == "float32[n - 2, 8]"
    assert format_type(b.call("slice", x, axes=[0], starts=[0], ends=[2**63 - 1], steps=[2]).type) in (
        "float32[(n + 1) // 2, 8]",
    )
    assert format_type(b.call("slice", x, axes=[0], starts=[0], ends=[3]).type) == "float32[3, 8]"


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(mode):
    x = counting(3, 4)
    pads = [1, 2, 2, 0]
    (got,) = check_op("pad", x, pads=pads, mode=mode, value=7 if mode == "constant" else 0, free={0: [0, 1]})
    options = {"constant_values": 7} if mode == "constant" else {}
    np.testing.assert_array_equal(got, np.pad(x, [(1, 2), (2, 0)], mode=mode, **options))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_gather(axis, dtype):
    x, indices = counting(3, 4), np.array([[0, 2], [-1, 1]], dtype)
    np.testing.assert_array_equal(
        check_op("gather", x, indices, axis=axis, free={0: [0]})[0], np.take(x, indices, axis)
    )


def test_gather_stays_inside_whatever_the_indices_are():
    np.testing.assert_array_equal(check_op("gather", counting(3), np.array([99, -99]))[0], [2, 0])


@pytest.mark.parametrize(
    ("shape", "expected"), [((6, 4), (6, 4)), ((-1,), (24,)), ((2, -1, 2), (2, 6, 2)), ((1, 24, 1), (1, 24, 1))]
)
def test_reshape(shape, expected):
    x = counting(2, 3, 4)
    (got,) = check_op("reshape", x, shape=shape)
    np.testing.assert_array_equal(got, x.reshape(expected))


def test_reshapes_keep_free_dims():
    n = Var("n", lower=1)
    b = Builder("f")
    x = b.input("x", TensorType((n, 3, 1, 4), "float32"))
    assert format_type(b.call("reshape", x, shape=(n, -1)).type) == "float32[n, 12]"
    assert format_type(b.call("reshape", x, shape=(-1, 6)).type) == "float32[n * 2, 6]"
    assert format_type(b.call("flatten", x, axis=2).type) == "float32[n * 3, 4]"
    assert format_type(b.call("squeeze", x).type) == "float32[n, 3, 4]"
    assert format_type(b.call("squeeze", x, axes=[-2]).type) == "float32[n, 3, 4]"
    assert format_type(b.call("unsqueeze", x, axes=[0, -1]).type) == "float32[1, n, 3, 1, 4, 1]"
    with pytest.raises(ShapeError, match="not known to divide"):
        b.call("reshape", x, shape=(-1, 5))
    with pytest.raises(ShapeError, match=r"dim 0 is n, not 1"):
        b.call("squeeze", x, axes=[0])
    with pytest.raises(ShapeError, match="as many elements"):
        b.call("reshape", x, shape=(n, 13))


@pytest.mark.parametrize(("op", "attrs"), [("flatten", {}), ("squeeze", {}), ("unsqueeze", {"axes": [0, 2]})])
def test_names_of_reshapes(op, attrs):
    x = counting(2, 1, 3)
    (got,) = check_op(op, x, free={0: [0]}, **attrs)
    np.testing.assert_array_equal(got.ravel(), x.ravel())


@pytest.mark.parametrize("dtype", ["int64", "bool", "float16", "uint8"])
def test_moves_take_any_dtype(dtype):
    x = (counting(2, 3) % 2).astype(dtype)
    check_op("transpose", x)
    check_op("concat", x, x, axis=0)
    check_op("slice", x, starts=[1], ends=[3], axes=[1])
    check_op("reshape", x, shape=(3, 2))
    check_op("pad", x, pads=[1, 0, 0, 1])
