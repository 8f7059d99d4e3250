"""The rule for Winograd's convolution: what it decides, what it makes of a kernel, and that every decision is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from kedge.compiler import te
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.rules.winograd import Tiling, Winograd
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in, loops_in
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import assert_same
from support.prepared import allocs
from support.targets import AVX2, AVX512, NEON, SCALAR, Model
from support.winograd import NAMES, case, convolution

RULE = Winograd()


def scheduled(func: PrimFunc, decisions: Mapping[str, Any], target: Model = AVX2) -> PrimFunc:
    sch = Schedule(func)
    RULE.apply(sch, decisions, target)
    return sch.func


@pytest.mark.parametrize("target", [AVX512, NEON, SCALAR])
@pytest.mark.parametrize("name", NAMES)
def test_default_decisions(name: str, target: Model) -> None:
    func, symbols = case(name)
    kernel = schedule_func(func, target)
    assert kernel.rule == "winograd"
    assert "refused" not in kernel.decisions
    space = RULE.space(func, target)
    assert set(kernel.decisions) == set(space)
    assert all(value in space[key] for key, value in kernel.decisions.items())
    assert [block.name for block in blocks_in(kernel.func.body) if block.name in ("biased", "added", "relu")] == []
    assert_same(func, kernel.func, symbols)


def drawn(rng: random.Random) -> Tiling:
    """Decisions from the space that make up one another."""
    rows, vectors = (rng.randint(1, 3), rng.randint(1, 3)), rng.randint(1, 2)
    times = [rng.randint(1, 2) for _ in range(3)]
    return Tiling(
        rng.randint(1, 2), rows[0] * times[0], rows[1] * times[1], *rows, vectors, vectors * times[2],
        rng.random() < 0.5, rng.choice((None, "batch", "down", "across", "outputs")), rng.randint(1, 3),
    )  # fmt: skip


def test_random_decisions_mean_the_same() -> None:
    rng = random.Random(5)
    for _ in range(10):
        func, symbols = case(rng.choice(NAMES))
        tiling = drawn(rng)
        space = RULE.space(func, AVX2)
        assert all(value in space[key] for key, value in tiling.decisions().items())
        assert_same(func, scheduled(func, tiling.decisions()), symbols)


def test_sizes_that_do_not_fit_one_another_are_refused() -> None:
    func = case("whole tiles")[0]
    default = dict(RULE.default(func, AVX2))
    for wrong in ({"down": 3, "rows_down": 2}, {"across": 2, "rows_across": 4}, {"outputs": 2, "vectors": 3}):
        with pytest.raises(ScheduleError, match="are not made of"):
            schedule_func(func, AVX2, decisions={**default, **wrong})


def test_a_core_keeps_a_block_of_tiles() -> None:
    func = convolution((1, 4, 56, 56, 16), 4, m=4, lanes=16)
    kernel = schedule_func(func, AVX512)
    tiling = Tiling(**kernel.decisions)
    assert not tiling.by_outputs
    assert tiling.parallel == "down"
    assert tiling.rows * tiling.vectors >= 12
    kept = {buffer.name: buffer.shape for buffer in allocs(prepare(kernel.func))}
    assert kept["input"] == (6, 6, 4, 1, tiling.down, tiling.across, 16)
    assert kept["product"] == (6, 6, tiling.outputs, 1, tiling.down, tiling.across, 16)
    assert kept["input_rows"] == (6, 6, 1, 1, 1, 1, 16)
    assert kept["output_rows"] == (4, 6, 1, 1, 1, 1, 16)


def test_few_tiles_are_spread_by_output_channels() -> None:
    kernel = schedule_func(convolution((1, 32, 7, 7, 16), 32, m=2, lanes=16), AVX512)
    tiling = Tiling(**kernel.decisions)
    assert (tiling.by_outputs, tiling.parallel) == (True, "outputs")
    assert [loop.kind for loop in loops_in(kernel.func.body)].count("parallel") == 2  # transforms, then products


def test_other_sums_of_products_do_not_match() -> None:
    x, w = te.placeholder((8, 4), "float32", "x"), te.placeholder((4, 8), "float32", "w")
    k = te.reduce_axis(4, "k")
    y = te.compute((8, 8), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")
    assert not RULE.match(te.create_prim_func([x, w, y], "dense"), AVX2)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("rule_winograd.txt", schedule_func(case("whole tiles")[0], AVX2).func.show())
