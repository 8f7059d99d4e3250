"""Special values of functions, and pow, with and without FMA and rounding instructions; see test_accuracy, too."""

from __future__ import annotations

import ctypes
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
from support.accuracy import CASES, Longer, errors

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
    if name in ("sin", "cos"):  # defined for finite, moderate arguments
        x[[2, 3, 14, 15]] = 0.25
    reference = next(case.reference for case in CASES if case.name == name)
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
    found = errors(apply(functions["pow", type_], x, y), want, x, of_argument=False, flushes=False)
    assert found.max() <= (1 if type_ == "float" else 2**10)

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
