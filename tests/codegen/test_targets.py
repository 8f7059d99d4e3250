"""Every target: links from this host into the right kind of ELF file that needs nothing, and computes the same."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly, parse_ir
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.lower.program import Entry, Kernel, Port, Program, Slot, Step
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.target import Target, known_tags, parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Binary, Cast, Expr, Var, call, const, maximum, minimum, select
from kedge.compiler.tir.stmt import PrimFunc
from support import functions
from support.emulated import emulated, run_program

#: One of each kind of code: with and without vector units, FMA, division and half precision.
KINDS = (
    "x86-64", "raspberry-pi/3b", "raspberry-pi/2b", "beaglebone/black", "llvm -mtriple=armv7-linux-gnueabihf",
    "visionfive/2", "bananapi/f3",
)  # fmt: skip


def everything(n: int | Var) -> PrimFunc:
    """One function with what targets differ in: every intrinsic, division, casts, float16, int64, min and max."""
    x, d = te.placeholder((n, 8), "float32", "x"), te.placeholder((n, 8), "float64", "d")
    k, h = te.placeholder((n, 8), "int64", "k"), te.placeholder((n, 8), "float16", "h")

    def floats(i: Expr, j: Expr) -> Expr:
        total: Expr = maximum(x[i, j], d_as_float(i, j))
        for name in ("exp", "tanh", "sigmoid", "erf", "sin", "cos", "floor", "ceil", "round", "abs"):
            total = total + call(name, x[i, j])
        for name in ("log", "sqrt", "rsqrt"):
            total = total + call(name, call("abs", x[i, j]) + 0.5)
        total = total + call("pow", call("abs", x[i, j]) + 0.5, x[i, j])
        return minimum(total, 1e6) + Cast(h[i, j], "float32") + Cast(k[i, j], "float32")

    def d_as_float(i: Expr, j: Expr) -> Expr:
        return Cast(d[i, j], "float32")

    def doubles(i: Expr, j: Expr) -> Expr:
        return call("exp", d[i, j]) + call("tanh", d[i, j]) * call("log", call("abs", d[i, j]) + 1.0) + call(
            "erf", d[i, j]
        ) + call("floor", d[i, j])  # fmt: skip

    def integers(i: Expr, j: Expr) -> Expr:
        by = select(k[i, j] < 0, const(-7), const(1000003))
        near = Cast(Cast(d[i, j] * 3e9, "int64"), "int64")
        one: Expr = Binary("floordiv", k[i, j], by) + Binary("floormod", k[i, j], by)
        return one * 3 + Binary("truncdiv", k[i, j], by) - Binary("truncmod", k[i, j], by) + near + i * 2 + j

    def small(i: Expr, j: Expr) -> Expr:
        narrow = Cast(Binary("floormod", k[i, j], const(1 << 20)), "int32")
        return Binary("floordiv", narrow, Cast(j, "int32") + 3) + Binary("truncmod", narrow, Cast(j, "int32") + 3)

    outputs = [
        te.compute((n, 8), floats, name="f"), te.compute((n, 8), doubles, name="g"),
        te.compute((n, 8), integers, name="p"), te.compute((n, 8), small, name="q"),
        te.compute((n, 8), lambda i, j: Cast(x[i, j] * 1.5, "float16"), name="r"),
    ]  # fmt: skip
    return te.create_prim_func([x, d, k, h, *outputs], "everything")


def everything_inputs(n: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(3)
    return [
        rng.standard_normal((n, 8)).astype("f"), rng.standard_normal((n, 8)),
        rng.integers(-(10**12), 10**12, (n, 8)), rng.standard_normal((n, 8)).astype(np.float16),
    ]  # fmt: skip


def plain_program(func: PrimFunc) -> Program:
    """The function as it is, without any rule."""
    split = len(func.params) - func.n_outputs
    ports = [Port(b.name, TensorType(b.shape, b.dtype)) for b in func.params]
    slots = [Slot("input", p.type, i) for i, p in enumerate(ports[:split])]
    slots += [Slot("output", p.type, i) for i, p in enumerate(ports[split:])]
    entry = Entry(
        "main", tuple(ports[:split]), tuple(ports[split:]), func.symbols, (Step("k", tuple(slots), func.symbols),), 0
    )  # fmt: skip
    return Program({"k": Kernel(func, "none", {}, ())}, (entry,))


@pytest.mark.parametrize("text", [tag for tag in known_tags() if isinstance(parse(tag), Target)])
def test_the_shared_object_is_of_the_right_kind_and_needs_nothing(text: str, kernels: KernelCache) -> None:
    target = parse(text)
    artifact = compile_prim_func(everything(Var("N", lower=1)), target, cache=kernels)
    (variant,) = artifact.manifest.variants
    lib = bytes(artifact.member(variant.lib))
    wide = target.arch.pointer_bits == 64
    assert lib[:4] == b"\x7fELF" and lib[4] == (2 if wide else 1) and lib[5] == 1
    kind, machine = struct.unpack_from("<HH", lib, 16)
    assert (kind, machine) == (3, target.arch.elf_machine)
    flags = struct.unpack_from("<I", lib, 48 if wide else 36)[0]
    if target.arch.name == "armv7l":
        assert flags & 0x400, "not hard float"
    if target.arch.name == "riscv64":
        assert flags & 0x6 == 0x4, "not lp64d"
    symbols = dynamic_symbols(lib, wide)
    assert [name for name, defined in symbols if defined] == ["kedge_module"]
    assert not [name for name, defined in symbols if name and not defined]
    assert variant.features == target.required_features and variant.arch == target.arch.name


def dynamic_symbols(lib: bytes, wide: bool) -> list[tuple[str, bool]]:
    """Names in .dynsym with whether they are defined, read from the section headers."""
    offset = struct.unpack_from("<Q" if wide else "<I", lib, 40 if wide else 32)[0]
    size, count = struct.unpack_from("<HH", lib, 58 if wide else 46)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ" if wide else "<IIIIIIIIII", lib, offset + size * i) for i in range(count)
    ]
    found = []
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        strings = sections[section[6]][4]
        step = 24 if wide else 16
        for at in range(section[4] + step, section[4] + section[5], step):
            name = struct.unpack_from("<I", lib, at)[0]
            index = struct.unpack_from("<H", lib, at + (6 if wide else 14))[0]
            end = lib.index(b"\0", strings + name)
            found.append((lib[strings + name : end].decode(), index != 0))
    return found


@pytest.mark.parametrize("text", KINDS)
def test_every_operation_means_the_same_everywhere(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    target = emulated(text)
    func = everything(Var("N", lower=1))
    data = everything_inputs(5)
    want = interp.run(func, data)
    for number, program in enumerate((lower_prim_func(func, target), plain_program(func))):
        folder = tmp_path / str(number)
        folder.mkdir()
        got = run_program(program, target, data, folder, kernels)
        np.testing.assert_allclose(got[0], want[0], rtol=2e-5, atol=1e-4)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-13)
        np.testing.assert_array_equal(got[2], want[2])
        np.testing.assert_array_equal(got[3], want[3])
        np.testing.assert_array_equal(got[4], want[4])


@pytest.mark.parametrize("text", KINDS)
def test_nan_wins_in_min_and_max_everywhere(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    target = emulated(text)
    for dtype in ("float32", "float64"):
        x, y = te.placeholder((8, 8), dtype, "x"), te.placeholder((8, 8), dtype, "y")
        zero = const(0.0, dtype)
        outputs = [
            te.compute((8, 8), lambda i, j, x=x, y=y: maximum(x[i, j], y[i, j]), name="a"),
            te.compute((8, 8), lambda i, j, x=x, y=y: minimum(x[i, j], y[i, j]), name="b"),
            te.compute((8, 8), lambda i, j, x=x, zero=zero: maximum(x[i, j], zero), name="c"),
            te.compute((8, 8), lambda i, j, x=x, zero=zero: minimum(zero, x[i, j]), name="d"),
        ]
        func = te.create_prim_func([x, y, *outputs], "extremes")
        values = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0, -1.0, 2.5, -3.0], dtype)
        data = [np.ascontiguousarray(part) for part in np.meshgrid(values, values)]
        folder = tmp_path / dtype
        folder.mkdir()
        got = run_program(lower_prim_func(func, target), target, data, folder, kernels)
        for have, want in zip(got, interp.run(func, data), strict=True):
            np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("text", KINDS)
def test_scheduled_kernels_run_everywhere(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    target = emulated(text)
    for func in (functions.conv(2, 3, 8, 5), functions.dense(Var("M", lower=1), 20, 10), functions.softmax(4, 10)):
        sizes = {var.name: 7 for var in func.symbols}
        data = functions.inputs(func, sizes)
        want = interp.run(func, data)
        folder = tmp_path / func.name
        folder.mkdir()
        got = run_program(lower_prim_func(func, target), target, data, folder, kernels)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


@pytest.mark.parametrize("text", KINDS)
def test_the_ir_parses_and_verifies_again(text: str) -> None:
    target = parse(text)
    ir = emit_kernel(everything(Var("N", lower=1)), target, "k").ir
    assert str(parse_ir(str(parse_ir(ir)))) == str(parse_ir(ir))


def test_scalar_32_bit_arm_has_neither_vectors_nor_the_upper_registers() -> None:
    """LLVM would take NEON for granted from the triple; what the artifact does not require is not there."""
    target = parse("llvm -mtriple=armv7-linux-gnueabihf")
    (kernel,) = lower_prim_func(everything(Var("N", lower=1)), target).kernels.values()
    assembly = emit_assembly(emit_kernel(kernel.func, target, "k").ir, target)
    assert "vmul.f" in assembly and not re.search(r"\bq\d|[\s{]d(1[6-9]|2\d|3[01])\b", assembly)


def test_code_uses_no_feature_that_the_target_does_not_declare() -> None:
    """The CPU's name only tunes: AVX-512 comes from +avx512f, never from -mcpu alone."""
    func = functions.dense(64, 64, 64)
    kernel = lower_prim_func(func, parse("x86-64-v3")).kernels["dense_relu"].func
    target = parse("llvm -mcpu=znver4 -mattr=-avx512f,-avx2,-fma")
    assembly = emit_assembly(emit_kernel(kernel, target, "k").ir, target)
    assert not re.search(r"%zmm|vfmadd|vpbroadcast", assembly)
