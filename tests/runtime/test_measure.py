"""Verdicts and statistics: pure, shared by agents and clients."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc.client.timing import Timing
from kedge.rpc.measure import POWERSAVE, is_disturbed, judge, mad, median_interval
from kedge.rpc.types import Health, Measurement, Pinning, TimeOptions, Verdict

QUIET = tuple(1e6 + 1e3 * (i * 7 % 11) for i in range(20))


def measured(samples: Sequence[float] = QUIET, number: int = 1, resolution_ns: int = 20, **rest: Any) -> Measurement:
    return Measurement(TimeOptions(number=number, repeat=len(samples)), tuple(samples), resolution_ns, 1, **rest)


def test_a_quiet_measurement_is_valid() -> None:
    calm = Health(load_1min=0.1, temperature_celsius=50.0, frequency_mhz=1500.0)
    assert judge(measured(before=calm, after=calm)) == (Verdict.VALID, [])
    assert judge(measured()) == (Verdict.VALID, [])


@pytest.mark.parametrize(
    ("measurement", "reason"),
    [
        (measured([]), "no samples were taken"),
        (measured([1.0, math.nan]), "not a number"),
        (measured([1.0, -1.0]), "negative"),
        (measured([0.0, 5.0]), "took no time"),
        (measured([100.0] * 5), "a sample of 100 ns is too short for a clock with steps of 20 ns"),
    ],
)
def test_invalid(measurement: Measurement, reason: str) -> None:
    for emulated in (False, True):
        verdict, reasons = judge(measurement, emulated=emulated)
        assert verdict is Verdict.INVALID
        assert len(reasons) == 1
        assert reason in reasons[0]


def test_calls_that_are_timed_one_by_one_have_to_last_one_by_one() -> None:
    """Where caches are flushed before each call, more calls in a sample do not help a coarse clock."""
    together = measured([100.0] * 5, number=1000)
    apart = replace(together, options=replace(together.options, cache_flush_bytes=1 << 20))
    assert judge(together) == (Verdict.VALID, [])
    assert judge(apart) == (Verdict.INVALID, ["a sample of 100 ns is too short for a clock with steps of 20 ns"])


@pytest.mark.parametrize(
    ("measurement", "reason"),
    [
        (measured([1000.0] * 5), "a sample of 1000 ns is short for a clock with steps of 20 ns"),
        (measured([1e6, 1e6]), "2 samples show no spread"),
        (measured([1e6, 2e6, 1e6, 2e6, 1.5e6]), "the samples spread by 33% (median absolute deviation)"),
        (
            measured([1e6 * (1 + i / 100) for i in range(12)]),
            "the samples drift by +8% from the first third to the last",
        ),
        (measured(before=Health(load_1min=0.9)), "the machine was busy before (load 0.90 on 1 cores)"),
        (measured(after=Health(temperature_celsius=90.0)), "the device was hot (90 °C)"),
        (
            measured(before=Health(throttled=("heat",)), after=Health(throttled=("heat", "under-voltage"))),
            "the device was slowed down (heat, under-voltage)",
        ),
        (
            measured(after=Health(problems=("9 MiB of memory are free, less than 32",))),
            "the device was not fit to measure (9 MiB of memory are free, less than 32)",
        ),
        (
            measured(before=Health(governor="performance"), after=Health(governor="ondemand")),
            "its governor changed from performance to ondemand",
        ),
        (
            measured(before=Health(frequency_mhz=1500.0), after=Health(frequency_mhz=600.0)),
            "its clock fell from 1500 to 600 MHz",
        ),
    ],
)
def test_suspect(measurement: Measurement, reason: str) -> None:
    assert judge(measurement) == (Verdict.SUSPECT, [reason])
    verdict, reasons = judge(measurement, emulated=True)
    assert (verdict, reasons[1:]) == (Verdict.EMULATED, [reason])


@pytest.mark.parametrize(
    ("cores", "threads", "load", "verdict"),
    [
        (4, 1, 0.9, Verdict.VALID),
        (2, 1, 1.4, Verdict.VALID),  # one core is taken, and the other is enough
        (2, 1, 1.6, Verdict.SUSPECT),
        (2, 2, 0.9, Verdict.VALID),
        (2, 2, 1.1, Verdict.SUSPECT),
        (64, 1, 60.0, Verdict.VALID),
        (64, 64, 60.0, Verdict.SUSPECT),
        (2, 0, 1.1, Verdict.SUSPECT),  # as many threads as cores
        (2, 8, 0.9, Verdict.VALID),
        (0, 1, 0.6, Verdict.SUSPECT),
    ],
)
def test_a_load_that_leaves_cores_for_the_threads(cores: int, threads: int, load: float, verdict: Verdict) -> None:
    measurement = replace(measured(before=Health(load_1min=load)), num_threads=threads)
    assert judge(measurement, num_cores=cores)[0] is verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.02, Verdict.VALID), (None, Verdict.SUSPECT), (0.5, Verdict.SUSPECT)])
def test_the_load_of_the_last_minute_says_nothing_of_cores_that_were_watched(
    share: float | None, verdict: Verdict
) -> None:
    """It may be that of the measurements before, whoever else was on the cores."""
    busy = measured(before=Health(load_1min=3.0), pinning=Pinning((2, 3), others_share=share))
    found, reasons = judge(replace(busy, num_threads=2), num_cores=4)
    assert found is verdict and len(reasons) == (verdict is Verdict.SUSPECT)
    assert all("busy before" in reason if share is None else "others used" in reason for reason in reasons)


def test_reasons_stay_short_on_machines_with_many_cores() -> None:
    busy = measured(pinning=Pinning(tuple(range(512)), others_share=0.2))
    _, (reason,) = judge(replace(busy, num_threads=512), num_cores=512)
    assert reason == "others used 20% of its cores (0-511) meanwhile"


@pytest.mark.parametrize(
    ("health", "disturbed"),
    [
        (Health(load_1min=99.0, governor="powersave", throttled=(POWERSAVE,)), False),
        (Health(temperature_celsius=86.0), True),
        (Health(temperature_celsius=84.0), False),
        (Health(throttled=(POWERSAVE, "heat")), True),
        (Health(problems=("9 MiB of its disk are free",)), True),
        (Health(), False),
    ],
)
def test_what_a_measurement_waits_for(health: Health, disturbed: bool) -> None:
    assert is_disturbed(health) is disturbed


def test_a_clock_that_rises_or_is_unknown_is_no_reason() -> None:
    for before, after in ((600.0, 1500.0), (None, 600.0), (1500.0, None)):
        health = {"before": Health(frequency_mhz=before), "after": Health(frequency_mhz=after)}
        assert judge(measured(**health))[0] is Verdict.VALID


# ---- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "expected"), [(5, None), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))])
def test_the_interval_is_the_published_one(n: int, expected: tuple[int, int] | None) -> None:
    """Order statistics (k, n - k + 1) for 95 %: the values of the usual sign-test tables."""
    assert median_interval([float(i) for i in range(1, n + 1)]) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=60), st.floats(0.5, 0.999))
def test_the_interval_has_the_confidence_it_claims(samples: list[float], confidence: float) -> None:
    interval = median_interval(samples, confidence)
    ordered, n = sorted(samples), len(samples)

    def coverage(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    if interval is None:
        assert coverage(1) < confidence
        return
    fitting = [k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= confidence - 1e-12]
    assert interval == (ordered[fitting[-1] - 1], ordered[n - fitting[-1]])


def test_the_interval_of_very_many_samples() -> None:
    interval = median_interval([float(i) for i in range(5000)])
    assert interval is not None
    assert interval[0] == pytest.approx(2500 - 0.98 * math.sqrt(5000), abs=2)
    with pytest.raises(ValueError, match="confidence is 1"):
        median_interval([1.0], 1)


def test_mad() -> None:
    assert mad([1, 2, 3, 4, 100]) == 1


@pytest.fixture(scope="module")
def stats() -> Any:
    """scipy.stats, which takes seconds to import: not in every worker, and not while tests are collected."""
    return importlib.import_module("scipy.stats")


@given(samples=st.lists(st.floats(1, 1e12), min_size=2, max_size=60))
def test_the_statistics_are_those_of_numpy_and_scipy(stats: Any, samples: list[float]) -> None:
    timing = Timing(Measurement(TimeOptions(), tuple(samples)))
    milliseconds = np.array(samples) / 1e6
    said = (timing.median_ms, timing.mean_ms, timing.std_ms, timing.min_ms, timing.max_ms)
    wanted = (np.median, np.mean, lambda x: np.std(x, ddof=1), np.min, np.max)
    assert said == pytest.approx([one(milliseconds) for one in wanted], rel=1e-9, abs=1e-9 * milliseconds.max())
    assert timing.mad_ms == pytest.approx(stats.median_abs_deviation(milliseconds, scale=1), rel=1e-9, abs=1e-12)
    k = int(stats.binom.ppf(0.025, len(samples), 0.5))
    ordered = np.sort(milliseconds)
    wanted_interval = (ordered[k - 1], ordered[-k]) if k > 0 else None
    assert timing.interval_ms() == (None if k == 0 else pytest.approx(wanted_interval))


def test_timing() -> None:
    verdict, reasons = judge(measured([2e6, 1e6, 3e6]))
    timing = Timing(
        Measurement(TimeOptions(number=4, repeat=3), (2e6, 1e6, 3e6), 20, 2, verdict=verdict, reasons=tuple(reasons))
    )
    assert (timing.median_ms, timing.mean_ms, timing.min_ms, timing.max_ms) == (2.0, 2.0, 1.0, 3.0)
    assert (timing.std_ms, timing.mad_ms, timing.number, timing.repeat) == (1.0, 1.0, 4, 3)
    assert timing.interval_ms() is None
    assert timing.verdict == "suspect"
    assert timing.reasons == ("the samples spread by 50% (median absolute deviation)",)
    tree = json.loads(json.dumps(timing.to_json()))
    assert tree["samples_ns"] == [2e6, 1e6, 3e6]
    assert (tree["median_ms"], tree["interval_95_ms"], tree["protocol"]["number"]) == (2.0, None, 4)


def test_timing_without_samples_can_be_shown() -> None:
    timing = Timing(Measurement(TimeOptions(), (), verdict=Verdict.INVALID, reasons=("no samples were taken",)))
    assert timing.to_json()["median_ms"] is None
    assert "no samples" in str(timing)


def test_printed(golden: Any) -> None:
    options = TimeOptions(12, 20, 0, 1, 100, 5_000_000, 4, 64 << 20)
    slow = Timing(Measurement(options, tuple(1.2e6 + i * 1e3 for i in range(20)), 20, 2, verdict=Verdict.VALID))
    fast = Timing(
        Measurement(TimeOptions(number=900), (812.5, 811.0), 20, 1, verdict=Verdict.SUSPECT, reasons=("few",))
    )
    golden("timing.txt", f"{slow}\n\n{fast}")
