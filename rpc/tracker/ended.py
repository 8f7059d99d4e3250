"""The jobs that ended last, as they are stored: whoever asks what came of one needs no turn of the store's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from kedge.rpc import convert
from kedge.rpc.types import Blob, Job, Measurement, Tensor

#: So many jobs; so many bytes of one at most, and of all. A measurement alone may have megabytes, and four times as
#: many where each of its numbers is an object.
_JOBS = 256
_BYTES = 64 << 10
_BYTES_OF_ALL = 4 << 20
#: Of anything that there may be many of, beside its text and its numbers.
_ITEM_BYTES = 128


class Ended:
    """Some of the jobs that are done, the newest. Nothing is here that is not durable."""

    def __init__(self) -> None:
        #: With the bytes of each.
        self._jobs: OrderedDict[str, tuple[Job, int]] = OrderedDict()
        self._bytes = 0

    def put(self, job: Job) -> None:
        """A job that is done, and stored."""
        self.forget([job.id])
        size = _size(job)
        if size > _BYTES:
            return
        self._jobs[job.id] = job, size
        self._bytes += size
        while len(self._jobs) > _JOBS or self._bytes > _BYTES_OF_ALL:
            self.forget([next(iter(self._jobs))])

    def get(self, job_id: str) -> Job | None:
        """The job; None says nothing of whether there is one."""
        found = self._jobs.get(job_id)
        return None if found is None else found[0]

    def forget(self, job_ids: Iterable[str]) -> None:
        """These jobs are stored no longer."""
        for job_id in job_ids:
            found = self._jobs.pop(job_id, None)
            if found is not None:
                self._bytes -= found[1]


def _size(job: Job) -> int:
    """About the bytes of a job as a message; to make the message of a short one would take twenty times as long."""
    size = _ITEM_BYTES + len(job.spec.selector) + len(job.spec.function)
    size += sum(map(_size_of_tensor, job.spec.task.inputs))
    size += sum(_ITEM_BYTES + len(fault.reason) for fault in job.faults)
    result = job.result
    if result is not None:
        size += len(result.outcome.message) + _ITEM_BYTES * len(result.stage_times)
        size += sum(map(_size_of_tensor, result.outputs))
        if result.measurement is not None and size <= _BYTES:
            size += _size_of_measurement(result.measurement)
    return size


def _size_of_tensor(tensor: Tensor) -> int:
    data = 0 if isinstance(tensor.data, Blob) else len(tensor.data)
    return _ITEM_BYTES + len(tensor.name) + 8 * len(tensor.shape) + data


def _size_of_measurement(measurement: Measurement) -> int:
    rows = () if measurement.profile is None else measurement.profile.steps_ns
    numbers = len(measurement.samples_ns) + sum(map(len, rows))
    rest = replace(measurement, samples_ns=(), profile=None)
    return 8 * numbers + _ITEM_BYTES * len(rows) + convert.measurement_to_pb(rest).ByteSize()
