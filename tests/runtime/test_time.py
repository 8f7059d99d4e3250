"""kedge_time under a clock that only the kernel moves: the meaning of every option."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc import abi
from support import native

PROGRAM = Path(__file__).with_name("programs") / "time_semantics.c"
MS = 1_000_000


def run(
    number: int = 1,
    repeat: int = 1,
    min_repeat_ns: int = 0,
    warmup: int = 0,
    limit_zero: int = 100,
    cooldown_interval_ns: int = 0,
    repeats_to_cooldown: int = 1,
    cache_flush_bytes: int = 0,
    kernel_ns: int = 100,
    cancel_at_call: int = 0,
    cancel_at_sleep: int = 0,
    profile: int = 0,
) -> Any:
    arguments = list(map(str, locals().values()))
    program = native.compile_c([PROGRAM, native.library()])  # which has a clock of its own: the library's is not taken
    output = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout
    return json.loads(output)


def test_number_and_repeat() -> None:
    result = run(number=5, repeat=3, warmup=2)
    assert result["calls"] == 2 + 5 * 3
    assert result["samples"] == [100.0] * 3  # of one call
    assert (result["number"], result["resolution"], result["status"]) == (5, 10, abi.OK)


def test_number_grows_to_the_least_time_of_a_repeat() -> None:
    result = run(repeat=4, min_repeat_ns=10_000, kernel_ns=100)
    # 1 call lasts 100 ns, so 101 are tried; all later repeats use them at once.
    assert result["number"] == 101
    assert result["calls"] == 1 + 4 * 101
    assert result["samples"] == [100.0] * 4


def test_number_grows_at_least_by_a_factor() -> None:
    """Where the estimate falls short by a hair, growth by a few calls would go on for ever."""
    result = run(number=99, repeat=1, min_repeat_ns=10_000, kernel_ns=100)
    assert result["number"] == int(99 * 1.618 + 1)


def test_a_number_that_suffices_stays() -> None:
    assert run(number=7, repeat=2, min_repeat_ns=700)["calls"] == 14


def test_a_kernel_that_takes_no_time() -> None:
    result = run(repeat=2, min_repeat_ns=1000, limit_zero=3, kernel_ns=0)
    assert result["status"] == abi.OK
    assert result["samples"] == [0.0, 0.0]
    # Three attempts for each sample, growing between them: 1, 2, 4; then 4, 7, 12.
    assert result["calls"] == (1 + 2 + 4) + (4 + 7 + 12)


def test_cooldown_between_groups_but_never_after_the_warmup() -> None:
    result = run(number=10, repeat=5, warmup=3, cooldown_interval_ns=MS, repeats_to_cooldown=2)
    assert result["calls_at_sleep"] == [3 + 20, 3 + 40]  # after repeats 2 and 4, not at the end
    assert result["slept"] == 2 * MS


def test_a_long_cooldown_is_slept_in_slices() -> None:
    result = run(repeat=2, cooldown_interval_ns=23 * MS)
    assert result["slept"] == 23 * MS
    assert len(result["calls_at_sleep"]) == 5


def test_caches_are_flushed_before_every_call_and_that_is_not_timed() -> None:
    result = run(number=5, repeat=2, warmup=1, cache_flush_bytes=1 << 16)
    assert result["order"] == "c" + "fc" * 10
    assert result["samples"] == [100.0] * 2
    assert run(number=5, repeat=2, warmup=1)["order"] == "c" * 11


def test_with_flushed_caches_a_repeat_lasts_as_long_with_the_flushes() -> None:
    """Whoever asks for 50 ms of a call of microseconds must not wait for minutes of flushing."""
    result = run(repeat=4, min_repeat_ns=1_000_000, cache_flush_bytes=1 << 16)
    assert (result["number"], result["calls"]) == (10, 1 + 4 * 10)
    assert result["samples"] == [100.0] * 4


@settings(max_examples=50, deadline=None)
@given(
    number=st.integers(1, 9),
    repeat=st.integers(1, 6),
    min_repeat_ns=st.sampled_from([0, 1, 400, 401, 2_345]),
    warmup=st.integers(0, 3),
    limit_zero=st.integers(0, 2),
    cooldown_interval_ns=st.sampled_from([0, 1, 12 * MS]),
    repeats_to_cooldown=st.integers(1, 4),
    cache_flush_bytes=st.sampled_from([0, 1, 1 << 12]),
    kernel_ns=st.sampled_from([0, 1, 100]),
)
def test_the_artifact_is_called_as_the_options_say(**options: int) -> None:
    """Whatever they are: how often, in which order with flushes and pauses, and what comes of it."""
    order, number = wanted_order(**options)
    result = run(**options)
    assert (result["order"], result["number"]) == (order, number)
    assert (result["calls"], len(result["samples"])) == (order.count("c"), options["repeat"])
    assert result["samples"] == [float(options["kernel_ns"])] * options["repeat"]
    assert (
        result["slept"] == (options["repeat"] - 1) // options["repeats_to_cooldown"] * options["cooldown_interval_ns"]
    )


def wanted_order(**o: int) -> tuple[str, int]:
    """What kedge.h promises, said once more: what happens, a letter for each thing, and the calls of a repeat."""
    call = "fc" if o["cache_flush_bytes"] else "c"
    pause = "s" * math.ceil(o["cooldown_interval_ns"] / (5 * MS))
    order, number = "c" * o["warmup"], o["number"]
    for repeat in range(o["repeat"]):
        if repeat > 0 and repeat % o["repeats_to_cooldown"] == 0:
            order += pause
        zeros = 0
        while True:
            order += call * number
            lasted = number * o["kernel_ns"] * (1001 if o["cache_flush_bytes"] else 1)
            zeros += lasted == 0
            if lasted >= o["min_repeat_ns"] or (lasted == 0 and zeros >= o["limit_zero"]):
                break
            by_time = o["min_repeat_ns"] / (lasted / number) + 1 if lasted else 0
            number = int(max(by_time, number * 1.618 + 1))
    return order, number


def test_a_profile_times_every_step() -> None:
    result = run(number=5, repeat=3, warmup=2, profile=1)
    assert result["calls"] == 2 + 5 * 3
    assert result["samples"] == [100.0] * 3
    assert result["steps"] == [25.0, 75.0] * 3  # of one call, without those of the warm-up


def test_a_profile_of_flushed_caches_times_the_steps_alone() -> None:
    result = run(number=5, repeat=3, warmup=2, profile=1, cache_flush_bytes=1 << 16)
    assert result["order"].startswith("cc" + "fc" * 15)  # then come the reads of memory, which are loops as well
    assert (result["samples"], result["steps"]) == ([100.0] * 3, [25.0, 75.0] * 3)


def test_steps_of_a_sample_that_was_too_short_are_forgotten() -> None:
    result = run(repeat=2, min_repeat_ns=10_000, profile=1)
    assert (result["number"], result["steps"]) == (101, [25.0, 75.0] * 2)


def test_a_profile_needs_room_for_its_steps() -> None:
    assert run(profile=2)["status"] == abi.E_ARGUMENT


def test_cancel_in_a_profile() -> None:
    result = run(number=10, repeat=10, cancel_at_call=15, profile=1)
    assert (result["status"], result["steps"]) == (abi.E_CANCELLED, [25.0, 75.0])


def test_cancel_between_calls() -> None:
    result = run(number=10, repeat=10, cancel_at_call=15)
    assert result["status"] == abi.E_CANCELLED
    assert result["calls"] == 15
    assert result["samples"] == [100.0]  # what was whole


def test_cancel_in_the_warmup() -> None:
    result = run(warmup=100, cancel_at_call=5)
    assert (result["status"], result["calls"], result["samples"]) == (abi.E_CANCELLED, 5, [])


def test_cancel_while_cooling_down() -> None:
    result = run(repeat=2, cooldown_interval_ns=3600 * 1000 * MS, cancel_at_sleep=2)
    assert result["status"] == abi.E_CANCELLED
    assert len(result["calls_at_sleep"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"number": 0}, {"repeat": 0}, {"min_repeat_ns": -1}, {"warmup": -1}, {"limit_zero": -1},
        {"cooldown_interval_ns": -1}, {"repeats_to_cooldown": 0}, {"cache_flush_bytes": -1},
    ],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, int]) -> None:
    result = run(**options)
    assert (result["status"], result["calls"]) == (abi.E_ARGUMENT, 0)
