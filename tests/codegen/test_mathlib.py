"""Special values of functions, and pow, with and without FMA and rounding instructions; see test_accuracy, too."""

from __future__ import annotations

import ctypes
import math
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
from support.accuracy import CASES, Longer

Array = np.ndarray[Any, Any]
LANES = 8
TARGETS = ("native", "x86-64")


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


@pytest.mark.parametrize("type_", ["float", "double"])
@pytest.mark.parametrize("name", UNARY)
def test_special_values(functions: dict[tuple[str, str], Any], name: str, type_: str) -> None:
    dtype = np.float32 if type_ == "float" else np.float64
    info = np.finfo(dtype)
    edges = [info.smallest_subnormal, info.tiny, info.max, -info.max]
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.0, *edges], dtype)
    reference = next(case.reference for case in CASES if case.name == name)
    got = apply(functions[name, type_], x)
    with np.errstate(all="ignore"):
        want = reference(x.astype(Longer)).astype(dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=8 * info.eps)
    signed = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[signed]), np.signbit(want[signed]))


def dtype_of(type_: str) -> Any:
    return np.float32 if type_ == "float" else np.float64


@pytest.mark.parametrize("type_", ["float", "double"])
def test_special_values_of_pow(functions: dict[tuple[str, str], Any], type_: str) -> None:
    dtype = dtype_of(type_)
    info = np.finfo(dtype)
    sizes = [0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 2.0**24 + 2, 2.0**53, 1e30, np.inf]
    sizes += [float(x) for x in (info.smallest_subnormal, info.tiny, info.max)]
    specials = np.array([*sizes, *(-x for x in sizes), np.nan, np.nan], dtype)
    a, b = (np.ascontiguousarray(part.ravel()) for part in np.meshgrid(specials, specials))
    with np.errstate(all="ignore"):
        expected = np.power(a, b)
    got = apply(functions["pow", type_], a, b)
    np.testing.assert_allclose(got, expected, rtol=2 * float(info.eps))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(expected[known]))


INF, NAN = math.inf, math.nan
#: C99, F.9.4.4: x, y, pow(x, y).
POW = (
    (0.0, -3.0, INF), (-0.0, -3.0, -INF), (0.0, -2.5, INF), (-0.0, -2.5, INF), (-0.0, -4.0, INF), (0.0, -INF, INF),
    (0.0, 3.0, 0.0), (-0.0, 3.0, -0.0), (0.0, 2.5, 0.0), (-0.0, 2.5, 0.0), (-0.0, 4.0, 0.0), (-1.0, INF, 1.0),
    (-1.0, -INF, 1.0), (1.0, NAN, 1.0), (1.0, INF, 1.0), (NAN, 0.0, 1.0), (NAN, -0.0, 1.0), (INF, 0.0, 1.0),
    (-8.0, 1 / 3, NAN), (0.5, -INF, INF), (-0.5, -INF, INF), (1.5, -INF, 0.0), (-1.5, -INF, 0.0), (0.5, INF, 0.0),
    (-0.5, INF, 0.0), (1.5, INF, INF), (-1.5, INF, INF), (-INF, -3.0, -0.0), (-INF, -2.5, 0.0), (-INF, -4.0, 0.0),
    (-INF, 3.0, -INF), (-INF, 2.5, INF), (-INF, 4.0, INF), (INF, -2.5, 0.0), (INF, 2.5, INF), (NAN, 1.0, NAN),
    (2.0, NAN, NAN), (-1.0, NAN, NAN), (0.0, NAN, NAN),
)  # fmt: skip


@pytest.mark.parametrize("type_", ["float", "double"])
def test_pow_is_as_c_has_it(functions: dict[tuple[str, str], Any], type_: str) -> None:
    x, y, want = (np.array(column, dtype_of(type_)) for column in zip(*POW, *[POW[0]] * (-len(POW) % 8), strict=True))
    got = apply(functions["pow", type_], x, y)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))


@pytest.mark.parametrize("type_", ["float", "double"])
def test_whole_powers_of_whole_numbers_are_exact(functions: dict[tuple[str, str], Any], type_: str) -> None:
    dtype = dtype_of(type_)
    pairs = [(x, y) for x in range(-60, 61) for y in range(53) if abs(x) ** y < 2 ** (np.finfo(dtype).nmant + 1)]
    pairs = pairs[: len(pairs) // 8 * 8]
    x, y = (np.array(column, dtype) for column in zip(*pairs, strict=True))
    np.testing.assert_array_equal(apply(functions["pow", type_], x, y), [a**b for a, b in pairs])


@pytest.mark.parametrize("type_", ["float", "double"])
def test_sigmoid_has_no_denormal_results(functions: dict[tuple[str, str], Any], type_: str) -> None:
    """Each operation on one takes some cores a hundred cycles; normal results are kept down to the least."""
    dtype = dtype_of(type_)
    least = np.finfo(dtype).tiny
    x = np.linspace(math.log(least) - 30, math.log(least) + 1, 8 * LANES).astype(dtype)
    got, exact = apply(functions["sigmoid", type_], x), np.exp(x.astype(Longer))
    np.testing.assert_allclose(got.astype(Longer), np.where(exact < least, 0, exact), rtol=1e-6)
    assert np.any(got == 0)
    assert np.any(got > 0)


def test_an_unknown_intrinsic_is_refused() -> None:
    b = FunctionBuilder(ModuleBuilder(parse("native")))
    with pytest.raises(CodegenError, match="gamma"):
        mathlib.apply(b, "gamma", [b.const(1.0, "float")])
