"""Elements that unrolled code multiplies by come in whole vectors where a multiply-add takes one out of a register."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.codegen.together import Together, together
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Module, TensorType
from kedge.compiler.graph.passes import default_passes, for_target
from kedge.compiler.lower.lower import lower
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Expr, Var, select
from kedge.compiler.tir.stmt import For, PrimFunc, Stmt
from kedge.compiler.tir.visitor import loads, stmt_children
from support.emulated import emulated, run_program

ARM = ("raspberry-pi/4b", "beaglebone/black")
LANES = {"float32": 4}


def product(rows: int, depth: int, columns: int = 4) -> PrimFunc:
    """y = x @ w."""
    x, w = te.placeholder((rows, depth), "float32", "x"), te.placeholder((depth, columns), "float32", "w")
    k = te.reduce_axis(depth, "k")
    y = te.compute((rows, columns), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    return te.create_prim_func([x, w, y], "product")


def tile(func: PrimFunc, rows: int, depth: int) -> Schedule:
    """Tiles of some rows, some steps of the sum unrolled."""
    sch = Schedule(func)
    i, j, k = sch.get_loops(sch.get_block("y"))
    i0, i1 = sch.split(i, [None, rows])
    k0, k1 = sch.split(k, [None, depth])
    sch.reorder(i0, k0, k1, i1, j)
    sch.decompose_reduction(sch.get_block("y"), k0)
    for loop in (k1, i1):
        sch.unroll(loop)
    sch.vectorize(j)
    return sch


def plans(sch: Schedule) -> list[Together | None]:
    """What `together` finds of x, for each outermost unrolled loop that reads it, in order."""
    found: list[Together | None] = []

    def walk(stmt: Stmt) -> None:
        if not isinstance(stmt, For) or stmt.kind != "unrolled":
            for child in stmt_children(stmt):
                walk(child)
        elif any(load.buffer.name == "x" for load in loads(stmt)):
            each = {load.buffer.name: plan for load, plan in together(stmt, {}, LANES).items()}
            found.append(each.get("x"))

    walk(prepare(sch.func))
    return found


def steps(plan: Together | None) -> list[int] | None:
    """By how many elements x moves with each loop."""
    return None if plan is None else sorted(plan.steps.values())


def test_steps_of_a_sum_read_one_vector_for_each_row() -> None:
    (plan,) = plans(tile(product(6, 8), 3, 4))
    assert plan is not None and steps(plan) == [1, 8]
    starts = {element: first for element, (first, size) in plan.vectors.items() if size == 4}
    assert starts == {8 * row + step: 8 * row for row in range(3) for step in range(4)}


def test_the_last_vector_of_a_run_overlaps_the_one_before_and_short_runs_come_in_pairs() -> None:
    (plan,) = plans(tile(product(6, 12), 3, 6))
    assert plan is not None
    assert [plan.vectors[element] for element in range(6)] == [(0, 4)] * 4 + [(2, 4)] * 2
    (plan,) = plans(tile(product(6, 6), 3, 3))
    assert plan is not None
    assert [plan.vectors[element] for element in range(3)] == [(0, 2), (0, 2), (1, 2)]


def test_only_what_is_surely_read_is_loaded() -> None:
    """Of 7 rows in tiles of 3 the last has one, of 14 steps by 8 the last are six: neighbours of those are not read."""
    whole, last = plans(tile(product(7, 8), 3, 4))
    assert whole is not None and set(whole.vectors) == {8 * row + step for row in range(3) for step in range(4)}
    assert last is not None and last.vectors == dict.fromkeys(range(4), (0, 4))
    whole, last = plans(tile(product(6, 14), 3, 8))
    assert whole is not None and set(whole.vectors) == {14 * row + step for row in range(3) for step in range(8)}
    assert last is not None
    starts = [0, 0, 0, 0, 2, 2]
    assert last.vectors == {14 * row + step: (14 * row + starts[step], 4) for row in range(3) for step in range(6)}


def test_a_choice_on_data_may_change_with_every_iteration() -> None:
    x, w, z = (te.placeholder(shape, "float32", name) for name, shape in (("x", (4, 8)), ("w", (8, 4)), ("z", (1,))))
    k = te.reduce_axis(8, "k")

    def body(i: Expr, j: Expr) -> Expr:
        return te.sum(select(z[0] > 0.0, x[i, k], 0.0) * w[k, j], k)

    sch = tile(te.create_prim_func([x, w, z, te.compute((4, 4), body, name="y")], "choosing"), 2, 4)
    assert set(plans(sch)) == {None}


def assembly(text: str) -> str:
    target = parse(text)
    return emit_assembly(emit_kernel(tile(product(8, 64), 4, 4).func, target, "kernel").ir, target)


def test_multiply_adds_by_element() -> None:
    lines = assembly("raspberry-pi/4b").splitlines()
    assert sum("fmla" in line for line in lines) == sum(".s[" in line for line in lines) == 16
    assert not any("ld1r" in line or "\tldr\ts" in line for line in lines)
    lines = assembly("llvm -mtriple=armv7-linux-gnueabihf -mcpu=cortex-a9").splitlines()
    assert sum("vmla.f32" in line and "[" in line for line in lines) == 16
    assert not any("[]" in line for line in lines)  # no element in all lanes
    assert "broadcast" in assembly("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3")


def broadcasts(rows: int, cpu: str) -> int:
    """The loads of one element for all lanes in a product of (rows, 64) and (64, 64), but for constants."""
    target = parse(f"llvm -mtriple=x86_64-linux-gnu -mcpu={cpu}")
    func = schedule_func(product(rows, 64, 64), target).func
    lines = emit_assembly(emit_kernel(func, target, "kernel").ir, target).splitlines()
    return sum("broadcastss" in line and "(" in line and "(%rip)" not in line for line in lines)


@pytest.mark.parametrize("cpu", ["znver4", "x86-64-v3"])
def test_one_row_takes_elements_out_of_vectors(cpu: str) -> None:
    """Its loads take the time; of two rows, the multiply-adds do."""
    assert broadcasts(1, cpu) == 0
    assert broadcasts(2, cpu) > 0


def test_shuffles_take_no_unit_from_multiply_adds() -> None:
    assert broadcasts(1, "skylake-avx512") > 0


# On emulated processors -----------------------------------------------------------------------------------------


def check(module: Module, inputs: list[np.ndarray], board: str, folder: Path) -> None:
    """The optimized and compiled module computes what the module means."""
    target = emulated(board)
    (expected,) = interp.run(module, {f"x{i}": array for i, array in enumerate(inputs)}).values()
    for step in for_target(default_passes(), target):
        module = step(module)
    (got,) = run_program(lower(module, target), target, inputs, folder, KernelCache(folder / "kernels"))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


#: Channels, filters, height, width, kernel, stride, padding, groups: tails of blocks and rows, borders on all sides.
CONVOLUTIONS = {
    "1x1": (16, 24, 5, 11, 1, 1, 0, 1),
    "1x1-one-block": (16, 4, 4, 9, 1, 1, 0, 1),
    "1x1-three-blocks": (20, 12, 3, 15, 1, 2, 0, 1),
    "1x1-part-of-a-block": (14, 10, 5, 11, 1, 1, 0, 1),
    "3x3": (16, 16, 9, 19, 3, 1, 1, 1),
    "3x3-stride2": (16, 20, 11, 17, 3, 2, 1, 1),
    "3x3-part-of-a-block": (10, 18, 9, 17, 3, 2, 1, 1),
    "row-of-11": (1, 8, 12, 40, 11, 4, 2, 1),
    "3x3-small": (32, 8, 7, 7, 3, 1, 1, 1),
    "stem": (3, 10, 23, 31, 7, 2, 3, 1),
    "grouped": (16, 16, 6, 13, 3, 1, 1, 2),
    "depthwise": (12, 12, 6, 17, 3, 1, 1, 12),
    "depthwise-stride2": (8, 8, 9, 21, 3, 2, 1, 8),
    "depthwise5": (8, 8, 7, 9, 5, 1, 2, 8),
}


@pytest.mark.parametrize("board", ARM)
@pytest.mark.parametrize(
    ("name", "free"), [*((name, False) for name in CONVOLUTIONS), ("3x3", True), ("depthwise", True)]
)
def test_convolutions(name: str, free: bool, board: str, tmp_path: Path) -> None:
    channels, filters, height, width, kernel, stride, padding, groups = CONVOLUTIONS[name]
    rng = np.random.default_rng(4)
    b = Builder("main")
    spatial = (Var("h", lower=1), Var("w", lower=1)) if free else (height, width)
    x = b.input("x0", TensorType((2, channels, *spatial), "float32"))
    shape = (filters, channels // groups, kernel, kernel)
    weight = b.constant(rng.standard_normal(shape).astype("float32"))
    pads = (padding,) * 4
    y = b.call("conv", x, weight, strides=(stride, stride), pads=pads, groups=groups, origin=("conv",))
    module = Module({"main": b.finish({"y": b.call("relu", y, origin=("relu",))})})
    check(module, [rng.standard_normal((2, channels, height, width)).astype("float32")], board, tmp_path)


@pytest.mark.parametrize("board", ARM)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "dtype"),
    [
        (7, 16, 20, "float32"),
        (33, 21, 37, "float32"),
        (9, 77, 24, "float32"),
        (1, 12, 5, "float32"),
        (50, 6, 8, "float32"),
        (9, 8, 6, "float64"),
    ],
)
def test_products(rows: int, depth: int, columns: int, dtype: str, constant: bool, board: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    b = Builder("main")
    first, second = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, depth), (depth, columns)))
    a = b.input("x0", TensorType(first.shape, dtype))
    w = b.constant(second) if constant else b.input("x1", TensorType(second.shape, dtype))
    module = Module({"main": b.finish({"y": b.call("matmul", a, w, origin=("matmul",))})})
    check(module, [first] if constant else [first, second], board, tmp_path)


@pytest.mark.parametrize("board", ARM)
def test_a_sum_of_free_length(board: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    b, depth = Builder("main"), Var("k", lower=1)
    x, w = b.input("x0", TensorType((9, depth), "float32")), b.input("x1", TensorType((depth, 20), "float32"))
    module = Module({"main": b.finish({"y": b.call("matmul", x, w, origin=("matmul",))})})
    inputs = [rng.standard_normal(shape).astype("float32") for shape in ((9, 11), (11, 20))]
    check(module, inputs, board, tmp_path)
