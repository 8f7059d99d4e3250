"""Seeing every stage: KEDGE_DUMP_DIR writes each one to a file, KEDGE_DEBUG=1 reports times on standard error.

KEDGE_DEBUG=2 also prints the graph after each pass; 3 each scheduled kernel (`.tir`) and the plain loops that code is
made from (`.loops`), and for a GPU its OpenCL C or PTX (`.cl`, `.ptx`); 4 the LLVM IR and the assembly (`.ll`, `.s`).
A file is named after its stage; another compile of the same kernel writes it anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kedge.rpc.errors import KedgeError


class DebugError(KedgeError):
    """KEDGE_DEBUG or KEDGE_DUMP_DIR has a value that nothing can be shown by."""


GRAPH, KERNEL, LLVM = 2, 3, 4
_LONGEST = 120  # characters of a file's name


def level() -> int:
    """The value of KEDGE_DEBUG, 0 where it is not set; raises DebugError where it is no number."""
    text = os.environ.get("KEDGE_DEBUG", "")
    if text and not (text.isascii() and text.isdecimal()):
        raise DebugError(
            f"KEDGE_DEBUG is {text!r}, which is no level", hint="set it to a number from 1 to 4, or unset it"
        )
    return int(text[:4] or "0")


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
        _write(Path(folder), f"{_file_name(stage)}.{suffix}", content)
    if level() >= minimum:
        sys.stderr.write(f"==== {stage}.{suffix}\n{content}\n")


def _file_name(stage: str) -> str:
    """The stage as any file system takes it; where something of it is left out, a digest tells it from others."""
    plain = re.sub(r"[^\w.-]+", "_", stage, flags=re.ASCII)
    if plain == stage and len(plain) <= _LONGEST:
        return plain
    return f"{plain[:_LONGEST]}-{hashlib.sha256(stage.encode()).hexdigest()[:8]}"


def _write(folder: Path, name: str, content: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if content.endswith("\n") else content + "\n", encoding="utf-8")
    except OSError as error:
        raise DebugError(
            f"KEDGE_DUMP_DIR: cannot write {folder / name}: {error.strerror}",
            hint="set it to a folder that can be written, or unset it",
        ) from error


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Report how long a stage took, in ms, when KEDGE_DEBUG is set."""
    start = time.perf_counter()
    yield
    if level() >= 1:
        sys.stderr.write(f"kedge: {stage}: {(time.perf_counter() - start) * 1e3:.1f} ms\n")
