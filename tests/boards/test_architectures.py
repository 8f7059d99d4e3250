"""Compiled models on every architecture: real machine code, executed by qemu, compared with the reference.

Two roads that a board takes. The native runner, as the agent starts it, loads `lib.so` dynamically; a program of one's
own has the model and the runtime linked into it (RISC-V here).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest

import kedge
from kedge.compiler import pipeline
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Var
from kedge.compiler.toolchain import build_runtime, cache_dir
from kedge.device_agent import runtime
from kedge.device_agent.runner import Runner
from kedge.device_agent.runtime.protocol import Tensor
from kedge.rpc.artifact import Artifact
from support.boards import ROOT, TRIPLES, emulated_command, zig

pytestmark = pytest.mark.board

ELF_MACHINES = {"arm64": 0xB7, "armhf": 0x28, "riscv64": 0xF3}
MODEL = ROOT / "kedge" / "data" / "digits.onnx"


@pytest.fixture(scope="module", params=list(TRIPLES))
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    emulated_command(name)
    return name


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(ROOT / "kedge" / "data" / "digits_test.npz") as data:
        return np.asarray(data["images"])[:24]


@pytest.fixture(scope="module")
def expected(images: np.ndarray) -> np.ndarray:
    (result,) = onnx.reference.ReferenceEvaluator(onnx.load(MODEL)).run(None, {"image": images})
    return np.asarray(result)


@pytest.fixture(scope="module")
def digits(arch: str) -> Artifact:
    return kedge.compile(kedge.load(MODEL), target=f"llvm -mtriple={TRIPLES[arch]} -num-cores=2")


@pytest.fixture
def runner(arch: str, tmp_path: Path) -> Iterator[Runner]:
    """The cross-built kedge-runner, behind a script that starts it in the emulator."""
    program = build_runtime(parse(f"llvm -mtriple={TRIPLES[arch]}")).runner
    script = tmp_path / "emulated-runner"
    words = shlex.join([*emulated_command(arch), str(program)])
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    script.chmod(0o755)
    with Runner(script, threads=2) as running:
        yield running


def unpacked(artifact: Artifact, folder: Path) -> tuple[Path, Path | None, int]:
    (variant,) = artifact.manifest.variants
    lib = folder / "lib.so"
    lib.write_bytes(artifact.member(variant.lib))
    if variant.weights is None:
        return lib, None, 0
    weights = folder / "weights"
    weights.write_bytes(artifact.member(variant.weights))
    return lib, weights, variant.weights_offset


def test_the_digits_network_in_the_runner(
    arch: str, runner: Runner, digits: Artifact, images: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    lib, weights, offset = unpacked(digits, tmp_path)
    assert struct.unpack_from("<H", lib.read_bytes(), 18)[0] == ELF_MACHINES[arch]
    runner.open(lib, weights, offset)
    # Compiled once with a free batch size.
    for batch in (1, 3, len(images)):
        (result,) = runner.call(0, [Tensor("float32", (batch, 1, 8, 8), images[:batch].tobytes())])
        assert result.shape == (batch, 10)
        found = np.frombuffer(bytes(result.data), np.float32).reshape(result.shape)
        np.testing.assert_allclose(found, expected[:batch], rtol=1e-4, atol=1e-6)
    timed = runner.time(0, [Tensor("float32", (1, 1, 8, 8), images[:1].tobytes())])
    assert min(timed.samples_ns) > 0


def linked(arch: str, model: object, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Artifact]:
    """A program of `linked_main.c`, the runtime's sources and the model's objects."""
    objects: list[bytes] = []
    link = pipeline.link_shared

    def remember(parts: list[bytes], target: object) -> bytes:
        objects.extend(parts)
        return link(parts, target)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "link_shared", remember)
    target = f"llvm -mtriple={TRIPLES[arch]} -num-cores=2"
    artifact = kedge.compile(model, target=target)  # type: ignore[arg-type]
    sources = [Path(__file__).with_name("linked_main.c")]
    sources += [runtime.SOURCE_DIR / name for name in runtime.LIBRARY_SOURCES]
    headers = [runtime.SOURCE_DIR / name for name in runtime.HEADERS]
    digest = hashlib.sha256(repr(zig(arch)).encode())
    for part in (*objects, *(path.read_bytes() for path in (*sources, *headers))):
        digest.update(part)
    folder = cache_dir() / "tests" / f"linked-{arch}-{digest.hexdigest()[:16]}"
    program = folder / "program"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(objects):
            (folder / f"{number}.o").write_bytes(part)
        build(arch, [*sources, *sorted(folder.glob("*.o"))], program)
    return program, artifact


def build(arch: str, inputs: list[Path], program: Path) -> None:
    words = ["-std=c11", "-O1", "-I", str(runtime.SOURCE_DIR), *map(str, inputs), "-lm", "-lpthread", "-ldl"]
    scratch = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*zig(arch), *words, "-o", str(scratch)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scratch.replace(program)


def call_linked(arch: str, program: Path, weights: Path | None, offset: int, *inputs: np.ndarray) -> list[np.ndarray]:
    data = b"".join(np.array([x.ndim, *x.shape], np.int64).tobytes() + x.tobytes() for x in inputs)
    command = [*emulated_command(arch), str(program), str(weights), str(offset)]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    results, at = [], 0
    while at < len(done.stdout):
        (ndim,) = struct.unpack_from("<q", done.stdout, at)
        shape = struct.unpack_from(f"<{ndim}q", done.stdout, at + 8)
        at += 8 * (1 + ndim)
        count = int(np.prod(shape))
        results.append(np.frombuffer(done.stdout, np.float32, count, at).reshape(shape))
        at += 4 * count
    return results


def test_the_digits_network_linked_into_a_risc_v_program(
    images: np.ndarray, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    emulated_command("riscv64")
    program, artifact = linked("riscv64", kedge.load(MODEL), monkeypatch)
    header = program.read_bytes()[:64]
    assert struct.unpack_from("<H", header, 18)[0] == ELF_MACHINES["riscv64"]
    _, weights, offset = unpacked(artifact, tmp_path)
    batches = [images[:1], images[:5], images]
    for found, batch in zip(call_linked("riscv64", program, weights, offset, *batches), batches, strict=True):
        np.testing.assert_allclose(found, expected[: len(batch)], rtol=1e-4, atol=1e-6)


EXPONENTIAL = """
#include <math.h>
#include "kedge_external.h"
int32_t my_exp(const kedge_external_call *call) {
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  int64_t size = kedge_size(&call->inputs[0]), two = kedge_external_int(call, "two", 1);
  for (int64_t i = 0; i < size; i++) y[i] = expf(x[i]);
  /* 32-bit ARM divides 64-bit numbers in the compiler's library. */
  return size / two == 7 ? KEDGE_OK : kedge_external_fail(call, "cannot divide");
}
"""


def test_external_code_finds_the_mathematics_of_the_board(arch: str, runner: Runner, tmp_path: Path) -> None:
    b = Builder("main")
    x = b.input("x", TensorType((Var("n", lower=1), 3), "float32"))
    module = kedge.Module({"main": b.finish({"y": b.call("exp", x)})})
    pattern = kedge.patterns.op("exp", kedge.patterns.wildcard("x"))
    external = kedge.External("my_exp", pattern, EXPONENTIAL, attributes=lambda match: {"two": 2})
    artifact = kedge.compile(module, f"llvm -mtriple={TRIPLES[arch]}", externals=[external])
    lib, weights, offset = unpacked(artifact, tmp_path)
    runner.open(lib, weights, offset)
    data = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    (result,) = runner.call(0, [Tensor("float32", data.shape, data.tobytes())])
    found = np.frombuffer(bytes(result.data), np.float32).reshape(result.shape)
    np.testing.assert_allclose(found, np.exp(data), rtol=1e-6)
