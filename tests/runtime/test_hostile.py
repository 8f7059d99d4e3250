"""Malformed modules and tensors: refused by the runtime's checks, or called without a byte out of place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import native

PROGRAM = Path(__file__).with_name("programs") / "hostile.c"


def attack(command: list[str], seed: int, rounds: int) -> None:
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512"}
    done = subprocess.run(
        [*command, str(seed), str(rounds)], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    opened, calls, times = map(int, done.stdout.split())
    assert rounds / 10 < opened < rounds  # some of both
    assert opened < calls < opened * 8
    assert opened < times < opened * 8


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_sanitizers(seed: int) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed; zig carries no address sanitizer")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    try:
        program = native.compile_c([PROGRAM, *native.library_sources()], *flags, compiler=(gcc,))
    except AssertionError as error:
        if "cannot find" in str(error):
            pytest.skip("gcc has no runtime for sanitizers here")
        raise
    attack([str(program)], seed, 20_000)


@pytest.mark.slow
def test_on_32_bits() -> None:
    """Sizes of 64 bits that a size_t of 32 cuts off."""
    emulator = shutil.which("qemu-arm") or shutil.which("qemu-arm-static")
    if emulator is None:
        pytest.skip("qemu-user is not installed")
    flags = ("-target", "arm-linux-musleabihf", "-static", "-fsanitize=undefined", "-fsanitize-trap=all")
    zig = tuple(word for word in native.ZIG if not word.startswith("-fno-sanitize"))
    program = native.compile_c([PROGRAM, *native.library_sources()], *flags, compiler=zig)
    attack([emulator, str(program)], 1, 10_000)
