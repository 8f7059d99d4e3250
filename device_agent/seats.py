"""Where a job's code runs: a runner in a folder of its own, started for the job or, as the spare, before there is one.

The spare is a runner like that of the last job, started while the device idles. It has loaded nothing, serves one job
as any runner does, and only one that wants the very same limits and cores: those were set when it started. For any
other it ends first: a job whose code is held by less, as a GPU's is, could reach it, and with it the job after.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple

from kedge.device_agent.runner import Limits, Runner


@dataclass(frozen=True, eq=False)
class Seat:
    """A runner, the folder that it may write in, and what it was started with (`cpus` None: those of the agent)."""

    runner: Runner
    folder: Path
    limits: Limits
    cpus: Optional[Tuple[int, ...]]


class Spare:
    """Room for one seat that nobody has yet. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seat: Optional[Seat] = None
        self._closed = False

    def take(self) -> Optional[Seat]:
        """The seat, now the caller's: to be used, or to be vacated before another job's code runs beside it."""
        with self._lock:
            seat, self._seat = self._seat, None
            return seat

    def fits(self, like: Seat) -> bool:
        """Whether there is one like this, or none is wanted any more."""
        with self._lock:
            seat = self._seat
            return self._closed or (seat is not None and (seat.limits, seat.cpus) == (like.limits, like.cpus))

    def put(self, seat: Seat) -> Optional[Seat]:
        """Keep a seat; returns the one that is to be vacated: that of before, or this one where none is wanted."""
        with self._lock:
            if self._closed:
                return seat
            before, self._seat = self._seat, seat
            return before

    def close(self) -> Optional[Seat]:
        """Want none any more; returns the one to be vacated."""
        with self._lock:
            self._closed = True
            seat, self._seat = self._seat, None
            return seat
