"""Loops over register tiles are split where conditions change: the meaning stays, loops that count have none."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.codegen.alloc import statements_of
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.codegen.split import split_loops
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Const, Expr, logical_and, select
from kedge.compiler.tir.stmt import For, If, PrimFunc, Stmt
from support import functions
from support.prepared import interpretable


def convolution(channels: int, width: int, taps: int, stride: int) -> PrimFunc:
    """A row of an image, padded by half of the taps, with 4 filters."""
    pad = taps // 2
    x, w = te.placeholder((channels, width), "float32", "x"), te.placeholder((channels, taps, 4), "float32", "w")
    i, k = te.reduce_axis(channels, "i"), te.reduce_axis(taps, "k")

    def element(j: Expr, c: Expr) -> Expr:
        at = j * stride + k - pad
        return te.sum(select(logical_and(at >= 0, at < width), x[i, at], 0.0) * w[i, k, c], [i, k])

    y = te.compute(((width - 1) // stride + 1, 4), element, name="y")
    return te.create_prim_func([x, w, y], "convolution")


def tile(func: PrimFunc, rows: int, steps: int) -> PrimFunc:
    """Register tiles of some rows; some taps are unrolled."""
    sch = Schedule(func)
    block = sch.get_block("y")
    j, c, i, k = sch.get_loops(block)
    j0, j1 = sch.split(j, [None, rows])
    k0, k1 = sch.split(k, [None, steps])
    sch.reorder(j0, i, k0, k1, j1, c)
    made = [block, sch.cache_write(block, j0, "register")]
    made.append(sch.decompose_reduction(block, i))
    sch.unroll(k1)
    for each in made:
        *_, own, lanes = sch.get_loops(each)
        sch.unroll(own)
        sch.vectorize(lanes)
    return sch.func


def loops(stmt: Stmt) -> Iterator[For]:
    """The loops that stay and have no others inside that do."""
    if isinstance(stmt, For) and stmt.kind == "serial" and isinstance(stmt.extent, Const) and stmt.extent.value > 1:
        inside = [loop for child in statements_of(stmt) for loop in loops(child)]
        yield from inside or [stmt]
        return
    for child in statements_of(stmt):
        yield from loops(child)


def branches(stmt: Stmt) -> bool:
    """Whether there is a choice in a statement."""
    return isinstance(stmt, If) or any(branches(child) for child in statements_of(stmt))


def test_a_rest_of_taps_is_behind_the_loop() -> None:
    body = split_loops(prepare(tile(convolution(3, 4, 7, 1), 4, 2)))
    assert [loop.extent.value for loop in loops(body) if isinstance(loop.extent, Const)]
    assert not any(branches(loop) for loop in loops(body))


def test_taps_that_reach_a_border_are_apart() -> None:
    """Of 5 taps over a whole row the middle one reaches none: the loop over channels has all of them in it."""
    before = prepare(tile(convolution(3, 8, 5, 1), 8, 1))
    assert any(branches(loop) for loop in loops(before))
    after = split_loops(before)
    assert not any(branches(loop) for loop in loops(after))
    assert [loop.extent.value for loop in loops(after) if isinstance(loop.extent, Const)] == [3]


@pytest.mark.parametrize("seed", range(12))
def test_the_meaning_stays(seed: int) -> None:
    rng = random.Random(seed)
    reference = convolution(rng.randrange(2, 4), rng.randrange(2, 30), rng.randrange(2, 8), rng.randrange(1, 3))
    func = tile(reference, rng.randrange(2, 9), rng.randrange(1, 5))
    data = functions.inputs(reference, {})
    ran = interp.run(interpretable(func, split_loops(prepare(func))), data, {})
    for got, want in zip(ran, interp.run(reference, data, {}), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_vectors_that_lie_apart_come_in_runs_on_armv7() -> None:
    x, w = te.placeholder((32, 4), "float32", "x"), te.placeholder((3, 4), "float32", "w")
    k = te.reduce_axis(3, "k")
    y = te.compute((8, 4), lambda j, c: te.sum(x[j * 2 + k, c] * w[k, c], k), name="y")
    sch = Schedule(te.create_prim_func([x, w, y], "depthwise"))
    block = sch.get_block("y")
    j, c, taps = sch.get_loops(block)
    outer, inner = sch.split(j, [None, 4])
    sch.reorder(outer, taps, inner, c)
    made = [block, sch.cache_write(block, outer, "register")]
    made.append(sch.decompose_reduction(block, taps))
    sch.unroll(taps)
    for each in made:
        *_, own, lanes = sch.get_loops(each)
        sch.unroll(own)
        sch.vectorize(lanes)
    targets = ("llvm -mtriple=armv7-linux-gnueabihf -mcpu=cortex-a9", "raspberry-pi/4b")
    runs = [emit_kernel(sch.func, parse(text), "kernel").ir.count('asm ""') for text in targets]
    assert runs == [3, 0]  # one for each tap
