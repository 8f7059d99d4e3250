"""What lists of jobs show: everything but the bulk."""

from __future__ import annotations

from dataclasses import replace

from kedge.rpc.types import Job, JobResult, JobSpec, SessionTask

#: Of what an outcome says; a crash brings the end of its standard error along.
_MESSAGE_CHARS = 500


def brief_spec(spec: JobSpec) -> JobSpec:
    """The spec without the tensors that its client sent."""
    if isinstance(spec.task, SessionTask):
        return spec
    return replace(spec, task=replace(spec.task, inputs=()))


def brief_result(result: JobResult) -> JobResult:
    """The result without tensors, samples and profile, and with the beginning of a long message."""
    outcome = replace(result.outcome, message=result.outcome.message[:_MESSAGE_CHARS])
    measurement = None if result.measurement is None else replace(result.measurement, samples_ns=(), profile=None)
    return replace(result, outcome=outcome, outputs=(), measurement=measurement)


def without_inputs(job: Job) -> Job:
    """The job without the tensors that its client sent."""
    return replace(job, spec=brief_spec(job.spec))


def brief_job(job: Job) -> Job:
    """The job as lists show it."""
    return replace(without_inputs(job), result=None if job.result is None else brief_result(job.result))
