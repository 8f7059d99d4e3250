"""Verdicts on which of two artifacts is faster."""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kedge
from kedge import comparison, te
from kedge.cli.app import tree
from kedge.comparison import ARMS, MIN_BLOCKS, compare, judge
from kedge.places import ThisMachine
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.types import Measurement, NoiseFloor, TimeOptions, Verdict
from support.commands import kedge_command


def blocks_of(ratio: float, spread: float, count: int = 12, seed: int = 0) -> list[dict[str, float]]:
    """Blocks of a machine that becomes slower all the time, whose times vary by `spread`."""
    rng = random.Random(seed)

    def one(drift: float, times: float) -> float:
        return 1e6 * drift * times * (1 + spread * rng.uniform(-1, 1))

    return [{arm: one(1 + 0.1 * i, ratio if arm == "b" else 1.0) for arm in ARMS} for i in range(count)]


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(0.8, 0.01, "faster"), (1.25, 0.01, "slower"), (1.0, 0.001, "same"), (1.5, 0.08, "slower")],
)
def test_verdicts(ratio: float, spread: float, verdict: str) -> None:
    found = judge(blocks_of(ratio, spread))
    assert found.verdict == verdict
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert found.noise <= 2 * spread + 0.01


def test_a_machine_that_becomes_slower_favours_neither() -> None:
    """The times of B overlap with those of A; the ratios of the blocks do not."""
    found = judge(blocks_of(1.1, 0.002))
    assert found.verdict == "slower" and abs(found.ratio - 1.1) < 0.005
    assert 0 < found.superiority < 0.5


def test_a_difference_within_the_noise_of_earlier_days_is_none() -> None:
    blocks = blocks_of(0.97, 0.002)
    assert judge(blocks).verdict == "faster"
    found = judge(blocks, known=0.05)
    assert found.verdict == "same" and found.noise == pytest.approx(0.05) and found.own_noise < 0.01


def test_wide_intervals_decide_nothing() -> None:
    blocks = [{"a": 1.0, "again": 1.0, "b": 1.0 + 0.3 * (i % 3)} for i in range(8)]
    assert judge(blocks).verdict == "inconclusive"


@given(st.lists(st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 4.0])] * 3), min_size=MIN_BLOCKS, max_size=20))
def test_turned_round_the_verdict_is_turned_round(times: list[tuple[float, float, float]]) -> None:
    there = judge([{"a": a, "again": again, "b": b} for a, again, b in times])
    # `again` keeps its distance to what is now the first.
    back = judge([{"a": b, "again": again / a * b, "b": a} for a, again, b in times])
    opposite = {"faster": "slower", "slower": "faster"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert back.ratio * there.ratio == pytest.approx(1)
    assert back.superiority + there.superiority == pytest.approx(1)


@pytest.fixture(scope="module")
def stats() -> Any:
    """scipy.stats, which takes seconds to import: not in every worker, and not while tests are collected."""
    return importlib.import_module("scipy.stats")


@given(times=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=MIN_BLOCKS, max_size=60))
def test_the_statistics_are_those_of_scipy(stats: Any, times: list[tuple[float, float]]) -> None:
    """The interval that of the binomial distribution's quantiles, the effect size that of Mann and Whitney's U."""
    found = judge([{"a": a, "again": a, "b": b} for a, b in times])
    logs = np.sort(np.log([b / a for a, b in times]))
    k = int(stats.binom.ppf(0.025, len(logs), 0.5))  # the fewest below the median that are not too unlikely
    low, high = logs[k - 1], logs[len(logs) - k]
    assert found.ratio == pytest.approx(np.exp(np.median(logs)))
    assert found.interval == pytest.approx((np.exp(low), np.exp(high)))
    a, b = zip(*times, strict=True)
    assert found.superiority == pytest.approx(stats.mannwhitneyu(a, b).statistic / len(times) ** 2)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """Of noise with a long tail, as timings have it."""
    rng, held = random.Random(7), 0
    for _ in range(1000):
        logs = [0.1 + rng.expovariate(20) - math.log(2) / 20 for _ in range(12)]  # of median 0.1
        low, high = judge([{"a": 1.0, "again": 1.0, "b": math.exp(log)} for log in logs]).interval
        held += low <= math.exp(0.1) <= high
    assert held >= 945, "12 blocks give 96.1 %"


