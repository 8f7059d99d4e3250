"""Put the agent on a board over SSH, start it, look at it, remove it. Nothing there needs root.

    deploy_board("pi@192.168.1.7", tracker="192.168.1.2:9190", runner_for=..., cache_dir=..., connected=...)

A deployment asks the board what it is, checks that it can reach the tracker, sends what it does not have yet,
replaces an agent that runs, and waits until the tracker sees the new one. If it does not come to that, the agent that
was there before is brought back; of a first installation only one whose agent was started stays, with its log. Once the
tracker sees the new one, nothing is undone any more, and the board is told to start it whenever it has started itself
(`boot.py`). An interrupt says what it leaves.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import posixpath
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kedge.deploy import boot, launch
from kedge.deploy.bundle import agent_site, agent_zipapp
from kedge.deploy.cachedir import Progress, silent
from kedge.deploy.errors import DeployError, DeploymentInterrupted, NameTakenError
from kedge.deploy.probe import BoardInfo, Place, locate, probe
from kedge.deploy.ssh import Completed, Connection, Destination, RemoteProcess, connect
from kedge.rpc.errors import KedgeError
from kedge.rpc.names import DEPLOYMENT, check_name, parse_labels

DIRECTORY = "~/.local/share/kedge-agent"
"""Where the agent lives on a board unless said otherwise."""

# The script comes through standard input, which stays open behind it.
_BOOT = 'import sys; exec(compile(sys.stdin.buffer.read(int(sys.argv.pop(1))), "launch.py", "exec"))'

_SLICE_S = 1.0
_PREPARE_S = 60.0
# A board that is still trying the tracker gives up first.
_FINISH_S = launch.CONNECT_S + 5.0
_START_S = launch.STOP_GRACE_S + 30.0

RunnerFor = Callable[[BoardInfo], Path]
"""Builds or finds the native `kedge-runner` for a board."""

Connected = Callable[[str, float], Mapping[str, str] | None]
"""`connected(name, timeout_s)` waits until the tracker sees a device of exactly that name, and gives its labels; None
when the time is up."""


class Joining(Protocol):
    """How an agent is let in: with a join string, or (None) in plaintext on loopback."""

    @property
    def join(self) -> str | None:
        """A secret that is good for one device."""

    @property
    def agents_port(self) -> int | None:
        """Where the tracker serves agents, if not where it serves clients."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What starts an agent when its board has started: `by` is "systemd", "cron" or None, and `why` then the reason.

    `what` is systemd's unit or cron's line.
    """

    by: str | None
    what: str
    why: str

    def __str__(self) -> str:
        if self.by is not None:
            return f"after a restart of the board it is started by {self.by} ({self.what})"
        return "after a restart of the board it is not started" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True, slots=True)
class Deployment:
    """An agent that a tracker sees."""

    name: str
    board: BoardInfo
    pid: int
    uploaded: tuple[str, ...]
    """What was sent: files that the board had already are not."""
    boot: Boot

    @property
    def start_command(self) -> str:
        """What starts the agent on the board, for its shell."""
        return shlex.join([self.board.python, posixpath.join(self.board.directory, "launch.py"), "start"])


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What a board says about its agent; `pid` is None where it does not run."""

    installed: bool
    pid: int | None
    name: str | None
    tracker: str | None
    boot: Boot


