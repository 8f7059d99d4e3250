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
from kedge.compiler.tir.expr import Expr, Var, const, select
from kedge.compiler.tir.stmt import PrimFunc
from support.prepared import assert_compiled

N = Var("n", lower=1)


def unpacked(channels: int, height: int, width: int, dtype: str = "float32", lanes: int = 16) -> PrimFunc:
    """Blocks of channels (n, C / lanes, H, W, lanes) as (n, C, H, W)."""
    x = te.placeholder((N, -(-channels // lanes), height, width, lanes), dtype, "x")
    shape = (N, channels, height, width)
    y = te.compute(shape, lambda n, c, h, w: x[n, c // lanes, h, w, c % lanes], name="y")
    return te.create_prim_func([x, y], "unpacked")


def packed(channels: int, height: int, width: int, dtype: str = "float32", lanes: int = 16) -> PrimFunc:
    """(n, C, H, W) in blocks; zeros where there are no more channels."""
    x = te.placeholder((N, channels, height, width), dtype, "x")
    shape = (N, -(-channels // lanes), height, width, lanes)

    def body(n: Expr, b: Expr, h: Expr, w: Expr, i: Expr) -> Expr:
        value = x[n, b * lanes + i, h, w]
        return select(b * lanes + i < channels, value, const(0, dtype)) if channels % lanes else value

    return te.create_prim_func([x, te.compute(shape, body, name="y")], "packed")


def transposed(rows: int, columns: int, dtype: str) -> PrimFunc:
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
    "narrow": (transposed(37, 6, "float32"), {}),
    "low": (transposed(6, 37, "float32"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_turned_is_the_same(kernels: KernelCache, name: str) -> None:
    func, symbols = CASES[name]
    assert_compiled(schedule_func(func, parse("native")).func, func, symbols, kernels)


@pytest.mark.parametrize("name", ["unpacked", "packed", "unpacked_fours"])
@pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "aws/graviton3"])
def test_no_element_is_loaded_or_stored_alone(name: str, target: str) -> None:
    """Though height and width are one loop, whose vectors go over the ends of rows."""
    chosen = parse(target)
    text = emit_kernel(schedule_func(CASES[name][0], chosen).func, chosen, "k").ir
    whole = text[: text.index("masked")] if "masked" in text else text
    assert "shufflevector" in text
    assert not re.search(r"insertelement <\d+ x float>", whole)
    assert "load float" not in whole and "store float" not in whole


def test_rows_come_in_the_largest_vectors_that_they_fill() -> None:
    plan = Turned(Var("j"), 14)
    parts = [plan.part(number, 16) for number in range(16)]
    assert parts == [(0, 8)] * 8 + [(8, 4)] * 4 + [None] * 4
    assert Turned(Var("j"), 16).part(5, 4) == (4, 4)
