"""Software pipelining: stages on different iterations, versions of what lies between them."""

from __future__ import annotations

import pytest
from schedule.test_blocks import loops_of, refused

from kedge.compiler import te
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.structural import equal
from support.functions import assert_same, chain, dense

N = Var("n", lower=1)


def fetched(size: int = 20, tile: int = 4, scope: str = "local") -> tuple[Schedule, LoopRef]:
    """A matrix product that fetches a part of both operands per step of its sum, and the loop over these steps."""
    sch = Schedule(dense(N, size, 6))
    y = sch.get_block("y")
    i, j, k = sch.get_loops(y)
    steps, inner = sch.split(k, [None, tile])
    sch.reorder(i, steps, j, inner)
    sch.cache_read(y, "w", steps, scope)
    sch.cache_read(y, "x", steps, scope)
    return sch, steps


@pytest.mark.parametrize("stages", [[0, 0, 1], [0, 1, 1], [0, 1, 2], [0, 0, 3]])
def test_stages(stages):
    sch, steps = fetched()
    before = sch.func
    sch.software_pipeline(steps, stages)
    for n in (1, 3):
        assert_same(before, sch.func, {"n": n})
    apart = stages[2] - stages[1]
    assert (f"w_local: float32[{apart + 1}, 4, 6]" if apart else "w_local: float32[4, 6]") in sch.show()
    assert equal(Schedule.replay(dense(N, 20, 6), sch.trace).func, sch.func)


def test_golden(golden):
    sch, steps = fetched(12)
    sch.software_pipeline(steps, [0, 0, 1])
    golden("software_pipeline.txt", sch.show())


def test_more_can_be_done_afterwards():
    sch, steps = fetched()
    before = sch.func
    sch.software_pipeline(steps, [0, 0, 1])
    sch.unroll(steps)
    sch.vectorize(sch.get_loops(sch.get_block("w_local"))[-1])
    row, *_ = sch.get_loops(sch.get_block("y"))
    sch.parallel(row)
    assert_same(before, sch.func, {"n": 2})


def test_a_tail_is_fetched_as_far_as_there_is_one():
    sch, steps = fetched(18)
    before = sch.func
    sch.software_pipeline(steps, [0, 1, 2])
    assert_same(before, sch.func, {"n": 2})


def test_refusals():
    sch, steps = fetched()
    before = sch.func
    for stages, reason in [
        ([0, 1], "its body has 3 statements (loop 'c1', loop 'c0', loop 'j'), and each takes one"),
        ([0, 1, 0], "stages [0, 1, 0]: they must begin with 0, never fall"),
        ([1, 1, 2], "they must begin with 0, never fall, and end above 0"),
        ([0, 0, 0], "they must begin with 0, never fall, and end above 0"),
        ([0, 0, 5], "it has 5 iterations, too few for 6 stages"),
    ]:
        refused(lambda s=stages: sch.software_pipeline(steps, s), "software_pipeline(loop 'k_0')", reason)
        assert sch.func is before
    free = Schedule(chain(N))
    refused(lambda: free.software_pipeline(loops_of(free, "a")[0], [0]), "its body is one statement")
    (i,) = loops_of(free, "c")
    free.compute_at(free.get_block("b"), i)
    refused(lambda: free.software_pipeline(i, [0, 1]), "its extent n is not constant", "sch.split(i, [None, 8])")
    whole = Schedule(chain(8))
    (i,) = loops_of(whole, "c")
    whole.compute_at(whole.get_block("b"), i)
    refused(lambda: whole.software_pipeline(i, [0, 1]), "block 'b' does not fill all of buffer 'b' in each iteration")
    x = te.placeholder((8,), "float32", "x")
    a = te.compute((8,), lambda i: x[i] + 1.0, name="a")
    both = Schedule(te.create_prim_func([x, a, te.compute((8,), lambda i: a[i] * 2.0, name="b")], "f"))
    (i,) = loops_of(both, "a")
    both.reverse_compute_at(both.get_block("b"), i)
    refused(lambda: both.software_pipeline(i, [0, 1]), "the caller uses 'a', too, outside of the loop")
