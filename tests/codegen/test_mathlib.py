"""The accuracy that mathlib's docstring states, on dense grids, with and without FMA and rounding instructions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler.codegen import mathlib
from kedge.compiler.codegen.builder import FunctionBuilder, ModuleBuilder
from kedge.compiler.codegen.machine import emit_object
from kedge.compiler.errors import CodegenError
from kedge.compiler.target import parse
from kedge.compiler.toolchain import link_shared

Array = np.ndarray[Any, Any]
LANES = 8
TARGETS = ("native", "x86-64")
Longer = np.longdouble


def load(names: tuple[str, ...], target_text: str, folder: Path) -> dict[tuple[str, str], Any]:
    """Functions that apply an intrinsic to eight lanes at a time: (name, LLVM type) -> C function."""
    target = parse(target_text)
    module = ModuleBuilder(target)
    for name in names:
        for type_ in ("float", "double"):
            b = FunctionBuilder(module)
            arity = 2 if name == "pow" else 1
            full = f"<{LANES} x {type_}>"
            loaded = [b.result(f"load {full}, ptr %p{i}, align 4", type_, LANES) for i in range(arity)]
            b.emit(f"store {mathlib.apply(b, name, loaded).typed}, ptr %out, align 4")
            b.emit("ret void")
            params = ", ".join(f"ptr %p{i}" for i in range(arity))
            module.add(b.finish(f"define void @{name}_{type_}({params}, ptr %out) {module.attributes}"))
    path = folder / "math.so"
    path.write_bytes(link_shared([emit_object(module.text(), target)], target))
    library = ctypes.CDLL(str(path))
    return {(name, type_): getattr(library, f"{name}_{type_}") for name in names for type_ in ("float", "double")}


UNARY = ("exp", "log", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt", "sqrt", "floor", "ceil", "round", "abs")


@pytest.fixture(scope="module", params=TARGETS)
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    return load((*UNARY, "pow"), request.param, tmp_path_factory.mktemp("math"))


def apply(function: Any, *arrays: Array) -> Array:
    out = np.empty_like(arrays[0])
    step = LANES * out.itemsize
    for at in range(0, out.nbytes, step):
        function(*(ctypes.c_void_p(array.ctypes.data + at) for array in (*arrays, out)))
    return out


def largest_error(got: Array, want: Array) -> float:
    """In units of the last place of the result; infinite where one is NaN or infinite and the other is not."""
    dtype = got.dtype
    with np.errstate(over="ignore", under="ignore"):
        rounded = want.astype(dtype)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    finite = np.isfinite(want.astype(np.longdouble)) & np.isfinite(got) & np.isfinite(rounded)
    spacing = np.abs(np.spacing(np.where(finite, rounded, dtype.type(1)))).astype(Longer)
    error = np.where(finite, np.abs(got.astype(Longer) - np.where(finite, want, 0)) / spacing, np.inf)
    return float(np.where(same & ~finite, 0, error).max())


def grid(dtype: Any, limit: float, *, positive: bool = False) -> Array:
    """Dense and even, normally distributed, and log-uniform down to denormals, with both signs."""
    rng = np.random.default_rng(0)
    count = 1 << 13
    tiny = -100 if dtype == np.float32 else -740
    log_uniform = np.exp(rng.uniform(tiny, math.log(limit), count)) * rng.choice([-1, 1], count)
    values = [
        np.linspace(-limit, limit, count),
        rng.standard_normal(count),
        rng.normal(0, limit / 8, count),
        log_uniform,
    ]
    every = np.clip(np.concatenate(values), -limit, limit).astype(dtype)
    return np.abs(every) if positive else every


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def erf(x: Array) -> Array:
    """By libm's double-precision erf, which is within an ULP of double."""
    return np.array([math.erf(float(v)) for v in x]).astype(Longer)


