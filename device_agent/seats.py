"""Where a job's code runs: a runner in a folder of its own, started for the job or, as the spare, before there is one.

The spare is a runner like that of the last job, started while the device idles. It has loaded nothing, serves one job
as any runner does, and only one that wants the very same limits and cores: those were set when it started. For any
other it ends first: a job whose code is held by less, as a GPU's is, could reach it, and with it the job after. One
that is still being started is given up instead: it will serve nobody, and no job waits for what it does not use.
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

    def fits(self, limits: Limits, cpus: Optional[Tuple[int, ...]]) -> bool:
        """Whether a job that wants these can have it."""
        return (self.limits, self.cpus) == (limits, cpus)


class Coming:
    """A spare that a thread is starting, with these limits and cores. Safe from several threads."""

    def __init__(self, limits: Limits, cpus: Optional[Tuple[int, ...]]) -> None:
        self.limits = limits
        self.cpus = cpus
        #: Set once it is there, or is not going to be.
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._runner: Optional[Runner] = None
        self._unwanted = False

    def started(self, runner: Runner) -> None:
        """Its process is there, and has said nothing yet."""
        with self._lock:
            self._runner = runner
            if self._unwanted:
                runner.kill()

    def give_up(self) -> None:
        """Have it end, now or as soon as it has a process; waits for nothing."""
        with self._lock:
            self._unwanted = True
            if self._runner is not None:
                self._runner.kill()


class Spare:
    """Room for one seat that nobody has yet, there or being started. Safe from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seat: Optional[Seat] = None
        self._coming: Optional[Coming] = None
        self._closed = False

    def take(
        self, limits: Limits, cpus: Optional[Tuple[int, ...]], patience_s: float, called_off: threading.Event
    ) -> Optional[Seat]:
        """The seat, now the caller's: to be used if it fits, else to be vacated before another job's code runs.

        One that is being started and fits is waited for, so long; else it is given up. Whoever waits for it when
        `called_off` is set, and `wake` called, gets none, and leaves it to the next job.
        """
        with self._changed:
            coming = self._coming
            if coming is not None and (coming.limits, coming.cpus) == (limits, cpus):
                self._changed.wait_for(lambda: self._coming is not coming or called_off.is_set(), patience_s)
            if self._coming is not None and called_off.is_set():
                return None
            return self._clear()

    def wake(self) -> None:
        """Have whoever waits see whether that was called off."""
        with self._changed:
            self._changed.notify_all()

    def drop(self) -> Optional[Seat]:
        """The seat, to be vacated by the caller, who has no use for it; one that is being started is given up."""
        with self._changed:
            return self._clear()

    def expect(self, limits: Limits, cpus: Optional[Tuple[int, ...]]) -> Optional[Coming]:
        """One that the caller is to start, and then to `put` or `miss`; None where there is one, or none is wanted."""
        with self._changed:
            there = self._coming or self._seat
            if self._closed or (there is not None and (there.limits, there.cpus) == (limits, cpus)):
                return None
            self._give_up()
            self._coming = Coming(limits, cpus)
            return self._coming

    def put(self, coming: Coming, seat: Seat) -> Optional[Seat]:
        """It is there; returns the one that is to be vacated: that of before, or this one where it was given up."""
        with self._changed:
            if self._coming is not coming:
                return seat
            before, self._seat, self._coming = self._seat, seat, None
            self._changed.notify_all()
            return before

    def miss(self, coming: Coming) -> bool:
        """It does not start; whether anybody wanted it still."""
        with self._changed:
            wanted = self._coming is coming
            if wanted:
                self._coming = None
                self._changed.notify_all()
            return wanted

    def close(self) -> Tuple[Optional[Seat], Optional[Coming]]:
        """Want none any more; returns the one to be vacated, and the one that was being started and is given up."""
        with self._changed:
            self._closed = True
            coming = self._coming
            return self._clear(), coming

    def _clear(self) -> Optional[Seat]:
        seat, self._seat = self._seat, None
        self._give_up()
        return seat

    def _give_up(self) -> None:
        """Want the one that is being started no more; whoever waits for it hears so."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.give_up()
            self._changed.notify_all()
