"""Which blobs the tracker's jobs need, kept in step with what is stored of them.

A job that is not done needs its manifest, the parts of all members, and its inputs. What facts will need is held before
they are stored; what they no longer need is let go afterwards: a crash in between must not find a job whose blobs are
gone. The outputs that the result of a job names stay for some minutes, so that whoever waits for it can read them, and
then as long as the result is kept and there is room.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kedge.rpc.errors import KedgeError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.facts import Fact, JobAccepted, JobDone, JobWithdrawn
from kedge.rpc.types import Blob, JobResult, JobSpec, SessionTask

log = logging.getLogger("kedge.tracker")


class Needed:
    """Holds in `blobs` for all jobs. Safe from several threads.

    `members_of` tells a manifest and the parts of its members; it may raise KedgeError.
    """

    def __init__(self, blobs: TrackerBlobs, members_of: Callable[[Blob], tuple[str, ...]]) -> None:
        self._blobs = blobs
        self._members_of = members_of
        self._lock = threading.Lock()
        self._live: dict[str, tuple[str, tuple[str, ...]]] = {}
        #: Jobs by manifest: many share one, and its parts are held once.
        self._manifests: Counter[str] = Counter()
        self._members: dict[str, tuple[str, ...]] = {}
        self._outputs: dict[str, tuple[str, ...]] = {}

    def restore(self, live: Iterable[JobAccepted], outputs: Iterable[tuple[str, str]]) -> None:
        """Hold what jobs need that were stored; `outputs` are (job, digest) of results that are kept."""
        with self._lock:
            for accepted in live:
                self._accept(accepted.job_id, accepted.spec)
            by_job: dict[str, list[str]] = {}
            for job_id, digest in outputs:
                by_job.setdefault(job_id, []).append(digest)
            for job_id, digests in by_job.items():
                self._keep_outputs(job_id, tuple(digests))

    def release(self) -> None:
        """Let everything go: the jobs are another tracker's business."""
        with self._lock:
            for job_id in list(self._live):
                self._end(job_id)
            for job_id in list(self._outputs):
                self._forget(job_id)

    def digests(self) -> set[str]:
        """All that is needed now, and what kept results name."""
        with self._lock:
            inputs = {digest for _, digests in self._live.values() for digest in digests}
            members = {digest for digests in self._members.values() for digest in digests}
            return inputs | members | {digest for digests in self._outputs.values() for digest in digests}

    def expected(self, facts: Sequence[Fact]) -> None:
        """These facts are about to be stored."""
        with self._lock:
            for fact in facts:
                if isinstance(fact, JobAccepted):
                    self._accept(fact.job_id, fact.spec)
                elif isinstance(fact, JobDone):
                    made = outputs_of(fact.result)
                    self._keep_outputs(fact.job_id, tuple(blob.digest for blob in made))
                    self._blobs.promise(made)

    def stored(self, facts: Sequence[Fact]) -> None:
        """These facts are durable."""
        with self._lock:
            for fact in facts:
                if isinstance(fact, (JobDone, JobWithdrawn)):
                    self._end(fact.job_id)
                if isinstance(fact, JobWithdrawn):
                    self._forget(fact.job_id)

    def forgotten(self, job_ids: Iterable[str]) -> None:
        """These jobs are kept no longer."""
        with self._lock:
            for job_id in job_ids:
                self._forget(job_id)

    def _accept(self, job_id: str, spec: JobSpec) -> None:
        if isinstance(spec.task, SessionTask):
            return  # what it loads is named later, and held while it lasts
        manifest = spec.manifest.digest
        inputs = tuple({tensor.data.digest for tensor in spec.task.inputs if isinstance(tensor.data, Blob)})
        self._live[job_id] = manifest, inputs
        self._manifests[manifest] += 1
        if self._manifests[manifest] == 1:
            self._members[manifest] = self._read(spec.manifest)
            self._blobs.hold(self._members[manifest])
        self._blobs.hold(inputs)
        self._blobs.redeem((*self._members[manifest], *inputs))

    def _end(self, job_id: str) -> None:
        if job_id not in self._live:
            return
        manifest, inputs = self._live.pop(job_id)
        self._blobs.let_go(inputs)
        self._manifests[manifest] -= 1
        if not self._manifests[manifest]:
            del self._manifests[manifest]
            self._blobs.let_go(self._members.pop(manifest))

    def _keep_outputs(self, job_id: str, digests: tuple[str, ...]) -> None:
        if digests and job_id not in self._outputs:
            self._outputs[job_id] = digests
            self._blobs.keep(digests)

    def _forget(self, job_id: str) -> None:
        self._blobs.keep_no_longer(self._outputs.pop(job_id, ()))

    def _read(self, manifest: Blob) -> tuple[str, ...]:
        """All of an artifact; nothing of one that somebody has removed: its jobs cannot run anyhow."""
        try:
            return self._members_of(manifest)
        except KedgeError as error:
            log.warning("what jobs need of artifact %s is not known: %s", manifest.digest, error)
            return (manifest.digest,)


def outputs_of(result: JobResult) -> tuple[Blob, ...]:
    """The blobs that a result names, each once."""
    return tuple(
        {tensor.data.digest: tensor.data for tensor in result.outputs if isinstance(tensor.data, Blob)}.values()
    )
