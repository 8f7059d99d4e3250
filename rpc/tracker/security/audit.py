"""The audit log: one JSON object per line for every act that security depends on, in files of bounded size.

    {"time": "2026-03-01T12:00:00.000Z", "event": "token created", "by": "admin", "role": "admin", "peer": "…", …}

It never contains a secret. Refused calls come at any rate that a stranger likes, and acts at any rate that a user or a
device likes: beyond a bound they are counted and not written, so that nobody can push what matters out of the files.
Administrators are bounded by nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("kedge.tracker")

_MAX_BYTES = 16 << 20
_KEPT = 4
#: Refusals written in any one minute, and acts of one user or device.
_REFUSALS = 120
_ACTS = 600
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
        #: In this minute: refusals under "", acts under who did them.
        self._counts: Counter[str] = Counter()
        self._closed = False
        #: Below 0 while there is none, as after a rotation that failed half-way.
        self._fd = self._open()

    def write(self, event: str, **details: Any) -> None:
        """Add a line; `details` are plain values, and text is cut where it is long.

        With a `by` in them whose `role` is none of an administrator, as far as the number of such lines allows.
        """
        with self._lock:
            by = details.get("by", "")
            if not by or details.get("role") == "admin" or self._allows(by, _ACTS):
                self._write(event, details)

    def refused(self, event: str, **details: Any) -> None:
        """Add a line about something that was refused, as far as their number in this minute allows."""
        with self._lock:
            if self._allows("", self._refusals):
                self._write(event, details)

    def _allows(self, by: str, most: int) -> bool:
        now = self._now_s()
        if now - self._minute >= _MINUTE_S:
            for who, count in self._counts.items():
                left_out = count - (_ACTS if who else self._refusals)
                if left_out > 0:
                    about = {"by": who} if who else {}
                    self._write("acts not written" if who else "refusals not written", {"count": left_out, **about})
            self._minute = now
            self._counts.clear()
        self._counts[by] += 1
        return self._counts[by] <= most

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
