"""Faults done to a fleet of real processes at random points: nothing accepted is lost, doubled, wrong or left behind.

    make faults                                  # each kind 20 times over 1,000 jobs
    pytest -m faults tests/faults -k agent --fault-seed 7 --fault-jobs 200 --fault-injections 5
    pytest -m faults tests/faults --fault-hours 8

The seed is printed where a test fails (and with -s), and decides what is done when; what processes do meanwhile is
theirs. A sample of all kinds but those of two trackers is in the default suite.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from . import campaign
from .campaign import Plan
from .kinds import KINDS, Kind
from .limit import real_stderr, time_limit
from .world import Shape, World, can_mount


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--fault-seed")
    chosen = random.SystemRandom().randrange(1_000_000) if given is None else int(given)
    sys.stdout.write(f"--fault-seed {chosen}\n")
    return chosen


def shape_for(kinds: list[Kind], clock: Path, request: pytest.FixtureRequest) -> Shape:
    needs = {kind.needs for kind in kinds}
    if "disks" in needs and not can_mount():
        if os.environ.get("CI"):
            pytest.fail("file systems of one's own need root; CI has it")
        pytest.skip("file systems of one's own need root")
    return Shape(
        plain="relay" in needs,
        disks="disks" in needs,
        clock=clock if "clock" in needs else None,
        database=request.getfixturevalue("postgres") if "pair" in needs else None,
        large_share=max(kind.large_share for kind in kinds),
    )


@pytest.mark.faults
@pytest.mark.parametrize("name", KINDS)
def test_each_kind(
    name: str,
    seed: int,
    runner: Path,
    artifact: Path,
    clock: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    option = request.config.getoption
    kinds = [KINDS[name]]
    plan = Plan(seed, option("--fault-injections"), option("--fault-jobs"), option("--fault-hours") * 3600 / len(KINDS))
    world = World(tmp_path, seed, shape_for(kinds, clock, request), runner, artifact)
    stderr = real_stderr(request.config)
    try:
        with time_limit(plan.limit_s, world.kill_all, stderr), world:
            report = campaign.run(world, kinds, plan)
    finally:
        os.close(stderr)
    sys.stdout.write(f"{report.as_json()}\n")
    where = option("--fault-report")
    if where:
        campaign.keep(Path(where), report)


SAMPLES = {
    "bytes": [kind for kind in KINDS.values() if kind.needs in ("", "clock")],
    "messages": [kind for kind in KINDS.values() if kind.needs == "relay"],
    "disks": [kind for kind in KINDS.values() if kind.needs == "disks"],
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_of_each(
    sample: str,
    seed: int,
    runner: Path,
    artifact: Path,
    clock: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    kinds = SAMPLES[sample]
    began = time.monotonic()
    with World(tmp_path, seed, shape_for(kinds, clock, request), runner, artifact) as world:
        report = campaign.run(world, kinds, Plan(seed, injections=1, jobs=40))
    sys.stdout.write(f"{time.monotonic() - began:.1f} s: {report.as_json()}\n")
