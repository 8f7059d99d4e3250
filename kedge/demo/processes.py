"""The processes of the demo: each a context manager that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kedge.deploy.interpreter import module_command
from kedge.rpc.errors import KedgeError

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


@contextlib.contextmanager
def service(
    what: str, *command: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Python module that writes one line to stdout when it is ready; stopped with SIGTERM at the end.

    `environment` is added to this process's. It ends with this process, too, if this one is killed.

    Raises:
        KedgeError: it ended or said nothing within the time; the message carries the end of its log.
    """
    with log.open("w") as errors:
        # A session of its own: Ctrl-C on the terminal must let the demo stop it in order.
        process = subprocess.Popen(
            module_command("kedge.demo.tied", *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def ready_line(what: str, process: subprocess.Popen[str], log: Path) -> str:
    """The line with which a service says that it is ready."""
    assert process.stdout is not None
    line = _line_within(process.stdout, READY_TIMEOUT_S)
    if line is None:
        tail = "\n".join(log.read_text().splitlines()[-10:])
        raise KedgeError(f"the {what} did not start; its log ends with:\n{tail}", hint="kedge doctor says what to fix")
    return line


def _line_within(stream: IO[str], seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                return stream.readline().strip() or None
    return None


@contextlib.contextmanager
def tracker(folder: Path) -> Iterator[str]:
    """A tracker on a free loopback port; gives its address."""
    folder.mkdir(parents=True)
    log = folder / "log"
    command = ("kedge", "tracker", "start", "--port", "0", "--data-dir", str(folder / "data"))
    with service("tracker", *command, log=log) as process:
        yield ready_line("tracker", process, log).split()[-1]


@contextlib.contextmanager
def agent(address: str, name: str, folder: Path, say: Callable[[str], None] = lambda what: None) -> Iterator[None]:
    """An agent on this machine, connected to the tracker at `address`; `say` is told what takes long."""
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime
    from kedge.deployment import joining

    folder.mkdir(parents=True)
    log = folder / "log"
    runner = build_runtime(parse("native"), progress=say).runner
    how = joining(address, name)
    arguments = [f"--tracker={address}", f"--name={name}", f"--runner={runner}", f"--data-dir={folder / 'data'}"]
    arguments += how.arguments
    with service("agent", "kedge.device_agent", *arguments, log=log, environment=how.environment) as process:
        ready_line("agent", process, log)
        yield


def missing_for_board(arch: str) -> str | None:
    """Why this machine cannot carry an emulated board, in one line; None if it can."""
    from kedge.deploy.emulated import EmulatedBoard

    return EmulatedBoard.missing_requirements(arch)


@contextlib.contextmanager
def board(arch: str, address: str, name: str, say: Callable[[str], None]) -> Iterator[Any]:
    """An emulated board with the agent deployed to it over SSH; gives the device as the tracker sees it."""
    from kedge.compiler.toolchain import cache_dir
    from kedge.deploy.emulated import EmulatedBoard
    from kedge.deployment import Login, deploy

    with EmulatedBoard(arch, cache_dir() / "boards", progress=say) as machine:
        login = Login(f"{machine.user}@{machine.host}:{machine.port}", machine.key_path, machine.known_hosts_path)
        device, _ = deploy(login, address, name=name, progress=say)
        yield device
