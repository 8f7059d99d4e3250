"""C code for tests, compiled by the ziglang package (or another compiler) and kept by content."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kedge.compiler.toolchain import cache_dir
from kedge.device_agent import runtime

ZIG = (sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all")
MODULES = Path(__file__).resolve().parent.parent / "runtime" / "modules"


def library_sources(*without: str) -> list[Path]:
    """The runtime library's sources, but for some."""
    return [runtime.SOURCE_DIR / name for name in runtime.LIBRARY_SOURCES if name not in without]


def compile_c(sources: Sequence[Path], *flags: str, compiler: Sequence[str] = ZIG) -> Path:
    """The product of compiling and linking `sources` with `flags`; compiled once for the same input."""
    digest = hashlib.sha256(repr((compiler, flags)).encode())
    headers = [runtime.SOURCE_DIR / name for name in runtime.HEADERS] + sorted(MODULES.glob("*.h"))
    for path in (*sources, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    out = cache_dir() / "tests" / f"{sources[0].stem}-{digest.hexdigest()[:16]}"
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}-{os.getpid()}")
    command = [
        *compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{runtime.SOURCE_DIR}",
        *map(str, sources), *flags, "-o", str(scratch), "-lpthread", "-ldl", "-lm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return scratch.replace(out)


def module(name: str, *flags: str) -> Path:
    """A hand-written module of tests/runtime/modules as a lib.so."""
    return compile_c([MODULES / f"{name}.c"], "-shared", "-fPIC", *flags)
