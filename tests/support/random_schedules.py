"""Random schedules of small functions, for tests of what must hold for every schedule."""

import math
import random
from collections.abc import Mapping

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import BlockRef, Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_on
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import Block, PrimFunc
from support.functions import bias_sigmoid, chain, conv, dense, evaluate, pool

N = Var("n", lower=1)


def odd(name: str) -> PrimFunc:
    """A sum that one buffer enters twice, over a part of it, and what uses it."""
    x, k = te.placeholder((4, 4), "float32", "x"), te.reduce_axis(3, "k")
    y = te.compute((4, 4), lambda i, j: te.sum(x[i, k] * x[k, j], k), name="y")
    return te.create_prim_func([x, te.compute((4, 4), lambda i, j: y[i, j] + x[j, i], name="z")], name)


#: Functions whose results are exact: whole numbers, no transcendental value is summed.
FUNCTIONS = {
    "dense": (dense(N, 5, 6), {"n": 3}),
    "conv": (conv(N, 2, 3, 2), {"n": 2}),
    "strided": (conv(1, 2, 4, 2, stride=2), {}),
    "pool": (pool(N, 2, 4), {"n": 2}),
    "chain": (chain(N), {"n": 7}),
    "bias": (bias_sigmoid(N, 2, 2, 3), {"n": 2}),
    "odd": (odd("odd"), {}),
}

#: What a step may be; the more fruitful ones stand there twice.
STEPS = (
    "split", "split", "fuse", "reorder", "reorder", "kind", "kind", "inline", "move", "move", "decompose", "cache",
    "fetch", "rfactor", "scope", "layout", "pad", "pipe", "prefetch", "blockize",
)  # fmt: skip


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
        case "pad":
            sch.pad_einsum(block, [rng.choice([1, 2, 4]) for _ in block_of(sch, block).iters])
        case "pipe":
            stages = sorted(rng.choice([0, 0, 1, 2]) for _ in range(rng.choice([2, 2, 3])))
            sch.software_pipeline(loop, [stage - stages[0] for stage in stages])
        case "prefetch":
            for region in block_of(sch, block).reads[:1]:
                sch.prefetch(block, region.buffer.name, loop, rng.choice([1, 3, 50]))
        case "blockize":
            sch.blockize(rng.choice(own))
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


#: The interpreter visits every instance of every block: more of them than this are no use.
MOST_INSTANCES = 4_000


def instances(func: PrimFunc, symbols: Mapping[str, int]) -> int:
    """How often blocks run or are passed over."""
    env = {var: symbols[var.name] for var in func.symbols}
    paths = (loops_on(block_path(func, block.name)) for block in blocks_in(func.body))
    return sum(math.prod(int(evaluate(loop.extent, env)) for loop in path) for path in paths)


def scheduled(name: str, rng: random.Random, steps: int) -> Schedule:
    """A function after so many random steps, of which some were refused and left no trace."""
    func, symbols = FUNCTIONS[name]
    sch = Schedule(func)
    for _ in range(steps):
        if instances(sch.func, symbols) > MOST_INSTANCES:
            break  # splitting what has one iteration over and over
        before, trace = sch.func, sch.trace
        try:
            random_step(sch, rng)
        except ScheduleError:
            assert sch.func is before or len(sch.trace) > len(trace)
    return sch
