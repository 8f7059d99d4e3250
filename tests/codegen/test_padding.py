"""What a padding would add to sums is not computed: the loops that are left, and that results stay the same."""

from __future__ import annotations

import re

import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.alloc import print_prepared
from kedge.compiler.codegen.padding import skip_padding
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.tir.expr import Dim, Expr, Var, logical_and, select
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from support.prepared import assert_compiled, assert_prepared
from support.targets import Model

#: Vectors of four lanes: the fewer elements, the sooner the interpreter is done.
SMALL = Model(vector_bits=128, vector_registers=32)
H, W = Var("h", lower=1), Var("w", lower=1)


def conv(height: Dim, width: Dim, *, kernel: int = 3, dilation: int = 1) -> PrimFunc:
    """Two blocks of 8 channels to 4, padded to keep its size."""
    pad = kernel // 2 * dilation
    x = te.placeholder((2, height, width, 8), "float32", "x")
    weight = te.placeholder((2, kernel, kernel, 8, 4), "float32", "weight")

    def padded(b: Expr, i: Expr, j: Expr, lane: Expr) -> Expr:
        inside = logical_and(i >= pad, i < height + pad, j >= pad, j < width + pad)
        return select(inside, x[b, i - pad, j - pad, lane], 0.0)

    p = te.compute((2, height + 2 * pad, width + 2 * pad, 8), padded, name="p")
    b, r, s, k = (te.reduce_axis(size, name) for size, name in zip((2, kernel, kernel, 8), "brsk", strict=True))
    y = te.compute(
        (height, width, 4),
        lambda i, j, o: te.sum(p[b, i + r * dilation, j + s * dilation, k] * weight[b, r, s, k, o], (b, r, s, k)),
        name="y",
    )
    return te.create_prim_func([x, weight, y], "conv")


CASES = {
    "one_row": (conv(1, 9), {}),
    "small": (conv(3, 5, kernel=5), {}),
    "dilated": (conv(5, 6, dilation=4), {}),
    "free": (conv(H, W), {"h": 3, "w": 17}),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """A cache of this module's own, so that no other test's kernels are used."""
    return KernelCache(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same(name: str, kernels: KernelCache) -> None:
    func, symbols = CASES[name]
    scheduled = schedule_func(func, SMALL).func
    assert_prepared(scheduled, func, symbols)
    assert_compiled(scheduled, func, symbols, kernels)


def test_rows_of_a_kernel_that_lie_in_the_padding_are_left_out() -> None:
    """The one row of this image meets one of three: a question before the loops of its taps, and in none of them."""
    func = schedule_func(CASES["one_row"][0], SMALL).func
    lines = print_prepared(func, prepare(func)).splitlines()
    asked = [line.strip() for line in lines if "r >= 1" in line]
    assert asked == ["if r >= 1 and r < 2:"], "\n".join(lines)


def test_only_rows_at_the_border_ask_for_the_padding() -> None:
    """In the middle of an image a tile has all its taps: its loops ask nothing."""
    func = schedule_func(conv(6, 50), SMALL).func
    text = print_prepared(func, prepare(func))
    asking = re.findall(r"^ *(if .*|else:)$", text, re.MULTILINE)
    row = "i_j_0_o_0 // 5"
    assert asking[0].startswith(f"if {row} >= 1 and {row} < 5 and "), text
    assert asking[1] == "else:" and f"if {row} + r >= 1 and {row} + r < 7:" in asking[2:], text
    assert "select" not in text[: text.index("else:")]


LOOP = """
func f(x: float32[8], w: float32[4]) -> (y: float32[1], z: float32[4]):
  for k in range(4):
    BODY
"""
SUM = "y[0] = y[0] + select(k >= 2, x[k], 0.0) * w[k]"


@pytest.mark.parametrize(
    ("body", "left_out"),
    [
        (SUM, True),
        ("y[0] = y[0] + select(k >= 2, x[k] * w[k], 0.0)", True),
        ("y[0] = y[0] + select(k >= 2, x[k], 1.0) * w[k]", False),
        ("y[0] = y[0] + (select(k >= 2, x[k], 0.0) + w[k])", False),
        ("y[0] = max(y[0], select(k >= 2, x[k], 0.0) * w[k])", False),
        ("z[k] = select(k >= 2, x[k], 0.0) * w[k]", False),
        (f"{SUM}\n    z[k] = w[k]", False),
        (f"{SUM}\n    y[0] = y[0] + select(k >= 1, w[k], 0.0)", False),
        ("for j in unrolled(2):\n      y[0] = y[0] + select(k + j >= 2, x[k], 0.0)", False),
    ],
)
def test_only_what_adds_nothing_is_left_out(body: str, left_out: bool) -> None:
    func = parse_func(LOOP.replace("BODY", body))
    assert (skip_padding(func.body) is not func.body) == left_out
