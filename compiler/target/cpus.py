"""The processors that kedge knows by LLVM's names, and boards that carry them.

A CPU's feature list names only what changes the numeric code we emit, and only what every specimen has: each
feature becomes a requirement of the artifact. Cache sizes are per core; a shared L2 is divided by its sharers. A third
level is what one core of an ordinary machine reaches, and 0 where many machines have none.

Units and latencies are those of the vendors' optimization guides and of LLVM's scheduling models. Where a processor
without fused multiply-add multiplies and adds in different units, a pair of both counts as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.target.arch import AARCH64, ARMV7, RISCV64, X86_64, Arch

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Units:
    """Execution units that do the same: how many, and how many bits each takes in a cycle."""

    count: int
    bits: int

    def per_cycle(self, vector_bits: int) -> float:
        """How many operations on vectors of `vector_bits` start in a cycle, at most."""
        return self.count * min(1.0, self.bits / vector_bits)


@dataclass(frozen=True, slots=True)
class Pipes:
    """What bounds a core's inner loops. `fma_latency` is in cycles, from one to the next of the same accumulator."""

    fma: Units
    fma_latency: int
    loads: Units
    stores: Units


#: Scalar or of half width: what nothing is known about.
_SMALL = Pipes(Units(1, 64), 8, Units(1, 128), Units(1, 128))
_WESTMERE = Pipes(Units(1, 128), 8, Units(1, 128), Units(1, 128))
_SANDY = Pipes(Units(1, 256), 8, Units(2, 128), Units(1, 128))
_HASWELL = Pipes(Units(2, 256), 5, Units(2, 256), Units(1, 256))
_SKYLAKE = Pipes(Units(2, 256), 4, Units(2, 256), Units(1, 256))
_GOLDEN = Pipes(Units(2, 256), 4, Units(3, 256), Units(2, 256))
_SKYLAKE_512 = Pipes(Units(2, 512), 4, Units(2, 512), Units(1, 512))
_ICELAKE_512 = Pipes(Units(2, 512), 4, Units(2, 512), Units(2, 256))
#: Clients of that generation lack the second unit of 512 bits: two of 256 are one of 512.
_ICELAKE_CLIENT = Pipes(Units(2, 256), 4, Units(2, 512), Units(2, 256))
_ZEN = Pipes(Units(2, 256), 5, Units(2, 256), Units(1, 256))
_ZEN3 = Pipes(Units(2, 256), 4, Units(2, 256), Units(1, 256))
_ZEN5 = Pipes(Units(2, 512), 4, Units(2, 512), Units(1, 512))
_IN_ORDER = Pipes(Units(1, 128), 8, Units(1, 128), Units(1, 128))
_A55 = Pipes(Units(1, 128), 4, Units(1, 128), Units(1, 128))
_A72 = Pipes(Units(1, 128), 4, Units(1, 128), Units(1, 64))
_A76 = Pipes(Units(2, 128), 4, Units(2, 128), Units(1, 128))
_V1 = Pipes(Units(4, 128), 4, Units(3, 128), Units(2, 128))
_V2_ARM = Pipes(Units(4, 128), 2, Units(3, 128), Units(2, 128))
_N2 = Pipes(Units(2, 128), 4, Units(3, 128), Units(2, 128))
_A9 = Pipes(Units(1, 64), 8, Units(1, 64), Units(1, 64))


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor core: LLVM's name, features beyond the architecture's baseline, units, bytes of data cache."""

    name: str
    arch: Arch
    features: tuple[str, ...] = ()
    pipes: Pipes = _SMALL
    l1_bytes: int = 32 * KIB
    l2_bytes: int = 256 * KIB
    l3_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Board:
    """A machine by its tag: the cores that do the computing, and how many there are."""

    tag: str
    cpu: str
    arch: Arch
    num_cores: int
    title: str


_V2 = ("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_SAPPHIRE = (*_V4, "avx512vnni", "avx512bf16", "avxvnni")
_ARM82 = ("dotprod", "fullfp16", "rdm")
_ARM86 = (*_ARM82, "fp16fml", "i8mm", "bf16")
_V7 = ("neon", "vfp4", "fp16", "hwdiv", "hwdiv-arm")
_V8_32 = (*_V7, "crc")

CPUS: tuple[Cpu, ...] = (
    Cpu("x86-64", X86_64, (), _WESTMERE),
    Cpu("x86-64-v2", X86_64, _V2, _WESTMERE),
    Cpu("x86-64-v3", X86_64, _V3, _HASWELL),
    # Half of these machines split an operation on 512 bits in two.
    Cpu("x86-64-v4", X86_64, _V4, _ZEN3, 32 * KIB, 1024 * KIB),
    Cpu("nehalem", X86_64, _V2, _WESTMERE, 32 * KIB, 256 * KIB, 8 * MIB),
    Cpu("sandybridge", X86_64, (*_V2, "avx"), _SANDY, 32 * KIB, 256 * KIB, 8 * MIB),
    Cpu("haswell", X86_64, _V3, _HASWELL, 32 * KIB, 256 * KIB, 8 * MIB),
    Cpu("broadwell", X86_64, _V3, _HASWELL, 32 * KIB, 256 * KIB, 8 * MIB),
    Cpu("skylake", X86_64, _V3, _SKYLAKE, 32 * KIB, 256 * KIB, 8 * MIB),
    Cpu("alderlake", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 1280 * KIB, 24 * MIB),
    Cpu("raptorlake", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 2 * MIB, 24 * MIB),
    Cpu("meteorlake", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 2 * MIB, 24 * MIB),
    # Machines of that name have cores of two kinds: this second level is the smaller one's.
    Cpu("arrowlake", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 2 * MIB, 24 * MIB),
    Cpu("arrowlake-s", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 3 * MIB, 36 * MIB),
    Cpu("lunarlake", X86_64, (*_V3, "avxvnni"), _GOLDEN, 48 * KIB, 2560 * KIB, 12 * MIB),
    Cpu("skylake-avx512", X86_64, _V4, _SKYLAKE_512, 32 * KIB, 1024 * KIB, 16 * MIB),
    Cpu("cascadelake", X86_64, (*_V4, "avx512vnni"), _SKYLAKE_512, 32 * KIB, 1024 * KIB, 16 * MIB),
    Cpu("cooperlake", X86_64, (*_V4, "avx512vnni", "avx512bf16"), _SKYLAKE_512, 32 * KIB, 1024 * KIB, 16 * MIB),
    Cpu("icelake-client", X86_64, (*_V4, "avx512vnni"), _ICELAKE_CLIENT, 48 * KIB, 512 * KIB, 8 * MIB),
    Cpu("rocketlake", X86_64, (*_V4, "avx512vnni"), _ICELAKE_CLIENT, 48 * KIB, 512 * KIB, 16 * MIB),
    Cpu("tigerlake", X86_64, (*_V4, "avx512vnni"), _ICELAKE_CLIENT, 48 * KIB, 1280 * KIB, 12 * MIB),
    Cpu("icelake-server", X86_64, (*_V4, "avx512vnni"), _ICELAKE_512, 48 * KIB, 1280 * KIB, 24 * MIB),
    Cpu("sapphirerapids", X86_64, _SAPPHIRE, _ICELAKE_512, 48 * KIB, 2 * MIB, 32 * MIB),
    Cpu("emeraldrapids", X86_64, _SAPPHIRE, _ICELAKE_512, 48 * KIB, 2 * MIB, 32 * MIB),
    Cpu("graniterapids", X86_64, _SAPPHIRE, _ICELAKE_512, 48 * KIB, 2 * MIB, 32 * MIB),
    Cpu("graniterapids-d", X86_64, _SAPPHIRE, _ICELAKE_512, 48 * KIB, 2 * MIB, 32 * MIB),
    Cpu("znver2", X86_64, _V3, _ZEN, 32 * KIB, 512 * KIB, 16 * MIB),
    Cpu("znver3", X86_64, _V3, _ZEN3, 32 * KIB, 512 * KIB, 32 * MIB),
    Cpu("znver4", X86_64, (*_V4, "avx512vnni", "avx512bf16"), _ZEN3, 32 * KIB, 1024 * KIB, 32 * MIB),
    Cpu("znver5", X86_64, (*_V4, "avx512vnni", "avx512bf16", "avxvnni"), _ZEN5, 48 * KIB, 1024 * KIB, 32 * MIB),
    Cpu("generic", AARCH64, (), _A72),
    Cpu("cortex-a35", AARCH64, (), _IN_ORDER, 32 * KIB, 128 * KIB),
    Cpu("cortex-a53", AARCH64, (), _IN_ORDER, 32 * KIB, 128 * KIB),
    Cpu("cortex-a55", AARCH64, _ARM82, _A55, 32 * KIB, 128 * KIB),
    Cpu("cortex-a57", AARCH64, (), _A72, 32 * KIB, 512 * KIB),
    Cpu("cortex-a72", AARCH64, (), _A72, 32 * KIB, 256 * KIB),
    Cpu("cortex-a73", AARCH64, (), _A72, 32 * KIB, 512 * KIB),
    Cpu("cortex-a75", AARCH64, _ARM82, _A72, 64 * KIB, 256 * KIB),
    Cpu("cortex-a76", AARCH64, _ARM82, _A76, 64 * KIB, 512 * KIB, 2 * MIB),
    Cpu("cortex-a78", AARCH64, _ARM82, _A76, 64 * KIB, 256 * KIB, 2 * MIB),
    Cpu("cortex-a78ae", AARCH64, _ARM82, _A76, 64 * KIB, 256 * KIB, 2 * MIB),
    Cpu("cortex-x1", AARCH64, _ARM82, _V1, 64 * KIB, 1024 * KIB, 4 * MIB),
    Cpu("neoverse-n1", AARCH64, _ARM82, _A76, 64 * KIB, 1024 * KIB, 32 * MIB),
    # SVE is present on V1, V2 and N2, but kedge emits fixed 128-bit vectors: not requiring it costs nothing.
    Cpu("neoverse-v1", AARCH64, _ARM86, _V1, 64 * KIB, 1024 * KIB, 32 * MIB),
    Cpu("neoverse-n2", AARCH64, _ARM86, _N2, 64 * KIB, 1024 * KIB, 32 * MIB),
    Cpu("neoverse-v2", AARCH64, _ARM86, _V2_ARM, 64 * KIB, 2 * MIB, 32 * MIB),
    Cpu("generic", ARMV7),
    Cpu("cortex-a7", ARMV7, _V7, _SMALL, 32 * KIB, 128 * KIB),
    Cpu("cortex-a8", ARMV7, ("neon",), _A9, 32 * KIB, 256 * KIB),
    Cpu("cortex-a9", ARMV7, ("neon", "fp16"), _A9, 32 * KIB, 256 * KIB),
    Cpu("cortex-a15", ARMV7, _V7, _A72, 32 * KIB, 512 * KIB),
    Cpu("cortex-a53", ARMV7, _V8_32, _IN_ORDER, 32 * KIB, 128 * KIB),
    Cpu("cortex-a72", ARMV7, _V8_32, _A72, 32 * KIB, 256 * KIB),
    Cpu("generic-rv64", RISCV64),
    Cpu("sifive-u74", RISCV64, (), _SMALL, 32 * KIB, 512 * KIB),
    Cpu("spacemit-x60", RISCV64, ("v",), _IN_ORDER, 32 * KIB, 128 * KIB),
)

BOARDS: tuple[Board, ...] = (
    Board("raspberry-pi/2b", "cortex-a7", ARMV7, 4, "Raspberry Pi 2 Model B"),
    Board("raspberry-pi/3b", "cortex-a53", AARCH64, 4, "Raspberry Pi 3 Model B, 64-bit system"),
    Board("raspberry-pi/3b-32", "cortex-a53", ARMV7, 4, "Raspberry Pi 3 Model B, 32-bit system"),
    Board("raspberry-pi/4b", "cortex-a72", AARCH64, 4, "Raspberry Pi 4 Model B, 64-bit system"),
    Board("raspberry-pi/4b-32", "cortex-a72", ARMV7, 4, "Raspberry Pi 4 Model B, 32-bit system"),
    Board("raspberry-pi/5", "cortex-a76", AARCH64, 4, "Raspberry Pi 5"),
    Board("jetson/nano", "cortex-a57", AARCH64, 4, "NVIDIA Jetson Nano, its CPU"),
    Board("jetson/orin", "cortex-a78ae", AARCH64, 12, "NVIDIA Jetson AGX Orin, its CPU"),
    Board("jetson/orin-nano", "cortex-a78ae", AARCH64, 6, "NVIDIA Jetson Orin Nano, its CPU"),
    Board("beaglebone/black", "cortex-a8", ARMV7, 1, "BeagleBone Black"),
    Board("rock-pi/4", "cortex-a72", AARCH64, 2, "ROCK Pi 4, its two big cores"),
    Board("aws/graviton2", "neoverse-n1", AARCH64, 64, "AWS Graviton 2"),
    Board("aws/graviton3", "neoverse-v1", AARCH64, 64, "AWS Graviton 3"),
    Board("aws/graviton4", "neoverse-v2", AARCH64, 96, "AWS Graviton 4"),
    Board("visionfive/2", "sifive-u74", RISCV64, 4, "StarFive VisionFive 2"),
    Board("bananapi/f3", "spacemit-x60", RISCV64, 8, "Banana Pi BPI-F3"),
)


def best_cpu(name: str, arch: Arch, features: frozenset[str]) -> Cpu:
    """The CPU called `name`, or else the highest level of its architecture that promises nothing beyond `features`."""
    levels = [cpu for cpu in CPUS if cpu.arch is arch and cpu.name.startswith(arch.generic_cpu)]
    return find_cpu(name, arch) or max(
        (c for c in levels if features >= set(c.features)), key=lambda c: len(c.features)
    )


def find_cpu(name: str, arch: Arch) -> Cpu | None:
    """The CPU called `name` of that architecture."""
    return next((cpu for cpu in CPUS if cpu.name == name and cpu.arch is arch), None)
