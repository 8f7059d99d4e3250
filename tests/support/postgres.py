"""PostgreSQL servers of the tests' own: real ones, in a temporary folder, on a socket there and on loopback."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from support.ports import free_ports

_START_S = 60.0


@cache
def _binary(name: str) -> Path | None:
    """A program of the PostgreSQL server, where Debian or the PATH has it."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    for folder in reversed(versions):
        if (folder / name).exists():
            return folder / name
    found = shutil.which(name)
    return Path(found) if found else None


def require_postgres() -> None:
    """Skip the test where there is no PostgreSQL; under CI, where there has to be one, fail."""
    if _binary("initdb") is not None and _binary("postgres") is not None:
        return
    reason = "needs PostgreSQL's server programs: apt-get install postgresql"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _unprivileged() -> dict[str, object]:
    """PostgreSQL refuses to be root: whom it runs as instead."""
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _end_with_the_tests() -> None:
    """Tests that are killed leave no server behind (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


@dataclass
class PostgresServer:
    """A server that runs; `stop`, `start` and `kill` are for tests of what its clients do then."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = field(default=None)
    _databases: int = 0

    def start(self) -> None:
        """Run it until it answers."""
        command = [str(_binary("postgres")), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        command += ["-p", str(self.port), "-h", "127.0.0.1", "-c", "max_connections=80"]
        # No file outlives the tests; and who makes a database would wait for a cleaner that is at its template.
        command += ["-c", "fsync=off", "-c", "autovacuum=off"]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=self.folder,
            start_new_session=True,
            preexec_fn=_end_with_the_tests,  # noqa: PLW1509 - it makes one system call
            **_unprivileged(),
        )
        log.close()
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "the PostgreSQL server does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, with all its sessions; what was committed is kept."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
            self.process = None

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._databases += 1
        name = f"kedge_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, name: str) -> str:
        """Of a database."""
        return f"postgresql://kedge@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str, name: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement as an administrator; returns its rows."""
        import psycopg

        with psycopg.connect(self.url(name), autocommit=True, connect_timeout=60) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """One that lives as long as the context."""
    require_postgres()
    pytest.importorskip("psycopg", reason="needs the Python package psycopg: pip install 'kedge[postgres]'")
    with tempfile.TemporaryDirectory(prefix="kedge-pg-") as name:
        folder, who = Path(name), _unprivileged()
        if who:
            os.chown(folder, int(str(who["user"])), int(str(who["group"])))
        options = ["-D", str(folder / "data"), "-U", "kedge", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        command = [str(_binary("initdb")), *options, "--locale=C"]
        made = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, **who)
        assert made.returncode == 0, made.stderr
        server = PostgresServer(folder, free_ports())
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that the tests of a session share; each makes databases of its own."""
    with postgres_server() as server:
        yield server
