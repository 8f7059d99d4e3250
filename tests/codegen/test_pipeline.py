"""What LLVM does with a kernel: all that it can where loops are left to it, little where these are vectors already."""

from __future__ import annotations

import re

import pytest

from kedge.compiler import te
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import call
from kedge.compiler.tir.stmt import PrimFunc
from support import functions

AVX2 = parse("x86-64-v3")


def one_loop(extent: int) -> Schedule:
    """`chain` as one loop that is neither a vector nor unrolled."""
    sch = Schedule(functions.chain(extent))
    for name in ("a", "b"):
        sch.compute_inline(sch.get_block(name))
    return sch


def vectors(extent: int, *, parallel: bool = False) -> PrimFunc:
    sch = one_loop(extent)
    (loop,) = sch.get_loops(sch.get_block("c"))
    if parallel:
        outer, loop = sch.split(loop, [None, 64])
        sch.parallel(outer)
    sch.vectorize(loop)
    return sch.func


def assembly(func: PrimFunc, *, scalar_loops: bool) -> str:
    code = emit_kernel(func, AVX2, "k")
    assert code.scalar_loops is scalar_loops
    return emit_assembly(code.ir, AVX2, vectorize=code.scalar_loops)


def test_loops_without_vectors_are_vectorized_by_llvm() -> None:
    assert re.search(r"vaddps.*ymm", assembly(one_loop(4096).func, scalar_loops=True))


@pytest.mark.parametrize(("extent", "rest"), [(4096, 0), (4099, 1)])
def test_loops_over_vectors_stay_as_they_are(extent: int, rest: int) -> None:
    """One vector at a time, then what is left one by one: nothing is unrolled, and the rest gets no smaller vectors."""
    text = assembly(vectors(extent), scalar_loops=False)
    assert len(re.findall(r"vaddps.*ymm", text)) == 1
    assert text.count("vaddss") == rest


def test_a_loop_beside_vectors_is_left_to_llvm() -> None:
    """The second of two loops; the first is a vector."""
    sch = Schedule(functions.chain(4096))
    sch.vectorize(sch.get_loops(sch.get_block("a"))[0])
    assembly(sch.func, scalar_loops=True)


def test_a_loop_that_cannot_be_a_vector_counts_as_scalar() -> None:
    """Lanes whose loops have other extents: what was emitted for all lanes at once is taken back."""
    n = 64
    x = te.placeholder((n, n), "float32", "x")
    k = te.reduce_axis(n, "k")
    y = te.compute((n,), lambda i: te.sum(x[i, k], k), name="y")
    sch = Schedule(te.create_prim_func([x, y], "sums"))
    assembly(sch.func, scalar_loops=True)


def test_the_body_of_a_parallel_loop_is_inlined() -> None:
    """It would be called once for each range of iterations, and its pointers spilled."""
    text = assembly(vectors(4096, parallel=True), scalar_loops=False)
    assert re.search(r"^k\.loop\d+:", text, re.MULTILINE)
    assert not re.search(r"\.body", text)


def test_helpers_are_inlined_and_not_kept() -> None:
    x = te.placeholder((64,), "float32", "x")
    sch = Schedule(te.create_prim_func([x, te.compute((64,), lambda i: call("exp", x[i]), name="y")], "exp"))
    sch.vectorize(sch.get_loops(sch.get_block("y"))[0])
    text = assembly(sch.func, scalar_loops=False)
    assert "vfmadd" in text and "kedge.exp" not in text
