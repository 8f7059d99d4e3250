"""Put the agent on a board over SSH, start it, look at it, remove it. Nothing there needs root.

    deploy_board("pi@192.168.1.7", tracker="192.168.1.2:9190", runner_for=..., cache_dir=..., online=...)

A deployment asks the board what it is, checks that it can reach the tracker, sends what it does not have yet,
replaces an agent that runs, and waits until the tracker sees the new one.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import posixpath
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.deploy import launch
from kedge.deploy.bundle import agent_site, agent_zipapp
from kedge.deploy.cachedir import Progress, silent
from kedge.deploy.errors import DeployError
from kedge.deploy.probe import BoardInfo, probe
from kedge.deploy.ssh import Completed, Connection, Destination, connect
from kedge.rpc.errors import NoDeviceError

DIRECTORY = "~/.local/share/kedge-agent"
"""Where the agent lives on a board unless said otherwise."""

_SLICE_S = 1.0
_FINISH_S = 10.0
_START_S = launch.STOP_GRACE_S + 30.0

RunnerFor = Callable[[BoardInfo], Path]
"""Builds or finds the native `kedge-runner` for a board."""

Online = Callable[[str, float], bool]
"""`online(name, timeout_s)` waits until the tracker sees the agent of that name; when the time is up it returns False
or raises `NoDeviceError`."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """An agent that a tracker sees."""

    name: str
    board: BoardInfo
    pid: int
    uploaded: tuple[str, ...]
    """What was sent: files that the board had already are not."""


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What a board says about its agent; `pid` is None where it does not run."""

    installed: bool
    pid: int | None
    name: str | None
    tracker: str | None


def deploy_board(
    destination: Destination,
    *,
    tracker: str,
    runner_for: RunnerFor,
    online: Online,
    cache_dir: Path,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    directory: str = DIRECTORY,
    timeout_s: float = 60.0,
    progress: Progress = silent,
) -> Deployment:
    """Install the agent and start it; return when `tracker` (HOST:PORT, as seen from the board) sees it.

    `name` is the board's host name unless given. Running it again updates what changed and restarts the agent.
    Raises `ConnectError` (SSH), `BoardUnsuitableError`, `FetchError` (wheels) or `DeployError`; in the last case
    the message ends with the agent's own log.
    """
    progress(f"connecting to {destination}")
    with connect(destination) as connection:
        board = probe(connection, directory)
        python = ".".join(map(str, board.python_version))
        progress(f"{board.hostname}: {board.arch}, glibc {board.glibc[0]}.{board.glibc[1]}, Python {python}")
        remote = _Remote(connection, board)
        there = remote.prepare(tracker)
        uploaded = remote.install(there, runner_for(board), cache_dir, progress)
        name = name or board.hostname
        remote.configure(tracker, name, labels or {})
        progress(f"starting the agent {name}")
        pid = remote.start(name, tracker, online, timeout_s)
    progress(f"{name} is online")
    return Deployment(name, board, pid, uploaded)


def uninstall(destination: Destination, *, directory: str = DIRECTORY) -> bool:
    """Stop the agent and remove every trace; False if nothing was installed there."""
    with connect(destination) as connection:
        remote = _Remote(connection, probe(connection, directory))
        return remote.command("remove", ok=(0, launch.EXIT_NOT_RUNNING)).status == 0


def status(destination: Destination, *, directory: str = DIRECTORY) -> AgentStatus:
    """Whether an agent is installed there, and whether it runs."""
    with connect(destination) as connection:
        remote = _Remote(connection, probe(connection, directory))
        found = json.loads(remote.command("status").stdout)
        return AgentStatus(found["installed"], found["pid"], found["name"], found["tracker"])


