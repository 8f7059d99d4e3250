"""Malformed modules and tensors: refused by the runtime's checks, or called without a byte out of place."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from kedge.device_agent.runtime import RUNNER_SOURCES, SOURCE_DIR, protocol
from kedge.device_agent.runtime.protocol import Tensor
from kedge.rpc.types import TimeOptions
from support import native

PROGRAM = Path(__file__).with_name("programs") / "hostile.c"
SANITIZERS = "address,undefined"


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
    attack([str(native.sanitized([PROGRAM], SANITIZERS))], seed, 20_000)


def test_the_runner_with_sanitizers(arithmetic: Path, weights: Path) -> None:
    """Requests about modules and tensors that stay, a good part of them mangled."""
    program = native.sanitized([SOURCE_DIR / name for name in RUNNER_SOURCES], SANITIZERS)
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512"}
    pipe = subprocess.PIPE
    with subprocess.Popen([program, "--stdio"], stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as runner:
        answered = mangle(runner, random.Random(20261126), protocol.pack_open(str(arithmetic), str(weights), 64, 1))
        _, said = runner.communicate(timeout=60)
    assert (runner.returncode, said) == (0, b"")
    assert min(answered.values()) > 300, answered  # of both, errors and results


def mangle(runner: subprocess.Popen[bytes], rng: random.Random, opening: bytes) -> Counter[int]:
    """Three thousand requests; how often each type of message answered."""
    assert runner.stdin is not None and runner.stdout is not None
    answered: Counter[int] = Counter()

    def ask(kind: int, payload: bytes) -> bytes:
        assert runner.stdin is not None and runner.stdout is not None
        runner.stdin.write(protocol.Header(kind, 0, 7, len(payload)).pack() + payload)
        runner.stdin.flush()
        header = protocol.Header.unpack(runner.stdout.read(protocol.HEADER.size))
        content = runner.stdout.read(header.length)
        answered[header.type] += 1
        return content if header.type == protocol.RESULT else b""

    hello = protocol.Header.unpack(runner.stdout.read(protocol.HEADER.size))
    runner.stdout.read(hello.length)
    ask(protocol.OPEN, opening)
    x = Tensor("float32", (2, 8), bytes(64))
    last = 1
    for _ in range(3_000):
        old = protocol.Kept(rng.randint(max(1, last - 4), last), "float32", (2, 8))
        kind, payload = rng.choice(
            [
                (protocol.CALL, with_data(protocol.pack_call(0, 0, rng.choice((0, 1, 4, 5))), [x])),
                (protocol.CALL, with_data(protocol.pack_call(0, 0, 4), [old])),
                (protocol.TIME, with_data(protocol.pack_time(0, 0, TimeOptions(repeat=1)), [old])),
                (protocol.KEEP, protocol.pack_keep("float32", (2, 8)) + bytes(rng.choice((0, 32, 64, 64, 64)))),
                (protocol.FILL, protocol.pack_fill(old.handle) + bytes(rng.choice((32, 64, 65)))),
                (protocol.FETCH, protocol.pack_fetch(old.handle, rng.choice((0, 32)), 32)),
                (protocol.RELEASE, protocol.pack_release([old.handle] * rng.randint(0, 2))),
                (protocol.OPEN, opening),
                (protocol.CLOSE, protocol.pack_close(rng.randint(1, 80))),
            ]
        )
        if rng.random() < 0.3 and kind not in (protocol.OPEN, protocol.TIME, protocol.CLOSE):
            noise = bytearray(payload)
            for _ in range(rng.randint(1, 4)):
                noise[rng.randrange(len(noise))] = rng.choice((0, 1, 255, rng.randrange(256)))
            payload = bytes(noise[: rng.randint(0, len(noise))])
        found = ask(kind, payload)
        if kind == protocol.KEEP and found:
            last = max(last, protocol.unpack_keep(found))
    return answered


def with_data(head: bytes, inputs: list[protocol.Given]) -> bytes:
    """A request with its inputs, each by its handle or with its zeros."""
    handles, values = protocol.pack_inputs(inputs)
    descriptors, _, size = protocol.pack_tensors(values)
    head += handles + descriptors
    return head.ljust(protocol.align(len(head)), b"\0") + bytes(size)


@pytest.mark.slow
def test_on_32_bits() -> None:
    """Sizes of 64 bits that a size_t of 32 cuts off."""
    emulator = shutil.which("qemu-arm") or shutil.which("qemu-arm-static")
    if emulator is None:
        pytest.skip("qemu-user is not installed")
    flags = ("-target", "arm-linux-musleabihf", "-static", "-fsanitize=undefined", "-fsanitize-trap=all")
    program = native.compile_c([PROGRAM, *native.library_sources()], *flags, compiler=(native.ZIG, "cc"))
    attack([emulator, str(program)], 1, 10_000)
