"""Processes whose output is at hand."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    """Return once `condition()` holds; fail naming `what` after `timeout_s`.

    Often a process has to be asked: one that takes long is asked less often.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < timeout_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(min(max(0.01, waited / 20), 0.05))


class LoggedProcess:
    """A process, standard error with its output; a context manager that ends it, also where it was stopped."""

    #: What it is called in messages, how long its words are waited for, and how long its end on SIGTERM.
    called = "the process"
    patience_s = 60.0
    end_s = 60.0

    def __init__(self) -> None:
        self.lines: list[str] = []

    def launch(self, command: Sequence[str], cwd: Path, env: dict[str, str] | None = None) -> None:
        """Run it; what an earlier one said stays in the log."""
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(self.end_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.lines.extend(iter(stream.readline, ""))

    @property
    def log(self) -> str:
        """All it said so far."""
        return "".join(self.lines)

    def wait_log(self, pattern: str, timeout_s: float | None = None) -> re.Match[str]:
        """The first match of `pattern` in what it says."""

        def found() -> re.Match[str] | None:
            if self.process.poll() is not None:
                self._reader.join(60)
            match = re.search(pattern, self.log)
            assert match or self.process.poll() is None, f"{self.called} ended:\n{self.log}"
            return match

        told = f"{self.called} to say {pattern!r}; it said:\n{self.log}"
        wait_for(found, told, self.patience_s if timeout_s is None else timeout_s)
        match = re.search(pattern, self.log)
        assert match
        return match
