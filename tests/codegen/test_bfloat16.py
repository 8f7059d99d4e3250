"""bfloat16: numpy's values to the bit on every target, and all the way through an artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from codegen.test_targets import plain_program

import kedge
from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Cast, Expr, Var, call, maximum, minimum, select
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from support.emulated import emulated, run_program

BF16 = np.dtype("bfloat16")
#: With and without instructions for it, with and without vectors, and of 32 bits.
KINDS = (
    "native", "x86-64", "x86-64-v3", "llvm -mcpu=znver4", "raspberry-pi/4b",
    "llvm -mtriple=aarch64-linux-gnu -mattr=+bf16", "raspberry-pi/2b", "llvm -mtriple=armv7-linux-gnueabihf",
    "visionfive/2", "bananapi/f3",
)  # fmt: skip
EVERY = np.arange(1 << 16, dtype=np.uint16).view(BF16)
OTHERS = ("bool", "int8", "uint8", "int16", "int32", "int64", "uint32", "float16", "float32", "float64")


def element(dtype_in: str, dtype_out: str, n: int) -> PrimFunc:
    x = te.placeholder((n,), dtype_in, "x")
    return te.create_prim_func([x, te.compute((n,), lambda i: Cast(x[i], dtype_out), name="y")], "cast")


def vectorized(func: PrimFunc) -> PrimFunc:
    sch = Schedule(func)
    sch.vectorize(sch.split(sch.get_loops(sch.get_block("y"))[0], [None, 16])[1])
    return sch.func


def same_bits(have: np.ndarray, want: np.ndarray) -> None:  # type: ignore[type-arg]
    """Equal to the bit; where NaN is wanted, any quiet one."""
    assert have.dtype == want.dtype == BF16
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(have), nan)
    np.testing.assert_array_equal(have[~nan].view(np.uint16), want[~nan].view(np.uint16))
    assert np.all(have[nan].view(np.uint16) & 0x40)


def run(func: PrimFunc, text: str, arrays: list[np.ndarray], folder: Path, cache: KernelCache):  # type: ignore[no-untyped-def, type-arg]
    target = emulated(text)
    folder.mkdir(exist_ok=True)
    return run_program(plain_program(func), target, arrays, folder, cache)


def patterns() -> np.ndarray:  # type: ignore[type-arg]
    """float32 around every bfloat16: itself, just below and above the middle to the next, and the middle; NaN too."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (high[:, None] | low).reshape(-1).view(np.float32)


