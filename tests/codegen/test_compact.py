"""Buffers live in one iteration where nothing is handed on, and are no larger there than what is used of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen import coverage
from kedge.compiler.codegen import prepare as preparing
from kedge.compiler.codegen.alloc import print_prepared
from kedge.compiler.codegen.coverage import written_before_read
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Expr, Load, Var, const
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import Buffer, For, PrimFunc, Scope, Store
from kedge.compiler.tir.visitor import seq, substitute_expr, walk_stmt
from support import functions
from support.prepared import allocs, assert_compiled, assert_prepared
from support.random_schedules import FUNCTIONS, scheduled

N, H, W, K = Var("n", lower=1), Var("h", lower=3), Var("w", lower=3), Var("k", lower=1)


def shapes(func: PrimFunc) -> dict[str, set[tuple[Dim, ...]]]:
    """The shapes that each buffer has after preparation."""
    found: dict[str, set[tuple[Dim, ...]]] = {}
    for buffer in allocs(prepare(func)):
        found.setdefault(buffer.name, set()).add(buffer.shape)
    return found


# Schedules that leave a tile alive -------------------------------------------------------------------------------


def convolution(n: Dim) -> PrimFunc:
    return functions.conv(n, 3, 12, 4)


def tiled_convolution(func: PrimFunc, *, parallel: bool = False) -> PrimFunc:
    """A tile of 4 x 5 of the output at a time: its convolution, and the padded input that it needs."""
    sch = Schedule(func)
    b, o, h, w = sch.get_loops(sch.get_block("relu"))
    h0, h1 = sch.split(h, [None, 4])
    w0, w1 = sch.split(w, [None, 5])
    sch.reorder(b, h0, w0, o, h1, w1)
    sch.compute_at(sch.get_block("conv"), o)
    sch.compute_at(sch.get_block("pad"), w0)
    if parallel:
        sch.parallel(b)
    return sch.func


def stencil(h: Dim, w: Dim) -> PrimFunc:
    """A sum over 3 x 3 neighbours, rows first."""
    x = te.placeholder((h, w), "float32", "x")
    s = te.compute((h - 2, w), lambda i, j: x[i, j] + x[i + 1, j] + x[i + 2, j], name="s")
    y = te.compute((h - 2, w - 2), lambda i, j: s[i, j] + s[i, j + 1] + s[i, j + 2], name="y")
    return te.create_prim_func([x, y], "stencil")


def tiled_stencil(func: PrimFunc) -> PrimFunc:
    sch = Schedule(func)
    i, j = sch.get_loops(sch.get_block("y"))
    i0, i1 = sch.split(i, [None, 4])
    j0, j1 = sch.split(j, [None, 8])
    sch.reorder(i0, j0, i1, j1)
    sch.compute_at(sch.get_block("s"), j0)
    sch.vectorize(j1)
    return sch.func


def product(m: Dim, k: Dim) -> PrimFunc:
    """A matrix product over panels of 8 columns."""
    a, b, axis = te.placeholder((m, k), "float32", "a"), te.placeholder((k, 16), "float32", "b"), te.reduce_axis(k, "k")
    packed = te.compute((2, k, 8), lambda q, r, s: b[r, q * 8 + s], name="packed")
    c = te.compute((m, 16), lambda i, j: te.sum(a[i, axis] * packed[j // 8, axis, j % 8], axis), name="c")
    return te.create_prim_func([a, b, c], "product")


def panelled_product(func: PrimFunc) -> PrimFunc:
    sch = Schedule(func)
    i, j, k = sch.get_loops(sch.get_block("c"))
    j0, j1 = sch.split(j, [None, 8])
    i0, i1 = sch.split(i, [None, 4])
    sch.reorder(j0, i0, k, i1, j1)
    sch.compute_at(sch.get_block("packed"), j0)
    sch.vectorize(j1)
    sch.unroll(i1)
    return sch.func


CASES: dict[str, tuple[PrimFunc, Callable[[PrimFunc], PrimFunc], dict[str, int]]] = {
    "conv_tile": (convolution(2), tiled_convolution, {}),
    "conv_tile_free": (convolution(N), tiled_convolution, {"n": 2}),
    "stencil": (stencil(20, 30), tiled_stencil, {}),
    "stencil_free": (stencil(H, W), tiled_stencil, {"h": 13, "w": 11}),
    "stencil_least": (stencil(H, W), tiled_stencil, {"h": 3, "w": 3}),
    "panel": (product(10, 6), panelled_product, {}),
    "panel_free": (product(N, K), panelled_product, {"n": 7, "k": 5}),
}


@pytest.mark.parametrize("name", ["conv_tile_free", "stencil_free", "panel_free"])
def test_golden(golden: Callable[[str, str], None], name: str) -> None:
    func, schedule, _ = CASES[name]
    before = schedule(func)
    golden(f"compact_{name}.txt", f"{before.show()}\n\nbecomes\n\n{print_prepared(before, prepare(before))}")


@pytest.mark.parametrize("name", CASES)
def test_tiles_compute_the_same(kernels: KernelCache, name: str) -> None:
    func, schedule, symbols = CASES[name]
    before = schedule(func)
    assert_prepared(before, func, symbols)
    assert_compiled(before, func, symbols, kernels)


def test_iterations_of_a_parallel_loop_have_a_tile_each(kernels: KernelCache) -> None:
    func = convolution(N)
    before = tiled_convolution(func, parallel=True)
    assert shapes(before) == {"pad": {(1, 3, 6, 7)}, "conv": {(1, 1, 4, 5)}}
    assert_prepared(before, func, {"n": 2})
    assert_compiled(before, func, {"n": 2}, kernels)


def by_pieces(scope: Scope, rows: int) -> PrimFunc:
    """`y` reads a tile that is filled by a fused and split loop, in a parallel loop under a serial one."""
    x = te.placeholder((3, rows, 2, 3), "float32", "x")
    t = te.compute((3, rows, 2, 3), lambda a, i, p, q: x[a, i, p, q] + 1.0, name="t")
    y = te.compute((3, rows, 2, 3), lambda a, i, p, q: t[a, i, 1 - p, q] * 2.0, name="y")
    sch = Schedule(te.create_prim_func([x, y], "f"))
    _, i, *_ = sch.get_loops(sch.get_block("y"))
    copy = sch.cache_read(sch.get_block("y"), "t", i, scope)
    sch.split(sch.fuse(*sch.get_loops(copy)[-2:]), [None, 4])
    sch.parallel(i)
    return sch.func


@pytest.mark.parametrize("scope", ["local", "register"])
def test_what_is_private_by_its_scope_is_inside_whatever_can_be_proved(scope: Scope, kernels: KernelCache) -> None:
    func = by_pieces(scope, 500)
    lines = [line.strip() for line in print_prepared(func, prepare(func)).splitlines()]
    assert lines.index("for i in parallel(500):") < next(i for i, line in enumerate(lines) if f"in {scope}" in line)
    assert_compiled(func, func, {}, kernels)


def test_the_extent_of_a_tail_has_a_constant_bound() -> None:
    """The last tile is shorter by a symbolic size: what is allocated is the whole tile."""
    assert shapes(tiled_stencil(stencil(H, W))) == {"s": {(4, 10)}}


def test_a_size_that_all_iterations_share_may_be_symbolic() -> None:
    assert [shape[0] for shape in shapes(panelled_product(product(N, K)))["packed"]] == [1]
    ((_, depth, _),) = shapes(panelled_product(product(N, K)))["packed"]
    assert depth is K


def stack_and_workspace(func: PrimFunc) -> tuple[int, Dim]:
    """Bytes on the stack and in the workspace, as the kernel's code has them."""
    code = emit_kernel(func, parse("native"), "k")
    stack = [4 * int(count) for count in re.findall(r"alloca \[(\d+) x float\]", code.ir)]
    return sum(stack), code.workspace


