"""What can go wrong with a runner: one small tree of exceptions under `RunnerError`."""

from __future__ import annotations

from typing import Optional

from kedge.rpc import abi
from kedge.rpc.errors import KedgeError


class RunnerError(KedgeError):
    """Base of what can go wrong with a runner; `stage` is "start", "load" or "run"."""

    def __init__(self, message: str, *, stage: str, hint: Optional[str] = None) -> None:
        super().__init__(message, hint=hint)
        self.stage = stage


class RunnerUnavailable(RunnerError):
    """There is no runner at that path that starts and speaks this protocol: the device's fault, not the artifact's."""


class RunnerCrashed(RunnerError):
    """The process ended on its own, or broke the protocol and was killed.

    `signal` is the number of the signal that ended it, or 0; `exit_status` its status, or 0; `stderr` the end of
    what it wrote there.
    """

    def __init__(self, message: str, *, stage: str, signal_number: int, exit_status: int, stderr: str) -> None:
        super().__init__(message, stage=stage)
        self.signal = signal_number
        self.exit_status = exit_status
        self.stderr = stderr


class RunnerTimeout(RunnerError):
    """A call missed its deadline, or used up its CPU seconds. `alive` says whether the runner can be used again."""

    def __init__(self, message: str, *, stage: str, alive: bool) -> None:
        super().__init__(message, stage=stage)
        self.alive = alive


class RunnerOutOfMemory(RunnerError):
    """An allocation failed under the memory limit, or the kernel's out-of-memory killer ended the process."""


class RunnerRefused(RunnerError):
    """The runtime refused; `status` is its kedge_status. The runner can be used again."""

    def __init__(self, message: str, *, stage: str, status: int) -> None:
        super().__init__(message, stage=stage)
        self.status = status


class RunnerCancelled(RunnerRefused):
    """`cancel` was called. The runner can be used again unless `alive` says that it had to be killed."""

    def __init__(self, message: str, *, stage: str, alive: bool) -> None:
        super().__init__(message, stage=stage, status=abi.E_CANCELLED)
        self.alive = alive
