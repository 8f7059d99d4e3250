"""Random schedules of small functions: whatever is not refused computes the same, and its trace replays."""

import random

import pytest

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import BlockRef, Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import Block
from kedge.compiler.tir.structural import equal
from support.functions import assert_same, bias_sigmoid, chain, conv, dense, pool

N = Var("n", lower=1)
#: Functions whose results are exact: whole numbers, no transcendental value is summed.
FUNCTIONS = {
    "dense": (dense(N, 5, 6), {"n": 3}),
    "conv": (conv(N, 2, 3, 2), {"n": 2}),
    "strided": (conv(1, 2, 4, 2, stride=2), {}),
    "pool": (pool(N, 2, 4), {"n": 2}),
    "chain": (chain(N), {"n": 7}),
    "bias": (bias_sigmoid(N, 2, 2, 3), {"n": 2}),
}

#: What a step may be; the more fruitful ones stand there twice.
STEPS = "split split fuse reorder reorder kind kind inline move move decompose cache fetch rfactor scope layout".split()  # noqa: SIM905


def block_of(sch: Schedule, ref: BlockRef) -> Block:
    """What the handle stands for now."""
    return next(block for block in blocks_in(sch.func.body) if block.name == ref.name)


def random_step(sch: Schedule, rng: random.Random) -> None:
    """One primitive with random arguments; it may be refused."""
    block = sch.get_block(rng.choice(blocks_in(sch.func.body)).name)
    own = list(sch.get_loops(block))
    if not own:
        return
    elsewhere = sch.get_loops(sch.get_block(rng.choice(blocks_in(sch.func.body)).name))
    loop = rng.choice([*own, *elsewhere])
    match rng.choice(STEPS):
        case "split":
            sch.split(loop, rng.choice([[None, 2], [None, 3], [2, None], [None, 2, 2]]))
        case "fuse":
            start = rng.randrange(len(own))
            sch.fuse(*own[start : start + 2])
        case "reorder":
            sch.reorder(*rng.sample(own, min(len(own), rng.choice([2, 3, len(own)]))))
        case "kind":
            getattr(sch, rng.choice(["parallel", "vectorize", "unroll"]))(rng.choice([loop, own[-1], own[0]]))
        case "inline":
            getattr(sch, rng.choice(["compute_inline", "reverse_compute_inline"]))(block)
        case "move":
            getattr(sch, rng.choice(["compute_at", "reverse_compute_at"]))(block, loop)
        case "decompose":
            sch.decompose_reduction(block, rng.choice(own))
        case "cache":
            sch.cache_write(block, rng.choice(own), rng.choice(["global", "shared", "local", "register"]))
        case "fetch":
            for region in block_of(sch, block).reads[:1]:
                sch.cache_read(block, region.buffer.name, rng.choice(own), rng.choice(["global", "local"]))
        case "rfactor":
            sch.rfactor(block, rng.choice(own))
        case "scope":
            sch.set_scope(block, rng.choice(["global", "shared", "local", "register"]))
        case "layout":
            rank = len(block_of(sch, block).writes[0].ranges)
            order = rng.sample(range(rank), rank)
            if rng.random() < 0.5:
                sch.transform_layout(block, lambda *i: [i[axis] for axis in order])
            elif rng.random() < 0.5:
                sch.transform_layout(
                    block, lambda *i: (*(i[axis] for axis in order[:-1]), i[order[-1]] // 2, i[order[-1]] % 2)
                )
            else:
                sch.storage_align(block, rng.randrange(rank), rng.choice([2, 4]), rng.choice([0, 1]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_schedules(name):
    func, symbols = FUNCTIONS[name]
    applied = 0
    for seed in range(12):
        rng = random.Random(f"{name} {seed}")
        sch = Schedule(func)
        for _ in range(14):
            try:
                random_step(sch, rng)
                applied += 1
            except ScheduleError:
                continue
        assert_same(func, sch.func, symbols)
        assert equal(Schedule.replay(func, sch.trace).func, sch.func)
        assert equal(parse_func(sch.show()), sch.func)
    assert applied > 50
