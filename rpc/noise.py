"""How far times of equal code are apart on a device: what comparisons of an artifact with itself (A/A) said there.

Trackers keep this for their devices, a machine's user for the machine itself. Pure; times are Unix milliseconds.
"""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple

from kedge.rpc.types import NoiseFloor, NoiseSample

#: What was measured longer ago counts no more.
MAX_AGE_MS = 30 * 86_400_000
#: Samples that are kept of one user and device, so that nobody is pushed out by another, and of a device in all.
MOST_OF_A_USER = 10
MOST_OF_A_DEVICE = 100


class Conditions(NamedTuple):
    """What a device is like, as far as its noise depends on it; a sample that was taken under others is stale."""

    target: str
    software: str
    governor: str


class Noise:
    """The samples of all devices."""

    def __init__(self, samples: Iterable[NoiseSample] = ()) -> None:
        self._kept: Dict[str, List[NoiseSample]] = {}
        for sample in sorted(samples, key=lambda sample: sample.measured_unix_ms):
            self._kept.setdefault(sample.device, []).append(sample)

    def keep(self, sample: NoiseSample) -> Tuple[str, ...]:
        """Add a sample; returns the ids of those that are forgotten for it.

        That are those it takes the place of, because they are stale by now, and the oldest where there are too many.
        """
        before = self._kept.get(sample.device, [])
        fresh = [each for each in before if not _is_replaced(each, sample)]
        of_user = [each for each in fresh if each.user == sample.user]
        extra = {each.id for each in of_user[: max(0, len(of_user) + 1 - MOST_OF_A_USER)]}
        after = [*(each for each in fresh if each.id not in extra), sample][-MOST_OF_A_DEVICE:]
        self._kept[sample.device] = after
        return tuple(each.id for each in before if each not in after)

    def of(self, device: str) -> Tuple[NoiseSample, ...]:
        """The samples of a device, the oldest first."""
        return tuple(self._kept.get(device, ()))

    def floors(self, device: str, conditions: Conditions, now_ms: int) -> Tuple[NoiseFloor, ...]:
        """What its samples say, by threads, place and conditions; those that count first, newest first."""
        groups: Dict[Tuple[int, str, Conditions], List[NoiseSample]] = {}
        for sample in self._kept.get(device, ()):
            groups.setdefault((sample.num_threads, sample.on, _conditions(sample)), []).append(sample)
        found = []
        for group in groups.values():
            young = [sample for sample in group if sample.measured_unix_ms >= now_ms - MAX_AGE_MS]
            stale = _stale(group[-1], conditions, bool(young))
            found.append(_floor(young or group, stale))
        return tuple(sorted(found, key=lambda floor: (floor.stale != "", -floor.measured_unix_ms)))


def floor_for(floors: Iterable[NoiseFloor], num_threads: int, on: str) -> Optional[NoiseFloor]:
    """The first of `floors` for so many threads there: one that counts, if there is any."""
    return next((floor for floor in floors if (floor.num_threads, floor.on) == (num_threads, on)), None)


def _conditions(sample: NoiseSample) -> Conditions:
    return Conditions(sample.target, sample.software, sample.governor)


def _is_replaced(old: NoiseSample, new: NoiseSample) -> bool:
    """Whether the new sample measures again what the old one cannot say any more."""
    same = (old.num_threads, old.on) == (new.num_threads, new.on)
    too_old = old.measured_unix_ms < new.measured_unix_ms - MAX_AGE_MS
    return too_old or (same and _difference(_conditions(old), _conditions(new)) != "")


def _difference(then: Conditions, now: Conditions) -> str:
    """What is no longer as it was; what is not known (of a device that has just come back) is no difference."""
    for name, was, is_now in zip(Conditions._fields, then, now):
        if was and is_now and was != is_now:
            return f"the {name} was {was}, and is {is_now} now"
    return ""


def _stale(sample: NoiseSample, now: Conditions, young: bool) -> str:
    difference = _difference(_conditions(sample), now)
    if difference:
        return difference
    return "" if young else f"it was measured on {day_of(sample.measured_unix_ms)}, and holds for 30 days"


def day_of(unix_ms: int) -> str:
    """A date, for people."""
    return datetime.fromtimestamp(unix_ms / 1000, timezone.utc).strftime("%Y-%m-%d")


def _floor(samples: List[NoiseSample], stale: str) -> NoiseFloor:
    """The median over users of each user's median: one user with odd samples does not move it far."""
    by_user: Dict[str, List[float]] = {}
    for sample in samples:
        by_user.setdefault(sample.user, []).append(sample.relative)
    newest = samples[-1]
    return NoiseFloor(
        relative=statistics.median(statistics.median(values) for values in by_user.values()),
        num_threads=newest.num_threads,
        on=newest.on,
        target=newest.target,
        software=newest.software,
        governor=newest.governor,
        comparisons=len(samples),
        measured_unix_ms=newest.measured_unix_ms,
        stale=stale,
    )
