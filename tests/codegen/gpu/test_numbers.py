"""Every element type and operation in OpenCL C: what a kernel computes is what the interpreter does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Binary, Cast, Expr, Select, Var, call, const, eq, maximum, minimum, select
from kedge.compiler.tir.stmt import PrimFunc
from support import opencl

Op = Callable[[Expr, Expr], Expr]
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_N = Var("n", lower=1)
FLOATS = ("float16", "bfloat16", "float32", "float64")


def chosen(number: Expr, values: Sequence[Expr], first: int = 0) -> Expr:
    """The value with that number."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return Select(
        number < first + half, chosen(number, values[:half], first), chosen(number, values[half:], first + half)
    )


def table(dtype: str, result: str, ops: Mapping[str, Op]) -> PrimFunc:
    """Row `i` holds what each operation makes of `a[i]` and `b[i]`; one kernel, since each takes a second to build."""
    a, b = te.placeholder((_N,), dtype, "a"), te.placeholder((_N,), dtype, "b")

    def element(i: Expr, j: Expr) -> Expr:
        return chosen(j, [Cast(op(a[i], b[i]), result) for op in ops.values()])

    return te.create_prim_func([a, b, te.compute((a.shape[0], len(ops)), element, name="y")], f"table_{dtype}")


def both(func: PrimFunc, arrays: list[Any], cache: KernelCache) -> tuple[Any, Any]:
    with np.errstate(all="ignore"):
        (want,) = interp.run(func, arrays)
    (got,) = opencl.run(func, arrays, cache)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    return got, want


def binary(op: Any) -> Op:
    return lambda a, b: Binary(op, a, b)


ARITHMETIC: dict[str, Op] = {op: binary(op) for op in ("add", "sub", "mul", "min", "max")}
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def compared(op: Any, dtype: str) -> Op:
    return lambda a, b: Cast(Binary(op, a, b), dtype)


def divided(op: Any, least: Expr, one: Expr) -> Op:
    return lambda a, b: Binary(op, maximum(a, least), select(eq(b, b - b), one, maximum(b, least)))


def unary(name: str) -> Op:
    return lambda a, b: call(name, a)


def pairs(values: Sequence[float], dtype: str) -> list[Any]:
    column = np.array(values, dtype)
    a, b = np.meshgrid(column, column, indexing="ij")
    return [a.reshape(-1), b.reshape(-1)]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype: str, kernels: KernelCache) -> None:
    """Sums wrap around, quotients round down or towards zero, literals keep their type at both ends of the range."""
    info = np.iinfo(dtype)
    least, most, one = const(info.min + 1, dtype), const(info.max, dtype), const(1, dtype)
    ops: dict[str, Op] = {
        **ARITHMETIC,
        "least": lambda a, b: a + const(info.min + (dtype == "int64"), dtype),
        "most": lambda a, b: minimum(a, most) - b,
        "abs": lambda a, b: call("abs", a),
        "pow": lambda a, b: call("pow", a, b),
        **({} if "64" in dtype else {"round": lambda a, b: call("round", a) + call("floor", b)}),
        "nested": lambda a, b: a - (b - a) * (a - b),
        "guarded": lambda a, b: select(eq(b, const(0, dtype)), a, Binary("floordiv", a, maximum(b, one))),
        # What numpy makes of 64-bit integers by rint, and of 0 and the least number as divisors, is not meant.
        **{op: divided(op, least, one) for op in ("floordiv", "floormod", "truncdiv", "truncmod")},
        **{name: compared(name, dtype) for name in COMPARISONS},
    }
    values = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 7, 100]
    values += [-1, -2, -3, -7] if info.min < 0 else []
    got, want = both(table(dtype, dtype, ops), pairs(values, dtype), kernels)
    for number, name in enumerate(ops):
        np.testing.assert_array_equal(got[:, number], want[:, number], err_msg=name)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 2.5, 0.1, 3e4, -7.25, math.inf, -math.inf, math.nan]
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-13}


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(dtype: str, kernels: KernelCache) -> None:
    """-0.0, infinities and NaN go through every operation as they do in the interpreter; min and max pass NaN on."""
    ops: dict[str, Op] = {
        **ARITHMETIC,
        **{op: binary(op) for op in ("div", "floordiv", "floormod", "truncmod")},
        **{name: compared(name, dtype) for name in COMPARISONS},
        **{name: unary(name) for name in ("abs", "floor", "ceil", "round")},
        "negated": lambda a, b: a * const(-1.0, dtype) - const(-0.0, dtype),
        "literals": lambda a, b: select(a < b, const(math.inf, dtype), const(-math.inf, dtype)),
        "nan": lambda a, b: select(call("isnan", a, dtype="bool"), const(1.0, dtype), const(math.nan, dtype)),
        "tenth": lambda a, b: const(0.1, dtype) * Cast(a < b, dtype),
        "not": lambda a, b: Cast(call("not", a < b, dtype="bool"), dtype),
        "logic": lambda a, b: Cast(Binary("or", Binary("and", a < b, b < const(2.0, dtype)), eq(a, b)), dtype),
        "truth": lambda a, b: Cast(Cast(a, "bool"), dtype),
        **{name: unary(name) for name in ("exp", "tanh", "erf", "sigmoid", "sin", "cos")},
        **{name: positive(name, dtype) for name in ("log", "sqrt", "rsqrt")},
        "pow": lambda a, b: call("pow", call("abs", a) + const(0.5, dtype), b),
    }
    got, want = both(table(dtype, dtype, ops), pairs(SPECIAL, dtype), kernels)
    for number, name in enumerate(ops):
        mine, theirs = got[:, number].astype("float64"), want[:, number].astype("float64")
        np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE[dtype], atol=2e-7, err_msg=name)
        if name in ("negated", "abs", "floor", "round", "add", "floordiv", "floormod", "truncmod"):
            np.testing.assert_array_equal(np.signbit(mine[mine == 0]), np.signbit(theirs[mine == 0]), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_has_no_denormal_results(dtype: str, kernels: KernelCache) -> None:
    least = float(np.finfo(dtype).tiny)
    x = np.array([*np.linspace(math.log(least) - 20, math.log(least) + 1, 61), -88.0, math.nan], dtype)
    got, _ = both(table(dtype, dtype, {"sigmoid": unary("sigmoid")}), [x, x], kernels)
    got = got[:, 0]
    exact = np.exp(x.astype("longdouble"))
    assert np.isnan(got[-1]) and not np.any((got > 0) & (got < least)) and np.any(got == 0)
    kept = exact > least * 1.0001
    np.testing.assert_allclose(got[kept].astype("longdouble"), exact[kept], rtol=1e-5)
    np.testing.assert_array_equal(got[exact < least * 0.9999], 0)


def test_remainders_are_exact(kernels: KernelCache) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(0, 1, 512) * 2.0 ** rng.integers(-60, 60, 512) for _ in range(2))
    ops: dict[str, Op] = {op: binary(op) for op in ("floordiv", "floormod", "truncmod")}
    for dtype in ("float32", "float64"):
        got, want = both(table(dtype, dtype, ops), [x.astype(dtype), y.astype(dtype)], kernels)
        np.testing.assert_array_equal(got, want)


