"""Matrix products, reductions, softmax, batch norm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.builder import Builder, call
from kedge.compiler.graph.ir import Call, TensorType
from kedge.compiler.tir.expr import Var
from support.graphs import check_op

rng = np.random.default_rng(1)


def normal(*shape: int, dtype: str = "float32"):
    return rng.standard_normal(shape).astype(dtype)


MATMULS = [
    ((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 5)), ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 5)), ((1, 3, 4), (2, 4, 1)), ((2, 3, 4), (4,)), ((4,), (2, 4, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), MATMULS)
def test_matmul_is_numpys(a, b):
    x, y = normal(*a), normal(*b)
    (got,) = check_op("matmul", x, y)
    # Terms that cancel each other leave what their order makes of them, and that is the library's.
    np.testing.assert_allclose(got, np.matmul(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64"])
def test_matmul_dtypes(dtype):
    a, b = rng.integers(-9, 9, (3, 4)).astype(dtype), rng.integers(-9, 9, (4, 2)).astype(dtype)
    check_op("matmul", a, b, free={0: [0]})


def test_matmul_with_free_rows_and_columns():
    check_op("matmul", normal(7, 4), normal(4, 5), free={0: [0], 1: [1]})


def test_matmul_expects_inner_dims_to_be_equal_and_refuses_those_that_never_are():
    b = Builder("f")
    k = Var("k", lower=1)
    x, y = b.input("x", TensorType((2, k), "float32")), b.input("y", TensorType((4, 2), "float32"))
    product = call("matmul", x, y)
    assert isinstance(product, Call) and isinstance(product.inputs[0], Call)
    assert product.inputs[0].op == "expect_shape" and product.inputs[0].type.shape == (2, 4)
    assert product.inputs[1] is y
    with pytest.raises(ShapeError, match=r"the last dim of a, k \+ 4, is not known to equal 4 of b"):
        call("matmul", b.input("z", TensorType((2, k + 4), "float32")), y)


@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("addend", [None, (5,), (1, 5), (3, 1), (3, 5), ()])
def test_gemm(trans_a, trans_b, addend):
    a, b = normal(*((4, 3) if trans_a else (3, 4))), normal(*((5, 4) if trans_b else (4, 5)))
    extra = [] if addend is None else [normal(*addend)]
    (got,) = check_op("gemm", a, b, *extra, trans_a=trans_a, trans_b=trans_b, alpha=0.5, beta=2.0)
    expected = 0.5 * (a.T if trans_a else a) @ (b.T if trans_b else b) + (2 * extra[0] if extra else 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_reductions_are_numpys(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = data.draw(st.none() | st.lists(st.integers(0, len(shape) - 1), unique=True).map(tuple))
    keepdims = data.draw(st.booleans())
    name = data.draw(st.sampled_from(["sum", "mean", "max", "min", "prod"]))
    x = normal(*shape)
    free = {0: [0]} if data.draw(st.booleans()) else None
    (got,) = check_op(f"reduce_{name}", x, axes=axes, keepdims=keepdims, free=free, rtol=1e-4, atol=1e-5)
    wide = getattr(np, name)(x.astype(np.float64), axis=axes, keepdims=keepdims)
    np.testing.assert_allclose(got, wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", "float64"])
def test_reductions_of_other_dtypes(dtype):
    x = rng.integers(-5, 5, (3, 4)).astype(dtype)
    for name in ("sum", "max", "min"):
        check_op(f"reduce_{name}", x, axes=[1])


@pytest.mark.parametrize("op", ["argmax", "argmin"])
@pytest.mark.parametrize("select_last", [False, True])
def test_positions_of_extremes(op, select_last):
    x = np.array([[3, 1, 3, 1], [5, 5, 5, 5], [0, -1, -1, 0]], np.float32)
    (got,) = check_op(op, x, axis=1, select_last=select_last, free={0: [0]})
    first = {"argmax": [0, 0, 0], "argmin": [1, 0, 1]}[op]
    last = {"argmax": [2, 3, 3], "argmin": [3, 3, 2]}[op]
    np.testing.assert_array_equal(got, last if select_last else first)
    assert check_op(op, x.astype(np.int32), axis=0, keepdims=True)[0].shape == (1, 4)


def test_argmax_finds_the_first_nan():
    np.testing.assert_array_equal(check_op("argmax", np.array([[1, np.nan, 9]], np.float32), axis=1)[0], [1])


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_softmax(op, axis):
    x = normal(3, 4, 5)
    (got,) = check_op(op, x, axis=axis, free={0: [0]})
    wide = np.exp(x.astype(np.float64))
    expected = wide / wide.sum(axis=axis, keepdims=True)
    np.testing.assert_allclose(got, expected if op == "softmax" else np.log(expected), rtol=1e-5, atol=1e-6)


def test_softmax_of_huge_numbers_is_finite():
    (got,) = check_op("softmax", np.array([[1e4, 1e4 - 1, -1e4]], np.float32))
    np.testing.assert_allclose(got, [[0.7310586, 0.26894143, 0]], rtol=1e-5)


def test_softmax_of_float16_is_computed_in_float32():
    check_op("softmax", np.array([[11.5, 11, -3]], np.float16))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_batch_norm(shape):
    x, (scale, bias, mean) = normal(*shape), (normal(3) for _ in range(3))
    var = np.abs(normal(3)) + 0.5
    (got,) = check_op("batch_norm", x, scale, bias, mean, var, epsilon=1e-3, rtol=1e-4, atol=1e-5, free={0: [0]})
    per = (1, 3, *[1] * (len(shape) - 2))
    wide = [v.astype(np.float64).reshape(per) for v in (scale, bias, mean, var)]
    expected = (x - wide[2]) / np.sqrt(wide[3] + 1e-3) * wide[0] + wide[1]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