def test_memory_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = tiled_stencil(stencil(400, 500)), tiled_stencil(stencil(20, 30))
    free = tiled_stencil(stencil(H, W))
    compacted = [stack_and_workspace(func) for func in (large, small, free)]
    monkeypatch.setattr(preparing, "compact", lambda stmt: stmt)
    whole = [stack_and_workspace(func) for func in (large, small, free)]
    tile = 4 * 4 * 10  # of all versions, of which one runs at a time
    assert compacted == [(tile, 0)] * 3
    assert whole[0] == (0, (398 * 500 * 4 + 63) // 64 * 64)  # which both versions use
    assert whole[1][0] == 18 * 30 * 4
    assert not isinstance(whole[2][1], int)


# What may not move ----------------------------------------------------------------------------------------------


def only_loop(func: PrimFunc) -> For:
    return next(stmt for stmt in reversed(tuple(walk_stmt(func.body))) if isinstance(stmt, For))


def hand_written(*lines: str) -> PrimFunc:
    text = "\n    ".join(lines)
    return parse_func(f"func f(x: float32[64]) -> (y: float32[64]):\n  alloc t: float32[64]\n  {text}")


@pytest.mark.parametrize(
    ("lines", "own"),
    [
        (("for i in range(64):", "t[i] = x[i]", "y[i] = t[i]"), True),
        (("for i in range(64):", "y[i] = t[i]", "t[i] = x[i]"), False),
        (("for i in range(64):", "t[i] = x[i]", "y[i] = t[max(i - 1, 0)]"), False),
        (("for i in range(64):", "if i > 3:", "  t[i] = x[i]", "y[i] = t[i]"), False),
        (("for i in range(64):", "if i > 3:", "  t[i] = x[i]", "if i > 5:", "  y[i] = t[i]"), True),
        (("for i in range(64):", "if i > 5:", "  t[i] = x[i]", "if i > 3:", "  y[i] = t[i]"), False),
        (("for i in range(16):", "for j in range(4):", "  t[i * 4 + j] = x[i * 4 + j]",
          "for k in range(4):", "  y[i * 4 + k] = t[i * 4 + 3 - k]"), True),
        (("for i in range(16):", "for j in range(3):", "  t[i * 4 + j] = x[i * 4 + j]",
          "for k in range(4):", "  y[i * 4 + k] = t[i * 4 + 3 - k]"), False),
        (("for i in range(16):", "for j in range(2):", "  t[i * 4 + j * 2 + 1] = x[i * 4 + j]",
          "for k in range(2):", "  y[i * 4 + k] = t[i * 4 + k * 2 + 1]"), True),
        (("for i in range(16):", "for j in range(2):", "  t[i * 4 + j * 2] = x[i * 4 + j]",
          "for k in range(2):", "  y[i * 4 + k] = t[i * 4 + k]"), False),
        # Tiles of 4 and of 16 end at the same place, within the last of them.
        (("for i in range(2):", "for j in range(7):", "  for l in range(4):", "    t[i * 32 + j * 4 + l] = x[j]",
          "for k in range(2):", "  for m in range(4):", "    for l in range(4):", "      if k * 16 + m * 4 + l < 26:",
          "        y[i * 32 + k * 16 + m * 4 + l] = t[i * 32 + k * 16 + m * 4 + l]"), True),
        (("for i in range(2):", "for j in range(6):", "  for l in range(4):", "    t[i * 32 + j * 4 + l] = x[j]",
          "for k in range(2):", "  for m in range(4):", "    for l in range(4):", "      if k * 16 + m * 4 + l < 26:",
          "        y[i * 32 + k * 16 + m * 4 + l] = t[i * 32 + k * 16 + m * 4 + l]"), False),
        (("for i in range(64):", "for k in range(4):", "  if k == 0:", "    t[i] = 0.0", "  t[i] = t[i] + x[i]",
          "y[i] = t[i]"), True),
        (("for i in range(64):", "for k in range(4):", "  if k == 1:", "    t[i] = 0.0", "  t[i] = t[i] + x[i]",
          "y[i] = t[i]"), False),
        # The first iteration initialises only if it comes there.
        (("for i in range(16):", "if i < 1:", "  t[0] = 1.0", "for k in range(4):", "  if k % 3 >= 1:",
          "    if k == 0:", "      t[0] = 0.0", "    y[i * 4 + k] = t[0]"), False),
        (("for i in range(16):", "if i < 1:", "  t[0] = 1.0", "for k in range(4):", "  if x[k] > 1.0:",
          "    if k == 0:", "      t[0] = 0.0", "    y[i * 4 + k] = t[0]"), False),
        (("for i in range(16):", "for k in range(4):", "  for j in range(k):", "    if k == 0:",
          "      t[j] = 0.0", "    y[i * 4 + k] = t[j]"), False),
        (("for i in range(64):", "for k in range(4):", "  if k < 3:", "    if k == 0:",
          "      t[i] = 0.0", "    y[i] = t[i]"), True),
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "else:", "  t[i] = 0.0", "y[i] = t[i]"), True),
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "else:", "  t[63 - i] = 0.0", "y[i] = t[i]"), False),
        # What a choice does not take need not be there.
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "y[i] = select(i < 4, t[i], 0.0)"), True),
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "y[i] = select(i >= 4, 0.0, t[i] + t[i])"), True),
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "y[i] = select(i < 5, t[i], 0.0)"), False),
        (("for i in range(64):", "if i < 4:", "  t[i] = x[i]", "y[i] = select(i < 4, t[i], t[i] * 2.0)"), False),
    ],
)  # fmt: skip
def test_an_iteration_reads_what_it_wrote(lines: tuple[str, ...], own: bool) -> None:
    func = hand_written(*lines)
    assert written_before_read(only_loop(func), func.allocs[0], {}) is own
    assert ({"t": {(64,)}} == shapes(func)) is not own