def test_float64_becomes_float16_with_one_rounding(kernels: KernelCache) -> None:
    middle = 1 + 2.0**-11
    x = np.array([middle, middle + 2.0**-40, middle - 2.0**-40, -middle - 2.0**-40, 65519.9999999, 1e300, math.nan])
    got, want = both(table("float64", "float16", {"a": lambda a, b: a}), [x, x], kernels)
    np.testing.assert_array_equal(got, want)
    assert got[1, 0] != got[0, 0]


def positive(name: str, dtype: str) -> Op:
    return lambda a, b: call(name, call("abs", a) + const(0.125, dtype))


def test_casts(kernels: KernelCache) -> None:
    """From every type to every type and on to float64, where the other type can hold the value."""
    kinds = ("bool", *INTEGERS, *FLOATS)
    sources = [te.placeholder((_N,), kind, f"from_{kind}") for kind in kinds]

    def element(i: Expr, j: Expr) -> Expr:
        return chosen(j, [Cast(Cast(source[i], kind), "float64") for source in sources for kind in kinds])

    y = te.compute((_N, len(kinds) ** 2), element, name="y")
    func = te.create_prim_func([*sources, y], "casts")
    values = [0, 1, 2, 100, 127, 0.5, 1.75, 99.99]
    arrays = [np.array(values).astype("int64" if kind in INTEGERS else "float64").astype(kind) for kind in kinds]
    got, want = both(func, arrays, kernels)
    for number, pair in enumerate((a, b) for a in kinds for b in kinds):
        np.testing.assert_array_equal(got[:, number], want[:, number], err_msg=" to ".join(pair))


def test_floats_that_an_integer_cannot_hold_wrap_around(kernels: KernelCache) -> None:
    """As `docs/numerics.md` has it, which the interpreter follows."""
    edges = [2.0**bits for bits in (7, 8, 15, 16, 31, 32, 40, 63, 64, 65)]
    near = [np.nextafter(np.float32(edge), np.float32(0)) for edge in edges]
    positive = np.array([0, 0.9, 5, 200.7, 300, 70000, 3e9, 1e10, 1e19, 1e30, np.inf, np.nan, *edges, *near])
    sources = [te.placeholder((_N,), kind, f"from_{kind}") for kind in FLOATS]
    results = [te.compute((_N,), lambda i, x=x, to=to: Cast(x[i], to)) for x in sources for to in INTEGERS]
    with np.errstate(over="ignore"):
        arrays = [np.concatenate([positive, -positive]).astype(np.dtype(kind)) for kind in FLOATS]
    func = te.create_prim_func([*sources, *results], "cut")
    got = opencl.run(func, arrays, kernels)
    for (source, to), made, want in zip(
        itertools.product(FLOATS, INTEGERS), got, interp.run(func, arrays), strict=True
    ):
        np.testing.assert_array_equal(made, want, err_msg=f"{source} to {to}")


def test_wide_integers_become_narrow_ones(kernels: KernelCache) -> None:
    kinds = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64")
    ops = {kind: through(kind) for kind in kinds}
    a = np.array([2**63 - 1, -(2**63), 2**31, -(2**31) - 1, 300, -129, 65536, 2**32 + 5])
    got, want = both(table("int64", "int64", ops), [a, a], kernels)
    np.testing.assert_array_equal(got, want)


def through(kind: str) -> Op:
    return lambda a, b: Cast(Cast(a, kind), "int64")