class _Remote:
    """One board's installation directory, worked on through `launch.py`."""

    def __init__(self, connection: Connection, board: BoardInfo) -> None:
        self._connection = connection
        self._board = board
        self._script = Path(launch.__file__).read_bytes()
        self._site = ""

    def command(self, name: str, *arguments: str, timeout_s: float = 60.0, ok: tuple[int, ...] = (0,)) -> Completed:
        """Run one of `launch.py`'s commands; the script itself travels with it."""
        words = [self._board.python, "-", name, self._board.directory, *arguments]
        done = self._connection.run(words, stdin=self._script, timeout_s=timeout_s, check=False)
        if done.status not in ok:
            said = (done.stdout + done.stderr).strip()[-1500:]
            raise DeployError(f"{self._connection.destination}: {name} failed (status {done.status}): {said}")
        return done

    def prepare(self, tracker: str) -> dict[str, Any]:
        """What is installed there; refuses early if the board cannot open a connection to the tracker."""
        host, _, port = tracker.rpartition(":")
        if not host or not port.isdigit():
            raise DeployError(f"{tracker!r} is no address of a tracker", hint="write HOST:PORT")
        bare = host.removeprefix("[").removesuffix("]")
        done = self.command("prepare", bare, port, ok=(0, launch.EXIT_UNREACHABLE))
        if done.status != 0:
            raise DeployError(
                f"{self._connection.destination} cannot reach the tracker at {tracker}: {done.stdout.strip()}",
                hint=_unreachable_hint(bare, port),
            )
        there: dict[str, Any] = json.loads(done.stdout)
        return there

    def install(self, there: dict[str, Any], runner: Path, cache_dir: Path, progress: Progress) -> tuple[str, ...]:
        """Send what the board does not have in exactly this version; returns the names of what was sent."""
        board = self._board
        site = agent_site(cache_dir, board.arch, board.glibc, board.python_version[:2], progress)
        files: dict[str, tuple[bytes, int]] = {
            "agent.pyz": (agent_zipapp(), 0o644),
            "kedge-runner": (runner.read_bytes(), 0o755),
            "launch.py": (self._script, 0o644),
        }
        sent = []
        for name, (data, mode) in files.items():
            if there["digests"].get(name) != hashlib.sha256(data).hexdigest():
                progress(f"sending {name} ({len(data) / 1e6:.1f} MB)")
                self._connection.put(data, self._path(name), mode=mode)
                sent.append(name)
        self._site = f"site-{site.digest}"
        if self._site not in there["sites"]:
            shown = _Percent(progress, "sending grpcio and protobuf")
            self._connection.put(site.archive, self._path("site.tar.gz"), transferred=shown)
            progress("unpacking on the board")
            self.command("unpack", site.digest, timeout_s=300)
            sent.append("site")
        return tuple(sent)

    def configure(self, tracker: str, name: str, labels: Mapping[str, str]) -> None:
        """Write `agent.json`: what to start, and how."""
        # One word each: a name may begin with a dash.
        arguments = [f"--tracker={tracker}", f"--name={name}"]
        arguments += [f"--label={key}={value}" for key, value in sorted(labels.items())]
        arguments += [f"--runner={self._path('kedge-runner')}", f"--data-dir={self._path('data')}"]
        config = {
            "python": self._board.python,
            "site": self._site,
            "name": name,
            "tracker": tracker,
            "arguments": arguments,
        }
        self._connection.put(json.dumps(config, indent=1).encode(), self._path("agent.json"), mode=0o600)

    def start(self, name: str, tracker: str, online: Online, timeout_s: float) -> int:
        """Start the agent in place of one that runs; wait for the tracker to see it, or for its end."""
        # It ends when the agent ends; if this side goes away first, its standard input is closed and it ends too.
        words = [self._board.python, self._path("launch.py"), "launch", self._board.directory]
        launcher = self._connection.start(words, stdin=None)
        try:
            pid = launcher.read_line(_START_S)
            if not pid.isdigit():
                raise DeployError(f"the agent {name} was not started on {self._connection.destination}: {pid}")
            deadline = time.monotonic() + timeout_s
            while (left := deadline - time.monotonic()) > 0:
                if _seen(online, name, min(_SLICE_S, left)):
                    return int(pid)
                ended = launcher.wait(0)
                if ended is not None:
                    log = ended.stdout.partition("\n")[2]
                    raise DeployError(f"the agent {name} on {self._connection.destination} ended:\n{log}")
        finally:
            launcher.finish(_FINISH_S)
        log = self.command("tail", ok=(0, launch.EXIT_NOT_RUNNING)).stdout
        raise DeployError(
            f"the agent {name} runs on {self._connection.destination}, but the tracker at {tracker} "
            f"did not see it within {timeout_s:.0f} s. Its log ends with:\n{log}",
            hint="is that the tracker this command talks to, and is the name not in use?",
        )

    def _path(self, name: str) -> str:
        return posixpath.join(self._board.directory, name)


class _Percent:
    """Shows the progress of a transfer in steps of a quarter."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._what = what
        self._next = 0

    def __call__(self, sent: int, total: int) -> None:
        percent = 100 * sent // max(total, 1)
        if percent >= self._next:
            self._progress(f"{self._what}: {percent} % of {total / 1e6:.1f} MB")
            self._next = percent - percent % 25 + 25


def _seen(online: Online, name: str, timeout_s: float) -> bool:
    try:
        return online(name, timeout_s)
    except NoDeviceError:
        return False


def _unreachable_hint(host: str, port: str) -> str:
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        return (
            f"{host} means the board itself there: start the tracker on an address of this machine "
            f"(kedge tracker start --host 0.0.0.0 --port {port}) and give that address, "
            f"or forward the port: ssh -N -R {port}:127.0.0.1:{port} BOARD"
        )
    return "is the tracker running there, does it listen on more than 127.0.0.1, and does a firewall let the board in?"