@pytest.mark.parametrize("length", [64, 131, 197])
def test_rows_of_a_softmax_stay_near_whatever_their_length(length: int) -> None:
    """Sums go in steps of four vectors, exponentials in single ones: both end where the row does."""
    kernel = schedule_func(functions.softmax(16, length), parse("llvm -mcpu=znver4"))
    assert shapes(kernel.func)["e"] == {(1, length)}


def test_conditions_around_a_sum_cost_no_more_each_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the border of an image in many dims has them: facts about the sum itself doubled with each."""
    made = 0

    def counted(expr: Expr, values: Mapping[Var, Expr]) -> Expr:
        nonlocal made
        made += 1
        return substitute_expr(expr, values)

    def expressions(depth: int) -> int:
        nonlocal made
        nest = [line for d in range(depth) for line in (f"for k{d} in range(3):", f"  if i + k{d} >= 1:")]
        nested = [" " * 4 * (number // 2) + line for number, line in enumerate(nest)]
        func = hand_written(
            "for i in range(64):", "  t[i] = 0.0", *(f"  {line}" for line in nested),
            f"  {' ' * 4 * depth}t[i] = t[i] + x[i]", "  y[i] = t[i]",
        )  # fmt: skip
        made = 0
        assert written_before_read(only_loop(func), func.allocs[0], {})
        return made

    monkeypatch.setattr(coverage, "substitute_expr", counted)
    assert expressions(8) < 4 * expressions(4)


def test_a_fused_loop_that_fills_several_dims_is_seen_through() -> None:
    func = by_pieces("local", 7)
    body = preparing.lower_blocks(func.body)
    loop = next(stmt for stmt in walk_stmt(body) if isinstance(stmt, For) and stmt.kind == "parallel")
    (tile,) = (buffer for buffer in func.allocs if buffer.scope == "local")
    assert written_before_read(loop, tile, {})


def test_a_tile_is_not_split_among_lanes() -> None:
    func = hand_written("for i in vectorized(64):", "t[i] = x[i]", "y[i] = t[i]")
    assert shapes(func) == {"t": {(64,)}}


def test_alignment_that_was_asked_for_stays() -> None:
    sch = Schedule(stencil(20, 32))
    i, _ = sch.get_loops(sch.get_block("y"))
    i0, _ = sch.split(i, [None, 3])
    sch.compute_at(sch.get_block("s"), i0)
    sch.storage_align(sch.get_block("s"), 0, 32, 8)
    assert shapes(sch.func) == {"s": {(3, 40)}}


def test_what_depends_on_data_stays_whole() -> None:
    x, t, y = Buffer("x", (8,), "int64"), Buffer("t", (8, 8), "float32"), Buffer("y", (8,), "float32")
    i, j = Var("i"), Var("j")
    fill = For(j, const(8), "serial", Store(t, (i, j), const(1.0, "float32")))
    body = For(i, const(8), "serial", seq(fill, Store(y, (i,), Load(t, (i, Load(x, (i,)))))))
    (buffer,) = allocs(prepare(PrimFunc("f", (x, y), 1, body, (t,))))
    assert buffer.shape == (8, 8)


def test_nothing_to_shrink_is_the_same_object() -> None:
    func = functions.dense(4, 8, 4)
    body = preparing.place_allocs(preparing.lower_blocks(func.body), func.allocs)
    assert preparing.compact(body) is body


# Whatever the schedule ------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(FUNCTIONS)), rng=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_random_schedules(name, rng):
    func, symbols = FUNCTIONS[name]
    assert_prepared(scheduled(name, rng, 14).func, func, symbols)


def test_random_schedules_shrink_buffers() -> None:
    """The test above is about something."""
    shrunk = 0
    for seed in range(120):
        name = sorted(FUNCTIONS)[seed % len(FUNCTIONS)]
        func = scheduled(name, random.Random(seed), 14).func
        body = preparing.place_allocs(preparing.lower_blocks(func.body), func.allocs)
        shrunk += preparing.compact(body) is not body
    assert shrunk >= 10, shrunk


@pytest.mark.parametrize("rows", [3, N])
def test_buffers_take_the_memory_of_those_that_are_dead(rows: Dim, kernels: KernelCache) -> None:
    """Two in turn, and one for what is added at the end; what has another shape keeps its own."""
    x = te.placeholder((rows, 3_000), "float32", "x")  # no buffer of them fits on a stack
    stages = [x]
    for number in range(7):
        before = stages[-1]
        stages.append(te.compute(x.shape, lambda i, j, t=before: t[i, j] * 0.5 + 1.0, name=f"stage{number}"))
    turned = te.compute((3_000, rows), lambda j, i: stages[-1][i, j], name="turned")
    y = te.compute(x.shape, lambda i, j: turned[j, i] + stages[1][i, j], name="y")
    func = te.create_prim_func([x, y], "f")
    assert sorted(buffer.name for buffer in allocs(prepare(func))) == ["stage0", "stage1", "stage2", "turned"]
    sch = Schedule(func)  # a buffer inside of a loop, beside those outside
    sch.compute_at(sch.get_block("stage3"), sch.get_loops(sch.get_block("stage4"))[0])
    found = sorted(buffer.name for buffer in allocs(prepare(sch.func)))
    assert found == ["stage0", "stage1", "stage2", "stage3", "turned"]
    for each in (func, sch.func):
        assert_prepared(each, func, {"n": 3})
        assert_compiled(each, func, {"n": 3}, kernels)
