"""`Accelerator`: a GPU of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

#: What code for OpenCL takes of a block unless told otherwise; where a device offers more, it is not better for it.
_MAX_THREADS, _SHARED_BYTES = 256, 32 << 10


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

    def target(self, host: str) -> str:
        """The target string that compiles for it, where the target `host` compiles for the CPU that drives it."""
        if self.kind == "cuda":
            return f'cuda -arch={self.arch} -host="{host}"'
        block = f"-max-threads={min(self.max_threads, _MAX_THREADS)} -shared={min(self.shared_bytes, _SHARED_BYTES)}"
        return f'{self.kind} {block} -host="{host}"'
