"""Seeing every stage: KEDGE_DUMP_DIR writes each one to a file, KEDGE_DEBUG=1 reports times on standard error.

KEDGE_DEBUG=2 also prints the graph after each pass, 3 the scheduled kernels, 4 their LLVM IR.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GRAPH, KERNEL, LLVM = 2, 3, 4


def level() -> int:
    """The value of KEDGE_DEBUG; 0 where it is not a number."""
    text = os.environ.get("KEDGE_DEBUG", "")
    return int(text) if text.isdigit() else 0


def wanted(minimum: int) -> bool:
    """Whether a stage of that level is to be shown."""
    return "KEDGE_DUMP_DIR" in os.environ or level() >= minimum


def show(stage: str, suffix: str, minimum: int, text: Callable[[], str]) -> None:
    """Show a stage: `text()` goes to `<stage>.<suffix>` in the dump folder, and to standard error from `minimum` on."""
    folder = os.environ.get("KEDGE_DUMP_DIR")
    if folder is None and level() < minimum:
        return
    content = text()
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "_", stage)[:120]
        (path / f"{name}.{suffix}").write_text(content if content.endswith("\n") else content + "\n")
    if level() >= minimum:
        sys.stderr.write(f"==== {stage}.{suffix}\n{content}\n")


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Report how long a stage took, in ms, when KEDGE_DEBUG is set."""
    start = time.perf_counter()
    yield
    if level() >= 1:
        sys.stderr.write(f"kedge: {stage}: {(time.perf_counter() - start) * 1e3:.1f} ms\n")
