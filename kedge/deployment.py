"""Deploying an agent: `kedge.deploy` brings it to the board, the compiler's toolchain gives the runner, the tracker
says when it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kedge
from kedge.rpc import names
from kedge.rpc.errors import NoDeviceError, UsageError
from kedge.rpc.security import signing

if TYPE_CHECKING:
    from kedge.deploy.board import AgentStatus, Deployment

Progress = Callable[[str], None]

#: The least that a board of each architecture runs: the runner needs no more, whatever its models were compiled for.
_BASELINE = {
    "aarch64": "llvm -mtriple=aarch64-linux-gnu",
    "armv7l": "llvm -mtriple=armv7-linux-gnueabihf",
    "riscv64": "llvm -mtriple=riscv64-linux-gnu",
    "x86_64": "x86-64",
}


@dataclass(frozen=True, slots=True)
class Login:
    """How to log in to a board: `host` is [USER@]HOST[:PORT]; the rest defaults to what `~/.ssh` says."""

    host: str
    identity: Path | None = None
    known_hosts: Path | None = None

    def destination(self) -> Any:
        """The login as `kedge.deploy` takes it."""
        from kedge.deploy.ssh import resolve

        return resolve(self.host, identity=self.identity, known_hosts=self.known_hosts)


@dataclass(frozen=True, slots=True)
class Joining:
    """How an agent comes to a tracker: with a join string, as what it is enrolled as, or in plaintext on loopback."""

    join: str | None = None
    enrolled: bool = False
    agents_port: int | None = None

    @property
    def arguments(self) -> list[str]:
        """Of the agent's command line, on which no secret is."""
        return [] if self.join or self.enrolled else ["--insecure-loopback"]

    @property
    def environment(self) -> dict[str, str]:
        """Of the agent's environment."""
        return {"KEDGE_JOIN": self.join} if self.join else {}


def joining(tracker: str, device: str) -> Joining:
    """How a device may join a tracker whose administrator asks.

    Raises:
        AuthenticationError: there are no credentials here.
        PermissionDeniedError: they are not those of an administrator.
    """
    from kedge.rpc.client.access import Access
    from kedge.rpc.security import credentials
    from kedge.rpc.transport import parse_trackers

    address = parse_trackers(tracker)
    tls = credentials.find(address).tls
    if tls is None:
        return Joining()
    with Access(address, tls) as access:
        join, agents_port = access.enrol_token(device)
    return Joining(str(join), agents_port=agents_port)


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """`["rack=a"]` as `{"rack": "a"}`; raises UsageError on anything else, and on labels that a deployment sets."""
    labels = names.parse_labels(texts)
    if names.DEPLOYMENT in labels:
        raise UsageError(
            f"the label {names.DEPLOYMENT!r} tells deployments apart and is set by them", hint="choose another key"
        )
    return labels


def deploy(
    login: Login,
    tracker: str,
    *,
    name: str | None = None,
    labels: dict[str, str] | None = None,
    signers: Sequence[str] = (),
    measure_cores: str | None = None,
    log_format: str = "text",
    service: bool = True,
    timeout_s: float = 60.0,
    progress: Progress = lambda what: None,
) -> tuple[Any, Deployment]:
    """Install and start the agent on a board, and give the device as the tracker sees it, and what was done.

    With `signers` (public keys) the agent runs only what one of them signed; `measure_cores` ("2-3") are kept for
    timings. `log_format` is "text" or "json". With `service` the board starts the agent again whenever it has started.

    Raises:
        UsageError: a name or label that no device can have, or what is no key.
        ConnectError: no login, or no tracker.
        AuthenticationError, PermissionDeniedError: whoever deploys is no administrator of the tracker.
        DeployError: the board cannot run the agent, or the tracker did not see it in time; with the agent's log.
        DeploymentInterrupted: Ctrl-C, and what the board is like after it.
    """
    from kedge.compiler.toolchain import cache_dir
    from kedge.deploy.board import Standing, deploy_board

    if name is not None:
        names.check_name(name)
    signing.parse_signers(signers)
    destination = login.destination()
    options = [*(f"--require-signer={key}" for key in signers), f"--log-format={log_format}"]
    options += [f"--measure-cores={measure_cores}"] if measure_cores else []
    with kedge.connect(tracker) as fleet:
        deployed = deploy_board(
            destination,
            tracker=str(fleet.address),  # with the port, where only a host was named
            joining=lambda device: joining(tracker, device),
            runner_for=lambda board: runner_for(board.arch, progress),
            connected=lambda device, seconds: labels_of(fleet, device, seconds),
            cache_dir=cache_dir() / "deploy",
            name=name,
            labels=labels,
            options=options,
            service=service,
            timeout_s=timeout_s,
            progress=progress,
        )
        with Standing(Standing.running(deployed.name)).told():
            return fleet.wait_for_device(f"name={deployed.name}", timeout=timeout_s), deployed


def labels_of(fleet: Any, name: str, seconds: float) -> Mapping[str, str] | None:
    """The labels of the device of exactly that name, once it is connected; None when the time is up."""
    try:
        found: Mapping[str, str] = fleet.wait_for_device(f"name={name}", timeout=seconds).info.labels
    except NoDeviceError:
        return None
    return found


def remove(login: Login) -> bool:
    """Stop the agent on a board and remove every trace of it; False where there was none."""
    from kedge.deploy.board import uninstall

    return uninstall(login.destination())


def look(login: Login) -> AgentStatus:
    """What a board says about its agent; raises ConnectError, DeployError."""
    from kedge.deploy.board import status

    return status(login.destination())


def runner_for(arch: str, progress: Progress = lambda what: None) -> Path:
    """The native runner for boards of `arch` (as `uname -m` says), built once and cached."""
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime

    return build_runtime(parse(_BASELINE[arch]), progress=progress).runner
