"""C code for tests, compiled by the ziglang package (or another compiler) and kept by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import ziglang

from kedge.compiler.target import parse
from kedge.compiler.target.arch import Arch
from kedge.compiler.toolchain import build_runtime, cache_dir
from kedge.deploy.cachedir import build_once
from kedge.device_agent import runtime

#: The program itself: `python -m ziglang` starts a Python before it.
ZIG = str(Path(ziglang.__file__).with_name("zig"))
MODULES = Path(__file__).resolve().parent.parent / "runtime" / "modules"


def library_sources() -> list[Path]:
    """The runtime library's sources, for flags of one's own."""
    return [runtime.SOURCE_DIR / name for name in runtime.LIBRARY_SOURCES]


def library(target: str = "native") -> Path:
    """The runtime's static library: a program that is linked with it compiles none of its sources again."""
    return build_runtime(parse(target)).static


_COMPILE = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{runtime.SOURCE_DIR}", f"-I{MODULES}")


def zig_cc(arch: Arch) -> tuple[str, ...]:
    """zig's C compiler for an architecture, its products stripped, as those of the runtime are.

    zig makes a library of helpers, in seconds, for each target, CPU and whether to strip: tests need no other ones.
    """
    return (ZIG, "cc", "-target", arch.zig_target, f"-mcpu={arch.zig_cpu}", "-fno-sanitize=all", "-s")


def compile_c(sources: Sequence[Path], *flags: str, compiler: Sequence[str] = ()) -> Path:
    """The product of compiling and linking `sources` with `flags`, by zig for this machine if there is no `compiler`.

    Compiled once for the same input.
    """
    compiler = compiler or zig_cc(parse("native").host.arch)
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
