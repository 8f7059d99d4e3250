"""So many faults of some kinds at random points of so many jobs, and what came of it."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ledger
from .kinds import Kind
from .world import World


@dataclass(frozen=True)
class Plan:
    """At least `injections` of each kind over at least `jobs` jobs, and for at least `seconds`."""

    seed: int
    injections: int
    jobs: int
    seconds: float = 0.0

    @property
    def limit_s(self) -> float:
        """When it hangs: ten times what the slowest kind takes on two cores that do other work besides."""
        return self.seconds + 600 + self.jobs + 30 * self.injections


@dataclass(frozen=True)
class Report:
    """Of one campaign."""

    kinds: tuple[str, ...]
    seed: int
    injections: int
    seconds: float
    found: ledger.Found

    def as_json(self) -> dict[str, Any]:
        return {
            "kinds": list(self.kinds),
            "seed": self.seed,
            "injections": self.injections,
            "jobs": self.found.jobs,
            "seconds": round(self.seconds, 1),
            "outcomes": dict(sorted(self.found.outcomes.items())),
            "otherwise": dict(sorted(self.found.otherwise.items())),
            "client_errors": dict(sorted(self.found.errors.items())),
            "sessions": dict(sorted(self.found.sessions.items())),
            "session_errors": dict(sorted(self.found.session_errors.items())),
        }


def run(world: World, kinds: Sequence[Kind], plan: Plan) -> Report:
    """Do it; fails naming what does not hold afterwards."""
    rng = random.Random(plan.seed)
    began = time.monotonic()
    todo = [kind for kind in kinds for _ in range(plan.injections)]
    rng.shuffle(todo)
    points = sorted(rng.randrange(plan.jobs) for _ in todo)
    injected: Counter[str] = Counter()
    world.wait_jobs(1)
    while todo or time.monotonic() - began < plan.seconds:
        if points:
            world.wait_jobs(points.pop(0))
        one = todo.pop() if todo else rng.choice(list(kinds))
        time.sleep(rng.uniform(0.0, 0.2))
        one.inject(world, rng)
        injected[one.name] += 1
    world.wait_jobs(plan.jobs)
    report = Report(
        tuple(kind.name for kind in kinds),
        plan.seed,
        sum(injected.values()),
        time.monotonic() - began,
        ledger.end(world),
    )
    _judge(report, kinds, injected)
    return report


def _judge(report: Report, kinds: Sequence[Kind], injected: Counter[str]) -> None:
    """Outcomes and errors that no fault of these kinds explains, or more of them than it can."""
    may: Counter[str] = Counter()
    for kind in kinds:
        for outcome, each in kind.extra.items():
            may[outcome] += each * injected[kind.name]
    were: Counter[str] = Counter()
    for ended, count in report.found.otherwise.items():
        were[ended.split(": ")[1]] += count
    beyond = {outcome: count for outcome, count in were.items() if count > may[outcome]}
    assert not beyond, f"outcomes that nothing explains: {beyond}; there may be {may}; {report}"
    may_end = sum(kind.sessions * injected[kind.name] for kind in kinds)
    ended = report.found.sessions.total() - report.found.sessions["ok"]
    told = report.found.session_errors
    assert ended <= may_end, f"{ended} sessions ended, and {may_end} may have: {report}"
    assert told.total() <= may_end, f"of sessions, clients were told what nothing explains: {told}"
    allowed = tuple(error for kind in kinds for error in kind.errors)
    unexplained = [error for error in report.found.errors if error.split(":")[0] not in allowed]
    assert not unexplained, f"clients were told what nothing explains: {unexplained}"


def keep(path: Path, report: Report) -> None:
    """Add a report as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(report.as_json()) + "\n")
