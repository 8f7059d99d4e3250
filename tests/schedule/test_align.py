"""Aligning: loops begin where cache lines of a parameter do, wherever it begins, and no result changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from schedule.test_blocks import refused

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.gpu.kernel import emit_device
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.errors import CodegenError, VerifyError
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.rules.matmul import Matmul
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.target import parse
from kedge.compiler.target.core import TargetModel
from kedge.compiler.target.gpu import GpuTarget
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Lead, Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from kedge.compiler.tir.verify import verify
from support.compiled import opened, placed
from support.functions import dense, inputs
from support.targets import AVX2, AVX512

LINE = 64


def product(m: int | Var = 5, n: int = 64, *, relu: bool = True) -> tuple[Schedule, BlockRef, tuple[LoopRef, ...]]:
    """A product whose columns go in vectors of 16 from where lines of `w` begin, and its loops."""
    sch = Schedule(dense(m, 24, n, relu=relu))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    outer, inner = sch.split(sch.align(j, "w"), [None, 16])
    sch.reorder(i, outer, k, inner)
    return sch, y, (i, outer, k, inner)


def test_golden(golden) -> None:
    golden("align.txt", product()[0].show())


def test_replays_and_reads_back() -> None:
    sch, *_ = product(Var("m", lower=1))
    verify(sch.func)
    assert [type(symbol) for symbol in sch.func.symbols] == [Var, Lead]
    assert equal(Schedule.replay(dense(Var("m", lower=1), 24, 64), sch.trace).func, sch.func)
    assert equal(parse_func(sch.show()), sch.func)


def test_two_loops_of_one_buffer_have_one_lead() -> None:
    x = te.placeholder((64,), "float64", "x")
    a, b = (te.compute((64,), lambda i, s=s: x[i] + s, name=name) for name, s in (("a", 1.0), ("b", 2.0)))
    sch = Schedule(te.create_prim_func([x, a, b], "f"))
    for name in ("a", "b"):
        sch.align(sch.get_loops(sch.get_block(name))[0], "x")
    (lead,) = sch.func.symbols
    assert isinstance(lead, Lead)
    assert (lead.buffer, lead.lower, lead.upper) == ("x", 0, 7)


@pytest.mark.parametrize("lead", [0, 1, 4, 15])
def test_means_the_same_wherever_the_buffer_begins(lead: int) -> None:
    sch, *_ = product()
    given = inputs(sch.func)
    (expected,) = interp.run(dense(5, 24, 64), given)
    (found,) = interp.run(sch.func, given, {"w_lead": lead})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [0, 1, 4, 15])
@pytest.mark.parametrize("parallel", [False, True])
def test_compiled_for_every_beginning(tmp_path: Path, elements: int, parallel: bool) -> None:
    sch, y, (i, outer, k, _) = product(n=80)
    copy = sch.cache_write(y, outer, "register")
    init = sch.decompose_reduction(y, k)
    for block in (y, init, copy):
        sch.vectorize(sch.get_loops(block)[-1])
    if parallel:
        sch.parallel(sch.fuse(i, outer))
    verify(sch.func)
    given = inputs(sch.func)
    (expected,) = interp.run(dense(5, 24, 80), given)
    named = dict(zip((buffer.name for buffer in sch.func.params), given, strict=False))
    named["w"] = placed(named["w"], elements)
    with opened(compile_prim_func(sch, "native", cache=KernelCache(tmp_path))) as loaded:
        (found,) = loaded.run(named).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_refused_where_it_cannot_be() -> None:
    sch, _, (i, _, k, inner) = product()
    refused(lambda: sch.align(i, "nothing"), "'nothing' is no parameter", "take one of")
    refused(lambda: sch.align(k, "w"), "block 'y' reduces over it", "take a loop over outputs")
    sch.vectorize(inner)
    refused(lambda: sch.align(inner, "w"), "it is vectorized already")


def test_of_a_parameter_only() -> None:
    func: PrimFunc = product()[0].func
    wrong = replace(func, symbols=(replace(func.symbols[0], buffer="nothing"),))
    with pytest.raises(VerifyError, match=r"w_lead is of 'nothing', which is no parameter"):
        verify(wrong)


def test_not_on_a_gpu() -> None:
    target = parse("opencl")
    assert isinstance(target, GpuTarget)
    with pytest.raises(CodegenError, match="begins at cache lines"):
        emit_device(product()[0].func, target, "k")


@pytest.mark.parametrize(
    ("m", "k", "n", "relu"),
    [(13, 40, 112, True), (13, 40, 96, False), (1, 40, 64, False), (1, 40, 64, True), (1, 40, 304, True)],
)
@pytest.mark.parametrize("elements", [0, 4, 15])
def test_products_begin_at_lines(tmp_path: Path, m: int, k: int, n: int, relu: bool, elements: int) -> None:
    func, rule = dense(m, k, n, relu=relu), Matmul()
    sch = Schedule(func)
    rule.apply(sch, {**rule.default(func, AVX512), "align": True}, AVX512)
    verify(sch.func)
    given = inputs(func)
    (expected,) = interp.run(func, given)
    named = dict(zip((buffer.name for buffer in func.params), given, strict=False))
    named["w"] = placed(named["w"], elements)
    with opened(compile_prim_func(sch, "native", cache=KernelCache(tmp_path))) as loaded:
        (found,) = loaded.run(named).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_whole_tiles_are_read_without_a_question() -> None:
    func, rule = dense(13, 40, 112, relu=False), Matmul()
    sch = Schedule(func)
    rule.apply(sch, {**rule.default(func, AVX512), "align": True}, AVX512)
    ir = emit_kernel(sch.func, parse("x86-64-v4"), "k").ir
    assert "llvm.masked.load" in ir
    assert "llvm.vector.reduce.or" not in ir  # "is any lane of this row on?"


def test_where_products_begin_at_lines() -> None:
    def aligned(m: int, k: int, n: int, target: TargetModel = AVX512) -> bool:
        return bool(Matmul().default(dense(m, k, n), target)["align"])

    slower = replace(AVX512, fma_per_cycle=1.0)
    assert aligned(16, 2048, 2048, slower)
    assert not aligned(16, 2048, 2048)  # the sum goes in blocks, whose pieces of rows come one after the other
    assert aligned(16, 2039, 2048)  # no blocks divide the sum
    assert not aligned(16, 2048, 2056, slower)  # rows begin at other places of their lines
    assert not aligned(16, 256, 1024, slower)  # panels are near
    assert not aligned(16, 4096, 1024, slower)  # a panel more in 21
    assert not aligned(512, 2048, 2048)  # panels are copied
    assert not aligned(16, 2048, 2048, AVX2)  # vectors are half a line
    assert aligned(1, 64, 64) and aligned(1, 64, 512)
    assert not aligned(1, 8, 64)
    assert not aligned(1, 1024, 1024)  # threads share it


def test_one_row_takes_chunks_for_the_vectors_that_it_has_then() -> None:
    rule = Matmul()
    narrow, wide = (rule.default(dense(1, 64, n), AVX512) for n in (64, 512))
    assert (narrow["vectors"], narrow["stream"]) == (5, False)
    assert (wide["vectors"], wide["block"], wide["stream"]) == (5, 7, True)
