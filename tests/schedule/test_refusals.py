"""Every refusal of every primitive: its message, read as a golden file, that it leaves nothing behind, and that the
calls which its hint names do work, just as they stand there."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from schedule import test_order as order
from schedule.test_adverse import CARRIED, SOMETIMES, UNKNOWN
from schedule.test_tensorize import product, tiled

from kedge.compiler import schedule, te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.primitives.storage import IndexMap
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Var, call
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import assert_same, chain, conv, dense, pool, softmax
from support.hints import calls_in, follow

N = Var("n", lower=1)
#: A schedule, a call on it that is refused, and what names in the hint's calls stand for, where that is not the first
#: loop or block of that name.
Refused = Iterator[tuple[Any, ...]]
#: The functions that schedules began with.
BEGINNINGS: WeakKeyDictionary[Schedule, PrimFunc] = WeakKeyDictionary()
TOPICS: dict[str, Callable[[], Refused]] = {}


def topic(function: Callable[[], Refused]) -> Callable[[], Refused]:
    """One golden file: the refusals of one primitive or about one thing."""
    TOPICS[function.__name__] = function
    return function


def on(func: PrimFunc | Schedule | str, *names: str) -> tuple[Any, ...]:
    """A schedule, and the handles of blocks, each before those of its loops."""
    sch = func if isinstance(func, Schedule) else Schedule(parse_func(func) if isinstance(func, str) else func)
    if not isinstance(func, Schedule):
        BEGINNINGS[sch] = sch.func
    blocks = [sch.get_block(name) for name in names]
    return (sch, *(handle for block in blocks for handle in (block, *sch.get_loops(block))))


def rows(sch: Schedule, scope: str = "local") -> None:
    """`x` is read through a copy made in each row."""
    y = sch.get_block("y")
    sch.cache_read(y, "x", sch.get_loops(y)[0], scope)


TRIANGLE = """func f(x: float32[4]) -> (y: float32[4, 4]):
  for i in range(4):
    for j in range(i + 1):
      block y:
        vi = spatial(4, i)
        vj = spatial(4, j)
        reads x[vi]
        writes y[vi, vj]
        y[vi, vj] = x[vi]"""


@topic
def arguments() -> Refused:
    sch, y, *loops = on(dense(8, 12, 16), "y")
    i, j, _ = loops
    yield sch, lambda: sch.split(i)
    yield sch, lambda: sch.split(i, factor=4)
    yield sch, lambda: sch.split(i, 4)
    yield sch, lambda: sch.split(i, "24")
    yield sch, lambda: sch.split(i, [None, 4.0])
    yield sch, lambda: sch.split(i, [None, True])
    yield sch, lambda: sch.split(i, np.float32(4))
    piped, _, row, *_ = on(dense(8, 12, 16), "y")
    rows(piped)
    yield piped, lambda: piped.software_pipeline(row, 1)
    yield sch, lambda: sch.pad_einsum(y, 4)
    yield sch, lambda: sch.parallel("i")
    yield sch, lambda: sch.parallel(sch)
    yield sch, lambda: sch.fuse((i, j))
    yield sch, lambda: sch.vectorize(y), {"j": "sch.get_loops(z)[1]"}
    plain, *_, p = on(chain(8), "c")
    yield plain, lambda: plain.compute_inline("a"), {"block": "a"}
    yield plain, lambda: plain.compute_at(p, p), {"block": "b", "i": "sch.get_loops(c)[0]"}
    yield sch, lambda: sch.annotate("i", "key", 1)
    yield sch, lambda: sch.annotate(i, 1, 1)
    yield sch, lambda: sch.get_block(3)
    yield sch, lambda: sch.get_block("t")
    yield sch, lambda: sch.storage_align(y, None, 8)
    yield sch, lambda: sch.cache_write(y, i, "vmem")
    yield sch, lambda: sch.cache_write(y, i, np.array(["local", "shared"]))
    yield sch, lambda: sch.transform_layout(y, [1, 0])
    yield sch, lambda: sch.unroll(on(dense(8, 12, 16), "y")[2])
    yield sch, lambda: Schedule.unroll(sch.func, i)
    yield sch, lambda: sch.split(i, [None, 4], 8)
    yield sch, lambda: sch.vectorize(loops), {"j": "sch.get_loops(z)[1]"}
    yield sch, lambda: sch.get_block("x")
    yield sch, lambda: sch.get_block("Y")
    yield sch, lambda: sch.visualize(before=sch)
    for wrong in (sch, None, "y"):
        yield sch, lambda wrong=wrong: Schedule(wrong)
    sch.fuse(i, j)
    yield sch, lambda: sch.unroll(j)
    yield sch, lambda: sch.extent(j)
    sch, a, i, *_ = on(chain(8), "a", "b")
    sch.split(i, [None, 4])
    yield sch, lambda: sch.unroll(i)
    sch.compute_inline(a)
    yield sch, lambda: sch.get_loops(a)
    sch, b, i, *_ = on(chain(8), "b", "c")
    sch.compute_at(b, sch.get_loops(sch.get_block("c"))[0])
    yield sch, lambda: sch.unroll(i)


@topic
def replay() -> Refused:
    sch, _, i, *_ = on(dense(8, 12, 16), "y")
    sch.split(i, [None, 4])
    func = BEGINNINGS[sch]
    for trace in (
        [{"primitive": "conjure", "args": {}}],
        [{"primitive": "get_blok", "args": {"name": "y"}}],
        [{"primitive": "get_block", "args": {"name": "t"}}],
        ["get_block"],
        sch.trace[2:],
        [*sch.trace[:2], {**sch.trace[2], "args": {"loop": "l1"}, "result": ["l4"]}],
        [{"primitive": "get_block", "args": {"block": "y"}}],
        sch,
        None,
        "[]",
        [*sch.trace, {**sch.trace[2], "args": {"loop": "l1", "factors": [3, 2]}}],
    ):
        yield (
            sch,
            lambda trace=trace: Schedule.replay(func, trace),
            {"trace": "'[]'", "i": "block and sch.get_loops(block)[0]"},
        )


@topic
def split() -> Refused:
    sch, _, i, j, _ = on(dense(8, 12, 16), "y")
    yield sch, lambda: sch.split(i, [4])
    yield sch, lambda: sch.split(i, [None, None])
    yield sch, lambda: sch.split(i, [None, 0])
    yield sch, lambda: sch.split(i, [3, 2])
    yield sch, lambda: sch.split(i, [None, 2**40, 2**40])
    sch.parallel(j)
    yield sch, lambda: sch.split(j, [None, 4])
    sch, _, i, *_ = on(dense(N, 12, 16), "y")
    yield sch, lambda: sch.split(i, [4, 8])


@topic
def fuse() -> Refused:
    sch, _, i, j, k = on(dense(8, 12, 16), "y")
    yield sch, sch.fuse
    yield sch, lambda: sch.fuse(i)
    yield sch, lambda: sch.fuse(i, i)
    yield sch, lambda: sch.fuse(j, i)
    yield sch, lambda: sch.fuse(i, k)
    p = sch.get_loops(sch.get_block("z"))[0]
    yield sch, lambda: sch.fuse(i, p)
    rows(sch)
    yield sch, lambda: sch.fuse(i, j)
    sch, _, i, j = on(TRIANGLE, "y")
    yield sch, lambda: sch.fuse(i, j)


@topic
def reorder() -> Refused:
    sch, _, i, j, k, _, p, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.reorder(i)
    yield sch, lambda: sch.reorder(i, j, i)
    yield sch, lambda: sch.reorder(i, p)
    rows(sch)
    yield sch, lambda: sch.reorder(k, i)
    sch, _, i, j = on(TRIANGLE, "y")
    yield sch, lambda: sch.reorder(j, i)
    sch, _, i, j, k = on(dense(8, 12, 16), "y")
    fused = sch.fuse(j, k)
    yield sch, lambda: sch.reorder(fused, i)
    sch, _, i, j = on(order.OVERLAP, "y")
    yield sch, lambda: sch.reorder(j, i)
    sch, _, i, j = on(dense(8, 12, 16), "z")
    sch.vectorize(j)
    yield sch, lambda: sch.reorder(j, i)


@topic
def kinds() -> Refused:
    sch, y, i, j, k = on(dense(8, 12, 16), "y")
    yield sch, lambda: sch.parallel(k)
    yield sch, lambda: sch.vectorize(k)
    yield sch, lambda: sch.vectorize(j)
    yield sch, lambda: sch.annotate(i, "intrin", "dot")
    yield sch, lambda: sch.annotate(y, "cost", {1, 2})
    yield sch, lambda: sch.parallel(i, chunk=2)
    yield sch, lambda: sch.parallel(i, "dynamic", 0)
    sch.parallel(j)
    yield sch, lambda: sch.parallel(i)
    yield sch, lambda: sch.unroll(i)
    yield sch, lambda: sch.vectorize(j)
    sch, _, i, j, _ = on(dense(8, 12, 16), "y")
    sch.parallel(i)
    yield sch, lambda: sch.parallel(j)
    sch, _, i = on(chain(N), "a")
    yield sch, lambda: sch.vectorize(i)
    yield sch, lambda: sch.unroll(i)
    sch, _, i, _ = on(order.OVERLAP, "y")
    yield sch, lambda: sch.parallel(i)
    sch, a, i = on(chain(8), "a")
    sch.set_scope(a, "local")
    yield sch, lambda: sch.parallel(i)


@topic
def software_pipeline() -> Refused:
    sch, _, i, *_ = on(dense(8, 12, 16), "y")
    yield sch, lambda: sch.software_pipeline(i, [0, 1])
    rows(sch)
    yield sch, lambda: sch.software_pipeline(i, [0, 0, 1])
    yield sch, lambda: sch.software_pipeline(i, [1, 0])
    yield sch, lambda: sch.software_pipeline(i, [0, 0])
    yield sch, lambda: sch.software_pipeline(i, [0, 8])
    sch.parallel(i)
    yield sch, lambda: sch.software_pipeline(i, [0, 1])
    sch, _, i, *_ = on(dense(N, 12, 16), "y")
    rows(sch)
    yield sch, lambda: sch.software_pipeline(i, [0, 1])
    sch, y, _, j, k = on(dense(8, 12, 16), "y")
    fused = sch.fuse(j, k)
    sch.cache_read(y, "x", fused)
    yield sch, lambda: sch.software_pipeline(fused, [0, 1])
    sch, b, i = on(chain(8), "b")
    sch.reverse_compute_at(b, sch.get_loops(sch.get_block("a"))[0])
    loop = sch.get_loops(b)[0]
    yield sch, lambda: sch.software_pipeline(loop, [0, 1])
    back = CARRIED.replace(
        "writes y[vi]\n      y[vi] = t[0]", "writes y[vi], t[0]\n      y[vi] = t[0]\n      t[0] = 1.0"
    )
    for text in (CARRIED, back):
        sch, _, i = on(text, "a")
        yield sch, lambda sch=sch, i=i: sch.software_pipeline(i, [0, 1])
    x, index = te.placeholder((8,), "float32", "x"), te.placeholder((8,), "int64", "p")
    a = te.compute((8,), lambda i: x[i] + 1.0, name="a")
    shuffled = te.compute((8,), lambda i: a[i] * x[index[i]], name="y")
    sch, y, i = on(te.create_prim_func([x, index, shuffled, a], "f"), "y")
    sch.reverse_compute_at(y, sch.get_loops(sch.get_block("a"))[0])
    loop = sch.get_loops(y)[0]
    yield sch, lambda: sch.software_pipeline(loop, [0, 1])


@topic
def tensorize() -> Refused:
    sch, _, (i, k) = tiled("arm.sdot")
    yield sch, lambda: sch.tensorize(i, "arm.sdott")
    yield sch, lambda: sch.tensorize(i, "gemm")
    yield sch, lambda: sch.tensorize(k, "arm.sdot")
    yield sch, lambda: sch.tensorize(i, "arm.udot")
    sch.tensorize(i, "arm.sdot")
    packed = sch.get_block("b_local")
    yield sch, lambda: sch.transform_layout(packed, lambda p, q, r: (p, r, q))
    unknown, c, *_ = on(UNKNOWN, "c")
    yield unknown, lambda: unknown.annotate(c, "note", 1)
    sch, _, (i, k) = tiled("arm.sdot")
    sch.unroll(k)
    yield sch, lambda: sch.tensorize(i, "arm.sdot")
    sch, c, i, j, k = on(product(4, 4, 4, "int8", "int8"), "c")
    yield sch, lambda: sch.tensorize(j, "arm.sdot")
    less = UNKNOWN.replace("uint8", "int8").replace("16", "4").replace("  # intrin='nope'", "")
    less, c, i, _ = on(less.replace("tensorized", "range").replace("c[vi] +", "c[vi] -"), "c")
    yield less, lambda: less.tensorize(i, "arm.sdot")
    for depth in (6, 8):
        sch, c, i, j, k = on(product(4, 4, depth, "int8", "int8"), "c")
        outer, _ = sch.split(k, [None, 4])
        sch.reorder(outer, j)
        sch.decompose_reduction(c, outer)
        yield sch, lambda sch=sch, j=j: sch.tensorize(j, "arm.sdot")


@topic
def compute_inline() -> Refused:
    sch, y, *_, z, _, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.compute_inline(y)
    yield sch, lambda: sch.compute_inline(z)
    sch, s, _, a, _ = on(order.func(order.S, order.A, order.AGAIN, order.Y), "s", "a")
    yield sch, lambda: sch.compute_inline(s)
    yield sch, lambda: sch.compute_inline(a)
    first = order.block("y", "y[vi] = select(vi > 0, a[vi - 1], 0.0)", "a[vi - 1]", "y[vi]")
    sch, a, _ = on(order.func(order.S, first + order.A), "a")
    yield sch, lambda: sch.compute_inline(a)
    overlap = order.OVERLAP.replace("(y: float32[6])", "(z: float32[1])").replace("\n", "\n  alloc y: float32[6]\n", 1)
    for text in (SOMETIMES, overlap, TWO_STORES, IN_PLACE):
        sch, block, *_ = on(text, "a" if text is SOMETIMES else "y")
        yield sch, lambda sch=sch, block=block: sch.compute_inline(block)
    constant = TWO_STORES.replace("        y[vj] = 2.0\n", "").replace("y[vi]", "y[0]")
    sch, block, *_ = on(constant, "y")
    yield sch, lambda: sch.compute_inline(block)
    sch, b, i = on(chain(8), "b")
    sch.cache_read(b, "a", i)
    copy = sch.get_block("a_local")
    yield sch, lambda: sch.compute_inline(copy)


TWO_STORES = """func f(x: float32[4]) -> (z: float32[4]):
  alloc y: float32[4]
  for i in range(4):
    for j in range(4):
      block y:
        vi = spatial(4, i)
        vj = spatial(4, j)
        reads x[vi]
        writes y[vi], y[vj]
        y[vi] = x[vi]
        y[vj] = 2.0
  for i in range(4):
    block z:
      vi = spatial(4, i)
      reads y[vi]
      writes z[vi]
      z[vi] = y[vi]"""
IN_PLACE = """func f(x: float32[4]) -> (z: float32[4]):
  alloc y: float32[4]
  for i in range(4):
    block y:
      vi = spatial(4, i)
      reads y[vi]
      writes y[vi]
      y[vi] = y[vi] + 1.0
  for i in range(4):
    block z:
      vi = spatial(4, i)
      reads y[vi]
      writes z[vi]
      z[vi] = y[vi]"""


def steps(element: Callable[..., Any], shape: tuple[int, ...] = (4,), size: tuple[int, ...] = (4,)) -> PrimFunc:
    """`a = x + 1`, and a block `y` that uses it."""
    x = te.placeholder(size, "float32", "x")
    a = te.compute(size, lambda *i: x[i] + 1.0, name="a")
    return te.create_prim_func([x, te.compute(shape, lambda *i: element(a, x, *i), name="y")], "f")


@topic
def reverse_compute_inline() -> Refused:
    sch, _, _, _, _, z, *_ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.reverse_compute_inline(z)
    sch, a, _ = on(chain(8), "a")
    yield sch, lambda: sch.reverse_compute_inline(a)
    for element, shape in [
        (lambda a, x, i: a[i] * a[3 - i], (4,)),
        (lambda a, x, i: a[i] + x[i], (2,)),
        (lambda a, x, i, j: a[i] * 2.0, (4, 2)),
    ]:
        sch, y, *_ = on(steps(element, shape), "y")
        yield sch, lambda sch=sch, y=y: sch.reverse_compute_inline(y)
    sch, y, *_ = on(steps(lambda a, x, i, j: a[i, j] * a[j, i], (4, 4), (4, 4)), "y")
    yield sch, lambda: sch.reverse_compute_inline(y)
    x = te.placeholder((4,), "float32", "x")
    a, b = (te.compute((4,), lambda i: x[i] + 1.0, name=name) for name in "ab")
    both = te.compute((4,), lambda i: a[i] + b[i], name="y")
    sch, y, _ = on(te.create_prim_func([x, both, b], "f"), "y")
    yield sch, lambda: sch.reverse_compute_inline(y)
    sch, y, _ = on(order.func(order.S, order.A, order.RESET, order.USE), "y")
    yield sch, lambda: sch.reverse_compute_inline(y)
    sch, y, _ = on(order.func(order.S, order.A, order.Z, order.USE, results="y z"), "y")
    yield sch, lambda: sch.reverse_compute_inline(y)
    some = TWO_STORES.replace("vj", "vi").replace("        vi = spatial(4, j)\n", "").replace("y[vi], y[vi]", "y[vi]")
    sch, z, _ = on(some, "z")
    yield sch, lambda: sch.reverse_compute_inline(z)
    sch, z, _ = on(IN_PLACE, "z")
    yield sch, lambda: sch.reverse_compute_inline(z)


@topic
def compute_at() -> Refused:
    sch, a, i, b, j, c, k = on(chain(8), "a", "b", "c")
    yield sch, lambda: sch.compute_at(c, i)
    yield sch, lambda: sch.compute_at(b, j)
    yield sch, lambda: sch.compute_at(b, i)
    sch.vectorize(k)
    yield sch, lambda: sch.compute_at(b, k)
    sch, b, j, _, k = on(chain(8), "b", "c")
    sch.vectorize(j)
    yield sch, lambda: sch.compute_at(b, k)
    sch, b, j, _, k = on(chain(8), "b", "c")
    sch.parallel(j)
    yield sch, lambda: sch.compute_at(b, k)
    sch, e, *_, row, _ = on(softmax(4, 6), "e", "y")
    yield sch, lambda: sch.compute_at(e, row)
    sch, pad, *_, b, _, h, _, _, _, _ = on(conv(1, 2, 6, 3), "pad", "conv")
    sch.parallel(h)
    yield sch, lambda: sch.compute_at(pad, h)
    sch, a, _, _, i, _ = on(steps(lambda a, x, i, j: a[(i + j * 3) % 8], (8, 8), (8,)), "a", "y")
    yield sch, lambda: sch.compute_at(a, i)
    sch, s, *_, _again, y, i = on(order.func(order.S, order.A, order.AGAIN, order.Y), "s", "a", "again", "y")
    a = sch.get_block("a")
    yield sch, lambda: sch.compute_at(s, i)
    yield sch, lambda: sch.compute_at(a, i)
    first = order.block("y", "y[vi] = select(vi > 0, a[vi - 1], 0.0)", "a[vi - 1]", "y[vi]")
    sch, a, _, _, i = on(order.func(order.S, first, order.A), "a", "y")
    yield sch, lambda: sch.compute_at(a, i)
    sch, a, _, _, i = on(order.func(order.S, order.A, order.OUT), "a", "out")
    yield sch, lambda: sch.compute_at(a, i)
    for text in (TWO_STORES, IN_PLACE, OFF_BY_ONE, TWICE, CONDITION):
        sch, y, *_, i = on(text, "y", "z")
        yield sch, lambda sch=sch, y=y, i=i: sch.compute_at(y, i)
    sch, y, i, j, k, _z, _p, _ = on(dense(8, 12, 16), "y", "z")
    sch.cache_read(y, "x", i, "global")
    copy = sch.get_block("x_global")
    yield sch, lambda: sch.compute_at(copy, k)
    sch.set_scope(copy, "local")
    yield sch, lambda: sch.compute_at(copy, k)


UPDATE = "reads y[vi]\n      writes y[vi]\n      y[vi] = y[vi] + 1.0"
PLAIN = "reads x[vi]\n      writes y[vi]\n      y[vi] = x[vi]"
OFF_BY_ONE = IN_PLACE.replace(UPDATE, PLAIN.replace("y[vi]", "y[3 - vi]"))
TWICE = IN_PLACE.replace(UPDATE, f"vj = spatial(2, 0)\n      {PLAIN}")
CONDITION = IN_PLACE.replace(UPDATE, f"where i % 2 == 0\n      {PLAIN}")


@topic
def reverse_compute_at() -> Refused:
    sch, y, _, _, k, z, p, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.reverse_compute_at(z, k)
    yield sch, lambda: sch.reverse_compute_at(y, p)
    yield sch, lambda: sch.reverse_compute_at(z, p)
    sch, _, i, c, k = on(chain(8), "b", "c")
    sch.bind(k, "blockIdx.x")
    yield sch, lambda: sch.reverse_compute_at(c, i)
    sch, _top, row, _, _total, *_, y, _, _ = on(softmax(4, 6), "top", "total", "y")
    yield sch, lambda: sch.reverse_compute_at(y, row)
    for element, shape, size in [
        (lambda a, x, i: a[i] * a[3 - i], (4,), (4,)),
        (lambda a, x, i, j: a[i, j] * a[j, i], (4, 4), (4, 4)),
        (lambda a, x, i: a[i] + x[i], (2,), (4,)),
        (lambda a, x, i: a[i, i], (4,), (4, 4)),
    ]:
        sch, y, *_ = on(steps(element, shape, size), "y")
        loop = sch.get_loops(sch.get_block("a"))[0]
        yield sch, lambda sch=sch, y=y, loop=loop: sch.reverse_compute_at(y, loop)
    for text in (
        order.func(order.S, order.A, order.RESET, order.USE),
        order.func(order.S, order.A + order.Z, order.USE, results="y z"),
    ):
        sch, y, _, _, i = on(text, "y", "a")
        yield sch, lambda sch=sch, y=y, i=i: sch.reverse_compute_at(y, i)
    sch, y, _, _, i = on(order.func(order.S, order.A, order.AGAIN, order.Y), "y", "s")
    yield sch, lambda: sch.reverse_compute_at(y, i)
    sch, y, i, *_ = on(UNDER_IF, "y", "a")
    loop = sch.get_loops(sch.get_block("a"))[0]
    yield sch, lambda: sch.reverse_compute_at(y, loop)
    sch, y, _ = on(UNUSED, "y")
    loop = sch.get_loops(sch.get_block("a"))[0]
    yield sch, lambda: sch.reverse_compute_at(y, loop)
    sch, z, *_ = on(
        APART.replace("o * 2 + i", "i").replace("in range(2):\n      block a", "in range(4):\n      block a"), "z"
    )
    loop = sch.get_loops(sch.get_block("a"))[0]
    yield sch, lambda: sch.reverse_compute_at(z, loop)
    sch, z, *_ = on(APART, "z")
    loop = sch.get_loops(sch.get_block("a"))[0]
    yield sch, lambda: sch.reverse_compute_at(z, loop)
    sch, z, p, q, *_ = on(dense(8, 12, 16), "z", "y")
    sch.split(sch.fuse(p, q), [None, 5])
    loop = sch.get_loops(sch.get_block("y"))[0]
    yield sch, lambda: sch.reverse_compute_at(z, loop)
    strange = order.func(order.S, order.AGAIN, order.OUT)
    sch, out, _, _, i = on(strange, "out", "again")
    yield sch, lambda: sch.reverse_compute_at(out, i)


UNDER_IF = order.func(
    order.block("a", "a[vi] = x[vi]", "x[vi]", "a[vi]"),
    "\n    if i % 2 == 0:" + order.block("y", "y[vi] = a[vi]", "a[vi]", "y[vi]", indent="      "),
    allocs="a",
)
UNUSED = """func f(x: float32[4]) -> (y: float32[4]):
  alloc a: float32[4]
  for i in range(4):
    block a:
      vi = spatial(4, i)
      reads x[vi]
      writes a[vi]
      a[vi] = x[vi]
  for i in range(4):
    block y:
      vi = spatial(4, i)
      vj = spatial(2, 0)
      reads a[vi]
      writes y[vi]
      y[vi] = a[vi]"""
APART = """func f(x: float32[4]) -> (z: float32[4]):
  alloc a: float32[4]
  alloc b: float32[4]
  for o in range(2):
    for i in range(2):
      block a:
        vi = spatial(4, o * 2 + i)
        reads x[vi]
        writes a[vi]
        a[vi] = x[vi]
    for i in range(2):
      block b:
        vi = spatial(4, 2 - o * 2 + i)
        reads x[vi]
        writes b[vi]
        b[vi] = x[vi]
  for i in range(4):
    block z:
      vi = spatial(4, i)
      reads a[vi], b[vi]
      writes z[vi]
      z[vi] = a[vi] + b[vi]"""


@topic
def decompose_reduction() -> Refused:
    sch, y, i, j, k, z, p, _ = on(dense(8, 12, 16), "y", "z")
    _k0, k1 = sch.split(k, [None, 4])
    yield sch, lambda: sch.decompose_reduction(z, p)
    yield sch, lambda: sch.decompose_reduction(y, p)
    yield sch, lambda: sch.decompose_reduction(y, k1)
    sch.cache_write(y, i, "local")
    yield sch, lambda: sch.decompose_reduction(y, i)
    sch, y, i, j, k = on(dense(8, 12, 16), "y")
    sch.split(sch.fuse(j, k), [None, 5])
    yield sch, lambda: sch.decompose_reduction(y, i)
    sch, y, i, *_ = on(dense(1, 12, 16), "y")
    sch.cache_write(y, i, "local")
    sch.parallel(i)
    yield sch, lambda: sch.decompose_reduction(y, i)
    some = PREFIX.replace("range(i + 1)", "range(4)").replace("\n      ", "\n        ")
    some = some.replace("        block y", "      if i % 2 == 0:\n        block y")
    sch, y, i, _ = on(some, "y")
    yield sch, lambda: sch.decompose_reduction(y, i)
    sch, y, i, _ = on(order.READ_BEFORE, "y")
    yield sch, lambda: sch.decompose_reduction(y, i)


@topic
def rfactor() -> Refused:
    sch, y, _, j, k, z, p, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.rfactor(y, j)
    yield sch, lambda: sch.rfactor(z, p)
    yield sch, lambda: sch.rfactor(y, p)
    rows(sch)
    sch.cache_read(y, "w", k)
    yield sch, lambda: sch.rfactor(y, k)
    sch, y, _i, j, k = on(dense(8, 12, 16), "y")
    fused = sch.fuse(j, k)
    yield sch, lambda: sch.rfactor(y, fused)
    sch, y, _, k = on(PREFIX, "y")
    yield sch, lambda: sch.rfactor(y, k)


@topic
def cache_write() -> Refused:
    sch, y, i, j, k, _, p, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.cache_write(y, k)
    yield sch, lambda: sch.cache_write(y, p)
    sch.parallel(i)
    yield sch, lambda: sch.cache_write(y, i, "global")
    sch.decompose_reduction(y, k)
    yield sch, lambda: sch.cache_write(y, j)
    sch, y, i, *_ = on(dense(N, 12, N), "y")
    yield sch, lambda: sch.cache_write(y, i)
    sch, y, i, j, *_ = on(dense(4, 12, N), "y")
    yield sch, lambda: sch.cache_write(y, i)
    neighbour = order.MERGED.replace("y[vi // 2]", "y[vi]").replace("[2]", "[5]").replace("= y[vi] +", "= y[vi + 1] +")
    for text in (TWO_STORES, OFF_BY_ONE, IN_PLACE, neighbour, IF):
        sch, y, i, *_ = on(text, "y")
        yield sch, lambda sch=sch, y=y, i=i: sch.cache_write(y, i)
    sch, y, i, _, _, z, *_ = on(dense(8, 12, 16), "y", "z")
    lanes = sch.get_loops(z)[1]
    sch.vectorize(lanes)
    yield sch, lambda: sch.cache_write(z, lanes)
    sch, y, i, _, _, z, *_ = on(dense(8, 12, 16), "y", "z")
    outer, inner = sch.split(i, [None, 4])
    sch.reverse_compute_at(z, inner)
    yield sch, lambda: sch.cache_write(y, outer)


@topic
def cache_read() -> Refused:
    sch, y, i, _j, k, _, p, q = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.cache_read(y, "v", i)
    yield sch, lambda: sch.cache_read(y, "y", i)
    yield sch, lambda: sch.cache_read(y, "x", p)
    sch.vectorize(q)
    z = sch.get_block("z")
    yield sch, lambda: sch.cache_read(z, "y", q)
    sch.parallel(i)
    yield sch, lambda: sch.cache_read(y, "x", i, "global")
    x, index = te.placeholder((4,), "float32", "x"), te.placeholder((3,), "int64", "index")
    sch, y, i = on(te.create_prim_func([x, index, te.compute((3,), lambda i: x[index[i]], name="y")], "f"), "y")
    yield sch, lambda: sch.cache_read(y, "x", i)
    sch, y, i, _ = on(PREFIX, "y")
    yield sch, lambda: sch.cache_read(y, "x", i)
    sch, b, *_ = on(dense(8, 12, 16), "z", "y")
    sch.reverse_compute_at(b, sch.get_loops(sch.get_block("y"))[0])
    shared, *_ = sch.get_loops(b)
    yield sch, lambda: sch.cache_read(b, "y", shared)
    x, b, k = te.placeholder((12, 3), "float32", "x"), te.placeholder((12,), "float32", "b"), te.reduce_axis(3, "k")
    by_both, by_product = (lambda o, i: te.sum(x[i, k] * b[i], k)), (lambda o, i: te.sum(x[o, k] * b[i * k], k))
    for element in (by_both, by_product):
        sch, y, o, i, summed = on(te.create_prim_func([x, b, te.compute((2, 4), element, name="y")], "f"), "y")
        if element is by_both:
            sch.fuse(i, summed)
        yield sch, lambda sch=sch, y=y, o=o: sch.cache_read(y, "b", o)


PREFIX = """func f(x: float32[4]) -> (y: float32[4]):
  for i in range(4):
    for k in range(i + 1):
      block y:
        vi = spatial(4, i)
        vk = reduce(4, k)
        reads x[vk]
        writes y[vi]
        init:
          y[vi] = 0.0
        y[vi] = y[vi] + x[vk]"""
IF = order.func(
    "\n    if i % 2 == 0:" + order.block("y", "y[vi] = x[vi]", "x[vi]", "y[vi]", indent="      "), allocs=""
)


@topic
def set_scope() -> Refused:
    sch, a, i, c, _ = on(chain(N), "a", "c")
    yield sch, lambda: sch.set_scope(c, "local")
    yield sch, lambda: sch.set_scope(a, "register")
    sch.parallel(i)
    yield sch, lambda: sch.set_scope(a, "local")


@topic
def storage_align() -> Refused:
    sch, a, *_ = on(steps(lambda a, x, i, j, k: a[i, j, k], (4, 6, 5), (4, 6, 5)), "a")
    yield sch, lambda: sch.storage_align(a, 3, 8)
    yield sch, lambda: sch.storage_align(a, 2, 8)
    yield sch, lambda: sch.storage_align(a, 0, 0)
    yield sch, lambda: sch.storage_align(a, 0, 8, 8)
    yield sch, lambda: sch.storage_align(a, 0, 10, 1)
    sch, a, _ = on(chain(8), "a")
    yield sch, lambda: sch.storage_align(a, 0, 8)
    sch, y, *_ = on(dense(4, 5, N), "y")
    yield sch, lambda: sch.storage_align(y, 0, 8)


@topic
def transform_layout() -> Refused:
    sch, y, *_, z, _, _ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.transform_layout(z, lambda i, j: (j, i))
    yield sch, lambda: sch.transform_layout(y, lambda i: (i,))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: i)
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i / 2, j))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i * 1.5, j))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i < j, j))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i - 1, j))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i * 2**64, j))
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i // 2, j))
    sch, y, *_ = on(dense(8, 12, N), "y")
    yield sch, lambda: sch.transform_layout(y, lambda i, j: (i * j % N, j))
    flat = IndexMap((Var("i"),), (Var("i"),))
    yield sch, lambda: sch.transform_layout(y, flat)
    sch, y, *_ = on(TWO_BUFFERS, "y")
    yield sch, lambda: sch.transform_layout(y, lambda i: (i,))


TWO_BUFFERS = TWO_STORES.replace("y[vj]", "t[vj]").replace("  alloc", "  alloc t: float32[4]\n  alloc")


@topic
def pad_einsum() -> Refused:
    sch, y, i, _j, k, z, *_ = on(dense(8, 12, 16), "y", "z")
    yield sch, lambda: sch.pad_einsum(y, [4, 4])
    yield sch, lambda: sch.pad_einsum(y, [1, 0, 4])
    yield sch, lambda: sch.pad_einsum(z, [4, 4])
    sch.split(i, [None, 4])
    yield sch, lambda: sch.pad_einsum(y, [1, 1, 5])
    sch, first = on(order.READ_BEFORE, "first")
    yield sch, lambda: sch.pad_einsum(first, [])
    sch, windows, *_ = on(conv(1, 2, 5, 3), "conv")
    yield sch, lambda: sch.pad_einsum(windows, [1, 4, 1, 1, 4, 1, 1])
    sch, best, *_ = on(pool(1, 2, 4), "y")
    yield sch, lambda: sch.pad_einsum(best, [1, 1, 1, 1, 4, 4])
    x, s, k = te.placeholder((4, 6), "float32", "x"), te.placeholder((4,), "float32", "s"), te.reduce_axis(6, "k")
    for element in (lambda i: te.sum(x[i, k] * s[i], k), lambda i: te.sum(call("exp", x[i, k]), k)):
        sch, y, *_ = on(te.create_prim_func([x, s, te.compute((4,), element, name="y")], "f"), "y")
        yield sch, lambda sch=sch, y=y: sch.pad_einsum(y, [1, 4])


NESTED = """func f(x: float32[4, 4]) -> (y: float32[4, 4], z: float32[4, 4]):
  alloc a: float32[4, 4]
  for i in range(4):
    for j in range(4):
      block a:
        vi = spatial(4, i)
        vj = spatial(4, j)
        reads x[vi, vj]
        writes a[vi, vj]
        a[vi, vj] = x[vi, vj]
  for i in range(4):
    block outer:
      vi = spatial(4, i)
      reads a[vi, :4], x[vi, :4], y[vi, :4]
      writes y[vi, :4], z[vi, :4]
      for j in range(4):
        block inner:
          vj = spatial(4, j)
          reads a[vi, vj]
          writes y[vi, vj]
          y[vi, vj] = a[vi, vj]
        block other:
          vj = spatial(4, j)
          reads y[vi, vj], x[vi, vj]
          writes z[vi, vj]
          z[vi, vj] = y[vi, vj] + x[vi, vj]"""


@topic
def blocks_in_blocks() -> Refused:
    sch, a, _, _, inner, i, j, other, *_ = on(NESTED, "a", "inner", "other")
    yield sch, lambda: sch.cache_read(inner, "a", i)
    yield sch, lambda: sch.cache_write(inner, i)
    yield sch, lambda: sch.compute_at(a, j)
    yield sch, lambda: sch.compute_inline(other)
    yield sch, lambda: sch.reverse_compute_at(other, i)
    sch, a, *_ = on(NESTED, "a")
    outer = sch.get_loops(sch.get_block("outer"))[0]
    sch.compute_at(a, outer)
    yield sch, lambda: sch.software_pipeline(outer, [0, 1])


SQUARE = TRIANGLE.replace("range(i + 1)", "range(4)")
TOGETHER = SQUARE.replace("spatial(4, i)", "spatial(4, (i * 4 + j) // 3)")
UNTOLD = SQUARE.replace("        reads", "        where i + j * 2 < 5\n        reads").replace(
    "spatial(4, i)", "spatial(4, i // 2)"
)


@topic
def blockize() -> Refused:
    sch, _, i, *_ = on(dense(8, 12, 16), "y")
    rows(sch)
    yield sch, lambda: sch.blockize(i)
    sch, *_ = on(NESTED, "a")
    outer = sch.get_loops(sch.get_block("inner"))[1]
    yield sch, lambda: sch.blockize(outer)
    sch, _, i, j = on(TRIANGLE, "y")
    yield sch, lambda: sch.blockize(j)
    for text in (TOGETHER, UNTOLD):
        sch, _, i, j = on(text, "y")
        yield sch, lambda sch=sch, j=j: sch.blockize(j)
    sch, y, i, j, _ = on(dense(8, 12, 16), "y")
    outer = sch.blockize(j)
    yield sch, lambda: sch.cache_read(outer, "x", i)
    yield sch, lambda: sch.compute_at(outer, i)
    yield sch, lambda: sch.tensorize(y, "arm.sdot")
    sch, c, *loops = on(product(8, 16, 16, "uint8", "int8"), "c")
    (_, j1), (_, k1) = sch.split(loops[1], [None, 16]), sch.split(loops[2], [None, 4])
    sch.reorder(sch.get_loops(c)[3], j1)
    outer = sch.blockize(j1)
    yield sch, lambda: sch.tensorize(outer, "x86.vnni.dot")
    yield sch, lambda: sch.decompose_reduction(c, k1)
    yield sch, lambda: sch.rfactor(c, k1)
    yield sch, lambda: sch.cache_write(c, j1)


def state(sch: Schedule) -> tuple[object, ...]:
    """All that a schedule is."""
    return sch.func, sch.trace, sch._handles.snapshot()


def refusals(name: str) -> Iterator[tuple[ScheduleError, Schedule, Mapping[str, str]]]:
    """The refusals of a topic; each leaves its schedule as it was."""
    for sch, attempt, *names in TOPICS[name]():
        before = state(sch)
        with pytest.raises(ScheduleError) as caught:
            attempt()
        after = state(sch)
        assert after[0] is before[0]
        assert after[1:] == before[1:]
        yield caught.value, sch, names[0] if names else {}


@pytest.mark.parametrize("name", TOPICS)
def test_what_they_say(name, golden):
    messages = []
    for error, *_ in refusals(name):
        reason, _, nest = error.message.partition("\n")
        assert name in ("arguments", "replay") or nest, "it shows the nest"
        messages.append(f"{reason}\n  hint: {error.hint}" if error.hint else reason)
    golden(f"refusals/{name}.txt", "\n".join(messages))


@pytest.mark.parametrize("name", TOPICS)
def test_hints_can_be_followed(name):
    for error, sch, names in refusals(name):
        try:
            follow(sch, error.hint or "", names, BEGINNINGS.get(sch))
        except (ScheduleError, NameError, SyntaxError) as wrong:
            raise AssertionError(f"{error}\n\nfollowed, it leads to\n\n{wrong}") from wrong


@pytest.mark.parametrize("primitive", ["set_scope", "storage_align", "transform_layout"])
def test_the_same_call_again_after_cache_write(primitive):
    """What an output's block writes after `cache_write` can be changed, by the handle of before."""
    args = {"set_scope": ("local",), "storage_align": (0, 8), "transform_layout": (lambda i, j: (j, i),)}[primitive]
    func = dense(8, 12, 16)
    sch, z, *_ = on(func, "z")
    with pytest.raises(ScheduleError) as caught:
        getattr(sch, primitive)(z, *args)
    scope = {"sch": sch, "z": z}
    for each in calls_in(caught.value.hint or "")[0]:
        exec(each, scope)
    getattr(sch, primitive)(z, *args)
    assert_same(func, sch.func)


