"""What can be said about a measurement: robust statistics, and whether to believe it. Standard library, Python 3.9.

Agents judge what they measured, clients print it; both use this, so that they agree.
"""

from __future__ import annotations

import math
import statistics
from typing import List, Optional, Sequence, Tuple

from kedge.rpc.cores import cpu_list
from kedge.rpc.types import Health, Measurement, Verdict

#: A repeat that lasts fewer steps of the clock says nothing; below the second bound its last digits are noise.
MIN_STEPS = 10
FINE_STEPS = 100
#: Relative median absolute deviation, and relative change from the first to the last third, that are no longer quiet.
MAX_SPREAD = 0.05
MAX_DRIFT = 0.05
#: Fewer samples show no spread.
MIN_SAMPLES = 3
MAX_CELSIUS = 85.0
#: Running processes before the measurement began: per core, and beyond those that its threads leave free.
MAX_LOAD_PER_CORE = 0.5
MIN_FREQUENCY_RATIO = 0.9
#: Of each core that a measurement needs, the share that others may use meanwhile.
MAX_OTHERS_SHARE = 0.1
#: Of what slows a device down, the one thing that does not pass by itself: a governor that holds the lowest clock.
POWERSAVE = "powersave governor"


def mad(samples: Sequence[float]) -> float:
    """The median absolute deviation from the median, unscaled."""
    middle = statistics.median(samples)
    return statistics.median(abs(sample - middle) for sample in samples)


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Optional[Tuple[float, float]]:
    """The narrowest symmetric pair of order statistics that holds the median with at least `confidence`.

    Free of any distribution (David and Nagaraja, Order Statistics, section 7.1): of n samples, the k-th smallest and
    the k-th largest hold it between them unless fewer than k lie on one side, which has twice the probability that a
    fair coin shows fewer than k heads in n throws. None where even the extremes do not reach `confidence`.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected something between 0 and 1")
    n, k, fewer = len(samples), 0, 0.0
    while k < (n + 1) // 2:
        fewer += math.comb(n, k) / 2.0**n if n < 1000 else math.exp(_log_comb(n, k) - n * math.log(2))
        if 1 - 2 * fewer < confidence:
            break
        k += 1
    ordered = sorted(samples)
    return (ordered[k - 1], ordered[n - k]) if k > 0 else None


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def judge(measurement: Measurement, emulated: bool = False, num_cores: int = 1) -> Tuple[Verdict, List[str]]:
    """Whether to believe a measurement, and every reason not to.

    Invalid: it says nothing about the time. Emulated: it was taken on an emulator and says nothing about the device.
    Suspect: something disturbed it. `num_cores` is the device's, for the load that it bears.
    """
    broken = _broken(measurement)
    if broken is not None:
        return Verdict.INVALID, [broken]
    reasons = [reason for reason in (*_sample_reasons(measurement), *_health_reasons(measurement, num_cores)) if reason]
    if emulated:
        return Verdict.EMULATED, ["the device is emulated: the times say nothing about a real one", *reasons]
    return (Verdict.SUSPECT if reasons else Verdict.VALID), reasons


def is_disturbed(health: Health) -> bool:
    """Whether a measurement would say little now, and more after a while: heat, throttling, no memory or disk left."""
    celsius = health.temperature_celsius
    hot = celsius is not None and celsius > MAX_CELSIUS
    return hot or bool(health.problems) or any(word != POWERSAVE for word in health.throttled)


def _broken(m: Measurement) -> Optional[str]:
    if not m.samples_ns:
        return "no samples were taken"
    if any(not math.isfinite(sample) or sample < 0 for sample in m.samples_ns):
        return "a sample is negative or not a number"
    shortest = _shortest_ns(m)
    if shortest <= 0:
        return "a sample took no time"
    if shortest < MIN_STEPS * m.resolution_ns:
        return f"a sample of {shortest:.0f} ns is too short for a clock with steps of {m.resolution_ns} ns"
    return None


def _shortest_ns(m: Measurement) -> float:
    """The shortest time that was read off the clock: that of a sample, or of one call where each is timed by itself."""
    return min(m.samples_ns) * (1 if m.options.cache_flush_bytes else m.options.number)


def _sample_reasons(m: Measurement) -> List[str]:
    reasons, samples = [], m.samples_ns
    middle = statistics.median(samples)
    shortest = _shortest_ns(m)
    if shortest < FINE_STEPS * m.resolution_ns:
        reasons.append(f"a sample of {shortest:.0f} ns is short for a clock with steps of {m.resolution_ns} ns")
    if len(samples) < MIN_SAMPLES:
        reasons.append(f"{len(samples)} samples show no spread")
        return reasons
    spread = mad(samples) / middle
    if spread > MAX_SPREAD:
        reasons.append(f"the samples spread by {spread:.0%} (median absolute deviation)")
    third = len(samples) // 3
    if third >= MIN_SAMPLES:
        first, last = statistics.median(samples[:third]), statistics.median(samples[-third:])
        drift = (last - first) / middle
        if abs(drift) > MAX_DRIFT:
            reasons.append(f"the samples drift by {drift:+.0%} from the first third to the last")
    return reasons


def _health_reasons(m: Measurement, num_cores: int) -> List[str]:
    reasons = []
    before, after = m.before, m.after
    cores = max(num_cores, 1)
    # Whoever leaves a core to each of the measurement's threads does not disturb it (0 threads: all cores).
    limit = max(MAX_LOAD_PER_CORE * cores, cores - (m.num_threads or cores) + MAX_LOAD_PER_CORE)
    pinning = m.pinning
    watched = pinning is not None and pinning.others_share is not None
    # Only before: afterwards the load is the measurement's own. And only where nobody watched the cores meanwhile: the
    # load is that of a minute, that of earlier measurements among it.
    if not watched and before is not None and before.load_1min is not None and before.load_1min > limit:
        reasons.append(f"the machine was busy before (load {before.load_1min:.2f} on {cores} cores)")
    if pinning is not None and pinning.others_share is not None:
        there = len(pinning.cpus)
        needed = min(m.num_threads or there, there)
        # What the measurement's threads leave free others may use.
        if pinning.others_share * there > there - needed + MAX_OTHERS_SHARE * needed:
            shown = cpu_list(pinning.cpus)
            reasons.append(f"others used {pinning.others_share:.0%} of its cores ({shown}) meanwhile")
    if after is not None and after.temperature_celsius is not None and after.temperature_celsius > MAX_CELSIUS:
        reasons.append(f"the device was hot ({after.temperature_celsius:.0f} °C)")
    known = [health for health in (before, after) if health is not None]
    slowed = sorted({word for health in known for word in health.throttled})
    if slowed:
        reasons.append(f"the device was slowed down ({', '.join(slowed)})")
    unfit = list(dict.fromkeys(problem for health in known for problem in health.problems))
    if unfit:
        reasons.append(f"the device was not fit to measure ({'; '.join(unfit)})")
    if before is not None and after is not None and "" != before.governor != after.governor != "":
        reasons.append(f"its governor changed from {before.governor} to {after.governor}")
    clocks = [health.frequency_mhz or 0.0 for health in known]
    if len(clocks) == 2 and 0 < clocks[1] < MIN_FREQUENCY_RATIO * clocks[0]:
        reasons.append(f"its clock fell from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
    return reasons
