"""How long a job may still wait, from how long others took. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kedge.rpc.tracker.scheduler import Want
from kedge.rpc.types import BenchTask, JobSpec, SessionTask

#: How much the newest duration counts beside all before it.
_NEWEST = 0.3
_REMEMBERED = 10_000
#: So often one job is counted as being ahead of others; more would hold up the tracker.
_MOST_STEPS = 200_000
_ALL = ("", "", "")

Kind = tuple[str, str, str]


def kind_of(spec: JobSpec) -> Kind:
    """Jobs of one kind take about as long as each other."""
    return spec.manifest.digest, spec.function, "bench" if isinstance(spec.task, BenchTask) else "run"


class Durations:
    """Milliseconds that jobs hold a device, averaged by kind; older ones count less and less."""

    def __init__(self) -> None:
        self._mean: OrderedDict[Kind, float] = OrderedDict()

    def learn(self, spec: JobSpec, duration_ms: int) -> None:
        """A job took so long; how long people take says nothing about others."""
        if isinstance(spec.task, SessionTask):
            return
        for kind in (_ALL, kind_of(spec)):
            before = self._mean.get(kind, float(duration_ms))
            self._mean[kind] = before + _NEWEST * (duration_ms - before)
            self._mean.move_to_end(kind)
        self._mean.move_to_end(_ALL)
        while len(self._mean) > _REMEMBERED:
            self._mean.popitem(last=False)

    def expect(self, spec: JobSpec) -> float | None:
        """How long a job will hold its device; None before the first one has ended, and for a session."""
        if isinstance(spec.task, SessionTask):
            return None
        return self._mean.get(kind_of(spec), self._mean.get(_ALL))


@dataclass(frozen=True, slots=True)
class Wait:
    """A queued job's place among those that want the same devices, and milliseconds until it may start, if known."""

    position: int
    eta_ms: int | None


def waits(
    order: Sequence[tuple[str, Want]],
    usable: Callable[[Want], frozenset[str]],
    free_in: Callable[[str], float | None],
    takes: Callable[[str], float | None],
) -> dict[str, Wait]:
    """How long each job of a queue may wait, as if work were a fluid that the devices of a want share evenly.

    Of jobs far behind, where many stand in lines that overlap, nothing is said.

    Args:
        order: jobs with what they want, in the order in which they are likely to start.
        usable: the devices that could take a job with this want.
        free_in: milliseconds until a device is free; None where nobody can tell.
        takes: milliseconds that a job holds its device; None where nobody can tell.
    """
    lines, devices = _lines(usable, order)
    rivals = [[other for other, theirs in enumerate(devices) if not names.isdisjoint(theirs)] for names in devices]
    known = [[free_in(name) for name in names] for names in devices]
    ahead = [0] * len(devices)
    ahead_ms: list[float | None] = [0.0] * len(devices)
    found: dict[str, Wait] = {}
    steps = 0
    for job_id, want in order:
        line = lines[want]
        found[job_id] = Wait(ahead[line] + 1, _eta(known[line], ahead[line], ahead_ms[line]))
        steps += len(rivals[line])
        if steps > _MOST_STEPS:
            break
        duration = takes(job_id)
        for other in rivals[line]:
            ahead[other] += 1
            before = ahead_ms[other]
            ahead_ms[other] = None if before is None or duration is None else before + duration
    return found


def _lines(
    usable: Callable[[Want], frozenset[str]], order: Sequence[tuple[str, Want]]
) -> tuple[dict[Want, int], list[frozenset[str]]]:
    """Each want's line, by number, and the devices of each line: wants of the same devices stand in one."""
    numbers: dict[frozenset[str], int] = {}
    lines: dict[Want, int] = {}
    for _, want in order:
        if want not in lines:
            lines[want] = numbers.setdefault(usable(want), len(numbers))
    return lines, list(numbers)


def _eta(free_in: Sequence[float | None], ahead: int, ahead_ms: float | None) -> int | None:
    frees = [free for free in free_in if free is not None]
    if not frees or len(frees) < len(free_in) or ahead_ms is None:
        return None
    return round(max(min(frees), (sum(frees) + ahead_ms) / len(frees) if ahead else 0))
