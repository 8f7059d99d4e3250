"""What has one right answer, on every instruction set: powers of integers, remainders of floats, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.trig import TWO_OVER_PI
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.target import Target, parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Binary, Cast, Expr, call, const
from kedge.compiler.tir.stmt import PrimFunc
from support.accuracy import FLUSHING, ISAS, runs_here
from support.emulated import run_program

Array = np.ndarray[Any, Any]
INTEGERS = ("int8", "int32", "int64", "uint8", "uint32", "uint64")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if not runs_here(request.param):
        pytest.skip(f"no {request.param} here")
    name: str = request.param
    return name


def of_two(bodies: Sequence[Callable[[Expr, Expr], Expr]], arrays: Sequence[tuple[Array, Array]]) -> PrimFunc:
    """One output per pair of arrays."""
    inputs = [
        [te.placeholder(x.shape, str(x.dtype), f"x{at}"), te.placeholder(y.shape, str(y.dtype), f"y{at}")]
        for at, (x, y) in enumerate(arrays)
    ]
    outputs = [
        te.compute(x.shape, lambda i, body=body, x=x, y=y: body(x[i], y[i]), name=f"z{at}")
        for at, (body, (x, y)) in enumerate(zip(bodies, inputs, strict=True))
    ]
    return te.create_prim_func([*(x for pair in inputs for x in pair), *outputs], "f")


def run_on(isa: str, func: PrimFunc, data: Sequence[Array], folder: Path, cache: KernelCache) -> tuple[Array, ...]:
    target = parse(ISAS[isa])
    assert isinstance(target, Target)
    return run_program(lower_prim_func(func, target), target, data, folder, cache)


def wrapped(value: int, dtype: str) -> int:
    info = np.iinfo(dtype)
    return (value - int(info.min)) % (1 << info.bits) + int(info.min)


def power(base: int, exponent: int, dtype: str) -> int:
    if exponent >= 0:
        return wrapped(pow(base, exponent, 1 << 64), dtype) if base >= 0 else wrapped(base**exponent, dtype)
    return base if base in (0, 1) else (1 if exponent % 2 == 0 else -1) if base == -1 else 0


def test_powers_of_integers(isa: str, kernels: KernelCache, tmp_path: Path) -> None:
    pairs = []
    for dtype in INTEGERS:
        info = np.iinfo(dtype)
        bases = [0, 1, 2, 3, 9, 10, 255, 46341, 3037000500, -1, -2, -3, -128, int(info.min), int(info.max)]
        powers = [0, 1, 2, 3, 5, 7, 31, 63, 64, 100, -1, -2, -3, int(info.min)]
        held = [[v for v in values if info.min <= v <= info.max] for values in (bases, powers)]
        x, y = np.meshgrid(*(np.array(v, dtype) for v in held))
        pairs.append((x.ravel(), y.ravel()))
    func = of_two([lambda x, y: call("pow", x, y)] * len(pairs), pairs)
    data = [a for pair in pairs for a in pair]
    results = run_on(isa, func, data, tmp_path, kernels)
    for (x, y), got, same in zip(pairs, results, interp.run(func, data), strict=True):
        want = np.array([power(int(a), int(b), str(x.dtype)) for a, b in zip(x, y, strict=True)], x.dtype)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(same, want)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 13])
def test_a_literal_power_of_integers_is_a_few_products(exponent: int, kernels: KernelCache, tmp_path: Path) -> None:
    x = np.arange(-20, 21, dtype=np.int32)
    place = te.placeholder(x.shape, "int32", "x")
    body = lambda i: call("pow", place[i], const(exponent, "int32"))  # noqa: E731
    func = te.create_prim_func([place, te.compute(x.shape, body, name="y")], "f")
    want = np.array([wrapped(int(v) ** exponent, "int32") for v in x], np.int32)
    np.testing.assert_array_equal(run_on("SSE2", func, [x], tmp_path, kernels)[0], want)


def operands(dtype: str) -> tuple[Array, Array]:
    """Every special value with every other; quotients of every size; multiples, and what is next to them."""
    info, rng = np.finfo(dtype), np.random.default_rng(3)
    special = [0, 0.5, 1, 2, 3, 5.25, 1e4, float(info.tiny), float(info.smallest_subnormal), float(info.max), np.inf]
    x, y = np.meshgrid(*(np.array([*special, *(-v for v in special), np.nan], dtype),) * 2)
    count, low, high = 1 << 11, np.log(float(info.smallest_subnormal)), np.log(float(info.max))
    wide = np.exp(rng.uniform(low, high, (2, count))) * rng.choice([-1, 1], (2, count))
    near = rng.normal(0, 1, (2, count)) * [[100], [3]]
    near[0, ::2] = np.rint(near[0, ::2]) * near[1, ::2].astype(dtype)
    a, b = (np.concatenate([p.ravel(), q, r]).astype(dtype) for p, q, r in zip((x, y), wide, near, strict=True))
    return a, b


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_remainders_and_quotients_of_floats(isa: str, dtype: str, kernels: KernelCache, tmp_path: Path) -> None:
    with np.errstate(all="ignore"):
        x, y = operands(dtype)
    if isa in FLUSHING and dtype == "float32":  # it takes denormals for zeros
        tiny = np.finfo(dtype).tiny
        with np.errstate(all="ignore"):
            rest, moved = np.fmod(x, y), np.mod(x, y)
        usual = [(v == 0) | (np.abs(v) >= tiny) | np.isnan(v) for v in (x, y, rest, moved)]
        x, y = (np.ascontiguousarray(v[np.logical_and.reduce(usual)]) for v in (x, y))
    ops: dict[str, np.ufunc] = {"truncmod": np.fmod, "floormod": np.mod, "floordiv": np.floor_divide}
    bodies = [lambda a, b, op=op: Binary(op, a, b) for op in ops]
    func = of_two(bodies, [(x, y)] * len(ops))
    results = run_on(isa, func, [x, y] * len(ops), tmp_path, kernels)
    for function, got, same in zip(ops.values(), results, interp.run(func, [x, y] * len(ops)), strict=True):
        with np.errstate(all="ignore"):
            want = function(x, y)
        for found in (got, same):
            np.testing.assert_array_equal(found, want)
            known = ~np.isnan(want)
            np.testing.assert_array_equal(np.signbit(found[known]), np.signbit(want[known]))


def test_float64_becomes_float16_with_one_rounding(isa: str, kernels: KernelCache, tmp_path: Path) -> None:
    rng, every = np.random.default_rng(5), np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (every[1:] + every[:-1]) / 2
    edges = np.array([0, 65504, 65519.999, 65520, 1e6, 1e300, 2.0**-25, 2.0**-26, 1e-300, 5e-324, np.inf, np.nan])
    x = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, 1e6), rng.standard_normal(100), edges])
    x = np.concatenate([x, -x])
    place = te.placeholder(x.shape, "float64", "x")
    func = te.create_prim_func([place, te.compute(x.shape, lambda i: Cast(place[i], "float16"), name="y")], "f")
    with np.errstate(all="ignore"):
        want = x.astype(np.float16)
    got = run_on(isa, func, [x], tmp_path, kernels)[0]
    np.testing.assert_array_equal(got, want)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))


def cut(value: float, dtype: str) -> int:
    bits = 64 if dtype in ("int64", "uint64", "uint32") else 32
    if dtype == "uint64" and 2.0**63 <= value < 2.0**64:
        return int(value)
    return wrapped(int(value) if abs(value) < 2.0 ** (bits - 1) else -(2 ** (bits - 1)), dtype)


def test_floats_that_an_integer_cannot_hold_wrap_around(isa: str, kernels: KernelCache, tmp_path: Path) -> None:
    edges = [2.0**bits for bits in (7, 8, 15, 16, 31, 32, 40, 63, 64, 65)]
    near = [np.nextafter(np.float32(edge), np.float32(0)) for edge in edges]
    positive = np.array([0, 0.9, 5, 200.7, 300, 70000, 3e9, 1e10, 1e19, 1e30, np.inf, np.nan, *edges, *near])
    x = np.concatenate([positive, -positive])
    places = [te.placeholder(x.shape, dtype, dtype) for dtype in ("float32", "float64", "float16")]
    wanted = [
        (place, dtype)
        for place in places
        for dtype in (*INTEGERS, "int16", "uint16")
        # Those would be vfncvt.rtz.x.f.w, at which qemu 7 aborts.
        if isa != "RISC-V vectors" or place.dtype != "float64" or dtype in ("uint32", "int64", "uint64")
    ]
    outputs = [
        te.compute(x.shape, lambda i, place=place, dtype=dtype: Cast(place[i], dtype), name=f"y{at}")
        for at, (place, dtype) in enumerate(wanted)
    ]
    func = te.create_prim_func([*places, *outputs], "f")
    with np.errstate(over="ignore"):
        data = [x.astype(place.dtype) for place in places]
    results = run_on(isa, func, data, tmp_path, kernels)
    for (place, dtype), got, same in zip(wanted, results, interp.run(func, data), strict=True):
        want = np.array([cut(float(value), dtype) for value in data[places.index(place)]], dtype)
        np.testing.assert_array_equal(got, want, err_msg=f"{place.dtype} to {dtype}")
        np.testing.assert_array_equal(same, want, err_msg=f"{place.dtype} to {dtype}")


def test_the_table_holds_the_bits_of_two_over_pi() -> None:
    """Against Machin's formula in integers."""
    bits = 32 * len(TWO_OVER_PI) + 64

    def arctan_of_reciprocal(n: int) -> int:
        term, total, k = (1 << bits) // n, 0, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term, k = term // (n * n), k + 2
        return total

    pi = 4 * (4 * arctan_of_reciprocal(5) - arctan_of_reciprocal(239))
    want = (2 << (2 * bits)) // pi
    got = sum(word << (32 * at) for at, word in enumerate(reversed(TWO_OVER_PI)))
    assert got == want >> (bits - 32 * len(TWO_OVER_PI) + 64)
