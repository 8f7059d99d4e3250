"""When a device that fails is left alone for a while. Pure; times are Unix milliseconds.

The breaker opens when job after job fails there for reasons that are the device's, or for any reason where they have
nothing else in common: first for `quarantine_ms`, then for twice as long each time, until a job succeeds (Nygard,
"Release It!", 2007). Between two such times one job is let through to find out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge.rpc.outcome import OutcomeKind


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The rules of circuit breakers: open after so many failures in a row, first for so long, and never for longer."""

    after: int
    first_ms: int
    longest_ms: int


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A job that ended badly: whose it was, and of what artifact."""

    user: str
    artifact: str
    kind: OutcomeKind


@dataclass(slots=True)
class Breaker:
    """A device's circuit breaker."""

    #: Jobs that failed there for its sake, one after the other, and why.
    faults: dict[str, str] = field(default_factory=dict)
    #: Jobs that ended badly there since one went well, of users and artifacts that all differ: what many have in
    #: common is the device. One user, or one artifact, has no device quarantined.
    suspicions: dict[str, Suspicion] = field(default_factory=dict)
    #: How often it opened since a job last succeeded, until when it is open, and why.
    opened: int = 0
    until_ms: int = 0
    why: str = ""

    def is_open(self, now: int) -> bool:
        """True while no job is let through."""
        return now < self.until_ms

    def fault(self, job_id: str, reason: str, now: int, rules: Quarantine) -> bool:
        """A job failed there; True when that opens the breaker: after so many, or at once where it was open before."""
        self.faults[job_id] = reason
        if self.is_open(now):
            return False
        if len(self.faults) < rules.after and not self.opened:
            return False
        self._open(f"{len(self.faults)} jobs in a row failed there ({reason})", now, rules)
        return True

    def suspect(self, job_id: str, failure: Suspicion, now: int, rules: Quarantine) -> bool:
        """A job ended badly there, perhaps by its own fault; True when that opens the breaker."""
        known = self.suspicions.values()
        if self.is_open(now) or any(failure.user == k.user or failure.artifact == k.artifact for k in known):
            return False
        self.suspicions[job_id] = failure
        if len(self.suspicions) < rules.after:
            return False
        kinds = ", ".join(sorted({suspicion.kind.value.replace("_", " ") for suspicion in known}))
        self._open(f"jobs of {len(self.suspicions)} users in a row ended badly there ({kinds})", now, rules)
        self.suspicions.clear()  # it takes as many again: one user must not keep it open
        return True

    def _open(self, why: str, now: int, rules: Quarantine) -> None:
        self.until_ms = now + min(rules.longest_ms, rules.first_ms << min(self.opened, 30))
        self.opened += 1
        self.why = why

    def success(self) -> None:
        """A job went well there: the device does what it should."""
        self.faults.clear()
        self.suspicions.clear()
        self.opened, self.until_ms = 0, 0

    def forgive(self, job_id: str) -> None:
        """That job was at fault itself."""
        self.suspicions.pop(job_id, None)
        if self.faults.pop(job_id, None) is not None and not self.faults:
            self.opened, self.until_ms = 0, 0
