"""What a block reads and writes, as declared and as it touches elements when it runs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.tir.expr import Expr, Load, Var, const, maximum, minimum
from kedge.compiler.tir.regions import access_regions
from kedge.compiler.tir.stmt import Buffer, Region, Store
from support.functions import evaluate

P, J, N = Var("i"), Var("j"), Var("n", lower=1)
POINTS = [dict(zip((P, J, N), values, strict=True)) for values in itertools.product(range(5), range(4), (1, 3, 7))]


TERMS = (
    P, J, P * 2 + 1, P * N + J, (P * 4 + J) // 3, (P * 4 + J) % 5, minimum(P, N - 1), maximum(P - J, 0),
)  # fmt: skip


def indices() -> st.SearchStrategy[Expr]:
    """Strided, quotients, remainders, clipped, with symbolic strides."""
    term = st.sampled_from(TERMS)
    scaled = st.builds(lambda a, c: a * c, term, st.integers(1, 3))
    return st.one_of(term, st.builds(lambda a, b: a + b, term, term), scaled)


def elements(region: Region, env: dict[Var, int]) -> set[tuple[int, ...]]:
    spans = []
    for part in region.ranges:
        start, extent = int(evaluate(part.start, env)), int(evaluate(part.extent, env))
        spans.append(range(start, start + extent))
    return set(itertools.product(*spans))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(indices(), indices()), min_size=1, max_size=3), indices())
def test_regions_are_exactly_what_is_touched(read, written):
    """Every access by iteration variables is one element, told exactly; equal accesses are told once."""
    x, y = Buffer("x", (N * 64, N * 64), "float32"), Buffer("y", (N * 64,), "float32")
    value: Expr = const(0.0, "float32")
    for at in (*read, read[0]):
        value = value + Load(x, at)
    reads, writes = access_regions(Store(y, (written,), value))
    assert len(reads) <= len(read)
    for env in POINTS:
        touched = {tuple(int(evaluate(index, env)) for index in at) for at in read}
        assert set().union(*(elements(region, env) for region in reads)) == touched
        (stored,) = writes
        assert elements(stored, env) == {(int(evaluate(written, env)),)}


@pytest.mark.parametrize("where", ["read", "write"])
def test_an_index_from_data_gives_its_whole_dim_and_no_other(where):
    x, k, y = Buffer("x", (N, 6), "float32"), Buffer("k", (9,), "int64"), Buffer("y", (N, 6), "float32")
    gathered = Load(k, (J,))
    place = (gathered, J * 2), (P, J)
    at, to = place if where == "read" else reversed(place)
    reads, writes = access_regions(Store(y, to, Load(x, at)))
    (moved,) = (region for region in (*reads, *writes) if region.buffer is (x if where == "read" else y))
    (index,) = (region for region in reads if region.buffer is k)
    for env in POINTS:
        column = 2 * env[J]
        assert elements(moved, env) == {(row, column) for row in range(env[N])}
        assert elements(index, env) == {(env[J],)}


def test_an_accumulator_is_no_read_where_there_is_an_init():
    x, y = Buffer("x", (4, 4), "float32"), Buffer("y", (4,), "float32")
    body = Store(y, (P,), Load(y, (P,)) + Load(x, (P, J)))
    with_init, _ = access_regions(body, Store(y, (P,), const(0.0, "float32")))
    without, _ = access_regions(body)
    assert {region.buffer for region in with_init} == {x}
    assert {region.buffer for region in without} == {x, y}
