"""The runtime's CPU features against LLVM's own detection, and builds for every architecture."""

from __future__ import annotations

import platform
import shutil
import subprocess

import llvmlite.binding as llvm
import pytest

from kedge.compiler.target import ARCHS, parse
from kedge.compiler.toolchain import RuntimeFiles
from kedge.rpc import abi
from support import native

#: What LLVM takes from the model's name or other sources than the CPU's own flags.
NOT_FLAGS = {"x86_64": {"sgx", "ptwrite", "invpcid", "cldemote", "hreset", "uintr", "widekl", "kl", "lwp", "prefetchi"}}
#: A program's CPUs under qemu-user, and what LLVM says that they have.
EMULATED = {
    "aarch64": (
        "aarch64-linux-musl",
        {"cortex-a53": {"neon", "crc", "aes"}, "neoverse-n1": {"dotprod", "lse", "fullfp16"}},
    ),
    "arm": ("arm-linux-musleabihf", {"cortex-a7": {"neon", "vfp4", "hwdiv", "d32"}}),
    "riscv64": ("riscv64-linux-musl", {"rv64": {"m", "a", "f", "d", "c"}}),
}


def test_features_are_what_llvm_finds(runtime: RuntimeFiles) -> None:
    ours = abi.load_runtime(str(runtime.lib)).kedge_cpu_features().decode().split(",")
    theirs = {name for name, present in llvm.get_host_cpu_features().items() if present}
    assert ours == sorted(set(ours))
    assert set(ours) - theirs == set()
    assert theirs - set(ours) - NOT_FLAGS.get(platform.machine(), set()) == set()


def test_every_feature_that_native_may_require_is_reported(runtime: RuntimeFiles) -> None:
    """A feature that the compiler uses and the runtime does not know would refuse every artifact made here."""
    ours = set(abi.load_runtime(str(runtime.lib)).kedge_cpu_features().decode().split(","))
    assert set(parse("native").features) <= ours


@pytest.mark.slow
@pytest.mark.parametrize("arch", EMULATED)
def test_another_architecture_under_emulation(arch: str) -> None:
    """The whole runtime, linked statically: the pool's stress test and the timing semantics."""
    qemu = shutil.which(f"qemu-{arch}-static")
    if qemu is None:
        pytest.skip(f"qemu-{arch}-static is not installed")
    triple, _ = EMULATED[arch]
    programs = native.MODULES.parent / "programs"
    zig = (native.ZIG, "cc", "-fno-sanitize=all", "-static", "-target", triple)
    stress = native.compile_c([programs / "pool_stress.c", *native.library_sources()], compiler=zig)
    assert subprocess.run([qemu, stress, "2", "3", "50"], capture_output=True, text=True, check=True).stdout == "ok\n"


@pytest.mark.slow
@pytest.mark.parametrize("arch", EMULATED)
def test_features_under_emulation(arch: str) -> None:
    qemu = shutil.which(f"qemu-{arch}-static")
    if qemu is None:
        pytest.skip(f"qemu-{arch}-static is not installed")
    triple, cpus = EMULATED[arch]
    zig = (native.ZIG, "cc", "-fno-sanitize=all", "-static", "-target", triple)
    source = native.MODULES.parent / "programs" / "print_features.c"
    program = native.compile_c([source, *native.library_sources()], compiler=zig)
    for cpu, expected in cpus.items():
        found = subprocess.run([qemu, "-cpu", cpu, program], capture_output=True, text=True, check=True).stdout
        assert expected <= set(found.strip().split(",")), cpu


def test_all_architectures_are_known() -> None:
    assert {arch.name for arch in ARCHS} == {"x86_64", "aarch64", "armv7l", "riscv64"}
