"""The `kedge` command as users start it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Kedge = Callable[..., "subprocess.CompletedProcess[str]"]


def kedge_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "kedge", *map(str, arguments)]
