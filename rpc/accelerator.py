"""`Accelerator`: a GPU of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple


@dataclass(frozen=True)
class Accelerator:
    """A GPU of a machine, as its driver describes it; `kind` is "opencl" or "cuda", `index` counts among its kind.

    `arch` is its generation ("sm_90"), or on OpenCL the version of OpenCL C; `features` are what kernels may ask for:
    "fp16", "fp64", OpenCL's extensions, CUDA's generations; `shared_bytes` and `max_threads` what one block may have;
    `compute_units` its multiprocessors.
    """

    kind: str
    index: int
    name: str
    driver: str = ""
    arch: str = ""
    features: Tuple[str, ...] = ()
    memory_bytes: int = 0
    shared_bytes: int = 0
    max_threads: int = 0
    compute_units: int = 0

    @property
    def device(self) -> str:
        """As users name it: "cuda:0"."""
        return f"{self.kind}:{self.index}"
