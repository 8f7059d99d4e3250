"""Elements that are read along one dim and stored along another are transposed in registers, as whole vectors."""

from __future__ import annotations

import re

import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.turned import Turned
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Expr, Var, const, select
from kedge.compiler.tir.stmt import PrimFunc
from support.prepared import assert_compiled

N, D, H, W = (Var(name, lower=1) for name in "ndhw")


def unpacked(channels: int, height: Dim, width: Dim, dtype: str = "float32", lanes: int = 16) -> PrimFunc:
    """Blocks of channels (n, C / lanes, H, W, lanes) as (n, C, H, W)."""
    x = te.placeholder((N, -(-channels // lanes), height, width, lanes), dtype, "x")
    shape = (N, channels, height, width)
    y = te.compute(shape, lambda n, c, h, w: x[n, c // lanes, h, w, c % lanes], name="y")
    return te.create_prim_func([x, y], "unpacked")


def packed(channels: int, height: Dim, width: Dim, dtype: str = "float32", lanes: int = 16) -> PrimFunc:
    """(n, C, H, W) in blocks; zeros where there are no more channels."""
    x = te.placeholder((N, channels, height, width), dtype, "x")
    shape = (N, -(-channels // lanes), height, width, lanes)

    def body(n: Expr, b: Expr, h: Expr, w: Expr, i: Expr) -> Expr:
        value = x[n, b * lanes + i, h, w]
        return select(b * lanes + i < channels, value, const(0, dtype)) if channels % lanes else value

    return te.create_prim_func([x, te.compute(shape, body, name="y")], "packed")


def volumes(channels: int, lanes: int = 16) -> tuple[PrimFunc, PrimFunc]:
    """The same of images in three dims of free sizes: to blocks, and back."""
    x = te.placeholder((N, channels, D, H, W), "float32", "x")
    blocks = te.placeholder((N, channels // lanes, D, H, W, lanes), "float32", "x")
    y = te.compute(blocks.shape, lambda n, b, d, h, w, i: x[n, b * lanes + i, d, h, w], name="y")
    z = te.compute(x.shape, lambda n, c, d, h, w: blocks[n, c // lanes, d, h, w, c % lanes], name="z")
    return te.create_prim_func([x, y], "packed_volume"), te.create_prim_func([blocks, z], "unpacked_volume")


def transposed(rows: Dim, columns: Dim, dtype: str) -> PrimFunc:
    x = te.placeholder((rows, columns), dtype, "x")
    return te.create_prim_func([x, te.compute((columns, rows), lambda i, j: x[j, i], name="y")], "transposed")


CASES: dict[str, tuple[PrimFunc, dict[str, int]]] = {
    "unpacked": (unpacked(32, 12, 12), {"n": 2}),
    "unpacked_odd": (unpacked(58, 7, 7), {"n": 2}),
    "unpacked_fours": (unpacked(20, 14, 14, lanes=4), {"n": 1}),
    "packed": (packed(32, 12, 12), {"n": 2}),
    "packed_odd": (packed(58, 9, 5), {"n": 2}),
    "square_float64": (transposed(35, 44, "float64"), {}),
    "square_int8": (transposed(70, 65, "int8"), {}),
    "square_float16": (transposed(70, 65, "float16"), {}),
    "unpacked_free": (unpacked(32, H, W), {"n": 2, "h": 5, "w": 11}),
    "unpacked_short": (unpacked(32, H, W), {"n": 1, "h": 3, "w": 2}),
    "packed_free": (packed(32, H, W), {"n": 2, "h": 5, "w": 11}),
    "packed_odd_free": (packed(58, H, W), {"n": 2, "h": 4, "w": 9}),
    "packed_volume": (volumes(32)[0], {"n": 2, "d": 2, "h": 3, "w": 9}),
    "unpacked_volume": (volumes(32)[1], {"n": 2, "d": 2, "h": 3, "w": 9}),
    "square_free": (transposed(H, W, "float32"), {"h": 35, "w": 44}),
    "narrow": (transposed(37, 6, "float32"), {}),
    "low": (transposed(6, 37, "float32"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_turned_is_the_same(kernels: KernelCache, name: str) -> None:
    func, symbols = CASES[name]
    assert_compiled(schedule_func(func, parse("native")).func, func, symbols, kernels)


@pytest.mark.parametrize("name", ["unpacked", "packed", "unpacked_fours", "unpacked_free", "unpacked_volume"])
@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "aws/graviton3"])
def test_no_element_is_loaded_or_stored_alone(name: str, target: str) -> None:
    """Though height and width are one loop, whose vectors go over the ends of rows."""
    chosen = parse(target)
    text = emit_kernel(schedule_func(CASES[name][0], chosen).func, chosen, "k").ir
    whole = text[: text.index("masked")] if "masked" in text else text
    assert "shufflevector" in text
    assert not re.search(r"insertelement <\d+ x float>", whole)
    assert "load float" not in whole and "store float" not in whole


@pytest.mark.parametrize("name", ["unpacked_free", "packed_free", "packed_volume", "unpacked_volume", "square_free"])
def test_free_sizes_are_turned_and_no_lane_divides(name: str) -> None:
    """A loop over a height and a width counts elements in their order: none of them looks for its row."""
    target = parse("x86-64-v4")
    kernel = schedule_func(CASES[name][0], target)
    assert "refused" not in kernel.decisions
    text = emit_kernel(kernel.func, target, "k").ir
    assert text.count("shufflevector") > 16
    assert not re.search(r"[us](div|rem) <", text)


def test_rows_come_in_the_largest_vectors_that_they_fill() -> None:
    plan = Turned(Var("j"), 14)
    parts = [plan.part(number, 16) for number in range(16)]
    assert parts == [(0, 8)] * 8 + [(8, 4)] * 4 + [None] * 4
    assert Turned(Var("j"), 16).part(5, 4) == (4, 4)
