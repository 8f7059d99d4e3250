"""Tensor expressions become functions with one block per tensor."""

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.errors import CompileError
from kedge.compiler.tir.expr import Cast, Load, Var, call, eq, maximum, select
from kedge.compiler.tir.interp import run
from kedge.compiler.tir.verify import verify
from support.functions import conv, dense, softmax

N = Var("n", lower=1)


def test_golden_dense(golden):
    golden("dense.txt", verify(dense(N, 784, 10)).show())


def test_golden_conv(golden):
    golden("conv.txt", verify(conv(N, 2, 8, 4)).show())


def test_golden_softmax(golden):
    golden("softmax.txt", verify(softmax(N, Var("m", lower=1, upper=64))).show())


def test_indexing_gives_loads():
    x = te.placeholder((2, 3), "float32", "x")
    load = x[1, Var("j")]
    assert isinstance(load, Load)
    assert load.buffer is x.buffer
    assert load.dtype == "float32"
    scalar = te.placeholder((), "float32", "s")
    assert scalar.at(()).indices == ()


def test_wrong_index_count_and_dtype():
    x = te.placeholder((2, 3), "float32", "x")
    with pytest.raises(IndexError, match="x has 2 dims but was given 1"):
        x[0]
    index = te.placeholder((2,), "int32", "index")
    with pytest.raises(TypeError, match="index of x is int32; cast it"):
        x[index[0], 0]


def test_gather():
    x, index = te.placeholder((4, 3), "float32", "x"), te.placeholder((2,), "int32", "index")
    y = te.compute((2, 3), lambda i, j: x[Cast(index[i], "int64"), j], name="y")
    func = verify(te.create_prim_func([x, index, y], "gather"))
    block_reads = func.show().splitlines()
    assert any("reads index[vi], x[:4, vj]" in line for line in block_reads)
    data = np.arange(12, dtype="float32").reshape(4, 3)
    np.testing.assert_array_equal(run(func, [data, np.array([3, 0], "int32")])[0], data[[3, 0]])


@pytest.mark.parametrize(
    ("reduce", "reference"), [(te.sum, np.sum), (te.prod, np.prod), (te.max, np.max), (te.min, np.min)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
def test_reductions(reduce, reference, dtype):
    x, k = te.placeholder((3, 4), dtype, "x"), te.reduce_axis(4, "k")
    func = verify(te.create_prim_func([x, te.compute((3,), lambda i: reduce(x[i, k], k), name="y")], "f"))
    data = np.random.default_rng(0).integers(1, 4, (3, 4)).astype(dtype)
    np.testing.assert_array_equal(run(func, [data])[0], reference(data, axis=1).astype(dtype))


@pytest.mark.parametrize("reduce", [te.max, te.min])
def test_extremes_propagate_nan(reduce):
    x, k = te.placeholder((2, 3), "float32", "x"), te.reduce_axis(3, "k")
    func = te.create_prim_func([x, te.compute((2,), lambda i: reduce(x[i, k], k), name="y")], "f")
    data = np.array([[1, np.nan, 2], [3, 4, 5]], "float32")
    got = run(func, [data])[0]
    assert np.isnan(got[0])
    assert not np.isnan(got[1])


@pytest.mark.parametrize(("reduce", "value"), [(te.sum, 0), (te.prod, 1), (te.max, -np.inf), (te.min, np.inf)])
def test_reduction_over_nothing_gives_the_identity(reduce, value):
    x, k = te.placeholder((2, 0), "float32", "x"), te.reduce_axis(0, "k")
    func = verify(te.create_prim_func([x, te.compute((2,), lambda i: reduce(x[i, k], k), name="y")], "f"))
    np.testing.assert_array_equal(run(func, [np.ones((2, 0), "float32")])[0], [value, value])


def test_select_and_intrinsics():
    x = te.placeholder((4,), "float32", "x")
    y = te.compute((4,), lambda i: select(i < 1, x[i], call("exp", x[i - 1])), name="y")
    data = np.arange(4, dtype="float32")
    got = run(verify(te.create_prim_func([x, y], "f")), [data])[0]
    np.testing.assert_array_equal(got, np.concatenate([data[:1], np.exp(data[:3])]))


def test_several_outputs_and_repeated_names():
    x = te.placeholder((3,), "float32", "x")
    a = te.compute((3,), lambda i: x[i] + 1.0, name="t")
    b = te.compute((3,), lambda i: a[i] * 2.0, name="t")
    func = verify(te.create_prim_func([x, a, b], "f"))
    assert [p.name for p in func.params] == ["x", "t", "t_1"]
    assert func.n_outputs == 2
    assert func.allocs == ()
    one, two = run(func, [np.zeros(3, "float32")])
    np.testing.assert_array_equal(one, [1, 1, 1])
    np.testing.assert_array_equal(two, [2, 2, 2])


def test_symbols_in_order_of_appearance():
    m, n = Var("m", lower=1), Var("n", lower=1)
    x, y = te.placeholder((n, 3), "float32", "x"), te.placeholder((m, n), "float32", "y")
    z = te.compute((m + n, 3), lambda i, j: x[i % n, j] + y[i % m, 0], name="z")
    assert te.create_prim_func([x, y, z], "f").symbols == (n, m)


def test_scalar_tensor():
    x = te.placeholder((), "float32", "x")
    y = te.compute((), lambda: maximum(x.at(()), 0.0), name="y")
    assert run(verify(te.create_prim_func([x, y], "f")), [np.float32(-1).reshape(())])[0] == 0


def test_refusals():
    x, k = te.placeholder((3,), "float32", "x"), te.reduce_axis(3, "k")
    y = te.compute((3,), lambda i: x[i] + 1.0, name="y")
    with pytest.raises(CompileError, match="placeholder 'x' is read but missing"):
        te.create_prim_func([y], "f")
    with pytest.raises(CompileError, match="at least one"):
        te.create_prim_func([x], "f")
    with pytest.raises(CompileError, match="each placeholder once, then each output"):
        te.create_prim_func([y, x], "f")
    with pytest.raises(CompileError, match="must be the whole body"):
        te.compute((1,), lambda i: te.sum(x[k], k) + 1.0)
    with pytest.raises(CompileError, match="at least one axis"):
        te.sum(x[0], ())
    with pytest.raises(TypeError, match="cast to int64"):
        te.max(eq(x[0], 0.0), k)
