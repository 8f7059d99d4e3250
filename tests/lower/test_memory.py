"""The arena plan: live tensors never overlap, whatever the sizes are."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.graph.dims import evaluate, product, total
from kedge.compiler.lower.memory import Tenant, pack, plan_memory
from kedge.compiler.tir.expr import Dim, Var

N, H = Var("n", lower=0), Var("h", lower=0)
#: Sizes as programs have them: known, multiples of one symbol or of several, sums.
SIZES: list[Dim] = [
    0, 4, 64, 100, 4096,
    product((N, 4)), product((N, 40)), product((N, 4096)), product((N, H, 12)), product((N, H, 64)),
    product((N, total((H, 1)), 4)), total((product((N, 4)), 7)), product((H // 2, N, 4)), product((H // 2, N, 128)),
]  # fmt: skip
spans = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda span: (span[0], span[0] + span[1]))


@given(st.lists(st.tuples(st.sampled_from(SIZES), spans), max_size=14), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_live_tensors_never_overlap(given_tenants, n, h):
    tenants = [Tenant(size, *span) for size, span in given_tenants]
    plan = plan_memory(tenants)
    symbols = {N: n, H: h}
    places = [
        (evaluate(offset, symbols), evaluate(t.size, symbols)) for offset, t in zip(plan.offsets, tenants, strict=True)
    ]
    room = evaluate(plan.size, symbols)
    for offset, size in places:
        assert offset % 64 == 0
        assert 0 <= offset <= offset + size <= room
    for (a, (at_a, size_a)), (b, (at_b, size_b)) in combinations(zip(tenants, places, strict=True), 2):
        live_together = a.start <= b.end and b.start <= a.end
        if live_together and size_a and size_b:
            assert at_a + size_a <= at_b or at_b + size_b <= at_a


def test_tensors_of_a_free_batch_share_memory():
    chain = [Tenant(product((N, count)), step, step + 1) for step, count in enumerate((4096, 1024, 2048, 512, 40))]
    plan = plan_memory(chain)
    # 4096 and 1024 live together, and nothing later needs more.
    assert evaluate(plan.size, {N: 1}) == 4096 + 1024
    assert evaluate(plan.size, {N: 7}) == 7 * (4096 + 1024)


def test_known_sizes_come_first_and_stay_numbers():
    plan = plan_memory([Tenant(product((N, 64)), 0, 1), Tenant(100, 0, 1), Tenant(64, 2, 3)])
    assert plan.offsets[1:] == (0, 0)
    assert evaluate(plan.offsets[0], {N: 5}) == 128


def test_the_smallest_gap_is_taken():
    # At step 1 the second and fourth block are gone: a block of 3 goes into the gap of 4, not into that of 6.
    offsets, room = pack([8, 6, 5, 4, 3, 3], [(0, 9), (0, 0), (0, 9), (0, 0), (0, 9), (1, 1)])
    assert offsets == [0, 8, 14, 19, 23, 19]
    assert room == 26


def test_an_empty_plan():
    assert plan_memory([]).size == 0


@pytest.mark.parametrize("size", [1, 63, 64, 65])
def test_sizes_are_rounded_up(size):
    assert plan_memory([Tenant(size, 0, 0), Tenant(size, 0, 0)]).size == 2 * ((size + 63) // 64 * 64)
