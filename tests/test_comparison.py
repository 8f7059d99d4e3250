"""Verdicts on which of two artifacts is faster."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kedge
from kedge import comparison, te
from kedge.cli.app import app
from kedge.comparison import ARMS, MIN_BLOCKS, Floors, compare, judge
from kedge.rpc.client.timing import Timing
from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.types import Measurement, TimeOptions, Verdict
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
    assert judge(blocks, floors=[0.05, 0.06, 0.01]).verdict == "same"


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


def test_the_noise_of_a_device_is_kept(tmp_path: Path) -> None:
    floors = Floors.of(tmp_path, "bench/1")
    assert floors.found == ()
    floors.keep(0.01)
    Floors.of(tmp_path, "bench/1").keep(0.02)
    assert Floors.of(tmp_path, "bench/1").found == (0.01, 0.02)
    assert Floors.of(tmp_path, "other").found == ()
    assert [path.name for path in tmp_path.iterdir()] == ["bench_1.json"]
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(KedgeError, match=r"other\.json"):
        Floors.of(tmp_path, "other")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(kedge_command(*arguments), capture_output=True, text=True, timeout=120, check=False)


def summed(length: int) -> kedge.Artifact:
    x = te.placeholder((length,), "float32", "x")
    i = te.reduce_axis(length, "i")
    y = te.compute((1,), lambda _: te.sum(te.exp(x[i]), axis=i), name="y")
    return kedge.compile(te.create_prim_func([x, y], "summed"), target="native")


class Still:
    """A device whose time stands still: each artifact takes what it is said to take."""

    def __init__(self, times_ns: dict[int, float], verdict: Verdict = Verdict.VALID) -> None:
        self.times_ns, self.verdict = times_ns, verdict
        self.loaded: list[int] = []

    def load(self, artifact: kedge.Artifact) -> Still:
        self.loaded.append(id(artifact))
        return self

    def time(self, inputs: object, *, function: str, repeat: int, min_repeat_ms: float) -> Timing:
        samples = tuple(self.times_ns[self.loaded[-1]] * (1 + 0.001 * i) for i in range(repeat))
        return Timing(Measurement(TimeOptions(), samples, verdict=self.verdict, reasons=("because",)))


def test_each_block_times_all_three_in_random_order(tmp_path: Path) -> None:
    few, many, seen = summed(8), summed(80), []
    place = Still({id(few): 1e6, id(many): 3e6})
    found = compare(
        (few, many), ({}, {}), place, blocks=MIN_BLOCKS, seed=1, floors=Floors.of(tmp_path, "here"), device="here",
        progress=lambda what, done, total: seen.append((what, done, total)),
    )  # fmt: skip
    assert (found.verdict, found.device, round(found.ratio, 6)) == ("slower", "here", 3.0)
    assert "B is slower" in str(found) and "because" not in str(found)
    assert seen[0] == ("block 1 of 6", 0, 6) and len(seen) == MIN_BLOCKS
    blocks = [place.loaded[i : i + 3] for i in range(0, len(place.loaded), 3)]
    assert len(blocks) == MIN_BLOCKS and all(sorted(map(block.count, {*block})) == [1, 2] for block in blocks)
    assert len({tuple(block) for block in blocks}) > 1, "the order varies"
    assert Floors.of(tmp_path, "here").found == (0.0,)


def test_times_that_say_nothing_make_an_invalid_comparison(tmp_path: Path) -> None:
    few, many = summed(8), summed(80)
    place = Still({id(few): 1e6, id(many): 3e6}, Verdict.INVALID)
    found = compare((few, many), ({}, {}), place, blocks=MIN_BLOCKS, floors=Floors.of(tmp_path, "here"))
    assert found.verdict == "invalid" and found.reasons == ("because",)
    assert Floors.of(tmp_path, "here").found == (), "what says nothing is not remembered"


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
    assert len(json.loads((tmp_path / "kedge" / "noise" / "here.json").read_text())["floors"]) == 1


@pytest.mark.parametrize(("verdict", "status"), [("slower", 1), ("faster", 0), ("inconclusive", 0), ("invalid", 1)])
def test_the_command_fails_where_it_was_asked_to(
    verdict: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: replace(judge(blocks_of(1, 0.1)), verdict=verdict))
    summed(8).save(tmp_path / "x.kdg")
    path = str(tmp_path / "x.kdg")
    done = CliRunner().invoke(app, ["compare", path, path, "--fail-if-slower"])
    assert done.exit_code == status and "verdict: " in done.stdout


def test_too_few_blocks_are_refused() -> None:
    with kedge.local(threads=1) as place, pytest.raises(UsageError, match="5 blocks show no interval"):
        compare((summed(8), summed(8)), ({}, {}), place, blocks=5)