class Standing:
    """What a deployment that is interrupted says of the board; whoever changes the board keeps it true."""

    UNTOUCHED = "the board is as it was before"
    UNKNOWN = "the board does not say what is left there; --uninstall removes it"

    def __init__(self, says: str = UNTOUCHED) -> None:
        self.says = says

    @staticmethod
    def running(name: str) -> str:
        """What to say once the tracker sees the agent."""
        return f"the new agent {name} runs on the board all the same, and is removed with --uninstall"

    @contextmanager
    def told(self) -> Iterator[None]:
        """Ctrl-C inside raises DeploymentInterrupted, which says what the board is like."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise DeploymentInterrupted(self.says) from interrupt


def deploy_board(
    destination: Destination,
    *,
    tracker: str,
    joining: Callable[[str], Joining],
    runner_for: RunnerFor,
    connected: Connected,
    cache_dir: Path,
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    directory: str = DIRECTORY,
    service: bool = True,
    timeout_s: float = 60.0,
    progress: Progress = silent,
) -> Deployment:
    """Install the agent and start it; return when `tracker` (HOST:PORT, as seen from the board) sees it.

    `joining` says how the device of a name is let in. `name` is the board's host name unless given. `options` are
    further ones of the agent's command line, a word each. With `service` the board starts the agent whenever it has
    started itself, without it no longer. Running it again updates what changed and restarts the agent.

    Raises:
        UsageError: a name or label that no device can have; nothing was done.
        ConnectError: no login over SSH.
        BoardUnsuitableError, FetchError: nothing was changed on the board.
        NameTakenError: another machine has the name.
        DeployError: anything else; where the agent was started, the message ends with its own log.
        DeploymentInterrupted: Ctrl-C, and what the board is like after it.
    """
    parse_labels(f"{key}={value}" for key, value in (labels or {}).items())
    if name is not None:
        check_name(name)
    standing = Standing()
    with standing.told(), ExitStack() as stack:
        progress(f"connecting to {destination}")
        connection = stack.enter_context(connect(destination))
        place = locate(connection, directory)
        board = probe(connection, place)
        python = ".".join(map(str, board.python_version))
        progress(f"{board.hostname}: {board.arch}, glibc {board.glibc[0]}.{board.glibc[1]}, Python {python}")
        name = check_name(name or board.hostname)
        remote = _Remote(connection, place)
        how = joining(name)
        with remote.prepared(tracker, how.agents_port, service, standing) as there:
            _refuse_taken(name, connected(name, 0), there["agent"], tracker)
            site, uploaded = remote.install(there, board, runner_for(board), cache_dir, progress)
            deployment = secrets.token_hex(4)
            remote.configure(site, tracker, how.join, name, {**(labels or {}), DEPLOYMENT: deployment}, options)
            progress(f"starting the agent {name}")
            pid = remote.start(name, tracker, deployment, connected, timeout_s, progress)
            standing.says = standing.running(name)
        progress(f"{name} is online")
    return Deployment(name, board, pid, uploaded, remote.boot)


def uninstall(destination: Destination, *, directory: str = DIRECTORY) -> bool:
    """Stop the agent and remove every trace; False if nothing was installed there."""
    with connect(destination) as connection:
        remote = _Remote(connection, locate(connection, directory))
        removed = remote.command("remove", ok=(0, launch.EXIT_NOT_RUNNING)).status == 0
        left = remote.boots("off")
        if left.by is not None:
            raise DeployError(
                f"{destination}: the agent is removed, but not what starts it, {left.what} of {left.by}: {left.why}"
            )
        return removed


def status(destination: Destination, *, directory: str = DIRECTORY) -> AgentStatus:
    """Whether an agent is installed there, and whether it runs."""
    with connect(destination) as connection:
        remote = _Remote(connection, locate(connection, directory))
        found = json.loads(remote.command("status").stdout.splitlines()[-1])
        return AgentStatus(found["installed"], found["pid"], found["name"], found["tracker"], remote.boots("show"))


def _refuse_taken(name: str, labels: Mapping[str, str] | None, agent: Mapping[str, Any], tracker: str) -> None:
    """Raise NameTakenError if a device of that name is connected which is not the board's own `agent`."""
    if labels is None:
        return
    own = agent["pid"] is not None and agent["name"] == name and agent["deployment"] in (None, labels.get(DEPLOYMENT))
    if not own:
        raise _taken(name, tracker)


def _taken(name: str, tracker: str) -> NameTakenError:
    return NameTakenError(
        f"another machine is connected to the tracker at {tracker} under the name {name!r}",
        hint="choose another with --name, or stop the agent there",
    )


