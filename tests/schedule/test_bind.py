"""bind: what it takes runs thread by thread without races and is right; what it refuses, it names with the remedy."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Expr, Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import chain, dense, inputs, softmax
from support.gpu_threads import launches, run_threads
from support.hints import follow

N = Var("n", lower=1)


def add(*shape: int | Var) -> Schedule:
    x = te.placeholder(shape, "float32", "x")
    return Schedule(te.create_prim_func([x, te.compute(shape, lambda *i: x[i] + 1.0, name="y")], "add"))


def sums(rows: int = 3, columns: int = 7, combine: Callable[..., Expr] = te.sum) -> Schedule:
    x, k = te.placeholder((rows, columns), "float32", "x"), te.reduce_axis(columns, "k")
    y = te.compute((rows,), lambda i: combine(x[i, k], k), name="y")
    return Schedule(te.create_prim_func([x, y], "sums"))


def loops(sch: Schedule, block: str = "y") -> tuple[LoopRef, ...]:
    return tuple(sch.get_loops(sch.get_block(block)))


def check(sch: Schedule, before: PrimFunc, **symbols: int) -> None:
    """No race, no hang, and the same result; five orders of threads."""
    data = inputs(before, symbols)
    want = interp.run(before, data, symbols)
    for seed in range(5):
        for got, expected in zip(run_threads(sch.func, data, symbols, random.Random(seed)), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


# What it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis", [f"{kind}.{letter}" for kind in ("blockIdx", "threadIdx", "vthread") for letter in "xyz"]
)
def test_every_axis(axis: str) -> None:
    sch = add(4, 6)
    before, (i, j) = sch.func, loops(sch)
    sch.bind(j if axis.startswith("vthread") else i, axis)
    if axis.startswith("vthread"):
        sch.bind(i, "blockIdx.x")
    check(sch, before)


def test_the_example_of_tvm() -> None:
    """`B[i] = A[i] * 2`, split by 64 and bound to blockIdx.x and threadIdx.x."""
    a = te.placeholder((N,), "float32", "A")
    sch = Schedule(te.create_prim_func([a, te.compute((N,), lambda i: a[i] * 2.0, name="B")], "main"))
    before = sch.func
    (i,) = loops(sch, "B")
    outer, inner = sch.split(i, factors=[None, 64])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    for n in (1, 63, 64, 65, 200):
        check(sch, before, n=n)


def test_a_free_dim_on_groups() -> None:
    sch = add(N, 5)
    before, (i, j) = sch.func, loops(sch)
    sch.bind(i, "blockIdx.x")
    sch.bind(j, "threadIdx.x")
    check(sch, before, n=3)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("combine", [te.sum, te.max, te.min, te.prod])
def test_threads_combine_a_reduction(combine: Callable[..., Expr], length: int) -> None:
    sch = sums(columns=length, combine=combine)
    before, (i, k) = sch.func, loops(sch)
    sch.bind(i, "blockIdx.x")
    sch.bind(k, "threadIdx.x")
    check(sch, before)


@pytest.mark.parametrize("turns_outside", [False, True])
def test_threads_take_turns_in_a_reduction(turns_outside: bool) -> None:
    """Also where the turns stand outside of the threads, so that each of them is combined by itself."""
    sch = sums(columns=10)
    before, (_, k) = sch.func, loops(sch)
    turn, thread = sch.split(k, [None, 4])
    if not turns_outside:
        sch.reorder(thread, turn)
    sch.bind(loops(sch)[0], "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    check(sch, before)


def test_threads_of_several_rows_reduce_side_by_side() -> None:
    sch = sums(rows=4, columns=6)
    before, (i, k) = sch.func, loops(sch)
    outer, inner = sch.split(i, [None, 2])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.y")
    sch.bind(k, "threadIdx.x")
    check(sch, before)


def test_a_reduction_over_a_part_of_it_only() -> None:
    """The other part stays a loop around the threads; where the reduction begins, and only there, it is initialised."""
    sch = sums(columns=11)
    before, (i, k) = sch.func, loops(sch)
    _, thread, _ = sch.split(k, [None, 2, 3])
    sch.bind(i, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    check(sch, before)


def test_tiles_are_fetched_by_all_threads() -> None:
    sch = Schedule(dense(6, 8, 6, relu=False))
    before, c = sch.func, sch.get_block("y")
    i, j, k = sch.get_loops(c)
    by, ty = sch.split(i, [None, 4])  # tails: 6 is no multiple of 4
    bx, tx = sch.split(j, [None, 4])
    step, depth = sch.split(k, [None, 3])
    sch.reorder(by, bx, ty, tx, step, depth)
    for loop, axis in ((by, "blockIdx.y"), (bx, "blockIdx.x"), (ty, "threadIdx.y"), (tx, "threadIdx.x")):
        sch.bind(loop, axis)
    sch.cache_write(c, tx, "local")
    for name in ("x", "w"):
        fetch = sch.cache_read(c, name, step, "shared")
        element = sch.fuse(*sch.get_loops(fetch)[-2:])
        _, y, x = sch.split(element, [None, 4, 4])
        sch.bind(y, "threadIdx.y")
        sch.bind(x, "threadIdx.x")
    check(sch, before)
    (launch,) = launches(sch.func)
    assert launch.block == (4, 4, 1)


def test_parts_of_rfactor_in_shared_memory() -> None:
    sch = sums(columns=8)
    before, total = sch.func, sch.get_block("y")
    _, k = sch.get_loops(total)
    turn, thread = sch.split(k, [None, 4])
    parts = sch.rfactor(total, thread)
    sch.set_scope(parts, "shared")
    row, turn, thread = sch.get_loops(parts)
    sch.reorder(thread, turn)
    sch.bind(row, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    sch.bind(sch.get_loops(total)[-1], "threadIdx.x")
    check(sch, before)


def test_loops_of_one_axis_may_differ_in_extent() -> None:
    sch = Schedule(softmax(3, 6))
    before = sch.func
    (row, _) = loops(sch, "top")
    for name in ("e", "total", "y"):
        sch.reverse_compute_at(sch.get_block(name), row)
    sch.bind(row, "blockIdx.x")
    for name, threads in (("top", 4), ("e", 2), ("total", 3), ("y", 5)):
        *_, column = loops(sch, name)
        turn, thread = sch.split(column, [None, threads])
        sch.reorder(thread, turn)
        sch.bind(thread, "threadIdx.x")
    check(sch, before)
    assert launches(sch.func)[0].block == (5, 1, 1)


def test_each_nest_is_a_kernel_of_its_own() -> None:
    sch = Schedule(chain(N))
    before = sch.func
    for name in ("a", "b", "c"):
        sch.bind(loops(sch, name)[0], "blockIdx.x")
    assert len(launches(sch.func)) == 3
    check(sch, before, n=5)


def test_a_loop_outside_starts_the_kernel_again() -> None:
    sch = add(3, 4)
    before = sch.func
    sch.bind(loops(sch)[1], "threadIdx.x")
    (launch,) = launches(sch.func)
    assert [var.name for var in launch.scalars] == ["i0"]
    check(sch, before)


# What it refuses --------------------------------------------------------------------------------------------------


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(ScheduleError) as caught:
        work()
    return str(caught.value)


def refused(sch: Schedule, loop: LoopRef, axis: str, *texts: str, begin: PrimFunc | None = None, **names: str) -> None:
    """The call is refused with these words, changes nothing, and its hint can be followed (anew from `begin`)."""
    before = sch.func
    message = refusal(lambda: sch.bind(loop, axis))
    for text in (f"bind(loop {loop.name!r}", *texts):
        assert text in message
    assert sch.func is before
    follow(sch, message.partition("hint: ")[2], names, beginning=begin)


def test_an_unknown_axis() -> None:
    sch = add(4)
    refused(sch, loops(sch)[0], "blockidx.x", "thread='blockidx.x' is no axis of threads", "did you mean")


def test_a_loop_of_another_kind() -> None:
    sch = add(4, 4)
    i, j = loops(sch)
    sch.parallel(i)
    refused(sch, i, "blockIdx.x", "it is parallel already")
    refused(sch, j, "threadIdx.x", "it stands inside parallel loop")
    sch = add(4, 4)
    i, j = loops(sch)
    sch.vectorize(j)
    sch.bind(i, "blockIdx.x")
    refused(sch, i, "threadIdx.x", "it is bound to blockIdx.x already")


def test_parallel_loops_inside() -> None:
    sch = add(4, 4)
    i, j = loops(sch)
    sch.parallel(j)
    refused(sch, i, "blockIdx.x", "parallel loop 'i1' is inside: threads of a GPU start none of a CPU", "in place of")


def test_groups_hold_threads() -> None:
    sch = add(4, 4)
    i, j = loops(sch)
    sch.bind(j, "blockIdx.x")
    refused(
        sch,
        i,
        "threadIdx.x",
        "bound to blockIdx.x: groups hold threads, threads do not hold groups",
        "sch.reorder(i1, i0)",
    )
    sch = add(4, 4)
    i, j = loops(sch)
    sch.bind(i, "threadIdx.x")
    refused(sch, j, "blockIdx.x", "bound to threadIdx.x: groups hold threads", 'sch.bind(i1, "threadIdx.y")')


def test_one_axis_twice() -> None:
    sch = add(4, 4)
    i, j = loops(sch)
    sch.bind(i, "blockIdx.x")
    refused(
        sch, j, "blockIdx.x", "on the same nest is bound to blockIdx.x already", "both as one", begin=add(4, 4).func
    )
    sch = add(4, 4)
    i, j = loops(sch)
    sch.bind(i, "threadIdx.x")
    refused(
        sch,
        j,
        "threadIdx.x",
        "the inner one writes 'y': that is no tile in shared scope",
        "take another axis",
        begin=add(4, 4).func,
    )
    sch = add(4, 4)
    i, j = loops(sch)
    sch.bind(j, "threadIdx.x")
    refused(sch, i, "threadIdx.x", "the inner one writes 'y': that is no tile in shared scope", begin=add(4, 4).func)


def test_threads_of_no_constant_number() -> None:
    sch = add(N)
    refused(sch, loops(sch)[0], "threadIdx.x", "its extent is not constant", 'sch.bind(outer, "blockIdx.x")')


def test_groups_cannot_combine() -> None:
    sch = sums()
    refused(
        sch, loops(sch)[1], "blockIdx.x", "block 'y' reduces over it; groups cannot combine their parts", "threadIdx.x"
    )


def test_reductions_that_threads_cannot_combine() -> None:
    two = parse_func(
        """func f(x: float32[2, 4]) -> (m: float32[2], p: int64[2]):
  for i in range(2):
    for k in range(4):
      block both:
        vi = spatial(2, i)
        vk = reduce(4, k)
        reads x[vi, vk]
        writes m[vi], p[vi]
        init:
          m[vi] = -inf
          p[vi] = 0
        if x[vi, vk] > m[vi]:
          m[vi] = x[vi, vk]
          p[vi] = vk"""
    )
    sch = Schedule(two)
    refused(sch, loops(sch, "both")[1], "threadIdx.x", "is no sum, product, smallest or largest of values")


def test_outputs_inside_of_what_is_reduced() -> None:
    sch = sums()
    i, k = loops(sch)
    sch.decompose_reduction(sch.get_block("y"), i)
    sch.reorder(*reversed(loops(sch, "y")))
    k, i = loops(sch, "y")
    refused(
        sch, k, "threadIdx.x", "its output depends on loop 'i' inside", "sch.reorder(i, k)", i="sch.get_loops(y)[1]"
    )


def test_two_axes_of_one_reduction() -> None:
    sch = sums(columns=8)
    outer, inner = sch.split(loops(sch)[1], [2, 4])
    sch.bind(inner, "threadIdx.x")
    refused(
        sch, outer, "threadIdx.y", f"reduces over it and over loop {inner.name!r} inside, which is bound, too", "fuse"
    )


def test_a_result_in_private_memory() -> None:
    sch = sums()
    sch.cache_write(sch.get_block("y"), loops(sch)[0], "local")
    hint = 'sch.set_scope(y, "shared")'
    refused(sch, loops(sch)[1], "threadIdx.x", "in local scope, each thread its own", hint)


def test_iterations_that_need_one_another() -> None:
    text = """func f(x: float32[8]) -> (y: float32[9]):
  for i in range(8):
    block y:
      vi = spatial(8, i)
      reads x[vi], y[vi]
      writes y[vi + 1]
      y[vi + 1] = y[vi] + x[vi]"""
    sch = Schedule(parse_func(text))
    refused(sch, loops(sch)[0], "threadIdx.x", "its iterations may depend on one another through buffer 'y'")


def test_private_memory_that_is_used_outside() -> None:
    sch = Schedule(chain(8))
    sch.set_scope(sch.get_block("a"), "local")
    refused(sch, loops(sch, "a")[0], "threadIdx.x", "'a' in local scope is used outside of it, too")


def test_shared_memory_that_other_groups_use() -> None:
    sch = Schedule(chain(8))
    sch.set_scope(sch.get_block("a"), "shared")
    refused(sch, loops(sch, "a")[0], "blockIdx.x", "'a' in shared scope is used outside of it, too")
