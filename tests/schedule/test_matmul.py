"""The rule for matrix products: right for every decision of its space, and decisions that fit the processor."""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.errors import ScheduleError
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.rules.analysis import is_reduction
from kedge.compiler.schedule.rules.matmul import Matmul
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_in, loops_on
from kedge.compiler.target import parse
from kedge.compiler.target.costs import stays_near
from kedge.compiler.target.tiles import tile_for
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Cast, Dim, Expr, Var, maximum
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from support.compiled import opened, placed
from support.functions import assert_same, inputs
from support.prepared import assert_compiled, assert_prepared
from support.targets import AVX2, AVX512, NEON, SCALAR, Model

N, M, K = Var("n", lower=1), Var("m", lower=1), Var("k", lower=1)
RULE = Matmul()
ARMV7 = Model(vector_bits=128, vector_registers=16, fma_per_cycle=0.5, fma_latency=8, loads_per_cycle=0.5)


def product(m: Dim, k: Dim, n: Dim, dtype: str = "float32") -> PrimFunc:
    """`x @ w`, summed in float32 at least."""
    x, w, axis = te.placeholder((m, k), dtype, "x"), te.placeholder((k, n), dtype, "w"), te.reduce_axis(k, "k")
    wide = "float32" if dtype == "float16" else dtype

    def element(i: Expr, j: Expr) -> Expr:
        return te.sum(te.cast(x[i, axis], wide) * te.cast(w[axis, j], wide), axis)

    return te.create_prim_func([x, w, te.compute((m, n), element, name="y")], "product")


def packed(m: Dim, k: Dim, n: int, width: int) -> PrimFunc:
    """`relu(x @ w + b) + r` over panels of w."""
    x, w = te.placeholder((m, k), "float32", "x"), te.placeholder((-(-n // width), k, width), "float32", "w")
    b, r, axis = te.placeholder((n,), "float32", "b"), te.placeholder((m, n), "float32", "r"), te.reduce_axis(k, "k")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, axis] * w[j // width, axis, j % width], axis), name="y")
    z = te.compute((m, n), lambda i, j: maximum(y[i, j] + b[j], 0.0), name="z")
    return te.create_prim_func([x, w, b, r, te.compute((m, n), lambda i, j: z[i, j] + r[i, j], name="s")], "packed")


def biased(m: Dim, k: Dim, n: Dim) -> PrimFunc:
    """`relu(x @ w + b)` with w as it came."""
    x, w = te.placeholder((m, k), "float32", "x"), te.placeholder((k, n), "float32", "w")
    b, axis = te.placeholder((n,), "float32", "b"), te.reduce_axis(k, "k")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, axis] * w[axis, j], axis), name="y")
    z = te.compute((m, n), lambda i, j: maximum(y[i, j] + b[j], 0.0), name="z")
    return te.create_prim_func([x, w, b, z], "biased")


def batched(b: Dim, m: Dim, k: int, n: int) -> PrimFunc:
    """Each of a batch by its own matrix; the first operand is the same for all."""
    x, w, axis = te.placeholder((m, k), "float32", "x"), te.placeholder((b, k, n), "float32", "w"), te.reduce_axis(k)
    y = te.compute((b, m, n), lambda c, i, j: te.sum(x[i, axis] * w[c, axis, j], axis), name="y")
    return te.create_prim_func([x, w, y], "batched")


def sequences(b: Dim, m: Dim, k: int, n: int) -> PrimFunc:
    """Two dims of rows by one matrix."""
    x, w, axis = te.placeholder((b, m, k), "float32", "x"), te.placeholder((k, n), "float32", "w"), te.reduce_axis(k)
    y = te.compute((b, m, n), lambda c, i, j: te.sum(x[c, i, axis] * w[axis, j], axis), name="y")
    return te.create_prim_func([x, w, y], "sequences")


