"""How a job ended, as plain Python: the kinds, the stages, and one sentence for people."""

from __future__ import annotations

import enum
import signal as signals
from dataclasses import dataclass
from typing import Optional


class Word(str, enum.Enum):
    """An enumeration whose members are, print and serialise as their words."""

    def __str__(self) -> str:
        return str(self.value)


class Stage(Word):
    """The part of a job's life that has its own deadline."""

    QUEUE = "queue"
    TRANSFER = "transfer"
    LOAD = "load"
    RUN = "run"


class OutcomeKind(Word):
    """Why a job ended. The value is what `JobError.outcome` and `--json` show."""

    OK = "ok"
    #: Told by whoever compares outputs with a reference, as `kedge.validation` does; no agent knows what is right.
    WRONG_RESULT = "wrong_result"
    TIMEOUT = "timeout"
    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    LOAD_ERROR = "load_error"
    DEVICE_LOST = "device_lost"
    CANCELLED = "cancelled"
    INVALID_MEASUREMENT = "invalid_measurement"
    BAD_REQUEST = "bad_request"
    DEVICE_FAULT = "device_fault"
    #: Reported by a newer peer in words that this version does not know.
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Outcome:
    """The end of a job: `stage` is where it happened, `signal` and `exit_status` describe a crash (0: none)."""

    kind: OutcomeKind
    stage: Optional[Stage] = None
    signal: int = 0
    exit_status: int = 0
    message: str = ""

    @property
    def ok(self) -> bool:
        """True when the job did what it was asked to do."""
        return self.kind is OutcomeKind.OK

    def __str__(self) -> str:
        words = self.kind.value.replace("_", " ")
        if self.kind is OutcomeKind.CRASH and self.signal:
            words += f" ({_signal_name(self.signal)})"
        elif self.kind is OutcomeKind.CRASH and self.exit_status:
            words += f" (exit status {self.exit_status})"
        if self.stage is not None and self.kind is not OutcomeKind.OK:
            words += f" in stage {self.stage.value}"
        return f"{words}: {self.message}" if self.message else words


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
