"""An artifact for OpenCL, written by hand: main is y = 2 x + 1 by a kernel (tests/runtime/modules/doubling.c).

PoCL makes any CPU an OpenCL device: `apt install pocl-opencl-icd`. Tests of the real thing are skipped without one.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from kedge.device_agent.runner import Runner
from kedge.rpc import abi
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact import Artifact, Function, Manifest, Port, Symbol, Variant, VariantDevice, make_member
from support import native


def gpu_artifact(
    need: VariantDevice = VariantDevice("opencl", "", 64),  # noqa: B008 - frozen
    *flags: str,
) -> Artifact:
    """The artifact; `need` is what its manifest says of the device, `flags` are the compiler's."""
    arch, lib = platform.machine(), native.module("doubling", *flags).read_bytes()
    x, y = Port("x", "float32", ("N",)), Port("y", "float32", ("N",))
    manifest = Manifest(
        "doubling", abi.ABI_VERSION, "by hand", (Function("main", (x,), (y,), (Symbol("N"),)),),
        (Variant("opencl", arch, f"{arch}-linux-gnu", (), "lib.so", device=need),), (make_member("lib.so", lib),),
    )  # fmt: skip
    return Artifact(manifest, {"lib.so": lib})


def opencl_device(runner: Path) -> Accelerator:
    """The first OpenCL device; skips the test where there is none."""
    with Runner(runner) as started:
        found = started.devices("opencl")
    if not found.accelerators:
        pytest.skip(f"no OpenCL device: {found.reason}")
    return found.accelerators[0]
