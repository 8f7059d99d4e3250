"""Instructions on tiles: matched exactly, sealed, and right on processors that have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from codegen.test_targets import plain_program
from schedule.test_blocks import refused

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly
from kedge.compiler.errors import CodegenError
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.schedule.intrinsics import INTRINSICS
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Cast, Dim, Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from support.emulated import emulated, run_program

NATIVE = {"x86_64": "native", "aarch64": "llvm -mtriple=aarch64-linux-gnu -mattr=+dotprod,+i8mm,+bf16"}
#: What makes each instruction run in assembly.
MNEMONIC = {"x86.vnni.dot": "vpdpbusd", "arm.sdot": "sdot", "arm.udot": "udot", "arm.smmla": "smmla"}
MNEMONIC |= {"arm.ummla": "ummla", "arm.usmmla": "usmmla", "arm.bfdot": "bfdot", "arm.bfmmla": "bfmmla"}
MNEMONIC |= {"x86.bf16.dot": "vdpbf16ps"}


def product(m: Dim, n: int, k: int, left: str, right: str) -> PrimFunc:
    """`a @ b.T` of bytes, summed in int32, or of bfloat16, summed in float32."""
    total = "float32" if left == "bfloat16" else "int32"
    a, b = te.placeholder((m, k), left, "a"), te.placeholder((n, k), right, "b")
    axis = te.reduce_axis(k, "k")

    def element(i: Var, j: Var) -> object:
        return te.sum(Cast(a[i, axis], total) * Cast(b[j, axis], total), axis)

    return te.create_prim_func([a, b, te.compute((m, n), element, name="c")], "main")


def tiled(name: str, m: Dim = 6, n: int = 32, k: int = 16) -> tuple[Schedule, BlockRef, list[LoopRef]]:
    """A product whose innermost loops are those of an instruction, with operands packed for it; and these loops."""
    intrin = INTRINSICS[name]
    sizes = [int(loop.extent.value) for loop in intrin.loops]
    left, right = (buffer.dtype for buffer in intrin.func.params[:2])
    sch = Schedule(product(m, n, k, left, right))
    c = sch.get_block("c")
    loops = sch.get_loops(c)
    outer, inner = [*loops[: -len(sizes)]], []
    for loop, size in zip(loops[-len(sizes) :], sizes, strict=True):
        first, last = sch.split(loop, [None, size])
        outer.append(first)
        inner.append(last)
    sch.reorder(*outer, *inner)
    *_, column, summed = outer
    step = sizes[-1]
    for operand in ("a", "b"):
        packed = sch.cache_read(c, operand, column)
        sch.transform_layout(packed, lambda row, k: (k // step, row, k % step))
    sch.cache_write(c, column, "local")
    sch.decompose_reduction(c, summed)
    return sch, c, inner


def data(func: PrimFunc) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = []
    for buffer in func.params[:2]:
        if buffer.dtype == "bfloat16":
            arrays.append(rng.standard_normal(buffer.shape).astype("bfloat16"))
            continue
        info = np.iinfo(buffer.dtype)
        arrays.append(rng.integers(info.min, info.max + 1, buffer.shape).astype(buffer.dtype))
    return arrays


def check(got: np.ndarray, arrays: list[np.ndarray]) -> None:
    """Integers exactly; floats within the bound that `schedule.intrinsics` states."""
    a, b = (array.astype(np.float64) for array in arrays)
    exact, allowed = a @ b.T, a.shape[1] * 2.0**-23 * (np.abs(a) @ np.abs(b).T)
    if got.dtype == np.int32:
        allowed = np.zeros_like(exact)
    assert np.all(np.abs(got - exact) <= allowed)


@pytest.mark.parametrize("name", INTRINSICS)
def test_the_interpreter_sees_the_same_loops(name: str) -> None:
    sch, _, inner = tiled(name)
    sch.tensorize(inner[0], name)
    arrays = data(sch.func)
    check(interp.run(sch.func, arrays)[0], arrays)
    assert equal(parse_func(sch.show()), sch.func)
    assert equal(Schedule.replay(product(6, 32, 16, *(p.dtype for p in sch.func.params[:2])), sch.trace).func, sch.func)


def test_golden(golden) -> None:
    sch, _, inner = tiled("x86.vnni.dot", Var("m", lower=1))
    sch.tensorize(inner[0], "x86.vnni.dot")
    golden("tensorize.txt", sch.show())


@pytest.mark.parametrize("name", INTRINSICS)
def test_machine_code(name: str, tmp_path: Path) -> None:
    target = emulated(NATIVE[INTRINSICS[name].arch])
    if not all(map(target.has, INTRINSICS[name].features)):
        pytest.skip(f"this processor has no {', '.join(INTRINSICS[name].features)}")
    sch, _, inner = tiled(name)
    sch.tensorize(inner[0], name)
    arrays = data(sch.func)
    (got,) = run_program(lower_prim_func(sch, target), target, arrays, tmp_path, KernelCache(tmp_path / "kernels"))
    check(got, arrays)


def sums_of_pairs(name: str, pairs: list[tuple[float, float, float]], folder: Path) -> list[float]:
    """`c + a0 * 1 + a1 * 1` by the instruction itself, for each (c, a0, a1)."""
    intrin = INTRINSICS[name]
    target = emulated(NATIVE[intrin.arch])
    if not all(map(target.has, intrin.features)):
        pytest.skip(f"this processor has no {', '.join(intrin.features)}")
    func = parse_func(SEEDED.replace("LANES", str(intrin.func.params[2].shape[0])))
    sch = Schedule(func)
    sch.tensorize(sch.get_loops(sch.get_block("c"))[0], name)
    results = []
    for number, (c, a0, a1) in enumerate(pairs):
        lanes = func.params[1].shape[0]
        arrays = [np.array([a0, a1], "bfloat16"), np.ones((lanes, 2), "bfloat16"), np.full(lanes, c, np.float32)]
        place = folder / str(number)
        place.mkdir()
        (got,) = run_program(plain_program(sch.func), target, arrays, place, KernelCache(folder / "kernels"))
        assert np.all(got == got[0])
        results.append(float(got[0]))
    return results


SEEDED = """
func seeded(a: bfloat16[2], b: bfloat16[LANES, 2], first: float32[LANES]) -> (c: float32[LANES]):
  for i in range(LANES):
    block seed:
      vi = spatial(LANES, i)
      reads first[vi]
      writes c[vi]
      c[vi] = first[vi]
  for i in range(LANES):
    for k in range(2):
      block c:
        vi = spatial(LANES, i)
        vk = reduce(2, k)
        reads c[vi], a[vk], b[vi, vk]
        writes c[vi]
        c[vi] = c[vi] + float32(a[vk]) * float32(b[vi, vk])"""


def test_how_dot_products_of_bfloat16_round(tmp_path: Path) -> None:
    """What the docstring of `schedule.intrinsics` says: order, rounding, denormals."""
    big, tiny = 2.0**25, 2.0**-130
    cases = [(-big, 1.0, big), (-big, big, 1.0), (tiny, 0.0, 0.0), (0.0, tiny, tiny)]
    assert sums_of_pairs("x86.bf16.dot", cases, tmp_path) == [1.0, 0.0, 0.0, 0.0]


def test_how_arms_dot_products_of_bfloat16_round(tmp_path: Path) -> None:
    big, tiny = 2.0**25, 2.0**-130
    cases = [(-big, 1.0, big), (-big, big, 1.0), (tiny, 0.0, 0.0), (0.0, tiny, tiny), (1.0, 2.0**-30, 0.0)]
    odd = 1.0 + 2.0**-23  # digits are lost: the last bit becomes 1
    assert sums_of_pairs("arm.bfdot", cases, tmp_path) == [4.0, 4.0, 0.0, 0.0, odd]


@pytest.mark.parametrize("name", INTRINSICS)
def test_the_instruction_is_there(name: str) -> None:
    sch, _, inner = tiled(name)
    sch.tensorize(inner[0], name)
    target = parse("llvm -mtriple=x86_64-linux-gnu -mcpu=znver4" if name.startswith("x86") else NATIVE["aarch64"])
    assembly = emit_assembly(emit_kernel(sch.func, target, "k").ir, target)
    assert MNEMONIC[name] in assembly


def test_targets_without_it_are_refused_by_name() -> None:
    sch, _, inner = tiled("arm.sdot")
    sch.tensorize(inner[0], "arm.sdot")
    with pytest.raises(CodegenError, match=r"arm\.sdot, which .* does not have \(dotprod\)") as caught:
        emit_kernel(sch.func, parse("raspberry-pi/4b"), "k")
    assert "-mattr=+dotprod" in str(caught.value)
    with pytest.raises(CodegenError, match=r"arm\.sdot, which"):
        emit_kernel(sch.func, parse("x86-64-v4"), "k")


def test_refusals() -> None:
    sch, c, (i, k) = tiled("arm.sdot")
    before = sch.func
    for call, *words in [
        (lambda: sch.tensorize(i, "arm.sdott"), "there is no instruction 'arm.sdott'", "did you mean 'arm.sdot'?"),
        (lambda: sch.tensorize(k, "arm.sdot"), "computes loops of 4 x 4 around one block; here are loops of 4"),
        (lambda: sch.tensorize(i, "x86.vnni.dot"), "loops of 16 x 4", "here are loops of 4 x 4"),
        (lambda: sch.tensorize(i, "arm.udot"), "arm.udot takes uint8 and uint8", "uint8"),
        (lambda: sch.tensorize(sch.get_loops(c)[0], "arm.sdot"), "here are loops of 6"),
        (lambda: sch.tensorize(sch.get_loops(c)[2], "arm.sdot"), "here are loops of 4 x 4 x 4"),
    ]:
        refused(call, "tensorize(loop", *words)
        assert sch.func is before
    fresh = Schedule(product(6, 32, 16, "int8", "int8"))
    j, k = fresh.get_loops(fresh.get_block("c"))[1:]
    j0, j1 = fresh.split(j, [None, 4])
    k0, k1 = fresh.split(k, [None, 4])
    fresh.reorder(j0, k0, j1, k1)
    refused(lambda: fresh.tensorize(j1, "arm.sdot"), "initialises its output", "decompose_reduction")
    tail, _, inner = tiled("arm.sdot", n=30)
    refused(lambda: tail.tensorize(inner[0], "arm.sdot"), "runs only where", "pad_einsum")


def test_operands_in_another_order_are_refused() -> None:
    a, b = te.placeholder((8, 16), "int8", "a"), te.placeholder((16, 32), "int8", "b")
    axis = te.reduce_axis(16, "k")
    c = te.compute(
        (8, 32), lambda i, j: te.sum(Cast(a[i, axis], "int32") * Cast(b[axis, j], "int32"), axis), name="c"
    )  # fmt: skip
    sch = Schedule(te.create_prim_func([a, b, c], "main"))
    block = sch.get_block("c")
    _, j, k = sch.get_loops(block)
    j0, j1 = sch.split(j, [None, 4])
    k0, k1 = sch.split(k, [None, 4])
    sch.reorder(j0, k0, j1, k1)
    packed = sch.cache_read(block, "b", j0)
    sch.decompose_reduction(block, k0)
    refused(
        lambda: sch.tensorize(j1, "arm.sdot"), "operand 'b' of arm.sdot moves by 4 elements, here by 1", "cache_read"
    )
    sch.transform_layout(packed, lambda k, j: (k // 4, j, k % 4))
    sch.tensorize(j1, "arm.sdot")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-128, 128, p.shape).astype(np.int8) for p in sch.func.params[:2]]
    expected = arrays[0].astype(np.int32) @ arrays[1].astype(np.int32)
    np.testing.assert_array_equal(interp.run(sch.func, arrays)[0], expected)


def test_what_an_instruction_computes_stays_as_it_is() -> None:
    sch, c, inner = tiled("x86.vnni.dot")
    sch.tensorize(inner[0], "x86.vnni.dot")
    before = sch.func
    refused(lambda: sch.split(inner[1], [None, 2]), "it is tensorized already")
    refused(lambda: sch.transform_layout(c, lambda i, j: (i, j % 2, j // 2)), "operand 'c' of x86.vnni.dot moves by 1")
    refused(lambda: sch.parallel(inner[0]), "it is tensorized already")
    assert sch.func is before
