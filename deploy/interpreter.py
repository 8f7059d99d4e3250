"""This interpreter, as it starts modules of its own installation."""

from __future__ import annotations

import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENT…`, whatever lies in the working directory: a user's `queue.py` is not imported."""
    return [sys.executable, "-P", "-m", module, *arguments]
