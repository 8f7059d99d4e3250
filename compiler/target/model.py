"""`Target`: the machine that code is generated for, as schedule rules, code generation and the artifact see it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from kedge.compiler.target.arch import Arch
from kedge.compiler.target.cpus import find_cpu


@dataclass(frozen=True, slots=True)
class Throughput:
    """How much a core starts in a cycle, of vectors as wide as the target's.

    `fma_latency` is in cycles, from one multiply-add to the next of the same accumulator. Where the target has no
    fused multiply-add, a multiplication and an addition count as one.
    """

    fma_per_cycle: float
    fma_latency: int
    loads_per_cycle: float
    stores_per_cycle: float


@dataclass(frozen=True, slots=True)
class Target:
    """A CPU of one architecture.

    `features` are LLVM's names of what the code may use beyond the architecture's baseline, closed under
    implication and sorted: exactly these are required of the device. `cpu` only tunes (instruction scheduling, cache
    sizes, throughput); it never allows an instruction by itself. `l1_bytes` and `l2_bytes` are a core's own data
    caches; `l3_bytes` is the third level that the cores share, as far as one of them reaches, 0 where there is none.
    """

    arch: Arch
    cpu: str
    features: tuple[str, ...]
    num_cores: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    throughput: Throughput

    def __str__(self) -> str:
        """The target as options; `parse` reads it back to an equal target."""
        parts = ["llvm", f"-mtriple={self.arch.triple}", f"-mcpu={self.cpu}"]
        cpu = find_cpu(self.cpu, self.arch)
        # What the name promises and this machine lacks goes first: a feature takes those that need it along.
        missing = [f"-{f}" for f in (cpu.features if cpu is not None else ()) if f not in self.features]
        parts.append(f"-mattr={','.join([*missing, *('+' + f for f in self.features)]) or 'none'}")
        parts += [f"-num-cores={self.num_cores}", f"-l1={self.l1_bytes}", f"-l2={self.l2_bytes}"]
        if cpu is None or self.l3_bytes != cpu.l3_bytes:
            parts.append(f"-l3={self.l3_bytes}")
        usual = throughput_of(self.arch, self.cpu, self.features)
        for option, field in THROUGHPUT_OPTIONS.items():
            value = getattr(self.throughput, field)
            if value != getattr(usual, field):
                parts.append(f"{option}={str(value).removesuffix('.0')}")
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
        return _vector_bits(self.arch, self.features)

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

    @property
    def fma_by_element(self) -> bool:
        """Whether a multiply-add takes one element of a vector register for all lanes."""
        return self.arch.name == "aarch64" or (self.arch.name == "armv7l" and self.has("neon"))

    @property
    def memory_operands(self) -> bool:
        """Whether arithmetic takes an operand from memory; else all that is loaded wants a register."""
        return self.arch.name == "x86_64"

    @property
    def l3_share_bytes(self) -> int:
        """Bytes of the third level that each core has while all of them work; less than is true with several of it."""
        return self.l3_bytes // self.num_cores

    @property
    def fma_per_cycle(self) -> float:
        """Multiply-adds of whole vectors that a core starts in a cycle, at most."""
        return self.throughput.fma_per_cycle

    @property
    def fma_latency(self) -> int:
        """Cycles from one multiply-add to the next of the same accumulator."""
        return self.throughput.fma_latency

    @property
    def loads_per_cycle(self) -> float:
        """Vectors that a core loads from its first-level cache in a cycle, at most."""
        return self.throughput.loads_per_cycle

    @property
    def stores_per_cycle(self) -> float:
        """Vectors that a core stores in a cycle, at most."""
        return self.throughput.stores_per_cycle


#: The options of a target string that replace what is known of a CPU, and what each replaces.
THROUGHPUT_OPTIONS = {
    "-fma": "fma_per_cycle",
    "-fma-latency": "fma_latency",
    "-loads": "loads_per_cycle",
    "-stores": "stores_per_cycle",
}


def throughput_of(arch: Arch, cpu_name: str, features: Collection[str]) -> Throughput:
    """What the CPU of that name (the generic one where it is unknown) does with vectors that `features` allow."""
    cpu = find_cpu(cpu_name, arch) or find_cpu(arch.generic_cpu, arch)
    assert cpu is not None, f"no generic CPU for {arch.name}"
    bits = _vector_bits(arch, features)
    pipes = cpu.pipes
    # Code without fused multiply-add occupies the units that fuse twice.
    passes = 2 if "fma" in cpu.features and "fma" not in features else 1
    return Throughput(
        fma_per_cycle=pipes.fma.per_cycle(bits) / passes,
        fma_latency=pipes.fma_latency,
        loads_per_cycle=pipes.loads.per_cycle(bits),
        stores_per_cycle=pipes.stores.per_cycle(bits),
    )


def _vector_bits(arch: Arch, features: Collection[str]) -> int:
    if arch.name == "x86_64":
        return 512 if "avx512vl" in features else 256 if "avx" in features else 128
    return 128
