"""The interpreter against numpy, one iteration at a time and vectorized."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from kedge.compiler import te
from kedge.compiler.errors import VerifyError
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Binary, Cast, Load, Var, binary, call, const, logical_and, select
from kedge.compiler.tir.interp import run
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import Buffer, For, PrimFunc, Store
from kedge.compiler.tir.visitor import seq
from kedge.rpc.errors import InputError
from support.functions import conv, dense, inputs, mean, pool, softmax

N = Var("n", lower=1)


def numpy_conv(x, w, b, stride):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, w.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.maximum(np.einsum("nchwrs,ocrs->nohw", windows, w) + b[:, None, None], 0)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv(vectorize, stride):
    func = conv(N, 2, 5, 3, stride=stride)
    x, w, b = inputs(func, {"n": 2})
    np.testing.assert_array_equal(run(func, [x, w, b], vectorize=vectorize)[0], numpy_conv(x, w, b, stride))


@pytest.mark.parametrize("vectorize", [True, False])
def test_dense_softmax_pool_mean(vectorize):
    x, w, b = inputs(dense(N, 6, 5), {"n": 3})
    np.testing.assert_array_equal(run(dense(N, 6, 5), [x, w, b], vectorize=vectorize)[0], np.maximum(x @ w + b, 0))
    (x,) = inputs(softmax(N, 7), {"n": 3})
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(run(softmax(N, 7), [x], vectorize=vectorize)[0], e / e.sum(1, keepdims=True), rtol=1e-6)
    (x,) = inputs(pool(N, 2, 6), {"n": 2})
    best = x.reshape(2, 2, 3, 2, 3, 2).max((3, 5))
    np.testing.assert_array_equal(run(pool(N, 2, 6), [x], vectorize=vectorize)[0], best)
    np.testing.assert_allclose(run(mean(2, 2, 6), [x], vectorize=vectorize)[0], x.mean((2, 3)), rtol=1e-6)


def test_a_convolution_is_a_few_operations_on_arrays(monkeypatch):
    """One of a network for digits: its 300,000 multiply-adds are not done one by one."""
    func = conv(1, 16, 8, 32)
    reads = []
    monkeypatch.setattr(interp, "_inside", lambda *read, check=interp._inside: reads.append(read) or check(*read))
    run(func, inputs(func))
    assert 0 < len(reads) < 100


def unary(name: str, dtype: str = "float64") -> PrimFunc:
    x = te.placeholder((5,), dtype, "x")
    return te.create_prim_func([x, te.compute((5,), lambda i: call(name, x[i]), name="y")], "f")


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("exp", np.exp), ("log", np.log), ("sqrt", np.sqrt), ("tanh", np.tanh), ("floor", np.floor),
        ("ceil", np.ceil), ("round", np.round), ("sin", np.sin), ("cos", np.cos), ("abs", np.abs),
        ("rsqrt", lambda x: 1 / np.sqrt(x)), ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
    ],
)  # fmt: skip
def test_intrinsics(name, reference, vectorize):
    data = np.array([0.5, 1.5, 2.5, 3.25, 4.75])
    # With the vector instructions of some machines numpy's functions are 4 units of the last place beside libm's.
    np.testing.assert_allclose(run(unary(name), [data], vectorize=vectorize)[0], reference(data), rtol=4e-15)


def test_erf():
    got = run(unary("erf"), [np.array([-1.0, 0.0, 0.5, 1.0, 3.0])])[0]
    np.testing.assert_allclose(got, [-0.8427007929, 0, 0.5204998778, 0.8427007929, 0.9999779095], rtol=1e-9)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("op", "want"),
    [
        ("floordiv", [-2, -2, 1, 1]),
        ("floormod", [1, -1, -2, 1]),
        ("truncdiv", [-1, -1, 1, 1]),
        ("truncmod", [-2, 2, -2, 1]),
    ],
)
def test_integer_division(op, want, vectorize):
    a, b = te.placeholder((4,), "int64", "a"), te.placeholder((4,), "int64", "b")
    func = te.create_prim_func([a, b, te.compute((4,), lambda i: binary(op, a[i], b[i]), name="y")], "f")
    got = run(func, [np.array([-5, 5, -5, 4]), np.array([3, -3, -3, 3])], vectorize=vectorize)[0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("vectorize", [True, False])
def test_guarded_loads_are_safe_and_unguarded_ones_are_caught(vectorize):
    x = te.placeholder((4,), "float32", "x")
    safe = te.compute((6,), lambda i: select(logical_and(i >= 1, i < 5), x[i - 1], 0.0), name="y")
    got = run(te.create_prim_func([x, safe], "f"), [np.ones(4, "float32")], vectorize=vectorize)[0]
    np.testing.assert_array_equal(got, [0, 1, 1, 1, 1, 0])
    unsafe = te.compute((6,), lambda i: x[i % 4], name="y")  # what te refuses itself comes in as text
    text = te.create_prim_func([x, unsafe], "f").show().replace("vi % 4", "vi - 1")
    with pytest.raises(VerifyError, match="index vi - 1 of x leaves its dim of size 4"):
        run(parse_func(text), [np.ones(4, "float32")], vectorize=vectorize)


@pytest.mark.parametrize("vectorize", [True, False])
def test_conjunctions_do_not_evaluate_what_is_decided(vectorize):
    x = te.placeholder((4,), "float32", "x")
    y = te.compute((5,), lambda i: select(logical_and(i < 4, x[i] > 0.0), 1.0, 0.0), name="y")
    got = run(te.create_prim_func([x, y], "f"), [np.array([1, -1, 1, -1], "float32")], vectorize=vectorize)[0]
    np.testing.assert_array_equal(got, [1, 0, 1, 0, 0])


def test_casts_truncate():
    x = te.placeholder((2,), "float32", "x")
    func = te.create_prim_func([x, te.compute((2,), lambda i: Cast(x[i], "int32"), name="y")], "f")
    np.testing.assert_array_equal(run(func, [np.array([1.9, -1.9], "float32")])[0], [1, -1])


def test_a_recurrence_is_not_vectorized():
    # y[i + 1] = y[i] + x[i] reads what the iteration before wrote.
    x, y, i = Buffer("x", (4,), "int64"), Buffer("y", (5,), "int64"), Var("i")
    step = Store(y, (i + 1,), Binary("add", Load(y, (i,)), Load(x, (i,))))
    func = PrimFunc("scan", (x, y), 1, seq(Store(y, (const(0),), const(0)), For(i, const(4), "serial", step)))
    np.testing.assert_array_equal(run(func, [np.arange(1, 5)])[0], [0, 1, 3, 6, 10])


def test_memory_that_was_never_written_shows():
    y = Buffer("y", (3,), "float32")
    func = PrimFunc("f", (y,), 1, Store(y, (const(1),), const(1.0, "float32")))
    assert np.isnan(run(func, [])[0][[0, 2]]).all()


def test_bad_inputs():
    func = dense(N, 3, 2)
    x, w, b = inputs(func, {"n": 2})
    with pytest.raises(InputError, match="takes 3 inputs, not 2"):
        run(func, [x, w])
    with pytest.raises(InputError, match=r"w is float64\[3, 2\], not float32\[3, 2\]"):
        run(func, [x, w.astype("float64"), b])
    with pytest.raises(InputError, match=r"x is float32\[2, 4\], not float32\[n, 3\] = \[2, 3\]"):
        run(func, [np.zeros((2, 4), "float32"), w, b])
    out = te.compute((N,), lambda i: Cast(i, "float32"), name="y")
    with pytest.raises(InputError, match="value of n does not follow"):
        run(te.create_prim_func([out], "iota"), [])
    np.testing.assert_array_equal(run(te.create_prim_func([out], "iota"), [], {"n": 3})[0], [0, 1, 2])


@pytest.mark.parametrize("place", ["vi // 2", "vi"])
def test_elements_that_begin_anew_are_not_evaluated_at_once(place):
    text = f"""func f(x: float32[4, 3]) -> (y: float32[4]):
  for i in range(4):
    for k in range(3):
      block y:
        vi = spatial(4, i)
        vk = reduce(3, k)
        reads x[vi, vk]
        writes y[{place}]
        init:
          y[{place}] = 0.0
        y[{place}] = y[{place}] + x[vi, vk]"""
    func = parse_func(text)
    (x,) = inputs(func)
    (got,), (want,) = run(func, [x]), run(func, [x], vectorize=False)
    np.testing.assert_array_equal(got, want)
    last = [1, 3] if place != "vi" else [0, 1, 2, 3]
    np.testing.assert_array_equal(got[: len(last)], x.sum(1)[last])
