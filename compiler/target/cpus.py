"""The processors that kedge knows by LLVM's names, and boards that carry them.

A CPU's feature list names only what changes the numeric code we emit, and only what every specimen has: each
feature becomes a requirement of the artifact. Cache sizes are per core; a shared L2 is divided by its sharers.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.target.arch import AARCH64, ARMV7, RISCV64, X86_64, Arch

KIB = 1024


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor core: LLVM's name, features beyond the architecture's baseline, bytes of data cache."""

    name: str
    arch: Arch
    features: tuple[str, ...] = ()
    l1_bytes: int = 32 * KIB
    l2_bytes: int = 256 * KIB


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
_ARM82 = ("dotprod", "fullfp16", "rdm")
_ARM86 = (*_ARM82, "fp16fml", "i8mm", "bf16")
_V7 = ("neon", "vfp4", "fp16", "hwdiv", "hwdiv-arm")
_V8_32 = (*_V7, "crc")

CPUS: tuple[Cpu, ...] = (
    Cpu("x86-64", X86_64),
    Cpu("x86-64-v2", X86_64, _V2),
    Cpu("x86-64-v3", X86_64, _V3),
    Cpu("x86-64-v4", X86_64, _V4, 32 * KIB, 1024 * KIB),
    Cpu("nehalem", X86_64, _V2),
    Cpu("sandybridge", X86_64, (*_V2, "avx")),
    Cpu("haswell", X86_64, _V3),
    Cpu("broadwell", X86_64, _V3),
    Cpu("skylake", X86_64, _V3),
    Cpu("alderlake", X86_64, (*_V3, "avxvnni"), 48 * KIB, 1280 * KIB),
    Cpu("skylake-avx512", X86_64, _V4, 32 * KIB, 1024 * KIB),
    Cpu("cascadelake", X86_64, (*_V4, "avx512vnni"), 32 * KIB, 1024 * KIB),
    Cpu("icelake-server", X86_64, (*_V4, "avx512vnni"), 48 * KIB, 1280 * KIB),
    Cpu("sapphirerapids", X86_64, (*_V4, "avx512vnni", "avx512bf16", "avxvnni"), 48 * KIB, 2048 * KIB),
    Cpu("znver2", X86_64, _V3, 32 * KIB, 512 * KIB),
    Cpu("znver3", X86_64, _V3, 32 * KIB, 512 * KIB),
    Cpu("znver4", X86_64, (*_V4, "avx512vnni", "avx512bf16"), 32 * KIB, 1024 * KIB),
    Cpu("znver5", X86_64, (*_V4, "avx512vnni", "avx512bf16", "avxvnni"), 48 * KIB, 1024 * KIB),
    Cpu("generic", AARCH64),
    Cpu("cortex-a35", AARCH64, (), 32 * KIB, 128 * KIB),
    Cpu("cortex-a53", AARCH64, (), 32 * KIB, 128 * KIB),
    Cpu("cortex-a55", AARCH64, _ARM82, 32 * KIB, 128 * KIB),
    Cpu("cortex-a57", AARCH64, (), 32 * KIB, 512 * KIB),
    Cpu("cortex-a72", AARCH64, (), 32 * KIB, 256 * KIB),
    Cpu("cortex-a73", AARCH64, (), 32 * KIB, 512 * KIB),
    Cpu("cortex-a75", AARCH64, _ARM82, 64 * KIB, 256 * KIB),
    Cpu("cortex-a76", AARCH64, _ARM82, 64 * KIB, 512 * KIB),
    Cpu("cortex-a78", AARCH64, _ARM82, 64 * KIB, 256 * KIB),
    Cpu("cortex-a78ae", AARCH64, _ARM82, 64 * KIB, 256 * KIB),
    Cpu("cortex-x1", AARCH64, _ARM82, 64 * KIB, 1024 * KIB),
    Cpu("neoverse-n1", AARCH64, _ARM82, 64 * KIB, 1024 * KIB),
    # SVE is present on V1, V2 and N2, but kedge emits fixed 128-bit vectors: not requiring it costs nothing.
    Cpu("neoverse-v1", AARCH64, _ARM86, 64 * KIB, 1024 * KIB),
    Cpu("neoverse-n2", AARCH64, _ARM86, 64 * KIB, 1024 * KIB),
    Cpu("neoverse-v2", AARCH64, _ARM86, 64 * KIB, 2048 * KIB),
    Cpu("generic", ARMV7),
    Cpu("cortex-a7", ARMV7, _V7, 32 * KIB, 128 * KIB),
    Cpu("cortex-a8", ARMV7, ("neon",), 32 * KIB, 256 * KIB),
    Cpu("cortex-a9", ARMV7, ("neon", "fp16"), 32 * KIB, 256 * KIB),
    Cpu("cortex-a15", ARMV7, _V7, 32 * KIB, 512 * KIB),
    Cpu("cortex-a53", ARMV7, _V8_32, 32 * KIB, 128 * KIB),
    Cpu("cortex-a72", ARMV7, _V8_32, 32 * KIB, 256 * KIB),
    Cpu("generic-rv64", RISCV64),
    Cpu("sifive-u74", RISCV64, (), 32 * KIB, 512 * KIB),
    Cpu("spacemit-x60", RISCV64, ("v",), 32 * KIB, 128 * KIB),
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


def find_cpu(name: str, arch: Arch) -> Cpu | None:
    """The CPU called `name` of that architecture."""
    return next((cpu for cpu in CPUS if cpu.name == name and cpu.arch is arch), None)
