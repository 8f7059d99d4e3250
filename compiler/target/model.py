"""`Target`: the machine that code is generated for, as schedule rules, code generation and the artifact see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kedge.compiler.target.arch import Arch


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU of one architecture.

    `features` are LLVM's names of what the code may use beyond the architecture's baseline, closed under
    implication and sorted: exactly these are required of the device. `cpu` only tunes (instruction scheduling and
    cache sizes); it never allows an instruction by itself.
    """

    arch: Arch
    cpu: str
    features: tuple[str, ...]
    num_cores: int
    l1_bytes: int
    l2_bytes: int

    def __str__(self) -> str:
        """The target as options; `parse` reads it back to an equal target."""
        parts = ["llvm", f"-mtriple={self.arch.triple}", f"-mcpu={self.cpu}"]
        parts.append(f"-mattr={','.join('+' + f for f in self.features) or 'none'}")
        parts += [f"-num-cores={self.num_cores}", f"-l1={self.l1_bytes}", f"-l2={self.l2_bytes}"]
        return " ".join(parts)

    @property
    def kind(self) -> Literal["llvm"]:
        """The back end: always "llvm" for a CPU."""
        return "llvm"

    @property
    def host(self) -> Target:
        """The CPU that runs what is not a kernel of a GPU: this one."""
        return self

    @property
    def label(self) -> str:
        """A short name for messages and files: the architecture."""
        return self.arch.name

    @property
    def triple(self) -> str:
        """The LLVM triple."""
        return self.arch.triple

    @property
    def required_features(self) -> tuple[str, ...]:
        """What the device must report beyond its architecture's baseline, sorted."""
        return self.features

    def has(self, feature: str) -> bool:
        """Whether code may use `feature`."""
        return feature in self.features or feature in self.arch.baseline

    @property
    def vector_bits(self) -> int:
        """Bits of the widest vector register that code uses.

        A machine without vector instructions counts four scalars as one vector, so that every rule works with
        vectors and the back end takes them apart.
        """
        if self.arch.name == "x86_64":
            return 512 if self.has("avx512vl") else 256 if self.has("avx") else 128
        return 128

    @property
    def vector_registers(self) -> int:
        """How many vector registers there are."""
        if self.arch.name == "x86_64":
            return 32 if self.has("avx512vl") else 16
        if self.arch.name == "armv7l":
            return 16 if self.has("neon") else 4
        if self.arch.name == "riscv64":
            return 32 if self.has("v") else 8
        return 32

    @property
    def fma(self) -> bool:
        """Whether one instruction multiplies and adds with one rounding."""
        needs = {"x86_64": "fma", "armv7l": "vfp4"}.get(self.arch.name)
        return needs is None or self.has(needs)
