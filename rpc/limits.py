"""Numbers that a job may not exceed. Clients check them before anything is sent, trackers and agents once more."""

from __future__ import annotations

import numbers
from typing import Any

from kedge.rpc.artifact.place import parse_device
from kedge.rpc.errors import InputError
from kedge.rpc.types import (
    MAX_DEADLINE_MS,
    MAX_LEASE_MS,
    MAX_PROFILE_SAMPLES,
    MAX_SAMPLES,
    BenchTask,
    JobSpec,
    SessionTask,
    TimeOptions,
)

#: Of a job: up to so much above and below the usual 0.
MAX_PRIORITY = 2**31 - 1
_INT32 = 2**31 - 1
#: Times of equal code that differ by more say that nothing was measured.
MAX_NOISE = 1000.0


def check_number(name: str, value: Any, least: int, most: int, hint: str) -> None:
    """Raise InputError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        raise InputError(f"{name} is {value!r}, expected a whole number from {least} to {most}", hint=hint)


def check_spec(spec: JobSpec) -> None:
    """Raise InputError, naming the number or device in `spec` that no tracker or agent would take."""
    for name in spec.deadlines.__dataclass_fields__:
        given = getattr(spec.deadlines, name)
        check_number(f"the deadline {name}", given, 0, MAX_DEADLINE_MS, "0 means the tracker's default")
    check_number("threads", spec.num_threads, 0, _INT32, "0 means all that the device offers")
    check_number("priority", spec.priority, -MAX_PRIORITY, MAX_PRIORITY, "higher runs first; 0 is usual")
    parse_device(spec.on)
    if isinstance(spec.task, SessionTask):
        check_number("lease_ms", spec.task.lease_ms, 0, MAX_LEASE_MS, "0 means the tracker's default")
    if isinstance(spec.task, BenchTask):
        check_time_options(spec.task.options)


def check_noise(relative: float, num_threads: int, on: str) -> None:
    """Raise InputError unless this can be what equal code differed by, and where."""
    if not 0 <= relative <= MAX_NOISE:
        raise InputError(f"the noise is {relative!r}, expected a share from 0 to {MAX_NOISE:g}", hint="0.02 is 2 %")
    check_number("threads", num_threads, 0, _INT32, "those that were timed")
    parse_device(on)


def check_time_options(options: TimeOptions) -> None:
    """Raise InputError where more samples are wanted than a message takes."""
    hint = "every repeat is a sample that travels back; number= and min_repeat_ms= make each of them longer"
    most = MAX_PROFILE_SAMPLES if options.profile else MAX_SAMPLES
    check_number("repeat", options.repeat, 1, most, hint)
