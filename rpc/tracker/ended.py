"""The jobs that ended last, as they are stored: whoever asks what came of one needs no turn of the store's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kedge.rpc.tracker.jobs import carries
from kedge.rpc.types import Blob, Job

#: So many jobs, each with at most so many bytes of tensors.
_JOBS = 256
_BYTES = 64 << 10


class Ended:
    """Some of the jobs that are done, the newest. Nothing is here that is not durable."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def put(self, job: Job) -> None:
        """A job that is done, and stored."""
        outputs = () if job.result is None else job.result.outputs
        told = sum(len(tensor.data) for tensor in outputs if not isinstance(tensor.data, Blob))
        if carries(job.spec) + told <= _BYTES:
            self._jobs[job.id] = job
            while len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)

    def get(self, job_id: str) -> Job | None:
        """The job; None says nothing of whether there is one."""
        return self._jobs.get(job_id)

    def forget(self, job_ids: Iterable[str]) -> None:
        """These jobs are stored no longer."""
        for job_id in job_ids:
            self._jobs.pop(job_id, None)
