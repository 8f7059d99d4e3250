"""Tensor expressions become functions with one block per tensor."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kedge
from kedge.compiler import te
from kedge.compiler.errors import CompileError
from kedge.compiler.tir.expr import Binary, Cast, Load, Var, call, eq, maximum, select
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


# The public surface --------------------------------------------------------------------------------------------------


def outputs(func, *arrays):
    """What the interpreter gives, after comparing it with machine code."""
    expected = run(verify(func), list(arrays))
    names = [buffer.name for buffer in func.params]
    with kedge.compile(func, target="native").open(threads=1) as m:
        got = m.run(dict(zip(names, arrays, strict=False)), func.name)
    for name, array in zip(names[len(arrays) :], expected, strict=True):
        assert got[name].dtype == array.dtype
        if array.dtype.kind == "f":
            np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    return expected


def position(reduce, shape, axis, dtype, **options):
    """`reduce` over one axis of a tensor of any rank."""
    x, k = te.placeholder(shape, dtype, "x"), te.reduce_axis(shape[axis], "k")
    kept = [dim for at, dim in enumerate(shape) if at != axis]
    y = te.compute(kept, lambda *i: reduce(x[(*i[:axis], k, *i[axis:])], k, **options), name="y")
    return te.create_prim_func([x, y], "f")


def test_everything_public_is_there_and_documented():
    assert sorted(te.__all__) == sorted(set(te.__all__))
    for name in te.__all__:
        assert (getattr(te, name).__doc__ or "").strip(), name
        assert getattr(kedge.te, name) is getattr(te, name)


POSITIONS = [(te.argmax, np.argmax), (te.argmin, np.argmin)]


@pytest.mark.parametrize(("reduce", "reference"), POSITIONS)
@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"]
)
def test_the_first_of_equal_ones_wins(reduce, reference, dtype):
    x = np.random.default_rng(1).integers(0, 2, (7, 37)).astype(dtype)
    x[0] = x[0, 0]
    (got,) = outputs(position(reduce, (7, 37), 1, dtype), x)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, reference(x, axis=1))
    (last,) = outputs(position(reduce, (7, 37), 1, dtype, select_last=True), x)
    np.testing.assert_array_equal(last, 36 - reference(x[:, ::-1], axis=1))


@pytest.mark.parametrize(("reduce", "reference"), POSITIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_first_nan_wins_and_infinities_are_numbers(reduce, reference, dtype):
    nan, inf = math.nan, math.inf
    x = np.array([[1, nan, 9, nan], [nan, -inf, inf, 0], [-inf, -inf, -inf, -inf], [inf, inf, inf, inf]], dtype)
    (got,) = outputs(position(reduce, x.shape, 1, dtype), x)
    np.testing.assert_array_equal(got, reference(x, axis=1))


@pytest.mark.parametrize(("reduce", "reference"), POSITIONS)
@pytest.mark.parametrize("dtype", ["int64", "uint64", "uint8", "int8"])
def test_the_ends_of_an_integer_range_are_values_like_any_other(reduce, reference, dtype):
    info = np.iinfo(dtype)
    x = np.array([[info.min] * 3, [info.max] * 3, [info.min, info.max, info.max], [info.max, info.min, 0]], dtype)
    np.testing.assert_array_equal(outputs(position(reduce, x.shape, 1, dtype), x)[0], reference(x, axis=1))


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_positions_are_numpys_for_every_shape(data):
    reduce, reference = data.draw(st.sampled_from(POSITIONS))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    dims = [te.Var(f"d{at}", lower=1) if data.draw(st.booleans()) else size for at, size in enumerate(shape)]
    values = st.sampled_from([0.0, -0.0, 1.0, -2.5, math.nan, math.inf, -math.inf])
    size = math.prod(shape)
    x = np.array(data.draw(st.lists(values, min_size=size, max_size=size)), "float32").reshape(shape)
    (got,) = outputs(position(reduce, dims, axis, "float32"), x)
    np.testing.assert_array_equal(got, reference(x, axis=axis))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("costly", [False, True])
def test_a_position_of_computed_values_sees_the_same_numbers_twice(dtype, costly):
    """What is cheap is inlined into both passes, rounding included; what is costly is stored."""
    n, m = te.Var("n", lower=1), te.Var("m", lower=1)
    x, w, k = te.placeholder((n, m), dtype, "x"), te.placeholder((m,), dtype, "w"), te.reduce_axis(m, "k")

    def element(i):
        value = x[i, k] * w[k] + w[k]
        return te.argmax(te.tanh(value) * x[i, k] if costly else value, k)

    func = verify(te.create_prim_func([x, w, te.compute((n,), element, name="y")], "f"))
    assert [buffer.name for buffer in func.allocs] == ["y_value", "y_best"]
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((400, 101)).astype(dtype), rng.standard_normal(101).astype(dtype)
    wide, weight = a.astype("float64"), b.astype("float64")
    exact = wide * weight + weight
    exact = np.tanh(exact) * wide if costly else exact
    with kedge.compile(func, target="native").open(threads=2) as module:
        got = module.run({"x": a, "w": b}, "f")["y"]
    chosen = np.take_along_axis(exact, got[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(
        chosen, exact.max(axis=1), atol={"float32": 1e-5, "float16": 2e-2, "bfloat16": 0.1}[dtype]
    )


def test_a_position_over_several_axes_is_in_row_major_order():
    x, a, b = te.placeholder((3, 4, 5), "float32", "x"), te.reduce_axis(4, "a"), te.reduce_axis(5, "b")
    y = te.compute((3,), lambda i: te.argmin(x[i, a, b], (a, b)), name="y")
    data = np.random.default_rng(0).integers(0, 9, (3, 4, 5)).astype("float32")
    (got,) = outputs(te.create_prim_func([x, y], "f"), data)
    np.testing.assert_array_equal(got, data.reshape(3, 20).argmin(axis=1))


@pytest.mark.parametrize(("reduce", "reference"), [(te.any, np.any), (te.all, np.all)])
def test_quantifiers(reduce, reference):
    n = te.Var("n", lower=1)
    x, k = te.placeholder((4, n), "float32", "x"), te.reduce_axis(n, "k")
    y = te.compute((4,), lambda i: reduce(x[i, k] > 0, k), name="y")
    data = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], "float32")
    (got,) = outputs(te.create_prim_func([x, y], "f"), data)
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(got, reference(data > 0, axis=1))
    nothing = te.reduce_axis(0, "k")
    empty = te.compute((), lambda: reduce(te.const(True), nothing), name="y")
    assert run(te.create_prim_func([empty], "f"), [])[0] == reference(np.zeros(0, bool))


FUNCTIONS = {
    "exp": np.exp, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "abs": np.abs, "isnan": np.isnan, "erf": np.vectorize(math.erf), "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
    "log": lambda v: np.log(np.abs(v)), "sqrt": lambda v: np.sqrt(np.abs(v)),
    "rsqrt": lambda v: 1 / np.sqrt(np.abs(v)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number(name):
    x = te.placeholder((50,), "float32", "x")
    inside = te.abs if name in ("log", "sqrt", "rsqrt") else lambda value: value
    y = te.compute((50,), lambda i: getattr(te, name)(inside(x[i])), name="y")
    data = np.random.default_rng(0).uniform(-3, 3, 50).astype("float32")
    (got,) = outputs(te.create_prim_func([x, y], "f"), data)
    np.testing.assert_allclose(got, FUNCTIONS[name](data), rtol=1e-5, atol=1e-6)


def test_functions_of_several():
    x, y = te.placeholder((60,), "float32", "x"), te.placeholder((60,), "float32", "y")
    results = {
        "minimum": (lambda i: te.minimum(x[i], 0), lambda a, b: np.minimum(a, 0)),
        "maximum": (lambda i: te.maximum(x[i], y[i]), np.maximum),
        "pow": (lambda i: te.pow(te.abs(x[i]), y[i]), lambda a, b: np.abs(a) ** b),
        "select": (lambda i: te.select(x[i] > y[i], 1, 0.5), lambda a, b: np.where(a > b, 1, 0.5).astype("float32")),
        "where": (lambda i: te.where(te.ne(x[i], y[i]), x[i], 2), lambda a, b: np.where(a != b, a, 2)),
        "eq": (lambda i: te.eq(x[i], y[i]), np.equal),
        "logic": (
            lambda i: te.logical_or(te.logical_and(x[i] > 0, y[i] > 0), te.logical_not(x[i] > -1)),
            lambda a, b: ((a > 0) & (b > 0)) | ~(a > -1),
        ),
        "cast": (lambda i: te.cast(x[i] * 2, "int32"), lambda a, b: (a * 2).astype("int32")),
        "truth": (lambda i: te.cast(te.floor(x[i]), "bool"), lambda a, b: np.floor(a) != 0),
        "number": (lambda i: te.cast(x[i] > 0, "float32") + te.const(0.5), lambda a, b: (a > 0) + np.float32(0.5)),
    }
    tensors = [te.compute((60,), body, name=name) for name, (body, _) in results.items()]
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-2, 2, 60).astype("float32") for _ in range(2))
    b[:10] = a[:10]
    got = outputs(te.create_prim_func([x, y, *tensors], "f"), a, b)
    for array, (name, (_, reference)) in zip(got, results.items(), strict=True):
        np.testing.assert_allclose(array, reference(a, b), rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_guarded_gather_reads_nothing_outside():
    n = te.Var("n", lower=1)
    x, index = te.placeholder((n,), "float32", "x"), te.placeholder((9,), "int32", "index")

    def element(i):
        at = te.cast(index[i], "int64")
        return te.select(te.logical_and(at >= 0, at < n), x[at], -1)

    y = te.compute((9,), element, name="y")
    data, indices = np.arange(5, dtype="float32"), np.array([0, 4, 5, -1, 2, 1 << 30, -(1 << 31), 3, 1], "int32")
    (got,) = outputs(te.create_prim_func([x, index, y], "f"), data, indices)
    np.testing.assert_array_equal(got, [0, 4, -1, -1, 2, -1, -1, 3, 1])


def test_literals_take_the_dtype_of_their_value_or_their_neighbour():
    x = te.placeholder((3,), "int8", "x")
    assert [te.const(value).dtype for value in (1, 1.5, True)] == ["int64", "float32", "bool"]
    assert te.const(2, "float16").dtype == "float16"
    assert te.maximum(x[0], 3).dtype == "int8"
    assert te.select(x[0] > 0, 1, 0.5).dtype == te.select(x[0] > 0, 1.0, 0).dtype == "float32"
    assert te.exp(1).dtype == "float32"
    assert te.cast(3, "int8").dtype == "int8"
    assert te.const(np.float32(2)).dtype == "float32"


X, K = te.placeholder((3, 4), "float32", "x"), te.reduce_axis(4, "k")
IX, B = te.placeholder((3,), "int32", "i"), te.placeholder((3,), "bool", "b")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: te.placeholder((3,), "float", "p"),
            TypeError,
            "p has the unknown dtype 'float'; give one of bfloat16",
        ),
        (lambda: te.placeholder((2.5,), "float32", "p"), TypeError, "dim 2.5 of p is a float; give an int or a symbol"),
        (lambda: te.placeholder(3, "float32", "p"), TypeError, "the shape of p is 3; give a tuple of dims"),
        (lambda: te.placeholder((-1,), "float32", "p"), CompileError, "dim -1 of p is negative"),
        (lambda: te.placeholder((te.Var("n", "int32"),), "float32", "p"), TypeError, "a dim of p is int32"),
        (lambda: te.reduce_axis("n"), TypeError, "dim 'n' of k is a str"),
        (lambda: te.exp(X), TypeError, r"argument of exp is the whole tensor x; read an element of it: x\[i, j\]"),
        (lambda: te.exp(IX[0]), TypeError, r"exp takes floats, not int32; te.cast\(value, 'float32'\)"),
        (lambda: te.isnan(IX[0]), TypeError, "isnan takes floats, not int32"),
        (lambda: te.pow(IX[0], 2), TypeError, "pow takes floats, not int32"),
        (lambda: te.abs(B[0]), TypeError, "abs takes a number, not bool"),
        (lambda: te.logical_and(B[0], X[0, 0]), TypeError, "logical_and takes bools, not float32; compare it"),
        (lambda: te.logical_or(1), TypeError, "logical_or takes bools, not int64"),
        (lambda: te.logical_not(IX[0]), TypeError, "logical_not takes bools, not int32"),
        (lambda: te.select(X[0, 0], 1, 2), TypeError, "the condition of select is float32; compare it"),
        (lambda: te.select(B[0], X[0, 0], IX[0]), TypeError, "select: operands have dtypes float32 and int32; te.cast"),
        (lambda: te.maximum(IX[0], 0.5), TypeError, "maximum: operands have dtypes int32 and float32"),
        (lambda: te.const(0.5, "int32"), TypeError, "0.5 is no int32"),
        (lambda: te.const(300, "uint8"), TypeError, "300 is no uint8"),
        (lambda: te.const("a"), TypeError, "a literal is of type str; give a scalar expression or a number"),
        (lambda: te.cast(1, "f32"), TypeError, "cast has the unknown dtype 'f32'"),
        (lambda: X[0:2, 0], TypeError, "an index of x is of type slice"),
        (lambda: te.sum(X[0, K], (K, K)), CompileError, "sum: axis k is reduced twice"),
        (lambda: te.sum(X[0, 0], te.Var("j")), TypeError, "sum over j, which is no reduce axis"),
        (lambda: te.sum(B[0], K), TypeError, "cast to int64 first, or use te.any or te.all"),
        (lambda: te.any(X[0, K], K), TypeError, "any takes bools, not float32"),
        (lambda: te.argmax(X[0, K], ()), CompileError, "argmax: a reduction needs at least one axis"),
        (lambda: te.argmax(te.const(1.0), te.reduce_axis(0)), CompileError, "axis without elements has no result"),
        (lambda: te.compute((3,), lambda i: te.sum(X[i, 0], K), name="y"), CompileError, "does not use the axis k"),
        (lambda: te.compute((3,), lambda i: X[i, K], name="y"), CompileError, "y: reduce axis k is used, but not red"),
        (lambda: te.compute((3,), lambda i: te.argmax(X[i, K], K) + 1), CompileError, "must be the whole body"),
        (lambda: te.compute((3,), lambda i: te.sum(te.max(X[i, K], K), K)), CompileError, "must be the whole body"),
        (
            lambda: te.compute((3, 4), lambda i: X[i, 0], name="y"),
            TypeError,
            r"y has 2 dims, but its function takes \(i",
        ),
        (lambda: te.compute((3,), lambda i: None, name="y"), TypeError, "the element of y is of type NoneType"),
        (lambda: te.compute((3,), lambda i: X, name="y"), TypeError, "the element of y is the whole tensor x"),
        (lambda: te.compute((3,), lambda i: IX[i] / 2, name="y"), TypeError, "y: true division of int32; use //"),
        (
            lambda: te.compute((3,), lambda i: Binary("truncdiv", X[i, 0], X[i, 0]), name="y"),
            TypeError,
            r"y: truncdiv of float32; use //",
        ),
        (lambda: te.compute((3,), lambda i: B[i] + B[i], name="y"), TypeError, "y: add of bools; te.cast them"),
        (lambda: te.create_prim_func([X, X[0, 0]], "f"), TypeError, "f: a Load is among the parameters"),
    ],
)
def test_mistakes_are_named_with_their_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (lambda x, i: x[i * 1.5], "mul: 1.5 is no integer, and 'i' is int64; i * 3 // 2 rounds down, te.cast(i,"),
        (lambda x, i: x[0.5 + i], "add: 0.5 is no integer, and 'i' is int64; te.cast(i,"),
        (lambda x, i: x[i] * 1.5, "mul: 1.5 is no integer, and the element of 'x' is int32; value * 3 // 2"),
        (lambda x, i: te.select(i < 1.5, x[i], 0), "lt: 1.5 is no integer, and 'i' is int64"),
        (lambda x, i: te.select(x[i] + x[i] > np.float32(0.5), x[i], 0), "gt: .*0.5.* is no integer, and the other op"),
        (lambda x, i: x[i] * float("inf"), "mul: inf is no integer"),
    ],
)
def test_a_fraction_is_not_cut_to_an_integer(element, message):
    x = te.placeholder((8,), "int32", "x")
    with pytest.raises(TypeError, match=message.replace("(", r"\(").replace("* 3", r"\* 3").replace("* te", r"\* te")):
        te.compute((4,), lambda i: element(x, i), name="y")


def test_a_whole_float_beside_integers_is_an_integer():
    x = te.placeholder((8,), "int32", "x")
    y = te.compute((4,), lambda i: te.cast(x[i * 2.0] * 3.0, "float32") * 1.5, name="y")
    assert y.dtype == "float32"
