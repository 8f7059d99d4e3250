"""What an agent and the tracker say to each other on the agent's one stream, as plain frozen dataclasses.

    agent:   Hello, then any of Heartbeat, JobStarted, JobProgress, JobFinished, Goodbye
    tracker: Welcome or Refused, then any of AssignJob, AbortJob, ResultAccepted

Rules that both ends keep:

- `Hello.running` and every `Heartbeat.running` list each lease that the agent holds: jobs it was assigned, jobs it
  runs, and results that no ResultAccepted has named yet. A lease that a Hello does not list is given up: a job that
  never started is queued again, one that did is lost.
- JobStarted comes when the agent takes up the job, JobProgress at the start of each later stage, JobFinished once per
  lease, sent again after every reconnect until ResultAccepted names the job.
- AbortJob is answered by JobFinished too (outcome cancelled, or whatever happened first; where that was not accepted
  yet, cancelled takes its place).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Tuple, Union

from kedge.rpc.outcome import Stage
from kedge.rpc.types import DeviceInfo, Health, JobResult, JobSpec, Lease, Protocol


@dataclass(frozen=True)
class Hello:
    """The first message of an agent; `instance_id` is drawn at every start of the agent."""

    protocol: Protocol
    device: DeviceInfo
    instance_id: str
    running: Tuple[Lease, ...] = ()
    #: None from older agents, whose first heartbeat has it.
    health: Optional[Health] = None


@dataclass(frozen=True)
class Heartbeat:
    """Says that the agent lives, and renews the leases it names."""

    health: Health = field(default_factory=Health)
    running: Tuple[Lease, ...] = ()


@dataclass(frozen=True)
class JobStarted:
    """The agent took up the job; its transfer stage begins."""

    lease: Lease


@dataclass(frozen=True)
class JobProgress:
    """The job entered a stage."""

    lease: Lease
    stage: Stage


@dataclass(frozen=True)
class JobFinished:
    """The job ended."""

    lease: Lease
    result: JobResult


@dataclass(frozen=True)
class Goodbye:
    """The agent leaves on purpose; work that it still holds is lost."""

    reason: str = ""


@dataclass(frozen=True)
class Welcome:
    """The tracker accepts the agent."""

    protocol: Protocol
    tracker_id: str
    heartbeat_interval_ms: int


@dataclass(frozen=True)
class AssignJob:
    """Run this."""

    lease: Lease
    spec: JobSpec


@dataclass(frozen=True)
class AbortJob:
    """Stop this and report."""

    lease: Lease
    reason: str = ""


@dataclass(frozen=True)
class ResultAccepted:
    """The result is stored (or, when stale, not wanted); never send it again."""

    job_id: str
    stale: bool = False


@dataclass(frozen=True)
class Refused:
    """The stream ends after this; `retry` says whether coming back later can help."""

    reason: str
    retry: bool = False


AgentBody = Union[Hello, Heartbeat, JobStarted, JobProgress, JobFinished, Goodbye]
TrackerBody = Union[Welcome, AssignJob, AbortJob, ResultAccepted, Refused]
