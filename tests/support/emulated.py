"""Running compiled programs of any architecture under qemu's user mode.

They are linked statically with a small harness that needs neither a C library nor the runtime.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler.cache import KernelCache
from kedge.compiler.lower.program import Entry, Program
from kedge.compiler.package import pack_weights
from kedge.compiler.pipeline import compile_externals, compile_kernels, compile_objects
from kedge.compiler.target import Target, parse
from kedge.compiler.tir.expr import Var, as_expr
from kedge.compiler.toolchain import c_libraries, cache_dir
from kedge.compiler.workers import Workers
from kedge.device_agent import runtime
from support import native
from support.functions import evaluate

Array = np.ndarray[Any, Any]
HARNESS = Path(__file__).resolve().parent.parent / "codegen" / "harness.c"
_QEMU = {"aarch64": "aarch64", "armv7l": "arm", "riscv64": "riscv64", "x86_64": "x86_64"}


def emulator(target: Target) -> list[str] | None:
    """The command that runs a program of `target` here: none at all on its own architecture; None if it is missing."""
    if platform.machine() == target.arch.name:
        return []
    for name in (f"qemu-{_QEMU[target.arch.name]}-static", f"qemu-{_QEMU[target.arch.name]}"):
        found = shutil.which(name)
        if found is not None:
            # Vectors are an option of qemu's RISC-V, and off by default.
            return [found, "-cpu", "rv64,v=true,vlen=256"] if target.arch.name == "riscv64" else [found]
    return None


def emulated(text: str) -> Target:
    """The target, if its programs run here; the test is skipped otherwise."""
    target = parse(text)
    if emulator(target) is None:
        pytest.skip(f"no qemu for {target.arch.name}")
    return target


def _harness(target: Target) -> Path:
    """The harness for an architecture, compiled once."""
    arch = target.arch
    digest = hashlib.sha256(HARNESS.read_bytes() + (runtime.SOURCE_DIR / "kedge.h").read_bytes())
    out = cache_dir() / "tests" / f"harness-{arch.name}-{digest.hexdigest()[:16]}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(f".{os.getpid()}-{out.name}")
        flags = [
            "-std=c11",
            "-O1",
            "-g0",
            "-fno-sanitize=all",
            "-ffreestanding",
            "-fno-stack-protector",
            "-fno-builtin",
        ]
        flags += ["-marm"] if arch.name == "armv7l" else []  # the assembly in it is not Thumb
        command = [native.ZIG, "cc", "-target", arch.zig_target, f"-mcpu={arch.zig_cpu}", *flags]
        subprocess.run([*command, f"-I{runtime.SOURCE_DIR}", "-c", str(HARNESS), "-o", str(scratch)], check=True)
        scratch.replace(out)
    return out


def run_program(
    program: Program, target: Target, inputs: Sequence[Array], folder: Path, cache: KernelCache
) -> tuple[Array, ...]:
    """The results of the program's first function for `inputs`, in order."""
    weights = pack_weights(program.weights)
    paths = [str(_harness(target))]
    external = [part for made in compile_externals(program, target).values() for part in made.parts]
    with Workers() as workers:
        kernels = compile_kernels(program, target, cache, workers)
    objects = compile_objects(program, target, weights, kernels, cache)
    for number, data in enumerate([*objects, *external]):
        path = folder / f"{number}.o"
        path.write_bytes(data)
        paths.append(str(path))
    if external:  # 32-bit ARM divides and converts 64-bit numbers in the compiler's library
        paths += [str(path) for path in c_libraries(target) if path.name == "libcompiler_rt.a"]
    binary = folder / "program"
    link = [native.ZIG, "ld.lld", "-m", target.arch.lld_emulation, "-static", "--no-undefined", "-o", str(binary)]
    subprocess.run([*link, *paths], check=True)
    command = emulator(target)
    assert command is not None, f"no emulator for {target.arch.name}"
    entry = program.entries[0]
    symbols = _symbols(entry, inputs)
    shapes = [tuple(int(evaluate(as_expr(d), symbols)) for d in port.type.shape) for port in entry.outputs]
    blanks = [np.zeros(shape, port.type.dtype) for shape, port in zip(shapes, entry.outputs, strict=True)]
    request = _request(weights.data[weights.data_offset :], inputs, list(symbols.values()), blanks)
    done = subprocess.run([*command, str(binary)], input=request, capture_output=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr.decode())
    return _results(done.stdout, blanks)


def _symbols(entry: Entry, inputs: Sequence[Array]) -> dict[Var, int]:
    """The values of the entry's symbols, in order, from the shapes of the inputs."""
    found = {
        dim: size
        for port, array in zip(entry.inputs, inputs, strict=True)
        for dim, size in zip(port.type.shape, array.shape, strict=True)
        if isinstance(dim, Var)
    }
    return {var: found[var] for var in entry.symbols}


def _request(weights: bytes, inputs: Sequence[Array], symbols: Sequence[int], outputs: Sequence[Array]) -> bytes:
    parts = [struct.pack("<q", len(weights)), weights, struct.pack("<q", len(inputs))]
    for array in inputs:
        parts += [struct.pack("<q", array.nbytes), np.ascontiguousarray(array).tobytes()]
    parts.append(struct.pack(f"<{1 + len(symbols)}q", len(symbols), *symbols))
    parts.append(struct.pack(f"<{1 + len(outputs)}q", len(outputs), *(array.nbytes for array in outputs)))
    return b"".join(parts)


def _results(data: bytes, blanks: Sequence[Array]) -> tuple[Array, ...]:
    results, at = [], 0
    for blank in blanks:
        results.append(np.frombuffer(data, blank.dtype, blank.size, at).reshape(blank.shape))
        at += blank.nbytes
    assert at == len(data)
    return tuple(results)
