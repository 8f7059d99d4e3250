"""The agent as the process that it is: started, listened to, and found to have left nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from support.logged import LoggedProcess
from support.logged import wait_for as wait_for  # who starts agents waits for what they do


def descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def name_of(pid: int) -> str:
    """What a process calls itself; nothing once it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def at_work(pid: int) -> list[int]:
    """Processes below an agent, but for the one runner that may wait there for the next job."""
    names: dict[int, dict[int, str]] = {}  # by session: in a control group a runner is two processes
    for below in descendants(pid):
        with contextlib.suppress(ProcessLookupError):
            if name := name_of(below):
                names.setdefault(os.getsid(below), {})[below] = name
    waiting = [session for session, those in names.items() if {*those.values()} == {"kedge-runner"}]
    if len(waiting) == 1:
        del names[waiting[0]]
    return [below for those in names.values() for below in those]


class AgentProcess(LoggedProcess):
    """`python -m kedge.device_agent`, with its log at hand. Use it as a context manager.

    `command` starts the interpreter and `env` is its environment; both default to this one's.
    """

    called = "the agent"

    def __init__(
        self,
        tracker: str,
        runner: Path,
        data_dir: Path,
        *arguments: str,
        name: str = "here",
        command: Sequence[str] = (sys.executable,),
        env: dict[str, str] | None = None,
        secure: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.data_dir = data_dir
        words = ["--tracker", tracker, "--runner", str(runner), "--data-dir", str(data_dir), "--name", name]
        words += [] if secure else ["--insecure-loopback"]
        self.launch([*command, "-m", "kedge.device_agent", *words, *arguments], data_dir.parent, env)

    def wait_ready(self) -> None:
        """Until the tracker welcomed it."""
        self.wait_log(r"(?m)^kedge agent .* ready: ")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Signal it; its exit status."""
        os.kill(self.process.pid, number)
        status = self.process.wait(timeout_s)
        self._reader.join(60)
        return status
