"""A fleet of real processes that faults can be done to: a tracker, agents, clients, and proxies between them.

    client ---- 127.0.0.2 (proxy) ---- tracker ---- 127.0.0.3 (proxy) ---- agent ---- runner

A plain world has a gRPC relay in place of the proxies, which knows messages where those know bytes. A world with a pair
has two trackers on one PostgreSQL database, with a proxy before the database for each, and nothing else in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.errors import KedgeError
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.security.join import Join
from kedge.rpc.tracker.security.principal import Role
from kedge.rpc.transport import Address, Tls, parse_address
from support.agents import at_work, runs, wait_for
from support.ports import free_ports
from support.postgres import PostgresServer
from support.proxy import Proxy

from .relay import Relay

PROGRAMS = Path(__file__).with_name("programs")
#: By this every process of a world is known, whoever started it.
MARK = "KEDGE_FAULT_WORLD"
#: With room for all that a campaign keeps.
DISK_BYTES = 768 << 20


class Process:
    """A program that is started again and again, its log going on in one file."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], log: Path, cwd: Path) -> None:
        self.name = name
        self.log_path = log
        self._command = command
        self._env = dict(env)
        self._cwd = cwd
        self._popen: subprocess.Popen[str] | None = None
        self._seen = 0

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def start(self, *arguments: str, say_ready: bool = False) -> str:
        """Start it; with `say_ready`, returns the first line it writes to stdout."""
        self._seen = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("a") as log:
            out = subprocess.PIPE if say_ready else log
            self._popen = subprocess.Popen(
                [*self._command, *arguments], stdout=out, stderr=log, env=self._env, cwd=self._cwd, text=True
            )
        if not say_ready:
            return ""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, f"{self.name} did not start:\n{self.log_path.read_text()[-3000:]}"
        self._popen.stdout.close()
        return line

    def signal(self, number: int) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.signal(signal.SIGKILL)
        assert self._popen is not None
        self._popen.wait(60)

    def end(self, timeout_s: float) -> int:
        """SIGTERM, and its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        assert self._popen is not None
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{self.name} did not end; its log:\n{self.log_path.read_text()[-3000:]}") from error

    def since_start(self) -> str:
        """What its log says since it was last started."""
        with self.log_path.open(errors="replace") as log:
            log.seek(self._seen)
            return log.read()


@dataclass(frozen=True)
class Shape:
    """What a world is made of. `plain` has the relay; `disks` puts data folders on small file systems of their own;
    `clock` lets the wall clocks of tracker and agents jump; `database` is where two trackers keep their state."""

    plain: bool = False
    database: PostgresServer | None = None
    disks: bool = False
    clock: Path | None = None
    agents: int = 2
    clients: int = 2
    threads: int = 3
    large_share: float = 0.06


class World:
    """A context manager: everything runs when it is entered, and nothing is left when it is left."""

    def __init__(self, folder: Path, seed: int, shape: Shape, runner: Path, artifact: Path) -> None:
        self.folder = folder
        self.seed = seed
        self.shape = shape
        self.artifact = artifact
        self.token = secrets.token_hex(8)
        self.data = folder / "tracker"
        self.trackers: list[Process] = []
        self._peers: dict[str, dict[str, Any]] = {}
        self._ports: dict[str, tuple[int, int]] = {}
        self.runner = runner
        self._stack = contextlib.ExitStack()
        self._read: dict[Path, int] = {}
        self.lines: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.agents: list[Process] = []
        self.clients: list[Process] = []
        self._next_client = 0
        self._admin: Tls | None = None
        self._database = "" if shape.database is None else shape.database.new_database().rpartition("/")[2]
        self.proxies: dict[str, Proxy] = {}
        #: The ways to the database, by tracker.
        self.databases: dict[str, Proxy] = {}
        self.clock_file = folder / "clock"
        for name in ("tmp", "logs", "config", "clients"):
            (folder / name).mkdir()

    def __enter__(self) -> World:
        try:
            self._stack.enter_context(self._own_config())
            self.tracker = self._add_tracker("tracker")
            self._reach()
            for number in range(self.shape.agents):
                self._add_agent(f"board-{number}")
            for _ in range(self.shape.clients):
                self.add_client()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.clients, *self.agents, *self.trackers):
            if process.alive:
                process.signal(signal.SIGCONT)
                process.kill()
        for pid in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._stack.close()

    def kill_all(self) -> None:
        """SIGKILL to every process of this world, from any thread: whoever waits for one of them goes on."""
        for pid in _marked(self.token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ---- Parts ----

    def start_tracker(self, tracker: Process | None = None) -> None:
        """Start a tracker (None: the only one), again on the ports that it had."""
        tracker = tracker or self.tracker
        port, agents_port = self._ports.get(tracker.name, (0, 0))
        how = "plain" if self.shape.plain else "secure"
        peers = json.dumps(self._peers.get(tracker.name, {}))
        arguments = (str(self.folder / tracker.name), str(port), str(agents_port), how, peers)
        port, agents_port = map(int, tracker.start(*arguments, say_ready=True).split())
        self._ports[tracker.name] = port, agents_port

    def leader(self) -> Process:
        """The one of two trackers that leads, once one does."""
        found: list[Process] = []

        def leads() -> bool:
            with contextlib.suppress(KedgeError), self.fleet() as fleet:
                led = [each.address for each in fleet.status().trackers if each.leads]
                found[:] = [each for each in self.trackers if str(self.address_of(each)) in led and each.alive]
            return bool(found)

        wait_for(leads, "one of the trackers to lead", 60)
        return found[0]

    def address_of(self, tracker: Process) -> Address:
        return Address("127.0.0.1", self._ports[tracker.name][0])

    def start_agent(self, agent: Process) -> None:
        """Start an agent and wait until the tracker has welcomed it."""
        agent.start()
        self.wait_agent(agent)

    def wait_agent(self, agent: Process) -> None:
        wait_for(lambda: "ready: " in agent.since_start(), f"{agent.name} to be welcomed", 60)

    def agent_data(self, agent: Process) -> Path:
        return self.folder / agent.name

    def add_client(self) -> Process:
        """One more client, whose jobs have numbers that no other's have."""
        number, self._next_client = self._next_client, self._next_client + 1
        name = f"client-{number}"
        config = self.folder / "clients" / str(number)
        self._client_credentials(config)
        command = [sys.executable, str(PROGRAMS / "client.py"), str(self.client_address), str(self.artifact)]
        seed = self.seed * 1000 + number
        command += [str(number), str(seed), str(self.shape.threads), str(self.shape.large_share)]
        client = self._process(name, command, KEDGE_CONFIG_DIR=str(config))
        client.start(str(self._said(client)))
        self.clients.append(client)
        return client

    def _said(self, client: Process) -> Path:
        return self.folder / "clients" / f"{client.name}.jsonl"

    @property
    def address(self) -> Address:
        """The tracker itself, or both of them."""
        first, *others = [self.address_of(tracker) for tracker in self.trackers]
        return Address(first.host, first.port, tuple(others)) if others else first

    def fleet(self) -> Fleet:
        """An administrator's connection, past all proxies."""
        return Fleet(self.address, self._admin)

    def runners(self, agent: Process) -> list[int]:
        """What an agent has started and not ended, but for the runner that waits for the next job."""
        return [pid for pid in at_work(agent.pid) if runs(pid)]

    def left_over(self) -> list[int]:
        """Processes of this world that live and are none of those which it started itself."""
        own = {process.pid for process in (*self.trackers, *self.agents, *self.clients) if process.alive}
        return [pid for pid in _marked(self.token) if pid not in own]

    def shift_clock(self, seconds: int) -> None:
        """The wall clocks of tracker and agents are off by so much from now on."""
        with self.clock_file.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    # ---- What clients say ----

    def hear(self) -> None:
        """Read what clients have written since."""
        for path in sorted((self.folder / "clients").glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                said = json.loads(line)
                self.lines.append(said)
                self.counts[said["what"]] += 1

    def wait_jobs(self, count: int, timeout_s: float = 120.0) -> None:
        """Until clients have seen so many jobs end."""

        def ended() -> bool:
            self.hear()
            dead = [client.name for client in self.clients if not client.alive]
            assert not dead, f"{dead} ended: {(self.folder / 'logs' / dead[0]).read_text()[-3000:]}"
            return self.counts["done"] >= count

        wait_for(ended, f"{count} jobs to end; by now {self.counts}", timeout_s)

    def stop_clients(self) -> None:
        """No more jobs; returns once those under way have ended and their clients too."""
        for client in self.clients:
            wait_for(self._said(client).exists, f"{client.name} to be ready", 60)
            client.signal(signal.SIGTERM)
        for client in self.clients:
            status = client.wait(120)
            assert status == 0, f"{client.name} ended with {status}:\n{client.log_path.read_text()[-3000:]}"
        self.hear()

    # ---- Making it ----

    def _process(self, name: str, command: list[str], *, clock: bool = False, **env: str) -> Process:
        environment = {**os.environ, MARK: self.token, "TMPDIR": str(self.folder / "tmp"), **env}
        environment.pop("KEDGE_TRACKER", None)
        if clock and self.shape.clock is not None:
            if not self.clock_file.exists():
                self.clock_file.write_bytes(bytes(8))
            environment |= {"LD_PRELOAD": str(self.shape.clock), "KEDGE_TEST_CLOCK": str(self.clock_file)}
        return Process(name, command, environment, self.folder / "logs" / name, self.folder)

    def _add_tracker(self, name: str) -> Process:
        self._mount(self.folder / name)
        tracker = self._process(name, [sys.executable, str(PROGRAMS / "tracker.py")], clock=True)
        if self.shape.database is not None:
            port = free_ports(3)
            self._ports[name] = port, port + 1
            way = self._stack.enter_context(Proxy("127.0.0.1", 0, ("127.0.0.1", self.shape.database.port)))
            self.databases[name] = way
            url = replace(self.shape.database, port=way.port).url(self._database)
            self._peers[name] = {"database": url, "peers_port": port + 2}
            if self.trackers:
                with Access(self.address, self._admin) as access:
                    self._peers[name]["join"] = str(access.create_token("tracker")[1])
        self.trackers.append(tracker)
        self.start_tracker(tracker)
        return tracker

    def _reach(self) -> None:
        """The ways in: proxies or a relay, and credentials for whoever goes there."""
        port, agents_port = self._ports["tracker"]
        if self.shape.plain:
            self.relay = self._stack.enter_context(Relay(str(self.address)))
            self.client_address = self.agents_address = parse_address(self.relay.address)
            return
        security = self.data / "security"
        self._admin = Tls((security / "ca.pem").read_bytes(), token=(security / "admin.token").read_text().strip())
        if self.shape.database is not None:
            self._add_tracker("other")
            self.client_address = self.agents_address = self.address
        else:
            clients = self._stack.enter_context(Proxy("127.0.0.2", port, ("127.0.0.1", port)))
            agents = self._stack.enter_context(Proxy("127.0.0.3", agents_port, ("127.0.0.1", agents_port)))
            self._stack.enter_context(Proxy("127.0.0.3", port, ("127.0.0.1", port)))  # to enrol
            self.proxies = {"clients": clients, "agents": agents}
            self.client_address, self.agents_address = Address("127.0.0.2", port), Address("127.0.0.3", port)
        with Access(self.address, self._admin) as access:
            _, self._user_join = access.create_token(Role.SUBMIT.value, "ann")

    def _client_credentials(self, config: Path) -> None:
        tls = None if self.shape.plain else Tls(self._user_join.ca, token=self._user_join.token)
        with self._own_config(config):
            Credentials(self.client_address.each, tls).save()

    def _add_agent(self, name: str) -> None:
        data = self.folder / name
        self._mount(data)
        command = [sys.executable, "-m", "kedge.device_agent", "--runner", str(self.runner), "--data-dir", str(data)]
        command += ["--name", name, "--tracker", str(self.agents_address)]
        env = {}
        if self.shape.plain:
            command.append("--insecure-loopback")
        else:
            with Access(self.address, self._admin) as access:
                env["KEDGE_JOIN"] = str(replace_address(access.enrol_token(name)[0], self.agents_address))
        agent = self._process(name, command, clock=True, **env)
        self.agents.append(agent)
        self.start_agent(agent)

    def _mount(self, folder: Path) -> None:
        """Make a folder, with `disks` on a file system of its own."""
        folder.mkdir(mode=0o700)
        if not self.shape.disks:
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)], check=True)
        self._stack.callback(subprocess.run, ["umount", str(folder)], check=True)

    @contextlib.contextmanager
    def _own_config(self, folder: Path | None = None) -> Iterator[None]:
        before = os.environ["KEDGE_CONFIG_DIR"]
        os.environ["KEDGE_CONFIG_DIR"] = str(folder or self.folder / "config")
        try:
            yield
        finally:
            os.environ["KEDGE_CONFIG_DIR"] = before


def replace_address(join: Join, address: Address) -> Join:
    """The same join string by another way."""
    return replace(join, address=address)


def can_mount() -> bool:
    """Whether this process may have file systems of its own making."""
    folder = Path("/tmp") / f"kedge-mount-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        return done.returncode == 0
    except FileNotFoundError:
        return False
    finally:
        folder.rmdir()


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """As long as this lasts, the file system of `folder` has no space."""
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        yield
    finally:
        ballast.unlink()


def _marked(token: str) -> list[int]:
    """Every process with this mark in its environment."""
    found = []
    needle = f"{MARK}={token}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            pid = int(path.parent.name)
            if needle in path.read_bytes() and runs(pid):
                found.append(pid)
    return found