def image(b: Dim, h: int, w: int, k: int, n: int, width: int = 48) -> PrimFunc:
    """The rows of images by panels."""
    x, m = te.placeholder((b, h, w, k), "float32", "x"), te.placeholder((n // width, k, width), "float32", "m")
    axis = te.reduce_axis(k, "k")

    def element(c: Expr, i: Expr, j: Expr, f: Expr) -> Expr:
        return te.sum(x[c, i, j, axis] * m[f // width, axis, f % width], axis)

    return te.create_prim_func([x, m, te.compute((b, h, w, n), element, name="y")], "image")


def turned(m: int, k: int, n: int) -> PrimFunc:
    """A first operand with its rows along the last dim."""
    x, w, axis = te.placeholder((k, m), "float32", "x"), te.placeholder((k, n), "float32", "w"), te.reduce_axis(k)
    y = te.compute((m, n), lambda i, j: te.sum(x[axis, i] * w[axis, j], axis), name="y")
    return te.create_prim_func([x, w, y], "turned")


def by_rows(b: int, m: Dim, k: Dim, n: Dim, dtype: str = "float32") -> PrimFunc:
    """Each of a batch `relu(x @ transpose(w))`: the second operand's neighbours are along the sum."""
    x, w, axis = te.placeholder((b, m, k), dtype, "x"), te.placeholder((n, b, k), dtype, "w"), te.reduce_axis(k, "k")
    t = te.compute((b, k, n), lambda c, i, j: w[j, c, i], name="t")
    wide = "float32" if dtype == "float16" else dtype

    def element(c: Expr, i: Expr, j: Expr) -> Expr:
        return te.sum(te.cast(x[c, i, axis], wide) * te.cast(t[c, axis, j], wide), axis)

    y = te.compute((b, m, n), element, name="y")
    return te.create_prim_func([x, w, te.compute((b, m, n), lambda *i: maximum(y[i], 0.0), name="z")], "by_rows")


def both_turned(m: Dim, k: Dim, n: Dim) -> PrimFunc:
    """`transpose(x) @ transpose(w)`."""
    x, w, axis = te.placeholder((k, m), "float32", "x"), te.placeholder((n, k), "float32", "w"), te.reduce_axis(k)
    y = te.compute((m, n), lambda i, j: te.sum(x[axis, i] * w[j, axis], axis), name="y")
    return te.create_prim_func([x, w, y], "both_turned")


def squares() -> PrimFunc:
    """Sums of squares: no two operands."""
    x, axis = te.placeholder((4, 8), "float32", "x"), te.reduce_axis(8)
    return te.create_prim_func([x, te.compute((4,), lambda i: te.sum(x[i, axis] * x[i, axis], axis), name="y")], "f")


CASES: dict[str, tuple[PrimFunc, Mapping[str, int]]] = {
    "plain": (product(13, 9, 37), {}),
    "wide": (product(5, 6, 70), {}),
    "one_row": (product(1, 12, 40), {}),
    "streamed": (biased(1, 13, 110), {}),
    "streamed_rows": (biased(3, 9, 130), {}),
    "streamed_depth": (biased(2, K, 75), {"k": 11}),
    "free_rows": (product(N, 8, 20), {"n": 11}),
    "both_turned": (both_turned(3, 37, 37), {}),
    "both_turned_free": (both_turned(N, K, 20), {"n": 2, "k": 67}),
    "free_columns": (product(6, 5, M), {"m": 19}),
    "free": (product(N, K, M), {"n": 7, "k": 6, "m": 18}),
    "packed": (packed(10, 7, 45, 16), {}),
    "packed_free": (packed(N, 6, 30, 8), {"n": 9}),
    "packed_one": (packed(1, 8, 50, 16), {}),
    "images": (image(2, 3, 7, 6, 32, 16), {}),
    "images_free": (image(N, 9, 2, 5, 16, 8), {"n": 2}),
    "batched": (batched(3, 10, 6, 21), {}),
    "batched_free": (batched(N, M, 5, 16), {"n": 2, "m": 5}),
    "sequences": (sequences(2, 7, 6, 18), {}),
    "turned": (turned(11, 6, 26), {}),
    "by_rows": (by_rows(2, 7, 21, 35), {}),
    "by_rows_free": (by_rows(1, N, K, M), {"n": 6, "k": 18, "m": 33}),
    "by_rows_batched": (by_rows(3, 5, 9, 6), {}),
    "by_rows_half": (by_rows(1, 9, 33, 17, "float16"), {}),
    "double": (product(7, 6, 11, "float64"), {}),
    "half": (product(7, 6, 20, "float16"), {}),
}

#: What goes with whatever is added to it.
ALONE = {"row": 0, "block": 2, "inside": False, "pack_a": False, "pack_b": False, "ahead": 0, "next": False}
ALONE |= {"stream": False, "depth": 0}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """A cache of this module's own, so that no other test's kernels are used."""
    return KernelCache(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("target", [AVX2, AVX512, NEON, ARMV7])
@pytest.mark.parametrize("name", CASES)
def test_the_default_is_right_and_in_the_space(name, target):
    func, symbols = CASES[name]
    chosen, space = RULE.default(func, target), RULE.space(func, target)
    assert set(chosen) == set(space)
    assert all(value in space[key] for key, value in chosen.items()), chosen
    assert RULE.contradiction(func, chosen) is None
    kernel = schedule_func(func, target)
    assert kernel.rule == "matmul"
    assert "refused" not in kernel.decisions
    assert_same(func, kernel.func, symbols)


def drawn(func: PrimFunc, target: Model, rng: random.Random) -> dict[str, Any]:
    """Decisions by chance, one after the other in any order: each that goes with those before it.

    Without large tiles and blocks, which take too long to interpret.
    """
    space = {**RULE.space(func, target), "block": tuple(range(5))}
    decisions = {key: values[0] for key, values in space.items()}
    assert RULE.contradiction(func, decisions) is None
    for key in rng.sample(list(space), len(space)):
        trial = {**decisions, key: rng.choice(space[key])}
        if trial["rows"] * trial["vectors"] * trial["unroll"] <= 40 and RULE.contradiction(func, trial) is None:
            decisions = trial
    return decisions


@pytest.mark.parametrize("name", CASES)
def test_random_decisions_are_right(name, kernels: KernelCache):
    """In the interpreter as scheduled and as prepared, now and then as machine code; the trace replays."""
    func, symbols = CASES[name]
    rng = random.Random(name)
    for trial in range(3):
        decisions = drawn(func, AVX512 if trial % 2 else NEON, rng)
        kernel = schedule_func(func, AVX512, decisions=decisions)
        assert_same(func, kernel.func, symbols)
        if trial == 0:
            again = Schedule.replay(func, json.loads(json.dumps(kernel.trace)))
            assert equal(again.func, kernel.func)
            assert_prepared(kernel.func, func, symbols)
            assert_compiled(kernel.func, func, symbols, kernels)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 130), (7, 64, 65), (33, 20, 100), (70, 128, 48), (97, 33, 3)])
@pytest.mark.parametrize("free", [False, True])
def test_machine_code_of_odd_sizes(m, k, n, free, kernels: KernelCache):
    func = packed(N if free else m, k, n, 32)
    data = [array.astype("float32") for array in inputs(func, {"n": m})]
    want = interp.run(func, data, {"n": m} if free else {})
    names = [buffer.name for buffer in func.params]
    with opened(compile_prim_func(func, "native", cache=kernels), threads=2) as model:
        got = model.run(dict(zip(names, data, strict=False)))
    np.testing.assert_allclose(got["s"], want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "func",
    [
        product(4, 8, 1),
        product(4, 2, 16),
        product(4, 8, 16, "int32"),
        squares(),
    ],
    ids=["one_column", "short", "integers", "no_columns"],
)
def test_declines(func):
    assert not RULE.match(func, AVX2)
    assert schedule_func(func, AVX2).rule != "matmul"


def test_declines_without_vectors():
    assert not RULE.match(CASES["plain"][0], SCALAR)


def test_wrong_decisions_are_refused():
    func = CASES["plain"][0]
    chosen = RULE.default(func, AVX2)
    for wrong in ({"rows": 0}, {"vectors": 0}, {"width": 3}, {"row": 1}, {"unroll": 0}):
        with pytest.raises(ScheduleError, match="tile of block 'y'"):
            schedule_func(func, AVX2, decisions={**chosen, **wrong})
    with pytest.raises(ScheduleError, match="is packed already"):
        schedule_func(CASES["packed"][0], AVX2, decisions={**RULE.default(CASES["packed"][0], AVX2), "pack_b": True})


@pytest.mark.parametrize(
    ("target", "rows", "columns", "tile"),
    [
        (AVX512, 3136, 64, (6, 4)),
        (AVX512, 49, 2048, (7, 3)),
        (AVX512, 1, 1000, (1, 4)),
        (AVX512, None, 1000, (6, 4)),
        (AVX512, 512, 10, (8, 1)),
        (AVX2, 512, 512, (6, 2)),
        (AVX2, 512, 10, (6, 2)),
        (NEON, 512, 512, (6, 3)),
        (ARMV7, 512, 512, (2, 4)),
    ],
)
def test_tiles(target, rows, columns, tile):
    """What fills the processor and wastes least at the ends; never more accumulators than registers hold."""
    found = tile_for(target, 4, rows, columns)
    assert (found.rows, found.vectors) == tile
    assert found.rows * found.vectors + found.vectors < target.vector_registers


def test_narrow_products_take_narrow_vectors():
    assert tile_for(AVX512, 4, 8, 3).width == 4
    assert tile_for(AVX512, 8, 8, 100).width == 8


def test_large_products_are_parallel_and_packed():
    func = product(512, 512, 512)
    kernel = schedule_func(func, AVX2)
    assert kernel.decisions["pack_b"]
    assert any(loop.kind == "parallel" for loop in loops_in(kernel.func.body))
    assert not schedule_func(product(8, 512, 512), AVX2).decisions["pack_b"]


@pytest.mark.parametrize(
    ("m", "k", "n", "packs"),
    [
        (96, 96, 96, False),
        (512, 256, 500, False),  # a panel stays in half of the second cache
        (512, 512, 512, True),  # rows 2048 bytes apart: 256 of them have all places of their sets
        (64, 512, 512, False),  # too few rows to pay for the copy
        (240, 512, 512, False),  # 40 tiles, and a core's part of the third cache holds the operand
        (240, 512, 2048, True),
        (512, 256, 512, False),
        (512, 5000, 500, True),  # a panel of more than half of it
        (512, 2048, 16, False),  # one panel, which lies together
    ],
)
def test_panels_that_stay_near_as_they_lie_are_not_packed(m, k, n, packs):
    func = product(m, k, n)
    assert RULE.default(func, AVX2)["pack_b"] is packs
    assert RULE.default(func, replace(AVX2, l2_bytes=64 << 20))["pack_b"] is False


@pytest.mark.parametrize(
    ("m", "k", "n", "ahead"),
    [
        (16, 2048, 2048, 64),  # in 800 cycles two units are done with 12 multiply-adds 133 times: the most there is
        (4, 2048, 2048, 0),  # streamed
        (16, 300, 400, 0),  # all of it stays in the second cache
        (2000, 2048, 2048, 0),  # copied
        (N, 2048, 2048, 64),
        (16, K, 2048, 0),
    ],
)
def test_rows_of_panels_that_come_from_afar_are_prefetched(m, k, n, ahead):
    func = product(m, k, n)
    kernel = schedule_func(func, AVX2)
    assert kernel.decisions["ahead"] == ahead
    found = [loop.annotations["prefetch"] for loop in loops_in(kernel.func.body) if "prefetch" in loop.annotations]
    assert found == ([{"w": ahead}] if ahead else [])
    slow = replace(AVX2, fma_per_cycle=0.5)
    assert schedule_func(func, slow).decisions["ahead"] == ahead // 2


@pytest.mark.parametrize(
    ("m", "k", "n", "cores", "depth"),
    [
        (16, 2048, 2048, 1, 64),
        (16, 2048, 2048, 4, 64),
        (16, 2048, 2048, 16, 0),  # a core would have three panels
        (16, 4000, 4000, 4, 50),
        (8, 4000, 4000, 4, 0),  # one tile would have to ask for all
        (16, 997, 2048, 4, 0),  # no blocks divide the sum
        (4, 2048, 2048, 4, 0),  # streamed
        (16, 300, 400, 4, 0),  # all of it stays in the second cache
        (2000, 2048, 2048, 4, 0),  # copied
        (N, 2048, 2048, 4, 0),
    ],
)
def test_sums_over_rows_from_afar_go_in_blocks_on_the_fastest_cores_alone(m, k, n, cores, depth):
    func, fast = product(m, k, n), replace(AVX512, num_cores=cores, l2_bytes=2 << 20)
    for target in (AVX2, NEON, replace(AVX512, fma_per_cycle=1.0)):
        assert RULE.default(func, target)["depth"] == 0
    kernel = schedule_func(func, fast)
    chosen = kernel.decisions
    assert chosen["depth"] == depth
    assert "refused" not in chosen
    if depth:
        assert (chosen["next"], chosen["ahead"], chosen["pack_a"], chosen["pack_b"]) == (True, 0, False, False)
        panels = math.ceil(n / (chosen["vectors"] * chosen["width"]))
        assert chosen["block"] == math.ceil(panels / cores)
        found = [loop for loop in loops_in(kernel.func.body) if "spread" in loop.annotations]
        assert [loop.extent.value for loop in found] == [chosen["block"]]


@pytest.mark.parametrize("elements", [0, 4])
@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("make", [product, biased])
def test_sums_in_blocks_are_right(make, align, elements, kernels: KernelCache):
    """Rows and columns that no whole tiles divide, results of several blocks of columns, an array within a line."""
    func = make(13, 48, 208)
    blocks = {"rows": 4, "vectors": 3, "unroll": 2, "block": 2, "depth": 12, "next": True, "align": align}
    chosen = {**RULE.default(func, AVX512), **blocks, "pack_a": False, "pack_b": False, "ahead": 0, "stream": False}
    kernel = schedule_func(func, AVX512, decisions=chosen)
    assert_prepared(kernel.func, func, {})
    given = inputs(func)
    (want,) = interp.run(func, given)
    named = dict(zip((buffer.name for buffer in func.params), given, strict=False))
    named["w"] = placed(named["w"], elements)
    with opened(compile_prim_func(Schedule.replay(func, kernel.trace), "native", cache=kernels), threads=2) as model:
        (found,) = model.run(named).values()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("func", [biased(16, 48, 1100), batched(2, 16, 48, 1100)], ids=["rows", "batch_outside"])
def test_results_in_blocks_that_no_stack_holds_are_right(func, kernels: KernelCache):
    """33 KB of results wait, those of 11 panels of 23: each thread has its own in the workspace."""
    blocks = {"rows": 8, "vectors": 3, "unroll": 2, "block": 11, "depth": 16, "next": True, "parallel": True}
    chosen = {**RULE.default(func, AVX512), **ALONE, "row": RULE.default(func, AVX512)["row"], **blocks}
    kernel = schedule_func(func, AVX512, decisions=chosen)
    (results,) = [buffer for buffer in kernel.func.allocs if buffer.scope == "local"]
    assert math.prod(results.shape) * 4 == 16 * 11 * 48 * 4
    assert emit_kernel(kernel.func, parse("x86-64-v4"), "k").workspace
    given = inputs(func)
    (want,) = interp.run(func, given)
    named = dict(zip((buffer.name for buffer in func.params), given, strict=False))
    with opened(compile_prim_func(Schedule.replay(func, kernel.trace), "native", cache=kernels), threads=2) as model:
        (found,) = model.run(named).values()
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_golden_of_sums_in_blocks(golden: Callable[[str, str], None]) -> None:
    func = biased(5, 12, 100)
    blocks = {"rows": 2, "vectors": 2, "width": 16, "unroll": 2, "block": 2, "depth": 4, "next": True}
    chosen = {**RULE.default(func, AVX512), **ALONE, **blocks}
    golden("rule_sums.txt", schedule_func(func, AVX512, decisions=chosen).func.show())


@pytest.mark.parametrize(
    ("func", "wrong", "why"),
    [
        *((product(16, 48, 96), {"depth": 12, key: value}, f"{key}={value}, but with depth=12")
          for key, value in (("pack_a", True), ("pack_b", True), ("ahead", 8))),
        *((product(16, 48, 96), {"stream": True, key: value}, f"{key}={value}, but with stream=True")
          for key, value in (("depth", 12), ("pack_a", True), ("pack_b", True), ("ahead", 8), ("next", True))),
        (sequences(2, 16, 48, 96), {"depth": 12, "row": 1, "inside": True}, "inside=True, but with depth=12"),
        (sequences(2, 16, 48, 96), {"stream": True, "row": 1, "inside": True}, "inside=True, but with stream=True"),
        (product(16, 48, 96), {"pack_b": True, "ahead": 8}, "ahead=8, but with pack_b=True"),
        (product(16, 48, 96), {"pack_b": True, "next": True}, "next=True, but with pack_b=True"),
        (product(16, 48, 96), {"pack_a": True, "block": 0}, "pack_a=True, but with row=0 and block=0"),
        (product(16, 48, 96), {"pack_a": True, "row": None}, "pack_a=True, but with row=None"),
        (product(16, 48, 96), {"inside": True}, "inside=True, but with row=0 no other rows"),
    ],
)  # fmt: skip
def test_what_another_decision_would_leave_undone_is_refused(func, wrong, why):
    chosen = {**RULE.default(func, AVX512), **ALONE, **wrong}
    assert why in str(RULE.contradiction(func, chosen))
    with pytest.raises(ScheduleError, match=f"tile of block 'y': {why}"):
        schedule_func(func, AVX512, decisions=chosen)


def test_steps_that_do_not_divide_a_sum_are_refused():
    for func, can in ((product(16, 48, 96), "2, 3, 4, 6, 8, 12, 16, 24"), (packed(16, 48, 96, 48), "no steps but 0")):
        with pytest.raises(ScheduleError, match=f"depth=5, and its sum goes in blocks of {can}"):
            schedule_func(func, AVX512, decisions={**RULE.default(func, AVX512), "depth": 5})


@pytest.mark.parametrize(
    ("m", "k", "n", "ahead"),
    [
        (8, 1024, 4096, 64),
        (1, 1024, 4096, 0),  # the hardware sees the stream
        (9, 1024, 4096, 0),  # two tiles ask for the next panel together
        (N, 768, 3072, 0),
        (8, 256, 256, 0),  # all of it stays in the second cache
        (8, 512, 768, 0),  # some of it does
    ],
)
def test_packed_panels_from_afar_are_prefetched_by_the_fastest_cores_alone(m, k, n, ahead):
    func = packed(m, k, n, 48)
    for target in (AVX2, NEON, replace(AVX512, fma_per_cycle=1.0)):
        assert RULE.default(func, target)["ahead"] == 0
    kernel = schedule_func(func, AVX512)
    assert kernel.decisions["ahead"] == ahead
    found = [loop.annotations["prefetch"] for loop in loops_in(kernel.func.body) if "prefetch" in loop.annotations]
    assert [set(each) for each in found] == ([{"w"}] if ahead else [])


@pytest.mark.parametrize(
    ("m", "k", "n", "asks"),
    [
        (9, 1024, 4096, True),
        (400, 768, 3072, True),
        (8, 1024, 4096, False),  # one tile has nothing to share
        (400, 6000, 48, False),  # there is no next panel
        (400, 100, 400, False),  # all of it stays in the second cache
        (N, 768, 3072, False),  # what a tile's part is, is not known
    ],
)
def test_the_next_panel_is_asked_for_by_the_fastest_cores_while_rows_go_over_this_one(m, k, n, asks):
    func = packed(m, k, n, 48)
    for target in (AVX2, NEON, replace(AVX512, fma_per_cycle=1.0)):
        assert RULE.default(func, target)["next"] is False
    kernel = schedule_func(func, AVX512)
    assert kernel.decisions["next"] is asks
    found = [loop for loop in loops_in(kernel.func.body) if "spread" in loop.annotations]
    assert [loop.extent.value for loop in found] == ([math.ceil(n / 48)] if asks else [])


@pytest.mark.parametrize(
    ("b", "h", "w", "k", "n", "inside"),
    [
        (1, 14, 14, 384, 1536, True),
        (1, 7, 7, 3072, 768, True),
        (4, 14, 14, 1536, 384, True),  # rows do not stay, and are fewer bytes all the same
        (1, 56, 56, 96, 384, False),  # all panels stay in the second cache
        (1, 200, 200, 384, 1536, False),  # rows would be read for each panel, which is more
        (1, 1, 196, 384, 1536, False),  # no other rows
    ],
)
def test_rows_of_images_go_over_a_panel_that_would_come_again(b, h, w, k, n, inside):
    func = image(b, h, w, k, n)
    for target in (AVX2, NEON, replace(AVX512, fma_per_cycle=1.0)):
        assert RULE.default(func, target)["inside"] is False
    kernel = schedule_func(func, replace(AVX512, num_cores=2))  # more would share panels: loops over both are one
    assert kernel.decisions["inside"] is inside
    loops = loops_on(block_path(kernel.func, "y"))
    sizes = [loop.extent.value for loop in loops]
    assert (h in sizes[sizes.index(n // 48) :]) is inside


@pytest.mark.parametrize(
    ("func", "units", "asking"),
    [
        (packed(512, 2048, 256, 48), (8, 384, 384), (2,)),  # for two cores in blocks of rows
        (packed(1024, 4096, 96, 48), (256, 256, 256), ()),
        (packed(1024, 4096, 144, 48), (384, 384, 384), ()),  # of two cores one would have two of three panels
        (packed(196, 1536, 384, 48), (8, 200, 200), (2,)),
        (packed(4096, 4096, 1024, 48), (22, 11264, 11264), (2,)),
        (packed(400, 768, 3072, 48), (64, 64, 3200), (2, 8)),
        (image(1, 14, 14, 1536, 384), (8, 112, 224), (2,)),  # rows of the image are inside of panels
        (image(1, 14, 14, 384, 1536), (32, 32, 448), (2, 8)),
        (image(64, 14, 14, 1536, 384), (14, 196, 1568), (2, 8, 64)),  # images are dealt out with panels
    ],
)
def test_panels_are_shared_where_there_are_too_few_for_many_cores(func, units, asking):
    target = replace(AVX512, l2_bytes=2 << 20)
    assert RULE.default(func, replace(target, num_cores=1))["next"], "one core asks for each of them"
    for cores, count in zip((2, 8, 64), units, strict=True):
        kernel = schedule_func(func, replace(target, num_cores=cores))
        spread = [loop.extent.value for loop in loops_in(kernel.func.body) if loop.kind == "parallel"]
        assert (spread, kernel.decisions["next"]) == ([count], cores in asking), cores


@pytest.mark.parametrize("b", [2, N])
def test_rows_inside_of_panels_and_the_next_one_asked_for_change_no_result(b, kernels: KernelCache):
    """Images of a free number stay outside of panels."""
    func = image(b, 5, 9, 40, 96)
    chosen = RULE.default(func, AVX512)
    kernel = schedule_func(func, AVX512, decisions={**chosen, "row": 2, "rows": 8, "inside": True, "next": True})
    assert [loop.annotations["spread"] for loop in loops_in(kernel.func.body) if "spread" in loop.annotations] == [
        {"m": 1}
    ]
    assert_compiled(kernel.func, func, {} if b == 2 else {"n": 2}, kernels)


@pytest.mark.parametrize(
    ("m", "depth", "unroll"), [(64, 77, 4), (64, 80, 4), (64, 6, 4), (4, 77, 8), (4, 7, 4), (64, K, 4)]
)
def test_steps_of_a_sum_by_element_are_those_of_one_load_or_two(m, depth, unroll):
    assert RULE.default(product(m, depth, 64), NEON)["unroll"] == unroll


def test_rows_that_data_chooses_are_not_prefetched():
    x, w = te.placeholder((4, 16, 1024), "float32", "x"), te.placeholder((4, 1024, 1024), "float32", "w")
    chosen, axis = te.placeholder((4,), "int64", "chosen"), te.reduce_axis(1024)
    y = te.compute((4, 16, 1024), lambda b, i, j: te.sum(x[b, i, axis] * w[chosen[b], axis, j], axis), name="y")
    func = te.create_prim_func([x, w, chosen, y], "gathered")
    kernel = schedule_func(func, AVX2)
    assert (kernel.rule, kernel.decisions["ahead"]) == ("matmul", 0)
    assert RULE.space(func, AVX2)["ahead"] == (0,)


@pytest.mark.parametrize(
    ("m", "k", "n", "block"),
    [
        (1000, 1000, 1000, 7),  # 10 stay, and 7 keep two cores equally busy
        (60, 1000, 1000, 0),  # all rows stay
        (1000, 1000, 16, 0),  # one panel
        (1000, 4000, 1000, 0),  # two tiles would stay, and read panels as often as they save rows
        (2000, 300, 500, 36),  # the most that stay are 10 blocks
    ],
)
def test_rows_that_do_not_stay_go_in_blocks_that_do(m, k, n, block):
    func = product(m, k, n)
    target = replace(AVX2, num_cores=2)
    chosen = RULE.default(func, target)
    assert (chosen["pack_b"], chosen["block"]) == (False, block)
    assert chosen["block"] in RULE.space(func, target)["block"]
    assert 2 * chosen["block"] * chosen["rows"] * k * 4 <= target.l2_bytes


@pytest.mark.parametrize(
    ("m", "k", "n", "packs"),
    [
        (256, 256, 256, True),
        (197, 768, 3072, True),
        (64, 64, 64, False),
        (16, 2048, 2048, False),
        (512, 999, 32, False),
    ],
)
def test_where_lines_from_the_second_cache_are_too_slow_few_rows_are_worth_packing(m, k, n, packs):
    fast = replace(AVX512, fma_per_cycle=2.0, loads_per_cycle=2.0, num_cores=1)
    assert RULE.default(product(m, k, n), fast)["pack_b"] is packs


@pytest.mark.parametrize("target", [AVX2, replace(AVX512, fma_per_cycle=2.0)], ids=["avx2", "fast"])
def test_without_a_third_cache_few_rows_are_worth_packing(target):
    without = replace(target, l3_bytes=0)
    assert RULE.default(product(40, 512, 512), without)["pack_b"]
    assert not RULE.default(product(40, 512, 512), target)["pack_b"]
    assert not RULE.default(product(31, 512, 512), without)["pack_b"]


@pytest.mark.parametrize(
    ("rows", "step", "near"),
    [(1024, 64 * 3, True), (256, 2048, True), (257, 2048, False), (128, 4096, True), (129, 4096, False),
     (1024, 4096 + 64, True), (1400, 192, False)],
)  # fmt: skip
def test_rows_stay_near_where_they_fill_all_sets_of_the_cache(rows, step, near):
    """A second cache of 512 KiB, rows of three lines."""
    assert stays_near(AVX2, rows, 192, step) is near


@pytest.mark.parametrize("m", [1, 2, 4])
def test_products_of_few_rows_stream_what_is_not_packed(m):
    """The sum is outside of the columns, those of one core's block wait in its cache, and the consumer is in there."""
    kernel = schedule_func(biased(m, 512, 8192), AVX512)
    chosen = kernel.decisions
    assert chosen["stream"]
    assert chosen["rows"] == m
    assert 4 * chosen["block"] * chosen["vectors"] * chosen["width"] <= AVX512.l1_bytes // 2
    assert sum(buffer.scope == "local" for buffer in kernel.func.allocs) == len(kernel.func.allocs) == 1
    (path,) = [block_path(kernel.func, block.name) for block in blocks_in(kernel.func.body) if is_reduction(block)]
    names = [loop.var.name for loop in loops_on(path)]
    assert names.index("k_0") < names.index("j_1") < names.index("k_1")


def test_other_products_do_not_stream():
    for func in (packed(1, 512, 2048, 32), product(8, 512, 2048), product(N, 512, 2048), product(1, 512, 60)):
        assert not RULE.default(func, AVX512)["stream"]


@pytest.mark.parametrize(("m", "k", "n"), [(1, 300, 1130), (1, 7, 5000), (3, 131, 517), (4, 64, 2048)])
def test_machine_code_of_streams(m, k, n, kernels: KernelCache):
    func = biased(m, k, n)
    assert RULE.default(func, AVX512)["stream"]
    assert_compiled(schedule_func(func, AVX512).func, func, {}, kernels)


def test_a_cast_of_an_operand_stays_in_the_sum():
    assert any(isinstance(node, Cast) for node in _values(schedule_func(CASES["half"][0], AVX2).func))


def _values(func: PrimFunc):
    from kedge.compiler.tir.visitor import stores, walk_expr

    return [node for store in stores(func.body) for node in walk_expr(store.value)]
