"""Functions from text, whose buffers are written again and whose blocks depend on their order: the meaning stays."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
from schedule.test_blocks import loops_of, refused

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.interp import run
from kedge.compiler.tir.parser import parse_func
from support.functions import assert_same
from support.random_schedules import random_step


def block(name: str, store: str, reads: str, writes: str, *, extent: int = 4, indent: str = "    ") -> str:
    """A block over `vi`, as text."""
    lines = [f"block {name}:", f"  vi = spatial({extent}, i)", f"  reads {reads}", f"  writes {writes}", f"  {store}"]
    return "".join(f"\n{indent}{line}" for line in lines)


def func(*loops: str, allocs: str = "s a", results: str = "y") -> str:
    """A function whose loops hold these blocks."""
    outs = ", ".join(f"{name}: float32[4]" for name in results.split())
    lines = "".join(f"\n  alloc {name}: float32[4]" for name in allocs.split())
    return f"func f(x: float32[4]) -> ({outs}):{lines}" + "".join(f"\n  for i in range(4):{each}" for each in loops)


S = block("s", "s[vi] = x[vi] + 1.0", "x[vi]", "s[vi]")
A = block("a", "a[vi] = s[vi] * 2.0", "s[vi]", "a[vi]")
AGAIN = block("again", "s[vi] = x[vi] * 3.0", "x[vi]", "s[vi]")
AHEAD = block("ahead", "s[3 - vi] = x[vi] * 3.0", "x[vi]", "s[3 - vi]")
Y = block("y", "y[vi] = a[vi] + s[vi]", "a[vi], s[vi]", "y[vi]")
Y_OF_A = block("y", "y[vi] = a[vi] + x[vi]", "a[vi], x[vi]", "y[vi]")
UPDATE = block("y", "s[vi] = a[vi] + 1.0", "a[vi]", "s[vi]")
OUT = block("out", "y[vi] = s[vi]", "s[vi]", "y[vi]")


@pytest.mark.parametrize(
    ("text", "writer"),
    [
        (func(S, A, AGAIN, Y), "again"),
        (func(S, A + AHEAD, Y), "ahead"),
        (func(S, A, AGAIN + Y), "again"),
        (func(S, A, Y_OF_A + AHEAD), "ahead"),
        (func(S, A, UPDATE, OUT), "y"),
    ],
    ids=["between", "beside it", "beside its consumer", "after its consumer", "its consumer"],
)
def test_what_is_overwritten_cannot_be_computed_later(text, writer):
    sch = Schedule(parse_func(text))
    a, i = sch.get_block("a"), loops_of(sch, "y")[0]
    reason = f"block '{writer}' writes 's', which it reads"
    refused(lambda: sch.compute_at(a, i), "compute_at(block 'a')", reason)
    refused(lambda: sch.compute_inline(a), "compute_inline(block 'a')", reason)


def test_what_is_overwritten_elsewhere_can():
    for text in (func(S, A, Y), func(S, A, Y_OF_A, AGAIN, results="y"), func(S, AGAIN, A, Y)):
        before = parse_func(text)
        for primitive in ("compute_at", "compute_inline"):
            sch = Schedule(before)
            a, i = sch.get_block("a"), loops_of(sch, "y")[0]
            sch.compute_at(a, i) if primitive == "compute_at" else sch.compute_inline(a)
            assert_same(before, sch.func)


def test_consumers_that_run_first_see_older_values():
    first = block("y", "y[vi] = select(vi > 0, a[vi - 1], 0.0)", "a[vi - 1]", "y[vi]")
    sch = Schedule(parse_func(func(S, first + A)))
    refused(lambda: sch.compute_inline(sch.get_block("a")), "its consumer 'y' runs before it")
    sch = Schedule(parse_func(func(S, first, A)))
    refused(lambda: sch.compute_at(sch.get_block("a"), loops_of(sch, "y")[0]), "its consumer 'y' runs before it")


Z = block("z", "z[vi] = y[vi] + x[vi]", "y[vi], x[vi]", "z[vi]")
RESET = block("reset", "y[vi] = 0.0", "x[vi]", "y[vi]")
USE = block("y", "y[vi] = a[vi] + x[vi]", "a[vi], x[vi]", "y[vi]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (func(S, A, RESET, USE), "is written by block 'reset', too"),
        (func(S, A, Z, USE, results="y z"), "block 'z' uses 'y', which it writes"),
        (func(S, A + Z, USE, results="y z"), "block 'z' uses 'y', which it writes"),
    ],
    ids=["written", "read between", "read beside"],
)
def test_what_is_in_use_cannot_be_written_earlier(text, reason):
    sch = Schedule(parse_func(text))
    y, i = sch.get_block("y"), loops_of(sch, "a")[0]
    refused(lambda: sch.reverse_compute_at(y, i), "reverse_compute_at(block 'y')", reason)
    refused(lambda: sch.reverse_compute_inline(y), "reverse_compute_inline(block 'y')", reason)


def test_what_is_used_afterwards_can_be_written_earlier():
    before = parse_func(func(S, A, USE, Z, results="y z"))
    sch = Schedule(before)
    sch.reverse_compute_at(sch.get_block("y"), loops_of(sch, "a")[0])
    sch.reverse_compute_inline(sch.get_block("y"))
    assert_same(before, sch.func)


@pytest.mark.parametrize("condition", ["where", "if"])
def test_conditions_stay_with_their_blocks(condition):
    store = "y[vi] = a[vi] + 1.0"
    some = block("y", store, "a[vi]", "y[vi]").replace("\n      reads", "\n      where i % 2 == 0\n      reads")
    if condition == "if":
        some = "\n    if i % 2 == 0:" + block("y", store, "a[vi]", "y[vi]", indent="      ")
    sch = Schedule(parse_func(func(A.replace("s[vi]", "x[vi]"), some, allocs="a")))
    y, i = sch.get_block("y"), loops_of(sch, "a")[0]
    for call in (lambda: sch.reverse_compute_at(y, i), lambda: sch.reverse_compute_inline(y)):
        refused(call, f"it runs only {condition} i % 2 == 0")
    if condition == "if":
        refused(lambda: sch.cache_write(y, sch.get_loops(y)[0]), "it runs only if i % 2 == 0")


OVERLAP = """func f(x: float32[3, 4]) -> (y: float32[6]):
  for i in range(3):
    for j in range(4):
      block y:
        vi = spatial(3, i)
        vj = spatial(4, j)
        reads x[vi, vj]
        writes y[vi + vj]
        y[vi + vj] = x[vi, vj]"""
APART = OVERLAP.replace("[6]", "[12]").replace("vi + vj", "vi * 4 + vj")
MERGED = """func f(x: float32[4, 3]) -> (y: float32[2]):
  for i in range(4):
    for k in range(3):
      block y:
        vi = spatial(4, i)
        vk = reduce(3, k)
        reads x[vi, vk]
        writes y[vi // 2]
        init:
          y[vi // 2] = 0.0
        y[vi // 2] = y[vi // 2] + x[vi, vk]"""


@pytest.mark.parametrize("text", [OVERLAP, MERGED])
def test_the_last_store_to_a_place_stays_the_last(text):
    sch = Schedule(parse_func(text))
    i, j = loops_of(sch, "y")
    refused(lambda: sch.reorder(j, i), "reorder(loop 'i')", "through buffer 'y'")


def test_stores_to_places_apart_come_in_any_order():
    sch = Schedule(parse_func(APART))
    i, j = loops_of(sch, "y")
    sch.reorder(j, i)
    assert_same(parse_func(APART), sch.func)
    # Updates without a first value commute, wherever they go.
    updates = "\n".join(line for line in MERGED.splitlines() if "init" not in line and "= 0.0" not in line)
    updates = updates.replace("reads x", "reads y[vi // 2], x")
    sch = Schedule(parse_func(updates))
    i, k = loops_of(sch, "y")
    sch.reorder(k, i)
    data = [np.arange(12, dtype="float32").reshape(4, 3)]
    for got, want in zip(run(sch.func, data), run(parse_func(updates), data), strict=True):
        np.testing.assert_array_equal(got, want)


READ_BEFORE = """func f(x: float32[4]) -> (y: float32[1], z: float32[4]):
  block first:
    reads x[0]
    writes y[0]
    y[0] = x[0]
  for i in range(1):
    for k in range(4):
      block z:
        vk = spatial(4, k)
        reads y[0]
        writes z[vk]
        z[vk] = y[0]
      block y:
        vi = spatial(1, i)
        vk = reduce(4, k)
        reads x[vk]
        writes y[vi]
        init:
          y[vi] = 0.0
        y[vi] = y[vi] + x[vk]"""


def test_initialisations_stay_behind_what_reads_the_place_before():
    sch = Schedule(parse_func(READ_BEFORE))
    for loop in loops_of(sch, "y"):
        refused(lambda loop=loop: sch.decompose_reduction(sch.get_block("y"), loop), "block 'z' uses 'y' before it")


def test_accumulators_that_read_their_neighbours_have_no_cache():
    text = MERGED.replace("y[vi // 2]", "y[vi]").replace("[2]", "[5]").replace("= y[vi] +", "= y[vi + 1] +")
    sch = Schedule(parse_func(text))
    i, _ = loops_of(sch, "y")
    refused(lambda: sch.cache_write(sch.get_block("y"), i), "it reads other elements of 'y' than the one it writes")


def test_places_that_are_read_from_memory_are_no_interval():
    text = """func f(x: float32[4], p: int64[4]) -> (y: float32[4]):
  alloc a: float32[4]
  for i in range(4):
    block a:
      vi = spatial(4, i)
      reads x[vi]
      writes a[vi]
      a[vi] = x[vi] + 1.0
  for i in range(4):
    block y:
      vi = spatial(4, i)
      reads a[:4], p[vi]
      writes y[vi]
      y[vi] = a[p[vi]]"""
    sch = Schedule(parse_func(text))
    refused(lambda: sch.compute_at(sch.get_block("a"), loops_of(sch, "y")[0]), "is not a contiguous range")
    sch.compute_inline(sch.get_block("a"))
    data = [np.arange(4, dtype="float32"), np.array([3, 0, 2, 2])]
    np.testing.assert_array_equal(run(sch.func, data)[0], run(parse_func(text), data)[0])


@pytest.mark.parametrize(
    "text",
    [
        func(S, A, AGAIN, Y),
        func(S, A + AHEAD, Y),
        func(S, A, Y_OF_A + AHEAD),
        func(S, A, UPDATE, OUT),
        func(S, A, RESET, USE),
        func(S, A, USE, Z, results="y z"),
        OVERLAP,
        MERGED,
    ],
)
def test_whatever_is_not_refused_computes_the_same(text):
    for seed in range(15):
        rng, sch = random.Random(seed), Schedule(parse_func(text))
        for _ in range(8):
            with contextlib.suppress(ScheduleError):
                random_step(sch, rng)
        assert_same(parse_func(text), sch.func)


def test_reordering_looks_at_loops_in_between():
    sch = Schedule(parse_func(OVERLAP))
    outer, i = sch.split(loops_of(sch, "y")[0], [None, 3])
    (_, _, j) = loops_of(sch, "y")
    refused(lambda: sch.reorder(j, i, outer), "reorder(loop 'i_1')", "through buffer 'y'")
