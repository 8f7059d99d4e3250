"""`Profile`: where the time of a call goes, kernel by kernel, beside what the machine could do at most.

The limit is the roofline (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model", 2009):
a kernel takes at least as long as its arithmetic at the peak of the cores, and as its bytes at the rate of memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kedge.rpc import abi
from kedge.rpc.artifact import Function, Manifest
from kedge.rpc.client.inputs import arrange
from kedge.rpc.client.timing import Timing, timing_options
from kedge.rpc.errors import ArtifactError, JobError
from kedge.rpc.types import StepSamples, TimeOptions


@dataclass(frozen=True, slots=True)
class Roof:
    """What a machine does at most, all threads together; None where it is not known.

    `rates` are (bytes, bytes per second) of working sets, small ones first: what is read again and again stays in the
    cache that it fits.
    """

    flops_per_s: float | None
    rates: tuple[tuple[int, float], ...]
    clock_hz: float

    def least_ns(self, flops: float, n_bytes: float) -> float | None:
        """How long so much arithmetic and traffic takes at least, in nanoseconds."""
        known = [rate for size, rate in self.rates if size <= n_bytes] or [rate for _, rate in self.rates[:1]]
        if self.flops_per_s is None or not known:
            return None
        return 1e9 * max(flops / self.flops_per_s, n_bytes / known[-1])


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """A kernel's part in a call of the function.

    `calls` are those within one call of the function; `time_ns` is the median of all of them together, `share` its part
    of all kernels' time. `flops` and `n_bytes` are of all calls together: the operations that the model asks for (None
    where they are not known), and every input and output once for each call. `roof_share` is the least time that the
    machine needs for that over the time it took.
    """

    kernel: str
    rule: str
    decisions: Mapping[str, Any]
    origin: tuple[str, ...]
    calls: int
    time_ns: float
    share: float
    flops: int | None
    n_bytes: int
    roof_share: float | None

    @property
    def call_ns(self) -> float:
        """Nanoseconds of one call of the kernel."""
        return self.time_ns / self.calls

    @property
    def gflops_per_s(self) -> float | None:
        """10^9 operations per second."""
        return None if self.flops is None or self.time_ns <= 0 else self.flops / self.time_ns

    @property
    def gbytes_per_s(self) -> float | None:
        """10^9 bytes per second."""
        return None if self.time_ns <= 0 else self.n_bytes / self.time_ns

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values with their units in the names."""
        return {
            "kernel": self.kernel,
            "calls": self.calls,
            "call_ns": self.call_ns,
            "time_ns": self.time_ns,
            "share": self.share,
            "flops": self.flops,
            "bytes": self.n_bytes,
            "gflops_per_s": self.gflops_per_s,
            "gbytes_per_s": self.gbytes_per_s,
            "roof_share": self.roof_share,
            "rule": self.rule,
            "decisions": dict(self.decisions),
            "origin": list(self.origin),
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """The kernels of a function, those that take longest first, and the timing of the whole call."""

    kernels: tuple[KernelProfile, ...]
    timing: Timing
    roof: Roof

    @property
    def caption(self) -> str:
        """What the roofline is made of."""
        threads = self.timing.measurement.num_threads
        if self.roof.flops_per_s is None:
            return "share of roofline: not known, the artifact does not say what the CPU does in a cycle"
        reads = ", ".join(f"{rate / 1e9:.1f} GB/s of {_size(size)}" for size, rate in self.roof.rates if size)
        near = next((rate for size, rate in self.roof.rates if not size), None)
        first = "" if near is None else f"{near / 1e9:.0f} GB/s from the first-level cache (target), "
        return (
            f"roofline of {threads} thread{'s' if threads != 1 else ''}: {self.roof.flops_per_s / 1e9:.1f} GFLOP/s "
            f"of float32 (target: multiply-adds per cycle; measured: {self.roof.clock_hz / 1e9:.2f} GHz); {first}"
            f"measured reads: {reads or 'none'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values with their units in the names."""
        return {
            **self.timing.to_json(),
            "kernels": [kernel.to_json() for kernel in self.kernels],
            "roofline": {
                "flops_per_s": self.roof.flops_per_s,
                "flops_from": "target description and measured clock",
                "clock_hz": self.roof.clock_hz,
                "read_bytes_per_s": [{"working_set_bytes": size, "rate": rate} for size, rate in self.roof.rates],
                "reads_from": "measured; of a working set of 0 bytes: target description and measured clock",
            },
        }

    #: Of the table; those that begin with ">" are right-aligned.
    COLUMNS = (
        "kernel", ">calls", ">time/call", ">share", ">GFLOP/s", ">GB/s", ">roofline", "rule", "decisions", "from",
    )  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, as `COLUMNS` has them."""
        return [
            (
                kernel.kernel,
                str(kernel.calls),
                _time(kernel.call_ns),
                f"{kernel.share:.1%}",
                _number(kernel.gflops_per_s),
                _number(kernel.gbytes_per_s),
                "-" if kernel.roof_share is None else f"{kernel.roof_share:.0%}",
                kernel.rule,
                ", ".join(f"{name}={value}" for name, value in kernel.decisions.items()),
                ", ".join(kernel.origin),
            )
            for kernel in self.kernels
        ]

    def __str__(self) -> str:
        """The table, its caption, and the timing of the whole."""
        table = [tuple(name.removeprefix(">") for name in self.COLUMNS), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if name.startswith(">") else cell.ljust(width)
                for cell, width, name in zip(row, widths, self.COLUMNS, strict=True)
            ).rstrip()
            for row in table
        ]
        return "\n".join([*lines, self.caption, str(self.timing)])


def profile_options(**options: Any) -> TimeOptions:
    """How to profile: as `timing_options`, but samples grow until they last 10 ms, not 50; raises InputError."""
    if options.get("min_repeat_ms") is None and not options.get("cache_flush_bytes"):
        options["min_repeat_ms"] = 10
    return replace(timing_options(**options), profile=True)


def profile_of(manifest: Manifest, function: str, inputs: Mapping[str, Any], timing: Timing) -> Profile:
    """The profile that a timing brought, with the names and costs that the manifest has of its steps.

    Raises:
        ArtifactError: the manifest does not say what the steps are.
        JobError: the device took no profile.
    """
    samples = timing.measurement.profile
    if samples is None:
        raise JobError(
            "the device timed the call but made no profile", outcome="bad_request", hint="update the agent there"
        )
    called = manifest.function(function)
    report = _report(manifest, samples.variant)
    steps = report["functions"].get(called.name, ())
    if len(steps) != len(samples.steps_ns):
        raise ArtifactError(
            f"artifact {manifest.name!r} names {len(steps)} steps of {called.name}, its library has "
            f"{len(samples.steps_ns)}",
            hint="compile the model again",
        )
    symbols = _symbols(called, arrange(called, inputs))
    roof = _roof(report, samples, timing.measurement.num_threads)
    known = {kernel["name"]: kernel for kernel in report["kernels"]}
    by_kernel: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        by_kernel.setdefault(step["kernel"], []).append(number)
    totals = {name: _sums(samples.steps_ns[number] for number in numbers) for name, numbers in by_kernel.items()}
    whole = sum(map(statistics.median, totals.values()))
    found = []
    for name, numbers in by_kernel.items():
        time_ns = statistics.median(totals[name])
        costs = [(evaluate(steps[number]["flops"], symbols), evaluate(steps[number]["bytes"], symbols))
                 for number in numbers]  # fmt: skip
        counted = [flops for flops, _ in costs if flops is not None]
        least = [roof.least_ns(flops or 0, n_bytes or 0) for flops, n_bytes in costs]
        bounds = [bound for bound in least if bound is not None]
        kernel = known[name]
        found.append(
            KernelProfile(
                kernel=name,
                rule=kernel["rule"],
                decisions=kernel["decisions"],
                origin=tuple(kernel["origin"]),
                calls=len(numbers),
                time_ns=time_ns,
                share=time_ns / whole if whole > 0 else 0.0,
                flops=sum(counted) if len(counted) == len(costs) else None,
                n_bytes=sum(n_bytes or 0 for _, n_bytes in costs),
                roof_share=sum(bounds) / time_ns if time_ns > 0 and len(bounds) == len(counted) == len(costs) else None,
            )
        )
    return Profile(tuple(sorted(found, key=lambda kernel: -kernel.time_ns)), timing, roof)


def evaluate(cost: int | Sequence[Sequence[int]] | None, symbols: Sequence[int]) -> int | None:
    """A cost of the manifest: a number, or a postfix program of kedge_expr over the function's symbols."""
    if cost is None or isinstance(cost, int):
        return cost
    stack: list[int] = []
    for opcode, value in cost:
        if opcode == abi.EXPR_CONST:
            stack.append(value)
        elif opcode == abi.EXPR_SYMBOL:
            stack.append(symbols[value])
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(_OPERATIONS[opcode](left, right))
    (result,) = stack
    return result


_OPERATIONS: Mapping[int, Callable[[int, int], int]] = {
    abi.EXPR_ADD: lambda a, b: a + b,
    abi.EXPR_SUB: lambda a, b: a - b,
    abi.EXPR_MUL: lambda a, b: a * b,
    abi.EXPR_FLOORDIV: lambda a, b: a // b,
    abi.EXPR_FLOORMOD: lambda a, b: a % b,
    abi.EXPR_MIN: min,
    abi.EXPR_MAX: max,
}


def _report(manifest: Manifest, variant: int) -> Mapping[str, Any]:
    variants = manifest.info.get("variants", ())
    if not 0 <= variant < len(variants) or "functions" not in variants[variant]:
        raise ArtifactError(
            f"artifact {manifest.name!r} does not say which kernels its functions call", hint="compile the model again"
        )
    found: Mapping[str, Any] = variants[variant]
    return found


def _symbols(function: Function, arrays: Sequence[np.ndarray[Any, Any]]) -> list[int]:
    """The sizes of the function's free dims in a call with these inputs."""
    sizes = {
        dim: size
        for port, array in zip(function.inputs, arrays, strict=True)
        for dim, size in zip(port.shape, array.shape, strict=True)
    }
    return [sizes[symbol.name] for symbol in function.symbols]


def _roof(report: Mapping[str, Any], samples: StepSamples, threads: int) -> Roof:
    cycles = samples.clock_hz * threads
    peak, loads = report.get("flops_per_cycle"), report.get("load_bytes_per_cycle")
    measured = zip(abi.ROOF_BYTES, samples.read_bytes_per_s, strict=False)
    rates = [] if loads is None else [(0, loads * cycles)]
    rates += [(size, rate) for size, rate in measured if rate > 0]
    return Roof(None if peak is None else peak * cycles, tuple(rates), samples.clock_hz)


def _sums(steps: Iterable[Sequence[float]]) -> list[float]:
    """The sum over steps in each sample."""
    return [sum(values) for values in zip(*steps, strict=True)]


def _time(nanoseconds: float) -> str:
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= scale:
            return f"{nanoseconds / scale:.4g} {unit}"
    return f"{nanoseconds:.3g} ns"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"
