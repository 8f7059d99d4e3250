"""Trackers as the processes that they are, several on one database: started, killed, stopped and let go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.transport import Address, Tls, parse_address
from kedge.rpc.types import TrackerStatus
from support.agents import wait_for


def free_ports() -> int:
    """The first of three ports in a row that nobody listens on."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
                third.bind(("127.0.0.1", port + 2))
            except (OSError, OverflowError):
                continue
            return port


class TrackerProcess:
    """`kedge tracker start --database URL`, with a data folder of its own; a context manager that ends it."""

    def __init__(self, database: str, data_dir: Path, *arguments: str, port: int = 0) -> None:
        self.data_dir = data_dir
        self._database = database
        self._arguments = arguments
        self._port = port or free_ports()
        self.lines: list[str] = []
        self.start()

    def start(self) -> None:
        """Run it, on the same ports as before."""
        command = [sys.executable, "-P", "-m", "kedge", "tracker", "start", "--database", self._database]
        command += ["--port", str(self._port), "--peers-port", str(self._port + 2), "--data-dir", str(self.data_dir)]
        environment = {**os.environ, "KEDGE_CONFIG_DIR": str(self.data_dir.with_name(f"{self.data_dir.name}-config"))}
        self.process = subprocess.Popen(
            [*command, *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.data_dir.parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> TrackerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.lines.extend(iter(stream.readline, ""))

    @property
    def log(self) -> str:
        """All that it said so far."""
        return "".join(self.lines)

    def wait_log(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """The first match of `pattern` in what it says."""

        def found() -> re.Match[str] | None:
            if self.process.poll() is not None:
                self._reader.join(5)
            match = re.search(pattern, self.log)
            assert match or self.process.poll() is None, f"the tracker ended:\n{self.log}"
            return match

        wait_for(found, f"the tracker to say {pattern!r}", timeout_s)
        match = re.search(pattern, self.log)
        assert match
        return match

    def wait_ready(self) -> Address:
        """Until it serves; returns where."""
        return parse_address(self.wait_log(r"kedge tracker ready at (\S+)").group(1))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait(20)
        self._reader.join(5)

    @property
    def address(self) -> Address:
        """Where it serves clients."""
        return Address("127.0.0.1", self._port)

    def tls(self) -> Tls:
        """An administrator's, for every tracker of the fleet."""
        folder = self.data_dir / "security"
        return Tls((folder / "ca.pem").read_bytes(), token=(folder / "admin.token").read_text().strip())

    def fleet(self) -> Fleet:
        """A client of this tracker."""
        return Fleet(self.address, self.tls())

    def access(self) -> Access:
        """An administrator at this tracker."""
        return Access(self.address, self.tls())

    def status(self) -> TrackerStatus:
        """What it says of the fleet."""
        with self.fleet() as fleet:
            return fleet.status()