class _Remote:
    """One board's installation directory, worked on through `launch.py`."""

    def __init__(self, connection: Connection, place: Place) -> None:
        self._connection = connection
        self._place = place
        self._script = Path(launch.__file__).read_bytes()
        self._launched = False
        self.boot = Boot(None, "", "")

    def command(self, name: str, *arguments: str, timeout_s: float = 60.0, ok: tuple[int, ...] = (0,)) -> Completed:
        """Run one of `launch.py`'s commands; the script itself travels with it."""
        words = [self._place.python, "-", name, self._place.directory, *arguments]
        done = self._connection.run(words, stdin=self._script, timeout_s=timeout_s, check=False)
        if done.status not in ok:
            raise self._failed(name, done)
        return done

    def boots(self, name: str, *arguments: str) -> Boot:
        """Run one of `boot.py`'s commands, which travels likewise."""
        words = [self._place.python, "-", name, self._place.directory, *arguments]
        done = self._connection.run(words, stdin=Path(boot.__file__).read_bytes(), timeout_s=300.0, check=False)
        if done.status != 0:
            raise self._failed(f"boot {name}", done)
        return Boot(**json.loads(done.stdout.splitlines()[-1]))

    def _open(self, name: str, *arguments: str) -> RemoteProcess:
        """Start a command that ends when its standard input is closed: when this side goes away at the latest."""
        words = [self._place.python, "-c", _BOOT, str(len(self._script)), name, self._place.directory, *arguments]
        return self._connection.start(words, self._script, keep_open=True)

    def _failed(self, name: str, done: Completed) -> DeployError:
        said = (done.stdout + done.stderr).strip()[-1500:]
        if done.status == launch.EXIT_BUSY:
            return DeployError(f"{self._connection.destination}: {said}", hint="try again when it is done")
        return DeployError(f"{self._connection.destination}: {name} failed (status {done.status}): {said}")

    @contextmanager
    def prepared(
        self, tracker: str, agents_port: int | None, service: bool, standing: Standing
    ) -> Iterator[dict[str, Any]]:
        """What is installed there, locked against other deployments; an error inside brings back what was there.

        What the new agent replaced is forgotten at the end, when there is no way back, and `boot` is seen to.
        Refuses early if the board cannot open a connection to the tracker.
        """
        host, _, port = tracker.rpartition(":")
        if not host or not port.isdigit():
            raise DeployError(f"{tracker!r} is no address of a tracker", hint="write HOST:PORT")
        bare = host.removeprefix("[").removesuffix("]")
        holder = self._open("prepare", bare, port, *([str(agents_port)] if agents_port is not None else []))
        try:
            try:
                there = self._answer(holder, tracker, bare, port)
            except KeyboardInterrupt:
                standing.says = standing.UNKNOWN
                done = holder.finish(_FINISH_S)  # the board itself clears away what it made
                if done is not None and done.status in (0, launch.EXIT_UNREACHABLE, launch.EXIT_BUSY):
                    standing.says = standing.UNTOUCHED
                raise
            try:
                yield there
            except BaseException as error:
                self._undo(there, holder, error)
                standing.says = standing.UNTOUCHED
                raise
            try:
                self.command("settle")
                self.boot = self.boots("on", self._place.python) if service else self.boots("off")
            except KedgeError as failure:
                failure.message += f"\nBut {standing.says}."
                raise
        finally:
            holder.finish(_FINISH_S)

    def _answer(self, holder: RemoteProcess, tracker: str, host: str, port: str) -> dict[str, Any]:
        line = holder.read_line(_PREPARE_S)
        try:
            there: dict[str, Any] = json.loads(line)
        except ValueError:
            done = holder.wait(_FINISH_S) or Completed(-1, line, "")
            if done.status != launch.EXIT_UNREACHABLE:
                raise self._failed("prepare", done) from None
            raise DeployError(
                f"{self._connection.destination} cannot reach the tracker at {tracker}: {done.stdout.strip()}",
                hint=_unreachable_hint(host, port),
            ) from None
        return there

    def _undo(self, there: Mapping[str, Any], holder: RemoteProcess, error: BaseException) -> None:
        """Bring the board back to what it was; a first agent that was started and failed stays, to be looked at."""
        first = not there["agent"]["installed"]
        if first and self._launched and isinstance(error, Exception):
            return
        try:
            if first:
                holder.finish(_FINISH_S)  # removal takes the lock itself
                self.command("remove", ok=(0, launch.EXIT_NOT_RUNNING))
            else:
                back = self.command("rollback", ok=(0, launch.EXIT_NOT_RUNNING)).status == 0
                if back and isinstance(error, KedgeError):
                    error.message += "\nThe agent that ran there before runs again."
        except (KedgeError, KeyboardInterrupt) as failure:
            why, and_why = str(error) or "interrupted", str(failure) or "interrupted"
            raise DeployError(
                f"{self._connection.destination}: the deployment was broken off ({why}), and what it changed could "
                f"not be undone: {and_why}",
                hint="deploy again, or remove it: kedge deploy board … --uninstall",
            ) from error

    def install(
        self, there: Mapping[str, Any], board: BoardInfo, runner: Path, cache_dir: Path, progress: Progress
    ) -> tuple[str, tuple[str, ...]]:
        """Send what the board does not have in exactly this version; the site, and the names of what was sent."""
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
                self._connection.put(data, self._path(launch.NEW, name), mode=mode)
                sent.append(name)
        if f"site-{site.digest}" not in there["sites"]:
            shown = _Percent(progress, "sending grpcio and protobuf")
            self._connection.put(site.archive, self._path("site.tar.gz"), transferred=shown)
            progress("unpacking on the board")
            self.command("unpack", site.digest, timeout_s=300)
            sent.append("site")
        return f"site-{site.digest}", tuple(sent)

    def configure(
        self,
        site: str,
        tracker: str,
        join: str | None,
        name: str,
        labels: Mapping[str, str],
        options: Sequence[str] = (),
    ) -> None:
        """Write the new `agent.json`: what to start, and how; the join string goes into a file of its own."""
        # One word each: a name may begin with a dash.
        arguments = [f"--tracker={tracker}", f"--name={name}"]
        arguments += [f"--label={key}={value}" for key, value in sorted(labels.items())]
        arguments += [f"--runner={self._path('kedge-runner')}", f"--data-dir={self._path('data')}"]
        arguments += options
        arguments += ["--insecure-loopback" if join is None else f"--join-file={self._path('join')}"]
        if join is not None:
            self._connection.put(join.encode(), self._path(launch.NEW, "join"), mode=0o600)
        config = {
            "python": self._place.python,
            "site": site,
            "name": name,
            "tracker": tracker,
            "deployment": labels[DEPLOYMENT],
            "arguments": arguments,
        }
        self._connection.put(json.dumps(config, indent=1).encode(), self._path(launch.NEW, "agent.json"), mode=0o600)

    def start(
        self,
        name: str,
        tracker: str,
        deployment: str,
        connected: Connected,
        timeout_s: float,
        progress: Progress,
    ) -> int:
        """Start the agent in place of one that runs; wait for the tracker to see it, or for its end."""
        self._launched = True
        launcher = self._open("launch")
        labels: Mapping[str, str] | None = None
        try:
            pid = launcher.read_line(_START_S)
            if not pid.isdigit():
                raise DeployError(f"the agent {name} was not started on {self._connection.destination}: {pid}")
            deadline = time.monotonic() + timeout_s
            while (left := deadline - time.monotonic()) > 0:
                progress(f"waiting until the tracker sees {name}")
                labels = connected(name, min(_SLICE_S, left))
                if labels is not None and labels.get(DEPLOYMENT) == deployment:
                    return int(pid)
                # Another device of that name is there at once: until it leaves, the agent is waited for.
                ended = launcher.wait(0 if labels is None else min(_SLICE_S, left))
                if ended is not None:
                    log = ended.stdout.partition("\n")[2]
                    raise DeployError(f"the agent {name} on {self._connection.destination} ended:\n{log}")
        finally:
            launcher.finish(_FINISH_S)
        if labels is not None:
            raise _taken(name, tracker)
        log = self.command("tail", ok=(0, launch.EXIT_NOT_RUNNING)).stdout
        raise DeployError(
            f"the agent {name} runs on {self._connection.destination}, but the tracker at {tracker} "
            f"did not see it within {timeout_s:.0f} s. Its log ends with:\n{log}",
            hint="is that the tracker this command talks to?",
        )

    def _path(self, *names: str) -> str:
        return posixpath.join(self._place.directory, *names)


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
