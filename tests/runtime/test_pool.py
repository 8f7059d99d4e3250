"""The thread pool under load, with the sanitizers that this machine's compiler has."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import native

STRESS = Path(__file__).with_name("programs") / "pool_stress.c"


def stress(program: Path, callers: int, threads: int, loops: int, *emulator: str) -> None:
    command = [*emulator, program, str(callers), str(threads), str(loops)]
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}  # the program forks on purpose
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize(("callers", "threads"), [(1, 2), (1, 7), (4, 3), (8, 2)])
def test_every_element_once(callers: int, threads: int) -> None:
    """More callers than CPUs, more threads than CPUs: each loop does each element exactly once."""
    stress(native.compile_c([STRESS, *native.library_sources()], "-O2"), callers, threads, 2000)


@pytest.mark.parametrize(("zig_target", "qemu"), [("aarch64-linux-musl", "aarch64"), ("arm-linux-musleabihf", "arm")])
def test_on_other_architectures(zig_target: str, qemu: str) -> None:
    """Their atomics and system calls; qemu on x86 does not reorder memory as an ARM may: pool.c argues that."""
    emulator = shutil.which(f"qemu-{qemu}-static") or shutil.which(f"qemu-{qemu}")
    if emulator is None:
        pytest.skip(f"qemu-{qemu} is not installed")
    flags = ("-O2", "-static", "-target", zig_target)
    stress(native.compile_c([STRESS, *native.library_sources()], *flags), 3, 3, 300, emulator)


@pytest.mark.parametrize("sanitizer", ["thread", "undefined,address"])
def test_with_a_sanitizer(sanitizer: str) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed; zig carries no sanitizer runtime")
    flags = ("-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover")
    try:
        program = native.compile_c([STRESS, *native.library_sources()], *flags, compiler=(gcc,))
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip(f"gcc has no runtime for -fsanitize={sanitizer} here")
        raise
    stress(program, 3, 3, 300)
