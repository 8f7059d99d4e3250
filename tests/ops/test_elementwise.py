"""Element-wise and broadcasting operators: reference, lowering, every dtype, awkward numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.tir.expr import Var
from support.graphs import check_op

X = np.array([[-3.5, -2.5, -1.0, -0.0, 0.0], [0.5, 1.5, 2.0, 2.5, 7.25]], np.float32)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("relu", np.maximum(X, 0)),
        ("abs", np.abs(X)),
        ("neg", -X),
        ("floor", np.floor(X)),
        ("ceil", np.ceil(X)),
        ("round", np.array([[-4, -2, -1, 0, 0], [0, 2, 2, 2, 7]])),  # half to even
        ("tanh", np.tanh(X)),
        ("exp", np.exp(X)),
        ("sin", np.sin(X)),
        ("cos", np.cos(X)),
        ("erf", np.vectorize(math.erf)(X)),
        ("sigmoid", 1 / (1 + np.exp(-X.astype(np.float64)))),
        ("identity", X),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_unary(op, expected, dtype):
    (got,) = check_op(op, X.astype(dtype), free={0: [0]})
    rtol = {"float16": 1e-3, "bfloat16": 2**-8}.get(dtype, 1e-6)
    np.testing.assert_allclose(got.astype("float64"), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("op", ["log", "sqrt", "rsqrt"])
def test_unary_of_positive_numbers(op):
    check_op(op, np.abs(X) + 0.25)


def test_sigmoid_neither_overflows_nor_warns():
    (got,) = check_op("sigmoid", np.array([-1000, -50, 0, 50, 1000], np.float32))
    np.testing.assert_allclose(got, [0, 1.9287498e-22, 0.5, 1, 1])


def test_not_a_number_passes_through():
    x = np.array([np.nan, -1, np.inf], np.float32)
    assert np.isnan(check_op("relu", x)[0][0])
    assert np.isnan(check_op("clip", x, min=0.0, max=1.0)[0][0])
    assert np.isnan(check_op("maximum", x, np.zeros(3, np.float32))[0][0])
    np.testing.assert_array_equal(check_op("isnan", x)[0], [True, False, False])


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, [-9, 0, 9]), ({"min": -2.0}, [-2, 0, 9]), ({"max": 2.0}, [-9, 0, 2]), ({"min": -1.5, "max": 1.5}, None)],
)
@pytest.mark.parametrize("dtype", ["float32", "int32", "int8"])
def test_clip(limits, expected, dtype):
    (got,) = check_op("clip", np.array([-9, 0, 9], dtype), **limits)
    if expected is None:  # bounds of integers move inwards
        expected = [-1.5, 0, 1.5] if dtype == "float32" else [-1, 0, 1]
    np.testing.assert_array_equal(got, expected)


def test_clip_bounds_beyond_an_integer_dtype():
    np.testing.assert_array_equal(check_op("clip", np.array([-128, 127], np.int8), min=-1e9, max=1e9)[0], [-128, 127])


CASTS = [
    ("float32", "int32", [-3, 2, 0]), ("float32", "int64", [-3, 2, 0]), ("float32", "bool", [True, True, False]),
    ("int32", "float32", [-3, 2, 0]), ("float32", "float16", [-3.75, 2.75, 0]), ("bool", "float32", [1, 1, 0]),
    ("bool", "int64", [1, 1, 0]), ("float16", "float32", [-3.75, 2.75, 0]), ("int64", "bool", [True, True, False]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "dtype", "expected"), CASTS)
def test_cast(source, dtype, expected):
    (got,) = check_op("cast", np.array([-3.75, 2.75, 0]).astype(source), dtype=dtype)
    np.testing.assert_array_equal(got, np.array(expected, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "minimum", "maximum"])
def test_arithmetic(op, dtype):
    rng = np.random.default_rng(0)
    check_op(op, rng.integers(0, 9, (3, 4)).astype(dtype), rng.integers(0, 9, (4,)).astype(dtype), free={0: [0]})


def test_integers_divide_towards_zero():
    a, b = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    np.testing.assert_array_equal(check_op("div", a, b)[0], [3, -3, -3, 3])
    np.testing.assert_array_equal(check_op("mod", a, b)[0], [1, 1, -1, -1])
    np.testing.assert_array_equal(check_op("mod", a, b, fmod=True)[0], [1, -1, 1, -1])


def test_floats_divide_and_leave_remainders():
    a, b = np.array([7, -7, 5.5], np.float32), np.array([2, 2, -2], np.float32)
    np.testing.assert_allclose(check_op("div", a, b)[0], [3.5, -3.5, -2.75])
    np.testing.assert_allclose(check_op("mod", a, b)[0], [1, 1, -0.5])
    np.testing.assert_allclose(check_op("mod", a, b, fmod=True)[0], [1, -1, 1.5])


def test_pow():
    x = np.array([0.5, 2.0, 3.0], np.float32)
    np.testing.assert_allclose(check_op("pow", x, np.array(1.7, np.float32))[0], x**1.7, rtol=1e-6)
    np.testing.assert_array_equal(check_op("pow", np.array([-3, 2]), np.array([3, 10]))[0], [-27, 1024])


@pytest.mark.parametrize("op", ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"])
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_comparisons(op, dtype):
    x = np.arange(5).astype(dtype)
    assert check_op(op, x, x[::-1].copy())[0].dtype == np.bool_


@pytest.mark.parametrize("op", ["logical_and", "logical_or", "logical_xor", "equal", "not_equal"])
def test_logic(op):
    check_op(op, np.array([[True], [False]]), np.array([True, False]))


def test_not():
    np.testing.assert_array_equal(check_op("not", np.array([True, False]))[0], [False, True])


def test_where_broadcasts_all_three():
    condition = np.array([[True], [False]])
    (got,) = check_op("where", condition, np.float32(1.0).reshape(1), np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(got, [[1, 1, 1], [0, 1, 2]])


def test_leaky_relu():
    np.testing.assert_allclose(check_op("leaky_relu", X, alpha=0.1)[0], np.where(X < 0, X * np.float32(0.1), X))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_broadcasting_is_numpys(data):
    shapes = data.draw(hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=4, max_side=4))
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes.input_shapes)
    (got,) = check_op("sub", a, b)
    np.testing.assert_array_equal(got, a - b)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_broadcast_to_is_numpys(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    source = tuple(data.draw(st.sampled_from([dim, 1])) for dim in shape[data.draw(st.integers(0, len(shape))) :])
    x = np.arange(math.prod(source), dtype=np.float32).reshape(source)
    np.testing.assert_array_equal(check_op("broadcast_to", x, shape=shape)[0], np.broadcast_to(x, shape))


def test_symbolic_dims_broadcast_with_one_and_with_themselves():
    n, m = Var("n", lower=1), Var("m", lower=1)
    b = Builder("f")
    x, row = b.input("x", TensorType((n, 4), "float32")), b.input("row", TensorType((1, 4), "float32"))
    assert b.call("add", x, row).type.shape == (n, 4)
    assert b.call("add", x, x).type.shape == (n, 4)
    other = b.input("other", TensorType((m, 4), "float32"))
    with pytest.raises(ShapeError, match="n and m are not known to be equal"):
        b.call("add", x, other)


def test_refusals_name_operator_node_and_types():
    b = Builder("f")
    x, y = b.input("x", TensorType((2, 3), "float32")), b.input("y", TensorType((2, 4), "float32"))
    z = b.input("z", TensorType((2, 3), "int32"))
    with pytest.raises(ShapeError, match=r"add \(node sum1\): dims 3 and 4 do not broadcast; got add\(float32\[2, 3\]"):
        b.call("add", x, y, origin=("sum1",))
    with pytest.raises(ShapeError, match="dtypes differ"):
        b.call("add", x, z)
    with pytest.raises(ShapeError, match="dtype int32 is not supported"):
        b.call("exp", z)
    with pytest.raises(ShapeError, match="unknown attribute axes"):
        b.call("relu", x, axes=(1,))
    with pytest.raises(ShapeError, match="attribute dtype is missing"):
        b.call("cast", x)
    with pytest.raises(ShapeError, match="takes 2 inputs, not 1"):
        b.call("add", x)
