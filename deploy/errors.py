"""What can go wrong between this machine and a board: one class per reason."""

from __future__ import annotations

from kedge.rpc.errors import ConnectError, KedgeError


class DeployError(KedgeError):
    """A step of a deployment failed; the message names the board and the step."""


class BoardUnsuitableError(DeployError):
    """The board answers, but cannot run the agent (no Python 3.9, no room, an unknown architecture)."""


class NameTakenError(DeployError):
    """Another machine is connected to the tracker under the name that the board was to have."""


class DeploymentInterrupted(KeyboardInterrupt):
    """Ctrl-C during a deployment; the text says what the board is like now."""


class HostKeyUnknownError(ConnectError):
    """The board's host key is not in known_hosts: its identity cannot be checked."""


class HostKeyChangedError(ConnectError):
    """The board presents another host key than the one in known_hosts."""


class BoardAddressError(ConnectError):
    """How to log in is said in a way that can never work; nothing was tried."""

    exit_status = 2


class AuthenticationError(ConnectError):
    """The board accepted none of the keys that were offered."""


class RemoteCommandError(DeployError):
    """A command on the board ended with a non-zero status."""

    def __init__(self, message: str, *, status: int, stdout: str, stderr: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


class FetchError(DeployError):
    """Packages or wheels could not be downloaded, or are not what their index promised."""


class EmulationError(DeployError):
    """An emulated board cannot be built or started on this machine."""
