"""Random schedules of small functions for GPUs."""

from __future__ import annotations

import random

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_on
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import dense
from support.random_schedules import FUNCTIONS, MOST_INSTANCES, block_of, instances, random_step


def _sums(rows: int, columns: int) -> PrimFunc:
    """The sum, the product, the smallest and the largest of each row, and what is made of them."""
    x = te.placeholder((rows, columns), "float32", "x")
    k, r = te.reduce_axis(columns, "k"), te.reduce_axis(columns, "r")
    total = te.compute((rows,), lambda i: te.sum(x[i, k], k), name="total")
    most = te.compute((rows,), lambda i: te.max(x[i, r], r), name="most")
    y = te.compute((rows, columns), lambda i, j: (x[i, j] - most[i]) * total[i], name="y")
    return te.create_prim_func([x, y], "sums")


def _neighbours(n: int) -> PrimFunc:
    """Each step needs its neighbours of the step before."""
    x = te.placeholder((n + 2,), "float32", "x")
    a = te.compute((n + 2,), lambda i: x[i] + 1.0, name="a")
    b = te.compute((n + 1,), lambda i: a[i] * a[i + 1], name="b")
    return te.create_prim_func([x, te.compute((n,), lambda i: b[i] + b[i + 1], name="c")], "neighbours")


def _total(n: int) -> PrimFunc:
    """One sum over two axes."""
    x, k, r = te.placeholder((n, n), "float32", "x"), te.reduce_axis(n, "k"), te.reduce_axis(n, "r")
    return te.create_prim_func([x, te.compute((1,), lambda i: te.sum(x[k, r], (k, r)), name="y")], "total")


GPU_FUNCTIONS = {
    **{name: FUNCTIONS[name] for name in ("dense", "conv", "pool", "chain", "odd")},
    "product": (dense(4, 6, 5, relu=False), {}),
    "sums": (_sums(3, 7), {}),
    "neighbours": (_neighbours(8), {}),
    "total": (_total(5), {}),
}
AXES = tuple(f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx") for axis in "xy")
#: Steps of schedules for CPUs make up half of them; these the rest, the more fruitful ones twice.
STEPS = (
    "bind", "bind", "bind", "bind", "fetch", "fetch", "shared", "nested", "nested", "parts", "vthread", "split",
    "move", "reorder",
)  # fmt: skip


def gpu_step(sch: Schedule, rng: random.Random) -> None:
    """One primitive that GPUs are scheduled with; it may be refused."""
    block = sch.get_block(rng.choice(blocks_in(sch.func.body)).name)
    own = list(sch.get_loops(block))
    if not own:
        return
    match rng.choice(STEPS):
        case "bind":
            sch.bind(rng.choice(own), rng.choice(AXES))
        case "vthread":
            sch.bind(rng.choice(own), "vthread.x")
        case "split":
            sch.split(rng.choice(own), rng.choice([[None, 2], [None, 3], [None, 4], [2, None]]))
        case "reorder":
            sch.reorder(*rng.sample(own, min(len(own), rng.choice([2, 3, len(own)]))))
        case "move":
            others = sch.get_loops(sch.get_block(rng.choice(blocks_in(sch.func.body)).name))
            if others:
                getattr(sch, rng.choice(["compute_at", "reverse_compute_at"]))(block, rng.choice(others))
        case "shared":
            sch.set_scope(block, "shared")
        case "fetch":
            reads = block_of(sch, block).reads
            if reads:
                fetched = sch.cache_read(block, rng.choice(reads).buffer.name, rng.choice(own), "shared")
                _bind_inner(sch, fetched, rng)
        case "nested":
            _bind_inner(sch, block, rng)
        case "parts":
            parts = sch.rfactor(block, rng.choice(own))
            if rng.random() < 0.7:
                sch.set_scope(parts, "shared")
            _bind_inner(sch, parts, rng)


def _bind_inner(sch: Schedule, block: object, rng: random.Random) -> None:
    """Bind the innermost loops of a block to axes that are taken around them, if there are such."""
    loops = sch.get_loops(block)  # type: ignore[arg-type]
    if not loops:
        return
    loop = loops[-1]
    if len(loops) > 1 and rng.random() < 0.3:
        loop = sch.fuse(*loops[-2:])
    if rng.random() < 0.4:
        _, loop = sch.split(loop, [None, rng.choice([2, 3, 4])])
    sch.bind(loop, rng.choice(["threadIdx.x", "threadIdx.x", "threadIdx.y"]))


def _finish(sch: Schedule, rng: random.Random) -> None:
    """Bind what stands on no axis yet, where that can be."""
    for name in [block.name for block in blocks_in(sch.func.body)]:
        nodes = loops_on(block_path(sch.func, name))
        if any(node.kind == "thread" for node in nodes) or not nodes:
            continue
        loops = list(sch.get_loops(sch.get_block(name)))
        for loop in [*loops[:1], *rng.sample(loops, len(loops))]:
            try:
                sch.bind(loop, rng.choice(["blockIdx.x", "threadIdx.x", "blockIdx.y"]))
                break
            except ScheduleError:
                continue
        else:
            try:
                only, _ = sch.split(loops[0], [1, None])
                sch.bind(only, "blockIdx.x")
            except ScheduleError:
                continue


def gpu_scheduled(name: str, rng: random.Random, steps: int) -> Schedule:
    """A function after so many random steps, of which some were refused and left no trace."""
    func, symbols = GPU_FUNCTIONS[name]
    sch = Schedule(func)
    for _ in range(steps):
        if instances(sch.func, symbols) > MOST_INSTANCES:
            break
        try:
            if rng.random() < 0.7:
                gpu_step(sch, rng)
            else:
                random_step(sch, rng)
        except ScheduleError:
            pass  # refused; what a step did before is as legal as any schedule
    _finish(sch, rng)
    return sch