def test_the_noise_of_this_machine_is_kept_in_a_file(tmp_path: Path) -> None:
    place = ThisMachine(tmp_path / "state" / "noise.json")
    assert place.noise(1, "cpu") is None
    place.keep_noise(0.01, 1, "cpu")
    place.keep_noise(0.03, 1, "cpu")
    place.keep_noise(0.5, 2, "cpu")
    found = ThisMachine(tmp_path / "state" / "noise.json").noise(1, "cpu")
    assert found is not None and found.stale == ""
    assert (found.relative, found.comparisons, found.num_threads) == (0.02, 2, 1)
    assert place.noise(1, "opencl:0") is None
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["noise.json"]
    (tmp_path / "state" / "noise.json").write_text("{")
    with pytest.raises(KedgeError, match=r"noise\.json"):
        place.noise(1, "cpu")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(kedge_command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def summed(length: int) -> kedge.Artifact:
    x = te.placeholder((length,), "float32", "x")
    i = te.reduce_axis(length, "i")
    y = te.compute((1,), lambda _: te.sum(te.exp(x[i]), axis=i), name="y")
    return kedge.compile(te.create_prim_func([x, y], "summed"), target="native")


class Still:
    """A device whose time stands still: each artifact takes what it is said to take."""

    name, device = "still", "cpu"

    def __init__(
        self, times_ns: dict[int, float], verdict: Verdict = Verdict.VALID, known: NoiseFloor | None = None
    ) -> None:
        self.times_ns, self.verdict, self.known = times_ns, verdict, known
        self.loaded_ones: list[int] = []
        self.kept: list[tuple[float, int, str]] = []
        self.open = 0

    @contextmanager
    def loaded(self, artifact: kedge.Artifact) -> Iterator[Still]:
        assert self.open == 0, "nothing else is there while it is timed"
        self.open += 1
        self.loaded_ones.append(id(artifact))
        yield self
        self.open -= 1

    def time(self, inputs: object, function: str, repeat: int, min_repeat_ms: float) -> Timing:
        samples = tuple(self.times_ns[self.loaded_ones[-1]] * (1 + 0.001 * i) for i in range(repeat))
        return Timing(Measurement(TimeOptions(), samples, 20, 3, verdict=self.verdict, reasons=("because",)))

    def noise(self, num_threads: int, on: str) -> NoiseFloor | None:
        assert (num_threads, on) == (3, "cpu")
        return self.known

    def keep_noise(self, relative: float, num_threads: int, on: str) -> None:
        self.kept.append((relative, num_threads, on))


@pytest.fixture(scope="module")
def pair() -> tuple[kedge.Artifact, kedge.Artifact]:
    return summed(8), summed(80)


def place_of(pair: tuple[kedge.Artifact, kedge.Artifact], ratio: float, *rest: Any) -> Still:
    return Still({id(pair[0]): 1e6, id(pair[1]): ratio * 1e6}, *rest)


def test_each_block_times_all_three_in_random_order(pair: tuple[kedge.Artifact, kedge.Artifact]) -> None:
    seen, place = [], place_of(pair, 3)
    found = compare(
        pair, ({}, {}), place, blocks=MIN_BLOCKS, seed=1,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    assert (found.verdict, found.device, round(found.ratio, 6)) == ("slower", "still", 3.0)
    assert "B is slower" in str(found) and "because" not in str(found)
    assert seen[0] == ("block 1 of 6", 0, 6) and len(seen) == MIN_BLOCKS
    blocks = [place.loaded_ones[i : i + 3] for i in range(0, len(place.loaded_ones), 3)]
    assert len(blocks) == MIN_BLOCKS and all(sorted(map(block.count, {*block})) == [1, 2] for block in blocks)
    assert len({tuple(block) for block in blocks}) > 1, "the order varies"
    assert place.kept == [(0.0, 3, "cpu")]
    assert found.to_json()["noise_kept"] is None and "nothing was known before" in str(found)


def test_what_is_known_of_the_noise_counts_unless_it_is_stale(pair: tuple[kedge.Artifact, kedge.Artifact]) -> None:
    known = NoiseFloor(0.2, 3, "cpu", "llvm", "kedge 0.1", "performance", 7, 1_700_000_000_000)
    found = compare(pair, ({}, {}), place_of(pair, 1.1, Verdict.VALID, known), blocks=MIN_BLOCKS)
    assert (found.verdict, round(found.noise, 6), found.own_noise) == ("same", 0.2, 0.0)
    assert "7 earlier comparisons, the last on 2023-11-14: 20.00%" in str(found)
    assert found.to_json()["noise_kept"]["comparisons"] == 7
    stale = replace(known, stale="the governor was performance, and is ondemand now")
    place = place_of(pair, 1.1, Verdict.VALID, stale)
    found = compare(pair, ({}, {}), place, blocks=MIN_BLOCKS)
    assert (found.verdict, found.noise) == ("slower", 0.0)
    assert "does not count: the governor was performance" in str(found)
    assert place.kept == [(0.0, 3, "cpu")], "it is measured again"


def test_a_comparison_stands_where_its_noise_cannot_be_kept(
    pair: tuple[kedge.Artifact, kedge.Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(pair, 3)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(place, "keep_noise", ThisMachine(tmp_path / "file" / "noise.json").keep_noise)
    found = compare(pair, ({}, {}), place, blocks=MIN_BLOCKS)
    assert found.verdict == "slower" and "the noise is not kept: cannot" in found.reasons[0]


def test_noise_that_cannot_be_read_is_told_before_much_was_timed(
    pair: tuple[kedge.Artifact, kedge.Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(pair, 3)
    (tmp_path / "noise.json").write_text('{"a": 1}')
    monkeypatch.setattr(place, "noise", ThisMachine(tmp_path / "noise.json").noise)
    with pytest.raises(KedgeError, match="cannot read the noise of this machine") as caught:
        compare(pair, ({}, {}), place, blocks=MIN_BLOCKS)
    assert "remove that file" in str(caught.value) and len(place.loaded_ones) == len(ARMS)


def test_suspect_timings_are_told(pair: tuple[kedge.Artifact, kedge.Artifact]) -> None:
    found = compare(pair, ({}, {}), place_of(pair, 3, Verdict.SUSPECT), blocks=MIN_BLOCKS)
    assert found.verdict == "slower" and found.reasons == ("18 of 18 timings are suspect, such as: because",)


def test_times_that_say_nothing_make_an_invalid_comparison(pair: tuple[kedge.Artifact, kedge.Artifact]) -> None:
    place = place_of(pair, 3, Verdict.INVALID)
    found = compare(pair, ({}, {}), place, blocks=MIN_BLOCKS)
    assert found.verdict == "invalid" and found.reasons == ("because",)
    assert place.kept == [], "what says nothing is not remembered"


def test_every_timing_on_this_machine_has_a_runner_of_its_own(tmp_path: Path) -> None:
    seen = []
    place, artifact = ThisMachine(tmp_path / "noise.json"), summed(8)
    for _ in range(2):
        with place.loaded(artifact) as model:
            seen.append(model._runner.hello.pid)
        assert not Path(f"/proc/{seen[-1]}").exists()
    assert len(set(seen)) == 2


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    few, many = tmp_path / "few.kdg", tmp_path / "many.kdg"
    summed(4_000).save(few)
    summed(40_000).save(many)
    done = run("compare", few, many, "--blocks", "6", "--repeat", "1", "--min-repeat-ms", "1", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said["blocks_ns"]) == 6 and set(said["blocks_ns"][0]) == set(ARMS)
    assert said["interval_95"][0] <= said["ratio"] <= said["interval_95"][1] and said["noise"] > 0
    assert said["noise_kept"] is None and said["device"] == "here"
    kept = ThisMachine(tmp_path / "kedge" / "noise.json").noise(1, "cpu")
    assert kept is not None and kept.relative == pytest.approx(said["noise_here"])


@pytest.mark.parametrize(("verdict", "status"), [("slower", 1), ("faster", 0), ("inconclusive", 0), ("invalid", 1)])
def test_the_command_fails_where_it_was_asked_to(
    verdict: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: replace(judge(blocks_of(1, 0.1)), verdict=verdict))
    summed(8).save(tmp_path / "x.kdg")
    path = str(tmp_path / "x.kdg")
    done = CliRunner().invoke(tree(), ["compare", path, path, "--fail-if-slower"])
    assert done.exit_code == status and "verdict: " in done.stdout


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="5 blocks show no interval"):
        compare((summed(8), summed(8)), ({}, {}), Still({}), blocks=5)
