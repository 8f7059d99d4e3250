"""Trackers as the processes that they are, several on one database: started, killed, stopped and let go on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.transport import Address, Tls, parse_address
from kedge.rpc.types import TrackerStatus
from support.logged import LoggedProcess
from support.ports import free_ports


class TrackerProcess(LoggedProcess):
    """`kedge tracker start --database URL`, with a data folder of its own; a context manager that ends it."""

    called = "the tracker"
    patience_s = 60.0
    end_s = 60.0

    def __init__(self, database: str, data_dir: Path, *arguments: str, port: int = 0) -> None:
        super().__init__()
        self.data_dir = data_dir
        self._database = database
        self._arguments = arguments
        self._port = port or free_ports(3)
        self.start()

    def start(self) -> None:
        """Run it, on the same ports as before."""
        command = [sys.executable, "-P", "-m", "kedge", "tracker", "start", "--database", self._database]
        command += ["--port", str(self._port), "--peers-port", str(self._port + 2), "--data-dir", str(self.data_dir)]
        environment = {**os.environ, "KEDGE_CONFIG_DIR": str(self.data_dir.with_name(f"{self.data_dir.name}-config"))}
        self.launch([*command, *self._arguments], self.data_dir.parent, environment)

    def wait_ready(self) -> Address:
        """Until it serves; returns where."""
        return parse_address(self.wait_log(r"kedge tracker ready at (\S+)").group(1))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)

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
