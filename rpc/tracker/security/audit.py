"""The audit log: one JSON object per line for every act that security depends on, in files of bounded size.

    {"time": "2026-03-01T12:00:00.000Z", "event": "token created", "by": "admin", "role": "admin", "peer": "…", …}

It never contains a secret. Refused calls come at any rate that a stranger likes: beyond a bound they are counted and
not written, so that nobody can push what matters out of the files.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("kedge.tracker")

_MAX_BYTES = 16 << 20
_KEPT = 4
#: Refusals written in any one minute.
_REFUSALS = 120
_MINUTE_S = 60.0
_MAX_TEXT = 300


class Audit:
    """The log in `path`; older files are `path`.1 (the newest of them) to `path`.4. Safe from several threads."""

    def __init__(
        self, path: Path, now_s: Callable[[], float] = time.time, max_bytes: int = _MAX_BYTES, refusals: int = _REFUSALS
    ) -> None:
        self.path = path
        self._now_s = now_s
        self._max_bytes = max_bytes
        self._refusals = refusals
        self._lock = threading.Lock()
        self._minute = 0.0
        self._refused = 0
        self._closed = False
        #: Below 0 while there is none, as after a rotation that failed half-way.
        self._fd = self._open()

    def write(self, event: str, **details: Any) -> None:
        """Add a line; `details` are plain values, and text is cut where it is long."""
        with self._lock:
            self._write(event, details)

    def refused(self, event: str, **details: Any) -> None:
        """Add a line about something that was refused, as far as their number in this minute allows."""
        with self._lock:
            now = self._now_s()
            if now - self._minute >= _MINUTE_S:
                suppressed, self._minute, self._refused = self._refused - self._refusals, now, 0
                if suppressed > 0:
                    self._write("refusals not written", {"count": suppressed})
            self._refused += 1
            if self._refused <= self._refusals:
                self._write(event, details)

    def close(self) -> None:
        """Nothing is written any more."""
        with self._lock:
            self._closed = True
            self._release()

    def _write(self, event: str, details: dict[str, Any]) -> None:
        if self._closed:
            return
        now = self._now_s()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        plain = {key: value[:_MAX_TEXT] if isinstance(value, str) else value for key, value in details.items()}
        line = json.dumps({"time": moment, "event": event, **plain}, default=str).encode() + b"\n"
        try:
            if self._fd >= 0 and os.fstat(self._fd).st_size + len(line) > self._max_bytes:
                self._rotate()
            if self._fd < 0:
                self._fd = self._open()
            os.write(self._fd, line)
        except OSError as error:
            # A full disk must not stop the fleet, nor go unnoticed.
            log.error("cannot write the audit log %s: %s; it would have said: %s", self.path, error.strerror, line)

    def _rotate(self) -> None:
        self._release()
        for number in range(_KEPT, 0, -1):
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if newer.exists():
                newer.replace(self.path.with_name(f"{self.path.name}.{number}"))

    def _release(self) -> None:
        # Forgotten first: the number of a file that is closed soon belongs to another one.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> int:
        return os.open(str(self.path), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
