"""Random schedules for GPUs: what is not refused computes the same, in any order of threads, without races."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.gpu.ir import Barrier, walk
from kedge.compiler.codegen.gpu.ptx import emit_ptx_ir
from kedge.compiler.codegen.machine import LOCK, parse_ir
from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir import interp
from kedge.compiler.tir.structural import equal
from support import opencl
from support.functions import assert_same, inputs
from support.gpu_schedules import GPU_FUNCTIONS, gpu_scheduled
from support.gpu_threads import launches, run_threads


def check(name: str, rng: random.Random, steps: int) -> Schedule | None:
    """A random schedule whose kernels race nowhere, all of whose threads meet at each barrier, and that is right.

    None where it is refused as code for a GPU.
    """
    func, symbols = GPU_FUNCTIONS[name]
    sch = gpu_scheduled(name, rng, steps)
    assert_same(func, sch.func, symbols)
    assert equal(Schedule.replay(func, sch.trace).func, sch.func)
    data = inputs(func, symbols)
    try:
        found = run_threads(sch.func, data, symbols, rng)
    except CodegenError as error:
        assert error.hint or "reduces over" in str(error) or "condition on data" in str(error)
        return None
    for got, want in zip(found, interp.run(func, data, symbols), strict=True):
        np.testing.assert_array_equal(got, want)
    return sch


def check_texts(sch: Schedule, name: str, cache: KernelCache) -> None:
    """PTX's LLVM IR is valid, and OpenCL computes the same."""
    func, symbols = GPU_FUNCTIONS[name]
    with LOCK:
        parse_ir(emit_ptx_ir(launches(sch.func), "sm_75"))
    data = inputs(func, symbols)
    for got, want in zip(opencl.run(sch, data, cache), interp.run(func, data, symbols), strict=True):
        np.testing.assert_array_equal(got, want)


@given(name=st.sampled_from(sorted(GPU_FUNCTIONS)), rng=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_schedules(name: str, rng: random.Random) -> None:
    check(name, rng, 12)


@pytest.mark.parametrize("name", sorted(GPU_FUNCTIONS))
def test_a_random_schedule_on_opencl(name: str, kernels: KernelCache) -> None:
    """The one with most barriers among a few: each takes OpenCL a second."""
    found = (check(name, random.Random(f"{name} {seed}"), 12) for seed in range(20))
    most = max((sch for sch in found if sch is not None), key=_busy)
    check_texts(most, name, kernels)


def _busy(sch: Schedule) -> tuple[int, int]:
    """How much is done together in it: barriers, then steps; of few launches."""
    made = launches(sch.func)
    barriers = sum(isinstance(each, Barrier) for launch in made for each in walk(launch.body))
    return barriers if len(made) <= 2 else 0, len(sch.trace)


#: The great run: 10,000 schedules in parts of 250 (`pytest -m slow -n 2`).
PARTS, SEEDS_A_PART = 40, 250


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_very_many_random_schedules(part: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = KernelCache(tmp_path_factory.mktemp("kernels"))
    names = sorted(GPU_FUNCTIONS)
    for seed in range(part * SEEDS_A_PART, (part + 1) * SEEDS_A_PART):
        name, rng = names[seed % len(names)], random.Random(f"gpu {seed}")
        sch = check(name, rng, rng.choice([6, 12, 20]))
        if sch is not None and seed % 25 == 0:
            check_texts(sch, name, cache)
