"""The thread pool under load, with the sanitizers that this machine's compiler has."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import native
from support.boards import TRIPLES, emulated_command, zig

STRESS = Path(__file__).with_name("programs") / "pool_stress.c"


def stress(program: Path, callers: int, threads: int, loops: int, *emulator: str) -> None:
    command = [*emulator, program, str(callers), str(threads), str(loops)]
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}  # the program forks on purpose
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize(("callers", "threads"), [(1, 2), (1, 7), (4, 3), (8, 2)])
def test_every_element_once(callers: int, threads: int) -> None:
    """More callers than CPUs, more threads than CPUs: each loop does each element exactly once."""
    stress(native.compile_c([STRESS, native.library()]), callers, threads, 2000)


@pytest.mark.board
@pytest.mark.parametrize("arch", ["arm64", "armhf"])
def test_on_other_architectures(arch: str) -> None:
    """Their atomics and system calls; qemu on x86 does not reorder memory as an ARM may: pool.c argues that."""
    emulated = emulated_command(arch)
    library = native.library(f"llvm -mtriple={TRIPLES[arch]}")
    program = native.compile_c([STRESS, library], compiler=zig(arch))
    stress(program, 3, 3, 300, *emulated)


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_with_sanitizers(sanitizers: str) -> None:
    stress(native.sanitized([STRESS], sanitizers), 3, 3, 300)