@pytest.mark.parametrize("text", KINDS)
def test_every_value_widens_and_narrows_exactly(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    (wide,) = run(vectorized(element("bfloat16", "float32", EVERY.size)), text, [EVERY], tmp_path / "wide", kernels)
    np.testing.assert_array_equal(wide, EVERY.astype(np.float32))
    floats = patterns()
    func = vectorized(element("float32", "bfloat16", floats.size))
    (narrow,) = run(func, text, [floats], tmp_path / "narrow", kernels)
    with np.errstate(all="ignore"):
        same_bits(narrow, floats.astype(BF16))


def arithmetic(n: int) -> PrimFunc:
    x, y = te.placeholder((n,), "bfloat16", "x"), te.placeholder((n,), "bfloat16", "y")
    bodies = {
        "add": lambda i: x[i] + y[i], "sub": lambda i: x[i] - y[i], "mul": lambda i: x[i] * y[i],
        "div": lambda i: x[i] / y[i], "sqrt": lambda i: call("sqrt", x[i]), "min": lambda i: minimum(x[i], y[i]),
        "max": lambda i: maximum(x[i], y[i]), "chosen": lambda i: select(x[i] < y[i], x[i] * 3.1, y[i]),
        "sum": lambda i: x[i] * y[i] + x[i] * 0.1,  # rounded three times: never one multiply-add
    }  # fmt: skip
    outputs = [te.compute((n,), body, name=name) for name, body in bodies.items()]
    return te.create_prim_func([x, y, *outputs], "arithmetic")


@pytest.mark.parametrize("text", KINDS)
def test_arithmetic_rounds_each_result_as_numpy_does(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4096).astype(BF16)
    y = (rng.standard_normal(4096) * np.exp2(rng.integers(-8, 8, 4096))).astype(BF16)
    x[:6], y[:6] = [np.nan, np.inf, -np.inf, 0, -0.0, 3e38], [1, 1, np.inf, 0, 2, 3e38]
    func = arithmetic(x.size)
    target = emulated(text)
    for number, program in enumerate((lower_prim_func(func, target), plain_program(func))):
        folder = tmp_path / str(number)
        folder.mkdir()
        got = run_program(program, target, [x, y], folder, kernels)
        for have, want in zip(got, interp.run(func, [x, y]), strict=True):
            same_bits(have, want)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(
    "text", ["native", "x86-64", "raspberry-pi/2b", "llvm -mtriple=aarch64-linux-gnu -mattr=+bf16"]
)
def test_casts(text: str, other: str, kernels: KernelCache, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    high = 250 if other.startswith("u") else 120
    values = rng.uniform(0 if other.startswith("u") else -high, high, 999)
    for number, (source, to) in enumerate(((other, "bfloat16"), ("bfloat16", other))):
        data = values.astype(source)
        (have,) = run(element(source, to, 999), text, [data], tmp_path / str(number), kernels)
        np.testing.assert_array_equal(have, data.astype(to))


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sigmoid", "rsqrt", "sin", "cos", "floor", "abs"])
def test_intrinsics_round_once(name: str, kernels: KernelCache, tmp_path: Path) -> None:
    """Computed in float32: but for values within its error of a middle, the nearest bfloat16."""
    values = EVERY[np.isfinite(EVERY.astype(np.float32)) & (np.abs(EVERY.astype(np.float32)) < 1000)]
    x = te.placeholder(values.shape, "bfloat16", "x")
    func = te.create_prim_func([x, te.compute(values.shape, lambda i: call(name, x[i]), name="y")], "f")
    (have,) = run(vectorized(func), "native", [values], tmp_path / "f", kernels)
    (want,) = interp.run(func, [values])
    ordered = [np.where(a < 0, -(a & 0x7FFF), a) for a in (v.view(np.int16).astype(np.int32) for v in (have, want))]
    np.testing.assert_array_equal(np.isnan(have), np.isnan(want))
    known = ~np.isnan(want)
    steps = np.abs(ordered[0] - ordered[1])[known]
    assert steps.max() <= 1 and np.mean(steps != 0) < 1e-3


def test_text_and_structure_round_trip() -> None:
    func = arithmetic(8)
    assert equal(parse_func(func.show()), func)
    assert "bfloat16(0.1)" in func.show()


def test_copies_do_not_convert() -> None:
    """A value in a register is one that memory can hold, so to load and store it costs nothing."""
    n = 64
    x = te.placeholder((n,), "bfloat16", "x")
    func = te.create_prim_func([x, te.compute((n,), lambda i: x[i], name="y")], "copy")
    target = parse("x86-64-v3")
    assembly = emit_assembly(emit_kernel(vectorized(func), target, "k").ir, target)
    assert "vmovups" in assembly and not any(name in assembly for name in ("vpsrld", "vpslld", "vpmovzx"))


def test_arms_own_conversion_is_used() -> None:
    func = vectorized(element("float32", "bfloat16", 64))
    for text, there in (("llvm -mtriple=aarch64-linux-gnu -mattr=+bf16", True), ("raspberry-pi/4b", False)):
        target = parse(text)
        assert ("bfcvt" in emit_assembly(emit_kernel(func, target, "k").ir, target)) is there


def dense() -> PrimFunc:
    rows = Var("M", lower=1)
    x, w = te.placeholder((rows, 40), "bfloat16", "x"), te.placeholder((40, 24), "bfloat16", "w")
    k = te.reduce_axis(40, "k")

    def body(i: Expr, j: Expr) -> Expr:
        return te.sum(Cast(x[i, k], "float32") * Cast(w[k, j], "float32"), k)

    sums = te.compute((rows, 24), body, name="s")
    return te.create_prim_func([x, w, te.compute((rows, 24), lambda i, j: Cast(sums[i, j], "bfloat16"), name="y")], "f")


def test_an_artifact_takes_and_gives_arrays_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((5, 40)).astype(BF16), rng.standard_normal((40, 24)).astype(BF16)
    artifact = kedge.compile(dense(), target="native")
    assert [str(port) for port in artifact.manifest.functions[0].outputs] == ["y: bfloat16[M, 24]"]
    want = interp.run(dense(), [x, w])[0]
    np.savez(tmp_path / "in.npz", x=x, w=w)
    with np.load(tmp_path / "in.npz") as saved:  # numpy's files forget the dtype
        loaded = {"x": saved["x"], "w": saved["w"]}
    with artifact.open(threads=1) as module:
        results = [module.run({"x": x, "w": w})["y"], module.run(loaded)["y"]]
    with kedge.local(threads=1) as device:
        results.append(device.load(artifact).run({"x": x, "w": w})["y"])
    for got in results:
        assert got.dtype == BF16 and got.shape == want.shape
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2**-7, atol=2**-7)
