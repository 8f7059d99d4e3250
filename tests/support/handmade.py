"""Artifacts written by hand in C, for tests that need code to go wrong in ways the compiler never does."""

from __future__ import annotations

import platform
import shutil
import struct
from pathlib import Path

from kedge.compiler.target import parse
from kedge.rpc import abi
from kedge.rpc.artifact import Artifact, Function, Manifest, Port, Symbol, Variant, make_member
from support import native

WEIGHTS_OFFSET = 64


def compile_module(source: Path, out: Path, *, machine: str = "", features: str = "") -> Path:
    """Compile a C file that exports `kedge_module`, once for the same input; FEATURES is what it claims to need."""
    arch = parse(f"llvm -mtriple={machine or platform.machine()}-linux-gnu").host.arch
    language = ("-std=gnu11", "-Wno-missing-field-initializers")
    flags = (*language, "-shared", "-fPIC", "-fvisibility=hidden", f'-DFEATURES="{features}"')
    shutil.copyfile(native.compile_c([source], *flags, compiler=native.zig_cc(arch)), out)
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
