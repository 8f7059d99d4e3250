"""What goes wrong in kedge, as one small tree. Shared by every floor, so it depends on nothing.

Each class carries the exit status that the command line ends with, so that scripts can tell reasons apart.
"""

from __future__ import annotations


class KedgeError(Exception):
    """Base of every error kedge raises on purpose.

    The message names the thing that is wrong; `hint`, where present, says what to do next.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(KedgeError):
    """An option or argument with a value that can never work; nothing was done."""

    exit_status = 2


class ArtifactError(KedgeError):
    """A `.kdg` file that is corrupt, truncated, of another format version, or fails a digest."""

    exit_status = 3


class IncompatibleTargetError(KedgeError):
    """An artifact has no variant that this device can run (architecture, or a CPU feature or GPU it lacks)."""

    exit_status = 4


class InputError(KedgeError):
    """A named input is missing, unknown, or has the wrong dtype or shape."""

    exit_status = 5


class ConnectError(KedgeError):
    """A tracker or a board could not be reached."""

    exit_status = 6


class NoDeviceError(KedgeError):
    """No connected device matches a selector."""

    exit_status = 7


class JobError(KedgeError):
    """A job ended with an outcome other than ok; `outcome` is its name (see `kedge.rpc.outcome`)."""

    exit_status = 8

    def __init__(self, message: str, *, outcome: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.outcome = outcome


class AuthenticationError(KedgeError):
    """The tracker does not know who asks: no token or certificate, or one that is expired, revoked or another's."""

    exit_status = 9


class PermissionDeniedError(KedgeError):
    """The tracker knows who asks, and this is not for them."""

    exit_status = 10


class LimitError(KedgeError):
    """More of something than one user may have at a time."""

    exit_status = 11
