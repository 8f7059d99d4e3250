"""How often an artifact is called when it is timed: it counts its calls itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kedge
from kedge import patterns as p
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import TensorType

COUNTER = """
#include "kedge_external.h"

int32_t counted(const kedge_external_call *call) {
  static int32_t calls;
  float *y = kedge_data(&call->outputs[0]);
  *y = (float)++calls;
  return 0;
}
"""
X = {"x": np.ones(1, "float32")}


@pytest.fixture(scope="module")
def artifact() -> kedge.Artifact:
    b = Builder("main")
    x = b.input("x", TensorType((1,), "float32"))
    model = kedge.Module({"main": b.finish({"y": b.call("relu", x)})})
    counted = kedge.External("counted", p.op("relu", p.wildcard("x")), source=COUNTER)
    return kedge.compile(model, externals=[counted])


@pytest.fixture(scope="module", params=["in this process", "in a runner"])
def model(artifact: kedge.Artifact, request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "in a runner":
        with kedge.local(threads=2) as device:
            yield device.load(artifact)
    else:
        with artifact.open(threads=2) as opened:
            yield opened


def calls_of(model: Any, timed: Any) -> tuple[Any, int]:
    """What `timed` gives, and how often it called the artifact."""
    before = model.run(X)["y"][0]
    found = timed()
    return found, int(model.run(X)["y"][0] - before - 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(1, 40),
    repeat=st.integers(1, 8),
    warmup=st.integers(0, 5),
    cooldown_interval_ms=st.sampled_from([0, 0.01]),
    repeats_to_cooldown=st.integers(1, 4),
    cache_flush_bytes=st.sampled_from([0, 1, 100_001]),
)
def test_the_options_say_how_often(model: Any, **options: Any) -> None:
    timing, calls = calls_of(model, lambda: model.time(X, min_repeat_ms=0, **options))
    assert calls == options["warmup"] + options["repeat"] * options["number"]
    assert (timing.number, timing.repeat) == (options["number"], options["repeat"])


def test_a_repeat_lasts_as_long_as_it_should(model: Any) -> None:
    timing, calls = calls_of(model, lambda: model.time(X, repeat=3, min_repeat_ms=0.2))
    assert timing.samples_ns[-1] * timing.number >= 200_000
    assert timing.number > 100 and calls > 3 * timing.number / 2


def test_a_repeat_of_flushed_caches_ends_with_its_time(model: Any) -> None:
    """Of calls alone it would be as many as above, and as many flushes, which take many times as long."""
    timing, _ = calls_of(model, lambda: model.time(X, repeat=3, min_repeat_ms=0.2, cache_flush_bytes=1 << 22))
    assert timing.number < 100


def test_flushed_caches_are_a_sample_a_call_unless_more_is_said(model: Any) -> None:
    timing, calls = calls_of(model, lambda: model.time(X, repeat=5, cache_flush_bytes=1 << 16))
    assert (timing.number, calls) == (1, 1 + 5)
    assert calls_of(model, lambda: model.time(X, repeat=1))[1] > 100


def test_a_timing_says_how_the_machine_was_before_and_after(model: Any) -> None:
    measurement = model.time(X, repeat=3, min_repeat_ms=0.1).measurement
    for health in (measurement.before, measurement.after):
        assert health is not None and health.load_1min is not None and health.memory_available_bytes


def test_a_profile_calls_as_often_as_a_timing(model: Any) -> None:
    profile, calls = calls_of(model, lambda: model.profile(X, repeat=4, number=3, warmup=2, min_repeat_ms=0))
    assert (calls, profile.timing.number) == (2 + 4 * 3, 3)