CASES: list[tuple[str, Callable[[Array], Array], dict[str, float], dict[str, float]]] = [
    ("exp", np.exp, {"float": 110, "double": 760}, {"float": 1, "double": 1}),
    ("log", np.log, {"float": 1e38, "double": 5e307}, {"float": 1, "double": 1}),
    ("tanh", np.tanh, {"float": 12, "double": 22}, {"float": 2, "double": 3}),
    ("sigmoid", sigmoid, {"float": 110, "double": 750}, {"float": 3, "double": 3}),
    ("erf", erf, {"float": 6, "double": 7}, {"float": 3, "double": 4}),  # 3 and libm's own
    ("sin", np.sin, {"float": 2.0**20, "double": 2.0**19}, {"float": 1, "double": 3}),
    ("cos", np.cos, {"float": 2.0**20, "double": 2.0**19}, {"float": 1, "double": 3}),
    ("rsqrt", lambda x: 1 / np.sqrt(x), {"float": 1e38, "double": 1e300}, {"float": 2, "double": 2}),
    ("sqrt", np.sqrt, {"float": 1e38, "double": 1e300}, {"float": 0.5, "double": 0.5}),
    ("floor", np.floor, {"float": 1e8, "double": 1e16}, {"float": 0, "double": 0}),
    ("ceil", np.ceil, {"float": 1e8, "double": 1e16}, {"float": 0, "double": 0}),
    ("round", np.round, {"float": 1e8, "double": 1e16}, {"float": 0, "double": 0}),
    ("abs", np.abs, {"float": 1e38, "double": 1e300}, {"float": 0, "double": 0}),
]


@pytest.mark.parametrize("type_", ["float", "double"])
@pytest.mark.parametrize(("name", "reference", "limits", "ulp"), CASES, ids=[case[0] for case in CASES])
def test_accuracy(
    functions: dict[tuple[str, str], Any], name: str, reference: Callable[[Array], Array], limits: dict[str, float],
    ulp: dict[str, float], type_: str,
) -> None:  # fmt: skip
    dtype = np.float32 if type_ == "float" else np.float64
    x = grid(dtype, limits[type_], positive=name in ("log", "rsqrt", "sqrt"))
    with np.errstate(all="ignore"):
        want = reference(x.astype(Longer))
    assert largest_error(apply(functions[name, type_], x), want) <= ulp[type_]


@pytest.mark.parametrize("type_", ["float", "double"])
@pytest.mark.parametrize("name", UNARY)
def test_special_values(functions: dict[tuple[str, str], Any], name: str, type_: str) -> None:
    dtype = np.float32 if type_ == "float" else np.float64
    info = np.finfo(dtype)
    edges = [info.smallest_subnormal, info.tiny, info.max, -info.max]
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.0, *edges], dtype)
    if name in ("sin", "cos"):  # defined for finite, moderate arguments
        x[[2, 3, 14, 15]] = 0.25
    reference = next(case[1] for case in CASES if case[0] == name)
    got = apply(functions[name, type_], x)
    with np.errstate(all="ignore"):
        want = reference(x.astype(Longer)).astype(dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=8 * info.eps)
    signed = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[signed]), np.signbit(want[signed]))


@pytest.mark.parametrize("type_", ["float", "double"])
def test_pow(functions: dict[tuple[str, str], Any], type_: str) -> None:
    dtype = np.float32 if type_ == "float" else np.float64
    rng = np.random.default_rng(1)
    count = 1 << 13
    base = np.exp(rng.uniform(-5, 5, 2 * count)) * np.repeat([1, -1], count)
    power = np.concatenate([rng.uniform(-17, 17, count), rng.integers(-9, 9, count)])
    x, y = base.astype(dtype), power.astype(dtype)
    want = np.power(x.astype(Longer), y.astype(Longer))
    assert largest_error(apply(functions["pow", type_], x, y), want) <= (1 if type_ == "float" else 2**10)

    specials = np.array([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, np.inf, -np.inf, np.nan, -0.5, 3.0], dtype)
    a, b = (np.ascontiguousarray(part.ravel()) for part in np.meshgrid(specials, specials))
    with np.errstate(all="ignore"):
        expected = np.power(a, b)
    got = apply(functions["pow", type_], a, b)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(expected[known]))


def test_an_unknown_intrinsic_is_refused() -> None:
    b = FunctionBuilder(ModuleBuilder(parse("native")))
    with pytest.raises(CodegenError, match="gamma"):
        mathlib.apply(b, "gamma", [b.const(1.0, "float")])
