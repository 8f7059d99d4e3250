"""The agent as the process that it is: started, listened to, and found to have left nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Return once `condition()` holds; fail naming `what` after `timeout_s`."""
    moment = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < moment, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.01)


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


class AgentProcess:
    """`python -m kedge.device_agent`, with its log at hand. Use it as a context manager.

    `command` starts the interpreter and `env` is its environment; both default to this one's.
    """

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
        self.name = name
        self.data_dir = data_dir
        self.lines: list[str] = []
        words = ["--tracker", tracker, "--runner", str(runner), "--data-dir", str(data_dir), "--name", name]
        words += [] if secure else ["--insecure-loopback"]
        self.process = subprocess.Popen(
            [*command, "-m", "kedge.device_agent", *words, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=data_dir.parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
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
        """All it said so far."""
        return "".join(self.lines)

    def wait_log(self, pattern: str, timeout_s: float = 20.0) -> re.Match[str]:
        """The first match of `pattern` in what it says."""

        def found() -> re.Match[str] | None:
            if self.process.poll() is not None:
                self._reader.join(5)
            match = re.search(pattern, self.log)
            assert match or self.process.poll() is None, f"the agent ended:\n{self.log}"
            return match

        wait_for(found, f"the agent to say {pattern!r}; it said:\n{self.log}", timeout_s)
        match = re.search(pattern, self.log)
        assert match
        return match

    def wait_ready(self) -> None:
        """Until the tracker welcomed it."""
        self.wait_log(r"(?m)^kedge agent .* ready: ")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 15.0) -> int:
        """Signal it; its exit status."""
        os.kill(self.process.pid, number)
        status = self.process.wait(timeout_s)
        self._reader.join(5)
        return status
