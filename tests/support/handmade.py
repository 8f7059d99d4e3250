"""Artifacts written by hand in C, for tests that need code to go wrong in ways the compiler never does."""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
from pathlib import Path

from kedge.rpc import abi
from kedge.rpc.artifact import Artifact, Function, Manifest, Port, Symbol, Variant, make_member

ROOT = Path(__file__).resolve().parent.parent.parent
WEIGHTS_OFFSET = 64


def zig_target(machine: str) -> str:
    """What zig calls a glibc system of that machine."""
    return {
        "x86_64": "x86_64-linux-gnu.2.17",
        "aarch64": "aarch64-linux-gnu.2.17",
        "armv7l": "arm-linux-gnueabihf.2.17",
    }[machine]


def compile_module(source: Path, out: Path, *, machine: str = "", features: str = "") -> Path:
    """Compile a C file that exports `kedge_module`; FEATURES is what it claims to need."""
    command = [
        *(sys.executable, "-m", "ziglang", "cc", "-target", zig_target(machine or platform.machine())),
        *("-shared", "-fPIC", "-O1", "-g0", "-fvisibility=hidden", "-fno-sanitize=all"),
        *(f'-DFEATURES="{features}"', "-I", str(ROOT / "device_agent" / "runtime"), str(source), "-o", str(out)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return out


def artifact(
    lib: bytes, functions: tuple[str, ...], *, arch: str = "", features: tuple[str, ...] = (), weight: float = 10.0
) -> Artifact:
    """An artifact around a lib.so whose functions all take float32 x[N] and return y[N]; one weight, in two parts."""
    weights = b"header".ljust(WEIGHTS_OFFSET, b"\0") + struct.pack("<f", weight).ljust(64, b"\0")
    members = {"lib.so": lib, "weights.safetensors": weights}
    arch = arch or platform.machine()
    x, y = (Port(name, "float32", ("N",)) for name in "xy")
    triple = f"{arch}-linux-gnu"
    manifest = Manifest(
        name="handmade",
        abi=abi.ABI_VERSION,
        compiler="a C compiler",
        functions=tuple(Function(name, (x,), (y,), (Symbol("N", 1),)) for name in functions),
        variants=(Variant(f"llvm -mtriple={triple}", arch, triple, features, *members, WEIGHTS_OFFSET),),
        members=(make_member("lib.so", lib), make_member("weights.safetensors", weights, [WEIGHTS_OFFSET])),
    )
    return Artifact(manifest, members)
