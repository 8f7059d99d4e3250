"""GPUs as targets: `GpuTarget`, the generations of CUDA, and boards that carry a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from kedge.compiler.target.model import Target

KIB = 1024
GpuKind: TypeAlias = Literal["opencl", "cuda"]
GPU_KINDS: tuple[GpuKind, ...] = get_args(GpuKind)

#: What OpenCL asks of every full-profile device of version 1.1 and newer, and what CUDA gives without asking.
DEFAULT_SHARED_BYTES: dict[GpuKind, int] = {"opencl": 32 * KIB, "cuda": 48 * KIB}
#: OpenCL promises no number; 256 is what embedded GPUs (Mali, Adreno, Intel) have at least.
DEFAULT_MAX_THREADS: dict[GpuKind, int] = {"opencl": 256, "cuda": 1024}
#: Threads that run in lockstep. OpenCL does not say, so 1: code must not rely on any.
DEFAULT_WARP: dict[GpuKind, int] = {"opencl": 1, "cuda": 32}
#: The oldest generation that today's drivers (CUDA 13) still know; its PTX runs on every newer one.
DEFAULT_CUDA_ARCH = "sm_75"
#: Bytes of shared memory that one block can have at most, where it asks for more than the default; by generation
#: (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
CUDA_ARCHS: dict[str, int] = {
    "sm_50": 48 * KIB, "sm_52": 48 * KIB, "sm_53": 48 * KIB, "sm_60": 48 * KIB, "sm_61": 48 * KIB, "sm_62": 48 * KIB,
    "sm_70": 96 * KIB, "sm_72": 48 * KIB, "sm_75": 64 * KIB, "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_87": 163 * KIB,
    "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "sm_103": 227 * KIB, "sm_110": 227 * KIB,
    "sm_120": 99 * KIB, "sm_121": 99 * KIB,
}  # fmt: skip
_FIRST_WITH_OWN_FEATURES = 90


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """A GPU and the CPU that drives it.

    It has none of the CPU's properties (vector width, caches): a rule or a back end for CPUs cannot ask it.
    """

    kind: GpuKind
    #: The generation that code is for ("sm_87"), which newer ones run too (not so "sm_90a"); empty for OpenCL.
    arch_name: str
    #: Threads that one block (OpenCL: work-group) may have.
    max_threads: int
    #: Bytes of shared (OpenCL: local) memory that one block may use.
    shared_bytes: int
    #: Threads that run in lockstep; 1 where nothing is known.
    warp: int
    #: The CPU whose code launches the kernels.
    host: Target

    def __str__(self) -> str:
        """The target as options; `parse` reads it back to an equal target."""
        own = {"cuda": f"-arch={self.arch_name}", "opencl": f"-warp={self.warp}"}[self.kind]
        return f'{self.kind} {own} -max-threads={self.max_threads} -shared={self.shared_bytes} -host="{self.host}"'

    @property
    def label(self) -> str:
        """A short name for messages and files: "opencl", "cuda-sm_87"."""
        return f"{self.kind}-{self.arch_name}" if self.arch_name else self.kind

    @property
    def required_features(self) -> tuple[str, ...]:
        """What the host's CPU must report beyond its architecture's baseline, sorted."""
        return self.host.required_features


@dataclass(frozen=True, slots=True)
class GpuBoard:
    """A GPU by its tag. `host` is the target string of the CPU that it is built onto; "native" for a card."""

    tag: str
    kind: GpuKind
    arch_name: str
    title: str
    host: str = "native"


GPU_BOARDS: tuple[GpuBoard, ...] = (
    GpuBoard("nvidia/b200", "cuda", "sm_100", "NVIDIA B200"),
    GpuBoard("nvidia/h200", "cuda", "sm_90", "NVIDIA H200"),
    GpuBoard("nvidia/h100", "cuda", "sm_90", "NVIDIA H100"),
    GpuBoard("nvidia/l40s", "cuda", "sm_89", "NVIDIA L40S"),
    GpuBoard("nvidia/l4", "cuda", "sm_89", "NVIDIA L4"),
    GpuBoard("nvidia/a100", "cuda", "sm_80", "NVIDIA A100"),
    GpuBoard("nvidia/a10", "cuda", "sm_86", "NVIDIA A10"),
    GpuBoard("nvidia/t4", "cuda", "sm_75", "NVIDIA T4"),
    GpuBoard("nvidia/v100", "cuda", "sm_70", "NVIDIA V100"),
    GpuBoard("nvidia/rtx-5090", "cuda", "sm_120", "NVIDIA GeForce RTX 5090"),
    GpuBoard("nvidia/rtx-4090", "cuda", "sm_89", "NVIDIA GeForce RTX 4090"),
    GpuBoard("nvidia/rtx-3090", "cuda", "sm_86", "NVIDIA GeForce RTX 3090"),
    GpuBoard("nvidia/jetson-nano", "cuda", "sm_53", "NVIDIA Jetson Nano, its GPU", "jetson/nano"),
    GpuBoard("nvidia/jetson-agx-orin", "cuda", "sm_87", "NVIDIA Jetson AGX Orin, its GPU", "jetson/orin"),
    GpuBoard("nvidia/jetson-orin-nano", "cuda", "sm_87", "NVIDIA Jetson Orin Nano, its GPU", "jetson/orin-nano"),
    GpuBoard("rock-pi/4-gpu", "opencl", "", "ROCK Pi 4, its Mali-T860", "rock-pi/4"),
)


def generation_of(arch_name: str) -> str | None:
    """The generation that an architecture's code is for: sm_90 of sm_90 and of sm_90a; None where there is none.

    Code for sm_90a may use what only sm_90 itself has; there are such names from Hopper on.
    """
    if arch_name in CUDA_ARCHS:
        return arch_name
    generation = arch_name.removesuffix("a")
    return generation if generation in CUDA_ARCHS and cuda_level(generation) >= _FIRST_WITH_OWN_FEATURES else None


def cuda_level(arch_name: str) -> int:
    """The number of a generation, which orders them: 87 of "sm_87"."""
    return int(arch_name.removeprefix("sm_").removesuffix("a"))
