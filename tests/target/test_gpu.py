"""GPU target strings: what they mean, whose host they have, and how a wrong one is refused."""

from __future__ import annotations

import dataclasses

import pytest

from kedge.compiler.errors import TargetError
from kedge.compiler.target import GpuTarget, Target, parse, parse_cpu
from kedge.compiler.target.gpu import CUDA_ARCHS, GPU_BOARDS, KIB, generation_of
from kedge.rpc.accelerator import Accelerator


def gpu(text: str) -> GpuTarget:
    target = parse(text)
    assert isinstance(target, GpuTarget)
    return target


@pytest.mark.parametrize(
    ("text", "kind", "arch_name", "max_threads", "shared_bytes", "warp"),
    [
        ("opencl", "opencl", "", 256, 32 * KIB, 1),
        ("opencl -max-threads=64 -shared=16384 -warp=16", "opencl", "", 64, 16 * KIB, 16),
        ("cuda", "cuda", "sm_75", 1024, 48 * KIB, 32),
        ("cuda -arch=sm_90 --shared 232448", "cuda", "sm_90", 1024, 227 * KIB, 32),
        ("nvidia/h200", "cuda", "sm_90", 1024, 48 * KIB, 32),
        ("nvidia/h200 -arch=sm_90a -shared=232448", "cuda", "sm_90a", 1024, 227 * KIB, 32),
        ("nvidia/a100 -max-threads=512", "cuda", "sm_80", 512, 48 * KIB, 32),
        ("nvidia/h100 -arch=sm_80", "cuda", "sm_80", 1024, 48 * KIB, 32),
        ("nvidia/jetson-agx-orin", "cuda", "sm_87", 1024, 48 * KIB, 32),
    ],
)
def test_known_gpus(text: str, kind: str, arch_name: str, max_threads: int, shared_bytes: int, warp: int) -> None:
    target = gpu(text)
    found = (target.kind, target.arch_name, target.max_threads, target.shared_bytes, target.warp)
    assert found == (kind, arch_name, max_threads, shared_bytes, warp)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("cuda", "native"),
        ("opencl", "native"),
        ("nvidia/h200", "native"),
        ("cuda -host=raspberry-pi/4b", "raspberry-pi/4b"),
        ('cuda -arch=sm_87 -host="llvm -mtriple=aarch64-linux-gnu"', "llvm -mtriple=aarch64-linux-gnu"),
        ("cuda -host=\"llvm -mcpu='cortex-a72' -num-cores=2\"", "llvm -mcpu=cortex-a72 -num-cores=2"),
        (
            'opencl -host="llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72 -mattr=+dotprod,-crc"',
            "llvm -mcpu=cortex-a72 -mattr=+dotprod",
        ),
        ("nvidia/jetson-agx-orin", "jetson/orin"),
        ("nvidia/jetson-agx-orin -host=jetson/orin-nano", "jetson/orin-nano"),
    ],
)
def test_a_gpu_has_a_host(text: str, host: str) -> None:
    target = gpu(text)
    assert target.host == parse_cpu(host)
    assert target.required_features == target.host.required_features
    assert parse(str(target)) == target and hash(parse(str(target))) == hash(target)


def test_a_cpu_is_its_own_host() -> None:
    target = parse("raspberry-pi/4b")
    assert target.host is target and target.label == "aarch64"
    assert gpu("nvidia/h200").label == "cuda-sm_90" and gpu("opencl").label == "opencl"


def test_a_gpu_answers_no_question_about_a_cpu() -> None:
    asked = {field.name for field in dataclasses.fields(Target)} | {"vector_bits", "vector_registers", "fma", "triple"}
    assert {name for name in asked if hasattr(gpu("cuda"), name)} == set()
    with pytest.raises(TargetError, match="is a GPU"):
        parse_cpu("nvidia/h200")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("cuda -arch=87", "unknown CUDA architecture", "sm_87"),
        ("cuda -arch=sm_91", "unknown CUDA architecture", "sm_90"),
        ("cuda -arch=sm_80a", "unknown CUDA architecture", "sm_80"),
        ("cuda -arch", "needs a value", "-arch=VALUE"),
        ("cuda sm_90", "unexpected 'sm_90'", "-arch=VALUE"),
        ("cuda -mcpu=cortex-a72", "unknown option -mcpu", '-host="llvm -mcpu=VALUE"'),
        ("cuda -warp=64", "unknown option -warp", ""),
        ("opencl -arch=sm_80", "unknown option -arch", ""),
        ("cuda -max-threads=2048", "at most 1024", ""),
        ("cuda -shared=99999", "on sm_75 has at most 65536", ""),
        ("opencl -shared=none", "not a number", ""),
        ("opencl -max-threads=0", "at least 1", ""),
        ("opencl -max-threads=2147483648", "at most 2147483647", ""),
        ("nvidia/a100 -arch=sm_90", "contradicts the target, which is sm_80", ""),
        ("nvidia/h20", "unknown target", "nvidia/h200"),
        ("opncl", "unknown target", "opencl"),
        ('cuda -host="opencl"', "the host of a GPU is a CPU", "native"),
        ("cuda -host=llvm", "which architecture", "-mtriple"),
        ('cuda -host=""', "empty target", "native"),
        ('cuda -host="llvm -mcpu=cortex-a7x"', "unknown CPU", "cortex-a7"),
        ("rocm -mcpu=gfx90a", "not built yet", "opencl"),
        ("c", "not built yet", "llvm"),
    ],
)
def test_a_wrong_gpu_is_refused_with_a_remedy(text: str, message: str, hint: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_what_a_gpu_says_of_itself_is_a_target() -> None:
    t4 = Accelerator("cuda", 0, "T4", "580", "sm_75", max_threads=1024, shared_bytes=48 * KIB)
    assert parse(t4.target("native")) == parse("cuda -arch=sm_75")
    small = Accelerator("opencl", 0, "VideoCore", "1", "OpenCL C 1.2", max_threads=12, shared_bytes=16 * KIB)
    target = gpu(small.target("raspberry-pi/3b"))
    assert (target.max_threads, target.shared_bytes, target.host) == (12, 16 * KIB, parse("raspberry-pi/3b"))


def test_every_generation_is_one_that_the_back_end_emits() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    nvptx = llvm.Target.from_triple("nvptx64-nvidia-cuda")
    own = [f"{arch_name}a" for arch_name in CUDA_ARCHS if generation_of(f"{arch_name}a") == arch_name]
    assert own[0] == "sm_90a"
    for arch_name in (*CUDA_ARCHS, *own):
        text = nvptx.create_target_machine(cpu=arch_name).emit_assembly(llvm.parse_assembly(""))
        assert f".target {arch_name}" in text
    assert {board.arch_name for board in GPU_BOARDS if board.kind == "cuda"} <= set(CUDA_ARCHS)
