"""Random functions under random schedules: machine code of every vector length computes what the interpreter does."""

import random

import numpy as np
import pytest

from kedge.compiler.cache import KernelCache
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.tir import interp
from support.compiled import opened
from support.random_functions import random_function, random_inputs, tiled

#: No masks in vectors, masks for some types, masks for all.
TARGETS = ("x86-64", "x86-64-v3", "native")


def check(seed: int, cache: KernelCache) -> int:
    """Compile and run what the seed stands for, on two threads; gives the number of steps of its schedule."""
    rng = random.Random(seed)
    func, symbols = random_function(rng)
    data = random_inputs(func, symbols, rng)
    sch = tiled(func, symbols, rng)
    with opened(compile_prim_func(sch, TARGETS[seed % len(TARGETS)], cache=cache), threads=2) as model:
        got = model.run({buffer.name: array for buffer, array in zip(func.params, data, strict=False)})
    for have, want in zip(got.values(), interp.run(func, data, symbols), strict=True):
        np.testing.assert_array_equal(have, want, err_msg=f"seed {seed}")
    return len(sch.trace)


@pytest.mark.parametrize("part", range(3))
def test_random_functions_under_random_schedules(part, tmp_path):
    cache = KernelCache(tmp_path)
    assert sum(check(seed, cache) for seed in range(12 * part, 12 * (part + 1))) > 100


#: The great run: 12,000 functions in parts of 300, so that several workers share it (`pytest -m slow -n 2`).
PARTS, SEEDS_A_PART = 40, 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_very_many_random_functions(part, tmp_path):
    cache = KernelCache(tmp_path)
    for seed in range(1000 + part * SEEDS_A_PART, 1000 + (part + 1) * SEEDS_A_PART):
        check(seed, cache)
