"""Random schedules of small functions: whatever is not refused computes the same, and its trace replays."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.cache import KernelCache
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir import interp
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.structural import equal
from support.compiled import opened
from support.functions import assert_same, inputs
from support.races import race
from support.random_schedules import FUNCTIONS, scheduled


def check(name: str, sch: Schedule) -> None:
    """It is valid, computes the same in the interpreter, in any order, replays, and reads back."""
    func, symbols = FUNCTIONS[name]
    assert_same(func, sch.func, symbols)
    assert race(sch.func, symbols) is None
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)
    assert equal(parse_func(sch.show()), sch.func)


def check_compiled(name: str, sch: Schedule, cache: KernelCache) -> None:
    """Machine code computes the same."""
    func, symbols = FUNCTIONS[name]
    data = inputs(func, symbols)
    artifact = compile_prim_func(sch, "native", cache=cache)
    with opened(artifact) as model:
        got = model.run({buffer.name: array for buffer, array in zip(func.params, data, strict=False)})
    for have, want in zip(got.values(), interp.run(func, data, symbols), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-6, atol=1e-6)


RACING = """func f(x: float32[4]) -> (y: float32[4]):
  alloc t: float32[2]{scope}
  for i in {kind}(4):
    block t:
      vi = spatial(4, i)
      reads x[vi]
      writes t[vi // {apart}]
      t[vi // {apart}] = x[vi]
  for i in range(4):
    block y:
      vi = spatial(4, i)
      reads t[vi // 2]
      writes y[vi]
      y[vi] = t[vi // 2]"""


@pytest.mark.parametrize("kind", ["parallel", "vectorized"])
def test_races_are_found(kind):
    found = race(parse_func(RACING.format(scope="", kind=kind, apart=2)), {})
    assert found == f"iterations 0 and 1 of {kind} loop i meet in t[0]"
    assert race(parse_func(RACING.format(scope="", kind="range", apart=2)), {}) is None
    assert race(parse_func(RACING.format(scope="", kind=kind, apart=1)), {}) is None
    found = race(parse_func(RACING.format(scope=" in local", kind="parallel", apart=2)), {})
    assert found == "t in local scope is used outside of parallel loop i"


@given(name=st.sampled_from(sorted(FUNCTIONS)), rng=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_schedules(name, rng):
    check(name, scheduled(name, rng, 14))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_random_schedules_through_machine_code(name, tmp_path):
    cache = KernelCache(tmp_path)
    applied = 0
    for seed in range(6):
        sch = scheduled(name, random.Random(f"{name} {seed}"), 14)
        check_compiled(name, sch, cache)
        applied += len(sch.trace)
    assert applied > 50


#: The great run: 20,000 schedules in parts of 500, so that several workers share it (`pytest -m slow -n 2`).
PARTS, SEEDS_A_PART = 40, 500


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_very_many_long_random_schedules(part, tmp_path):
    cache = KernelCache(tmp_path)
    names = sorted(FUNCTIONS)
    for seed in range(part * SEEDS_A_PART, (part + 1) * SEEDS_A_PART):
        name = names[seed % len(names)]
        sch = scheduled(name, random.Random(seed), 30)
        check(name, sch)
        if seed % 50 == 0:
            check_compiled(name, sch, cache)
