"""The tracker's times and limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge.rpc.types import Deadlines


@dataclass(frozen=True, slots=True)
class Settings:
    """The tracker's times and limits. `deadlines` fills in what a job leaves open."""

    heartbeat_interval_ms: int = 3_000
    silence_ms: int = 10_000
    lease_ms: int = 15_000
    #: Without a word from its client a session ends; and however much is said, after this time.
    session_lease_ms: int = 10_000
    longest_session_ms: int = 12 * 3_600_000
    cancel_grace_ms: int = 10_000
    deadline_slack_ms: int = 5_000
    deadlines: Deadlines = field(
        default_factory=lambda: Deadlines(queue_ms=600_000, transfer_ms=300_000, load_ms=60_000, run_ms=300_000)
    )
    #: No job may ask for more.
    longest: Deadlines = field(
        default_factory=lambda: Deadlines(
            queue_ms=30 * 86_400_000, transfer_ms=86_400_000, load_ms=86_400_000, run_ms=7 * 86_400_000
        )
    )
    max_requeues: int = 2
    #: After so many devices that failed with it, a job is not given to another one.
    max_device_faults: int = 2
    #: So many jobs in a row that fail for the device's sake put it into quarantine, at first for so long; and so many
    #: that end badly for any reason, if their users and artifacts all differ.
    quarantine_after: int = 3
    quarantine_ms: int = 60_000
    longest_quarantine_ms: int = 3_600_000
    fair_half_life_ms: int = 600_000
    max_queued_per_user: int = 20_000
    #: Of inputs within specs, which are in memory until their jobs are done; those of further jobs become blobs.
    max_carried_bytes_per_user: int = 256 << 20
    #: Selectors, and needs of artifacts, that differ.
    max_wants_per_user: int = 1_000
    #: Where all users together have so many, each may only have an equal share of it: a plan looks at all of them.
    max_wants: int = 5_000
    max_reservation_ms: int = 7 * 86_400_000
    max_reservation_ahead_ms: int = 366 * 86_400_000
    max_reservations_per_user: int = 16
    remembered_jobs: int = 100_000
    remembered_devices: int = 1_000


def seconds(ms: int) -> str:
    """A time in words: "0.5 s"."""
    return f"{ms / 1000:g} s"
