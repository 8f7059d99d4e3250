"""Running what the compiler made for GPUs on this machine's OpenCL; PoCL makes any CPU a device of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from kedge.compiler.cache import KernelCache
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import parse_cpu
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.toolchain import build_runtime
from kedge.rpc import abi
from kedge.rpc.artifact import Artifact
from kedge.rpc.client.inprocess import open_in_process

Array = np.ndarray[Any, Any]


def require() -> None:
    """Skip, with the reason, where this machine has no OpenCL; under CI that is a failure."""
    lib = abi.load_runtime(str(build_runtime(parse_cpu("native")).lib))
    if lib.kedge_device_count(abi.DEVICE_OPENCL) > 0:
        return
    missing = f"no OpenCL: {lib.kedge_last_error().decode()}; apt-get install pocl-opencl-icd ocl-icd-libopencl1"
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have OpenCL: {missing}")
    pytest.skip(missing)


def run_artifact(artifact: Artifact, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of an artifact's first function, by name."""
    with open_in_process(artifact, build_runtime(parse_cpu("native")).lib, device="opencl") as model:
        return dict(model.run(inputs))


def run(source: PrimFunc | Schedule, arrays: Sequence[Array], cache: KernelCache) -> tuple[Array, ...]:
    """The outputs of a function for its inputs; skips where there is no OpenCL."""
    require()
    func = source.func if isinstance(source, Schedule) else source
    names = [buffer.name for buffer in func.params]
    inputs = dict(zip(names, arrays, strict=False))
    got = run_artifact(compile_prim_func(source, "opencl", cache=cache), inputs)
    return tuple(got[name] for name in names[len(names) - func.n_outputs :])
