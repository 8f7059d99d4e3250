"""Handles stay valid or are refused by name; traces replay; refusals leave everything as it was."""

import copy
import json

import pytest

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.structural import equal
from support.functions import assert_same, chain, dense, softmax

N = Var("n", lower=1)


def full_schedule(func):
    """A schedule that uses every primitive of the matrix product's road."""
    sch = Schedule(func)
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    i0, i1 = sch.split(i, [None, 2])
    j0, j1, j2 = sch.split(j, [None, 2, 4])
    sch.reorder(i0, j0, k, i1, j1, j2)
    copy = sch.cache_write(y, j0, "register")
    sch.reverse_compute_inline(sch.get_block("z"))
    init = sch.decompose_reduction(y, k)
    for block in (y, init, copy):
        rows, vectors, lanes = sch.get_loops(block)[-3:]
        sch.unroll(rows)
        sch.unroll(vectors)
        sch.vectorize(lanes)
    sch.annotate(k, "pragma", 2)
    sch.parallel(sch.fuse(i0, j0))
    return sch


def test_golden_and_meaning(golden):
    func = dense(N, 12, 16)
    sch = full_schedule(func)
    golden("full.txt", sch.show())
    for n in (1, 2, 5):
        assert_same(func, sch.func, {"n": n})


def test_trace_replays_through_json():
    sch = full_schedule(dense(N, 12, 16))
    again = Schedule.replay(dense(Var("m", lower=1), 12, 16), json.loads(json.dumps(sch.trace)))
    assert equal(again.func, sch.func)
    assert json.dumps(again.trace) == json.dumps(sch.trace)


def test_every_other_primitive_replays():
    func = softmax(N, 8)
    sch = Schedule(func)
    row, _ = sch.get_loops(sch.get_block("top"))
    for name in ("e", "total", "y"):
        sch.reverse_compute_at(sch.get_block(name), row)
    again = Schedule.replay(func, json.loads(json.dumps(sch.trace)))
    assert equal(again.func, sch.func)
    func = chain(N)
    sch = Schedule(func)
    sch.compute_inline(sch.get_block("a"))
    outer, inner = sch.split(sch.get_loops(sch.get_block("c"))[0], [None, 8])
    sch.compute_at(sch.get_block("b"), outer)
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    assert equal(Schedule.replay(func, json.loads(json.dumps(sch.trace))).func, sch.func)


def test_malformed_traces_are_refused():
    func = chain(8)
    with pytest.raises(ScheduleError, match="step 0: there is no primitive 'conjure'"):
        Schedule.replay(func, [{"primitive": "conjure", "args": {}}])
    with pytest.raises(ScheduleError, match="step 0: no step before it made handle 'l7'"):
        Schedule.replay(func, [{"primitive": "parallel", "args": {"loop": "l7"}}])
    with pytest.raises(ScheduleError, match="get_block"):
        Schedule.replay(func, [{"primitive": "get_block", "args": {"name": "nothing"}, "result": ["b0"]}])


def test_handles_follow_their_loop():
    sch = Schedule(dense(8, 12, 16))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    sch.reorder(k, j, i)
    sch.unroll(i)
    assert sch.get_loops(y) == (k, j, i)
    assert sch.get_block("y") is y


def test_deleted_handles_are_refused_by_name():
    sch = Schedule(chain(16))
    a = sch.get_block("a")
    (i,) = sch.get_loops(a)
    sch.split(i, [None, 4])
    with pytest.raises(
        ScheduleError, match=r"parallel\(loop 'i'\): it is gone: sch.split made loops 'i_0', 'i_1' of it"
    ):
        sch.parallel(i)
    sch.compute_inline(a)
    with pytest.raises(
        ScheduleError,
        match=r"get_loops\(block 'a'\): it is gone: sch.compute_inline put what it computes into block 'b'",
    ):
        sch.get_loops(a)


def test_handles_of_another_schedule_are_refused():
    one, two = Schedule(chain(16)), Schedule(chain(16))
    block = one.get_block("a")
    two.get_block("a")
    with pytest.raises(ScheduleError, match="belongs to another schedule"):
        two.get_loops(block)


def test_mixing_up_loops_and_blocks_is_refused():
    sch = Schedule(chain(16))
    block = sch.get_block("a")
    (loop,) = sch.get_loops(block)
    with pytest.raises(ScheduleError, match="it is a block, not the handle of a loop"):
        sch.parallel(block)
    with pytest.raises(ScheduleError, match="it is a loop, not the handle of a block"):
        sch.compute_inline(loop)


def test_refusals_change_nothing():
    sch = Schedule(dense(8, 12, 16))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    z = sch.get_block("z")
    func, trace = sch.func, sch.trace
    attempts = [
        lambda: sch.split(i, [3, 2]),
        lambda: sch.fuse(i, k),
        lambda: sch.parallel(k),
        lambda: sch.compute_inline(y),
        lambda: sch.cache_write(y, k, "register"),
        lambda: sch.reverse_compute_at(z, k),
        lambda: sch.decompose_reduction(z, j),
    ]
    for attempt in attempts:
        with pytest.raises(ScheduleError):
            attempt()
        assert sch.func is func
        assert sch.trace == trace
    sch.parallel(i)


def test_unknown_block_lists_the_known_ones():
    with pytest.raises(ScheduleError, match="the blocks are 'a', 'b', 'c'"):
        Schedule(chain(4)).get_block("d")


def test_annotations_are_what_a_text_gives_back():
    sch = Schedule(chain(4))
    sch.annotate(sch.get_block("a"), "tile", (4, (1, 2)))
    assert "# tile=[4, [1, 2]]" in sch.show()
    assert equal(parse_func(sch.show()), sch.func)
    assert equal(Schedule.replay(chain(4), json.loads(json.dumps(sch.trace))).func, sch.func)


@pytest.mark.parametrize("copied", [Schedule.copy, copy.copy, copy.deepcopy])
def test_a_copy_is_a_schedule_of_its_own(copied):
    func = dense(8, 12, 16)
    sch = Schedule(func)
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    outer, _ = sch.split(i, [None, 2])
    other = copied(sch)
    assert other.func is sch.func
    assert other.trace == sch.trace
    left, right = sch.split(j, [None, 4]), other.split(j, [2, 8])
    assert (sch.extent(left[1]).value, other.extent(right[1]).value) == (4, 8)
    other.parallel(outer)  # the handles of before stand for the same in both
    assert sch.get_loops(y)[0] is outer
    assert "parallel" in other.show()
    assert "parallel" not in sch.show()
    for one, strange in ((sch, right[0]), (other, left[0])):
        with pytest.raises(ScheduleError, match="the handle belongs to another schedule"):
            one.unroll(strange)
    assert_same(func, other.func)
    for each in (sch, other):
        assert equal(Schedule.replay(func, each.trace).func, each.func)
    with pytest.raises(ScheduleError, match=r"it is gone: sch.split made loops 'i_0', 'i_1' of it"):
        other.unroll(i)
    assert k in other.get_loops(y)
