"""Logs of trackers and agents, on stderr: lines for people, or one JSON object per line for machines.

    {"time": "2026-03-01T12:00:00.000Z", "level": "info", "logger": "kedge.tracker", "message": "…", "job": "…", …}

Who logs says what a line is about with `extra`: `log.info("…", extra={"job": job_id})`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Dict

from kedge.rpc.printable import printable

FORMATS = ("text", "json")
#: What a line may be about, besides its words.
FIELDS = ("job", "device", "user", "kind", "outcome", "stage")


class JsonFormatter(logging.Formatter):
    """One line per record, whatever the message has in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a JSON object."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        tree: Dict[str, Any] = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in FIELDS:
            value = getattr(record, name, "")
            if value not in ("", None):
                tree[name] = str(value)
        if record.exc_info:
            tree["exception"] = self.formatException(record.exc_info)
        return json.dumps(tree)


class TextFormatter(logging.Formatter):
    """Lines for people: whatever a message has in it, what begins a line was written by the one who logs."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's first line, and further ones, of its message or a traceback, indented."""
        return printable(super().format(record)).replace("\n", "\n    ")


def configure(form: str, text: str, level: int = logging.INFO) -> None:
    """Send everything of this level and above to stderr; `text` is the format of lines for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(text))
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(form == "json")