def test_calls_are_found_in_hints():
    assert calls_in("take another axis") == []
    assert calls_in("a, b = sch.split(i, [None, 8]); sch.unroll(b)") == [
        ["a, b = sch.split(i, [None, 8])", "sch.unroll(b)"]
    ]
    assert calls_in("sch.fuse(i, j) first, or sch.reorder(f(j), i)") == [["sch.fuse(i, j)"], ["sch.reorder(f(j), i)"]]
    assert calls_in("do it before sch.bind") == []


#: Primitives whose refusals have tests beside their own.
ELSEWHERE = {"align.py", "bind.py", "prefetch.py"}


def raising(path: Path) -> Iterator[tuple[int, int]]:
    """The first and last line of every statement in a file that refuses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            function = node.exc.func
            if isinstance(function, ast.Name) and function.id in ("refuse", "ScheduleError"):
                yield node.lineno, node.end_lineno or node.lineno


def raised_at(error: BaseException | None) -> Iterator[tuple[str, int]]:
    """The file and line of every frame that an error went through, and those of its causes."""
    while error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            yield Path(frame.f_code.co_filename).name, line
        error = error.__cause__


def test_all_of_them_are_here():
    root = Path(schedule.__file__).parent
    files = [each for each in (*root.glob("*.py"), *root.glob("primitives/*.py")) if each.name not in ELSEWHERE]
    places = {(path.name, *lines) for path in files for lines in raising(path)}
    seen = {place for name in TOPICS for error, *_ in refusals(name) for place in raised_at(error)}
    read = {(name, first, last) for name, first, last in places for at in range(first, last + 1) if (name, at) in seen}
    assert places == read, f"no test reads these refusals: {sorted(places - read)}"


def test_blocks_in_blocks_that_are_not_refused():
    for primitive in ("compute_inline", "transform_layout", "compute_at"):
        sch, a, *_ = on(NESTED, "a")
        if primitive == "compute_inline":
            sch.compute_inline(a)
        elif primitive == "transform_layout":
            sch.transform_layout(a, lambda i, j: (j, i))
        else:
            sch.compute_at(a, sch.get_loops(sch.get_block("outer"))[0])
        assert_same(parse_func(NESTED), sch.func)


def test_numbers_of_numpy_are_numbers():
    func = dense(8, 12, 16)
    sch, y, i, *_ = on(func, "y")
    sch.pad_einsum(y, tuple(np.array([1, 4, 5])))
    sch.split(i, (None, np.int32(4)))
    sch.annotate(y, "cost", np.int64(3))
    assert_same(func, sch.func)
    assert sch.trace[-2]["args"]["factors"] == [None, 4]
    Schedule.replay(func, sch.trace)
