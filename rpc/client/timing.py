"""`Timing`: a measurement as people read it. Times are those of one call."""

from __future__ import annotations

import math
import numbers
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from kedge.rpc.cores import cpu_list
from kedge.rpc.errors import InputError
from kedge.rpc.measure import mad, median_interval
from kedge.rpc.types import Measurement, TimeOptions

#: The largest unit in which a time is at least one.
_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
#: The wire and the ABI count in 64 bits.
_LARGEST = 2**63 - 1
#: How long a sample lasts at least, unless somebody says otherwise.
MIN_REPEAT_MS = 50.0


def timing_options(
    *,
    number: int = 1,
    repeat: int = 20,
    min_repeat_ms: float | None = None,
    warmup: int = 1,
    cooldown_interval_ms: float = 0,
    repeats_to_cooldown: int = 1,
    cache_flush_bytes: int = 0,
    limit_zero_time_iterations: int = 100,
) -> TimeOptions:
    """How to time, from what a user said; names and meanings of TVM's time_evaluator (docs/measurement.md).

    `min_repeat_ms` None is 50, or 0 where caches are flushed: older agents take flushes for no part of a repeat, and
    go on until their job's deadline.

    Raises:
        InputError: naming the option that is no whole number, negative, or zero where one is the least.
    """
    if min_repeat_ms is None:
        min_repeat_ms = 0 if cache_flush_bytes else MIN_REPEAT_MS
    return TimeOptions(
        number=_count("number", number, 1),
        repeat=_count("repeat", repeat, 1),
        min_repeat_ns=_nanoseconds("min_repeat_ms", min_repeat_ms),
        warmup=_count("warmup", warmup, 0),
        limit_zero_time_iterations=_count("limit_zero_time_iterations", limit_zero_time_iterations, 0),
        cooldown_interval_ns=_nanoseconds("cooldown_interval_ms", cooldown_interval_ms),
        repeats_to_cooldown=_count("repeats_to_cooldown", repeats_to_cooldown, 1),
        cache_flush_bytes=_count("cache_flush_bytes", cache_flush_bytes, 0),
    )


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= _LARGEST:
        raise InputError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return int(value)


def _nanoseconds(name: str, milliseconds: float) -> int:
    number = isinstance(milliseconds, (int, float)) and math.isfinite(milliseconds)
    if not number or not 0 <= milliseconds * 1e6 <= _LARGEST:
        raise InputError(f"{name} is {milliseconds!r}, expected milliseconds, at least 0")
    return round(milliseconds * 1e6)


@dataclass(frozen=True, slots=True)
class Timing:
    """Samples, the protocol they were taken by, statistics over them, and whether to believe them.

    Every statistic is of `samples_ns`, each of which is the mean of `number` calls; none is given that the sample
    cannot support (there are no percentiles).
    """

    measurement: Measurement

    @property
    def samples_ns(self) -> tuple[float, ...]:
        """Nanoseconds of one call, per sample."""
        return self.measurement.samples_ns

    @property
    def protocol(self) -> TimeOptions:
        """How it was timed, with `number` as it was used."""
        return self.measurement.options

    @property
    def number(self) -> int:
        """Calls in one sample."""
        return self.protocol.number

    @property
    def repeat(self) -> int:
        """How many samples were taken."""
        return len(self.samples_ns)

    @property
    def verdict(self) -> str:
        """valid, suspect, invalid, emulated; unknown where nobody judged it."""
        return self.measurement.verdict.value if self.measurement.verdict else "unknown"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not valid."""
        return self.measurement.reasons

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.samples_ns) / 1e6

    @property
    def mean_ms(self) -> float:
        """The mean."""
        return statistics.fmean(self.samples_ns) / 1e6

    @property
    def min_ms(self) -> float:
        """The smallest sample."""
        return min(self.samples_ns) / 1e6

    @property
    def max_ms(self) -> float:
        """The largest sample."""
        return max(self.samples_ns) / 1e6

    @property
    def std_ms(self) -> float | None:
        """The sample standard deviation; None of a single sample."""
        return statistics.stdev(self.samples_ns) / 1e6 if self.repeat > 1 else None

    @property
    def mad_ms(self) -> float:
        """The median absolute deviation from the median."""
        return mad(self.samples_ns) / 1e6

    def interval_ms(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """An interval that holds the true median with at least `confidence`; None if the sample cannot support it."""
        found = median_interval(self.samples_ns, confidence)
        return None if found is None else (found[0] / 1e6, found[1] / 1e6)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values with their units in the names."""
        some = bool(self.samples_ns)
        interval = self.interval_ms() if some else None
        return {
            "median_ms": self.median_ms if some else None,
            "interval_95_ms": None if interval is None else list(interval),
            "mean_ms": self.mean_ms if some else None,
            "std_ms": self.std_ms if some else None,
            "mad_ms": self.mad_ms if some else None,
            "min_ms": self.min_ms if some else None,
            "max_ms": self.max_ms if some else None,
            "samples_ns": list(self.samples_ns),
            "protocol": asdict(self.protocol),
            "resolution_ns": self.measurement.resolution_ns,
            "num_threads": self.measurement.num_threads,
            "before": None if self.measurement.before is None else asdict(self.measurement.before),
            "after": None if self.measurement.after is None else asdict(self.measurement.after),
            "pinning": None if self.measurement.pinning is None else asdict(self.measurement.pinning),
            "verdict": self.verdict,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        """A small table: one row of statistics, then how they came about, then the verdict."""
        lines = [*self._statistics(), self._protocol(), f"verdict: {self.verdict}"]
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])

    def _statistics(self) -> list[str]:
        if not self.samples_ns:
            return ["no samples"]
        median = statistics.median(self.samples_ns)
        scale, unit = next((pair for pair in _UNITS if median >= pair[0]), _UNITS[-1])

        def show(milliseconds: float | None) -> str:
            return "-" if milliseconds is None else f"{milliseconds * 1e6 / scale:.4g} {unit}"

        interval = self.interval_ms()
        columns = {
            "median": show(self.median_ms),
            "95% interval": "-" if interval is None else f"{show(interval[0])} .. {show(interval[1])}",
            "MAD": show(self.mad_ms),
            "mean": show(self.mean_ms),
            "std": show(self.std_ms),
            "min": show(self.min_ms),
            "max": show(self.max_ms),
        }
        widths = [max(len(name), len(value)) for name, value in columns.items()]
        rows = (columns.keys(), columns.values())
        return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]

    def _protocol(self) -> str:
        options, threads = self.protocol, self.measurement.num_threads
        calls = f"{options.number} call{'s' if options.number != 1 else ''}"
        parts = [f"{self.repeat} samples of {calls}", f"{options.warmup} to warm up"]
        if threads:
            parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
        pinning = self.measurement.pinning
        if pinning is not None and pinning.reserved:
            parts.append(f"on cores kept for timings ({cpu_list(pinning.cpus)})")
        if options.cooldown_interval_ns:
            parts.append(f"{options.cooldown_interval_ns / 1e6:g} ms pause every {options.repeats_to_cooldown}")
        if options.cache_flush_bytes:
            parts.append(f"caches flushed by {options.cache_flush_bytes / 2**20:.4g} MiB before every call")
        return ", ".join(parts)
