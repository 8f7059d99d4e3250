"""The rule for dot products: right for every decision of its space, and taken where both operands lie along the sum."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.schedule.rules.dot import Dot
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.expr import Dim, Var, maximum
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import equal
from support.functions import assert_same
from support.prepared import assert_compiled, assert_prepared
from support.targets import AVX2, AVX512, NEON, SCALAR, Model

N, M, K = Var("n", lower=1), Var("m", lower=1), Var("k", lower=1)
RULE = Dot()


def turned(m: Dim, k: Dim, n: Dim, dtype: str = "float32") -> PrimFunc:
    """`relu(x @ w.T + b)`."""
    x, w, b = te.placeholder((m, k), dtype, "x"), te.placeholder((n, k), dtype, "w"), te.placeholder((n,), dtype, "b")
    axis = te.reduce_axis(k, "k")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, axis] * w[j, axis], axis), name="y")
    return te.create_prim_func([x, w, b, te.compute((m, n), lambda i, j: maximum(y[i, j] + b[j], 0.0), name="z")], "f")


def scores(h: Dim, m: Dim, k: int) -> PrimFunc:
    """Each of a batch by its own matrix."""
    q, t, axis = te.placeholder((h, m, k), "float32", "q"), te.placeholder((h, m, k), "float32", "t"), te.reduce_axis(k)
    y = te.compute((h, m, m), lambda c, i, j: te.sum(q[c, i, axis] * t[c, j, axis], axis), name="y")
    return te.create_prim_func([q, t, y], "scores")


CASES = {
    "one_row": (turned(1, 32, 11), {}),
    "one_column": (turned(9, 48, 1), {}),
    "both": (turned(6, 16, 7), {}),
    "half_vectors": (turned(2, 24, 3), {}),
    "free": (turned(N, 16, M), {"n": 5, "m": 6}),
    "batched": (scores(2, 5, 16), {}),
    "batched_free": (scores(N, M, 16), {"n": 2, "m": 3}),
    "end": (turned(3, 37, 6), {}),
    "short": (turned(2, 5, 6), {}),
    "free_depth": (turned(2, K, 7), {"k": 21}),
    "all_free": (turned(N, K, M), {"n": 3, "k": 35, "m": 5}),
    "double": (turned(3, 16, 5, "float64"), {}),
}


def scheduled(func: PrimFunc, target: Model, decisions: Mapping[str, Any] | None = None) -> Schedule:
    """`func` by this rule, whichever one comes first for it."""
    assert RULE.match(func, target)
    sch = Schedule(func)
    RULE.apply(sch, RULE.default(func, target) if decisions is None else decisions, target)
    return sch


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    """A cache of this module's own, so that no other test's kernels are used."""
    return KernelCache(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("target", [AVX2, AVX512, NEON])
@pytest.mark.parametrize("name", CASES)
def test_the_default_is_right_and_in_the_space(name, target, kernels: KernelCache):
    func, symbols = CASES[name]
    chosen, space = RULE.default(func, target), RULE.space(func, target)
    assert set(chosen) == set(space)
    assert all(value in space[key] for key, value in chosen.items()), chosen
    kernel = scheduled(func, target)
    assert_same(func, kernel.func, symbols)
    if target is AVX512:
        assert equal(Schedule.replay(func, json.loads(json.dumps(kernel.trace))).func, kernel.func)
        assert_prepared(kernel.func, func, symbols)
        assert_compiled(kernel.func, func, symbols, kernels)


@pytest.mark.parametrize("name", ["both", "free", "batched", "end"])
def test_decisions_are_right(name):
    """Dims that are tiled or not, tiles that fit or not, one vector of partial sums or several.

    Free dims see the whole space, others every tile, and in turn every number of vectors.
    """
    func, symbols = CASES[name]
    space = RULE.space(func, NEON)
    tiles = list(itertools.product(space["row"], space["column"]))
    if name == "free":
        cases = [(*tile, vectors) for tile in tiles for vectors in space["vectors"]]
    else:
        cases = [(*tile, vectors) for tile, vectors in zip(tiles, itertools.cycle(space["vectors"]), strict=False)]
        assert {vectors for *_, vectors in cases} == set(space["vectors"])
    for row, column, vectors in cases:
        decisions = {**RULE.default(func, NEON), "row": row, "column": column, "vectors": vectors, "columns": 3}
        assert_same(func, scheduled(func, NEON, decisions).func, symbols)


@pytest.mark.parametrize(
    ("m", "k", "n", "rule"),
    [(1, 1024, 1000, "dot"), (1, 1001, 1000, "dot"), (8, 1023, 333, "dot"), (1, K, 100, "dot"), (500, 511, 1, "dot"),
     (256, 256, 256, "matmul"), (197, 64, 197, "matmul"), (N, K, M, "matmul")],
)  # fmt: skip
def test_few_rows_or_columns_are_dot_products(m, k, n, rule):
    """More of them are worth turning an operand for."""
    kernel = schedule_func(turned(m, k, n), AVX512)
    assert kernel.rule == rule
    assert "refused" not in kernel.decisions


def test_declines():
    for func in (turned(4, 1, 8), turned(4, 16, 8, "int32")):
        assert schedule_func(func, AVX2).rule != "dot"
    assert not RULE.match(CASES["both"][0], SCALAR)


def test_wrong_decisions_are_refused():
    func = CASES["both"][0]
    for wrong in ({"row": 1}, {"column": 0}, {"rows": 0}, {"width": 3}, {"vectors": 3}, {"width": 1}):
        with pytest.raises(ScheduleError, match="dot products of block 'y'"):
            scheduled(func, AVX2, {**RULE.default(func, AVX2), **wrong})
