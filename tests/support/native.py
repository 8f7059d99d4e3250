"""C code for tests, compiled by the ziglang package (or another compiler) and kept by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kedge.compiler.toolchain import cache_dir
from kedge.deploy.cachedir import build_once
from kedge.device_agent import runtime

ZIG = (sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all")
MODULES = Path(__file__).resolve().parent.parent / "runtime" / "modules"


def library_sources(*without: str) -> list[Path]:
    """The runtime library's sources, but for some."""
    return [runtime.SOURCE_DIR / name for name in runtime.LIBRARY_SOURCES if name not in without]


_COMPILE = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{runtime.SOURCE_DIR}", f"-I{MODULES}")


def compile_c(sources: Sequence[Path], *flags: str, compiler: Sequence[str] = ZIG) -> Path:
    """The product of compiling and linking `sources` with `flags`; compiled once for the same input."""
    out = _named(sources[0].stem, sources, compiler, flags)
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}-{os.getpid()}")
    words = [*map(str, sources), *flags, "-o", str(scratch), "-lpthread", "-ldl", "-lm"]
    _run([*compiler, *_COMPILE, *words])
    return scratch.replace(out)


def sanitized(sources: Sequence[Path], sanitizers: str) -> Path:
    """A program of `sources` and the runtime's library, watched by gcc's sanitizers; skips where it has none."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed; zig carries no sanitizer runtime")
    flags = ("-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    library = library_sources()

    def build(folder: Path) -> None:
        _run([gcc, *_COMPILE, *flags, "-c", *map(str, library)], folder)

    # The library takes ten seconds: it is compiled once for all programs, and waited for by workers beside this one.
    objects = build_once(_named("library", library, gcc, flags), build)
    try:
        return compile_c([*sources, *sorted(objects.iterdir())], *flags, compiler=(gcc,))
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip(f"gcc has no runtime for -fsanitize={sanitizers} here")
        raise


def _named(stem: str, sources: Sequence[Path], *how: object) -> Path:
    """Where to keep what is made of `sources`."""
    digest = hashlib.sha256(repr(how).encode())
    headers = [runtime.SOURCE_DIR / name for name in runtime.HEADERS] + sorted(MODULES.glob("*.h"))
    for path in (*sources, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    return cache_dir() / "tests" / f"{stem}-{digest.hexdigest()[:16]}"


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr


def module(name: str, *flags: str) -> Path:
    """A hand-written module of tests/runtime/modules as a lib.so."""
    return compile_c([MODULES / f"{name}.c"], "-shared", "-fPIC", *flags)
