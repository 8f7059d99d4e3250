"""The facts of each architecture's ABI, in one place: triples, linker and C compiler names, baseline, ELF machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Arch:
    """One instruction set with its Linux ABI.

    `name` is what `uname -m` prints there. `baseline` are the features that every machine of the ABI has: code may
    use them without asking. `known_features` are LLVM's names of those that kedge can require; `kedge_cpu_features`
    of the runtime reports the same names.
    """

    name: str
    triple: str
    aliases: tuple[str, ...]
    zig_target: str
    zig_cpu: str
    generic_cpu: str
    elf_machine: int
    lld_emulation: str
    data_layout: str
    pointer_bits: int
    float_abi: str
    abi_name: str
    baseline: tuple[str, ...]
    known_features: tuple[str, ...]
    implied: Mapping[str, tuple[str, ...]] = field(hash=False)


X86_64 = Arch(
    name="x86_64",
    triple="x86_64-unknown-linux-gnu",
    aliases=("x86_64", "amd64", "x86-64"),
    zig_target="x86_64-linux-gnu.2.17",
    zig_cpu="x86_64",
    generic_cpu="x86-64",
    elf_machine=62,
    lld_emulation="elf_x86_64",
    data_layout="e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128",
    pointer_bits=64,
    float_abi="sse",
    abi_name="",
    baseline=("sse", "sse2"),
    known_features=(
        "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "avx", "f16c", "fma", "avx2", "bmi", "bmi2", "lzcnt", "movbe",
        "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16",
        "avxvnni", "amx-tile", "amx-int8", "amx-bf16",
    ),
    implied=MappingProxyType(
        {
            "ssse3": ("sse3",), "sse4.1": ("ssse3",), "sse4.2": ("sse4.1",), "avx": ("sse4.2",), "f16c": ("avx",),
            "fma": ("avx",), "avx2": ("avx",), "avx512f": ("avx2", "f16c", "fma"), "avx512bw": ("avx512f",),
            "avx512cd": ("avx512f",), "avx512dq": ("avx512f",), "avx512vl": ("avx512f",), "avx512vnni": ("avx512f",),
            "avx512bf16": ("avx512bw",), "avx512fp16": ("avx512bw", "avx512vl"), "avxvnni": ("avx2",),
            "amx-int8": ("amx-tile",), "amx-bf16": ("amx-tile",),
        }
    ),
)  # fmt: skip

AARCH64 = Arch(
    name="aarch64",
    triple="aarch64-unknown-linux-gnu",
    aliases=("aarch64", "arm64"),
    zig_target="aarch64-linux-gnu.2.17",
    zig_cpu="generic",
    generic_cpu="generic",
    elf_machine=183,
    lld_emulation="aarch64linux",
    data_layout="e-m:e-p270:32:32-p271:32:32-p272:64:64-i8:8:32-i16:16:32-i64:64-i128:128-n32:64-S128-Fn32",
    pointer_bits=64,
    float_abi="hard",
    abi_name="",
    baseline=("fp-armv8", "neon"),
    known_features=("crc", "lse", "rdm", "fullfp16", "fp16fml", "dotprod", "i8mm", "bf16", "sve", "sve2"),
    implied=MappingProxyType({"fp16fml": ("fullfp16",), "sve": ("fullfp16",), "sve2": ("sve",)}),
)

ARMV7 = Arch(
    name="armv7l",
    triple="armv7-unknown-linux-gnueabihf",
    aliases=("armv7", "armv7l", "armv7a", "armhf", "arm"),
    zig_target="arm-linux-gnueabihf.2.17",
    zig_cpu="generic+v7a+vfp3d16-neon",
    generic_cpu="generic",
    elf_machine=40,
    lld_emulation="armelf_linux_eabi",
    data_layout="e-m:e-p:32:32-Fi8-i64:64-v128:64:128-a:0:32-n32-S64",
    pointer_bits=32,
    float_abi="hard",
    abi_name="",
    baseline=("vfp3d16", "thumb2"),
    # Linux reports no feature for the rounding instructions of ARMv8 in 32-bit state, so none can be required.
    known_features=("neon", "fp16", "vfp4", "hwdiv", "hwdiv-arm", "crc", "dotprod"),
    implied=MappingProxyType({"vfp4": ("fp16",), "dotprod": ("neon",)}),
)

RISCV64 = Arch(
    name="riscv64",
    triple="riscv64-unknown-linux-gnu",
    aliases=("riscv64", "rv64gc", "riscv64gc"),
    zig_target="riscv64-linux-gnu.2.27",
    zig_cpu="baseline_rv64",
    generic_cpu="generic-rv64",
    elf_machine=243,
    lld_emulation="elf64lriscv",
    data_layout="e-m:e-p:64:64-i64:64-i128:128-n32:64-S128",
    pointer_bits=64,
    float_abi="hard",
    abi_name="lp64d",
    baseline=("m", "a", "f", "d", "c"),
    # The auxiliary vector names single-letter extensions only; what an agent cannot report, code must not require.
    known_features=("v",),
    implied=MappingProxyType({}),
)

ARCHS: tuple[Arch, ...] = (X86_64, AARCH64, ARMV7, RISCV64)


def closure(arch: Arch, features: frozenset[str]) -> frozenset[str]:
    """`features` together with everything they imply."""
    done: set[str] = set()
    todo = list(features)
    while todo:
        feature = todo.pop()
        if feature not in done:
            done.add(feature)
            todo.extend(arch.implied.get(feature, ()))
    return frozenset(done)


def dependents(arch: Arch, feature: str) -> frozenset[str]:
    """Every known feature that needs `feature`, itself included: what goes when it is switched off."""
    return frozenset(f for f in arch.known_features if feature in closure(arch, frozenset((f,))))
