"""What a user's next job may be: how many there may be, how large, and for how long. Pure."""

from __future__ import annotations

from dataclasses import replace

from kedge.rpc.limits import check_number
from kedge.rpc.status import QueueFullError
from kedge.rpc.tracker.facts import Needs
from kedge.rpc.tracker.jobs import Jobs, carries
from kedge.rpc.tracker.scheduler import Want
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.types import Deadlines, JobSpec, SessionTask


class Admission:
    """The limits of jobs that are submitted."""

    def __init__(self, rules: Settings, jobs: Jobs) -> None:
        self._rules = rules
        self._jobs = jobs

    def check_room(self, spec: JobSpec, needs: Needs, user: str) -> None:
        """A user may have one more job like this; raises QueueFullError, and InputError for what no job may have."""
        rules, whose, longest = self._rules, user or "this user", self._longest(spec)
        for name in Deadlines.__dataclass_fields__:
            given, most = getattr(spec.deadlines, name), getattr(longest, name)
            check_number(f"the deadline {name}", given, 0, most, "0 means the tracker's default")
        if self._jobs.queue.count(user) >= rules.max_queued_per_user:
            raise QueueFullError(
                f"{rules.max_queued_per_user} jobs of {whose} wait already", hint="wait, or cancel some"
            )
        most, has = rules.max_wants_per_user, self._jobs.queue.count_wants(user)
        if self._jobs.queue.lines >= rules.max_wants:
            most = min(most, rules.max_wants // self._jobs.queue.users_with(user))
        if has >= most and not self._jobs.queue.has(Want(spec.selector, needs, user)):
            raise QueueFullError(
                f"jobs of {whose} wait for {has} different selections of devices already, and may for {most} now",
                hint="wait for some of them to start, or submit jobs with the same selector",
            )

    def may_carry(self, spec: JobSpec, user: str) -> bool:
        """Whether one more job like this may have its inputs within its spec; else they belong into blobs."""
        return self._jobs.carried(user) + carries(spec) <= self._rules.max_carried_bytes_per_user

    def deadlines(self, spec: JobSpec) -> Deadlines:
        """Those of the job, with the defaults where it leaves them open."""
        longest = self._longest(spec)
        default = self._rules.deadlines
        if isinstance(spec.task, SessionTask):
            default = replace(default, run_ms=longest.run_ms)
        return Deadlines(
            *(
                getattr(spec.deadlines, name) or min(getattr(default, name), getattr(longest, name))
                for name in Deadlines.__dataclass_fields__
            )
        )

    def _longest(self, spec: JobSpec) -> Deadlines:
        """What the deadlines of such a job may be."""
        rules = self._rules
        is_session = isinstance(spec.task, SessionTask)
        return replace(rules.longest, run_ms=rules.longest_session_ms) if is_session else rules.longest
