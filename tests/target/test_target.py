"""Target strings: what they mean, that they read back, and how a wrong one is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import CompileWarning, TargetError
from kedge.compiler.target import ARCHS, Target, known_tags, parse, parse_cpu
from kedge.compiler.target.arch import closure
from kedge.compiler.target.cpus import BOARDS, CPUS, best_cpu, find_cpu
from kedge.compiler.target.model import Throughput
from kedge.rpc import convert
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.types import DeviceInfo, ReportedTarget


@pytest.mark.parametrize("tag", known_tags())
def test_a_target_reads_back_from_its_own_text(tag: str) -> None:
    target = parse(tag)
    assert parse(str(target)) == target
    assert parse(target) is target


@pytest.mark.parametrize(
    ("text", "arch", "cpu", "cores"),
    [
        ("raspberry-pi/3b", "aarch64", "cortex-a53", 4),
        ("raspberry-pi/4b", "aarch64", "cortex-a72", 4),
        ("raspberry-pi/5", "aarch64", "cortex-a76", 4),
        ("jetson/orin", "aarch64", "cortex-a78ae", 12),
        ("beaglebone/black", "armv7l", "cortex-a8", 1),
        ("aws/graviton2", "aarch64", "neoverse-n1", 64),
        ("aws/graviton3", "aarch64", "neoverse-v1", 64),
        ("raspberry-pi/4b -num-cores=2", "aarch64", "cortex-a72", 2),
        ("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72 -mattr=+dotprod -num-cores=4", "aarch64", "cortex-a72", 4),
        ("llvm -mtriple=armv7-linux-gnueabihf -mcpu=cortex-a53", "armv7l", "cortex-a53", 4),
        ("llvm -mcpu cortex-a53", "aarch64", "cortex-a53", 4),
        ("llvm -mtriple=riscv64-linux-gnu", "riscv64", "generic-rv64", 4),
    ],
)
def test_known_targets(text: str, arch: str, cpu: str, cores: int) -> None:
    target = parse(text)
    assert (target.arch.name, target.cpu, target.num_cores) == (arch, cpu, cores)


@pytest.mark.parametrize(
    ("text", "bits", "registers", "fma"),
    [
        ("x86-64", 128, 16, False),
        ("x86-64-v3", 256, 16, True),
        ("x86-64-v4", 512, 32, True),
        ("raspberry-pi/4b", 128, 32, True),
        ("beaglebone/black", 128, 16, False),
        ("raspberry-pi/2b", 128, 16, True),
        ("llvm -mtriple=riscv64-linux-gnu", 128, 8, True),
    ],
)
def test_what_schedule_rules_see(text: str, bits: int, registers: int, fma: bool) -> None:
    target = parse(text)
    assert (target.vector_bits, target.vector_registers, target.fma) == (bits, registers, fma)


@pytest.mark.parametrize(
    ("text", "by_element", "in_memory"),
    [
        ("x86-64-v3", False, True),
        ("raspberry-pi/4b", True, False),
        ("beaglebone/black", True, False),
        ("bananapi/f3", False, False),
    ],
)
def test_where_operands_of_multiply_adds_come_from(text: str, by_element: bool, in_memory: bool) -> None:
    target = parse(text)
    assert (target.fma_by_element, target.memory_operands) == (by_element, in_memory)


@pytest.mark.parametrize(
    ("text", "fma", "latency", "loads", "stores"),
    [
        ("llvm -mcpu=znver4", 1, 4, 1, 0.5),  # two units of 256 bits, whatever the vectors are
        ("llvm -mcpu=znver4 -mattr=-avx512f", 2, 4, 2, 1),
        ("llvm -mcpu=skylake-avx512", 2, 4, 2, 1),
        ("llvm -mcpu=emeraldrapids", 2, 4, 2, 1),
        ("llvm -mcpu=graniterapids", 2, 4, 2, 1),
        ("llvm -mcpu=graniterapids-d", 2, 4, 2, 1),
        ("llvm -mcpu=arrowlake-s", 2, 4, 3, 2),
        ("llvm -mcpu=cooperlake", 2, 4, 2, 1),
        ("llvm -mcpu=tigerlake", 1, 4, 2, 1),
        ("llvm -mcpu=haswell", 2, 5, 2, 1),
        ("llvm -mcpu=haswell -mattr=-fma", 1, 5, 2, 1),  # a multiplication and an addition in the same units
        ("raspberry-pi/4b", 1, 4, 1, 0.5),
        ("raspberry-pi/5", 2, 4, 2, 1),
        ("raspberry-pi/3b", 1, 8, 1, 1),
        ("llvm -mtriple=armv7-linux-gnueabihf -mcpu=cortex-a9", 0.5, 8, 0.5, 0.5),
        ("aws/graviton2 -fma=1.5 -fma-latency=7 -loads=1 -stores=0.25", 1.5, 7, 1, 0.25),
    ],
)
def test_what_bounds_an_inner_loop(text: str, fma: float, latency: int, loads: float, stores: float) -> None:
    target = parse_cpu(text)
    assert (target.fma_per_cycle, target.fma_latency) == (fma, latency)
    assert (target.loads_per_cycle, target.stores_per_cycle) == (loads, stores)


def test_a_text_says_only_what_the_cpus_table_does_not() -> None:
    assert "-l2=1048576" in str(parse("aws/graviton2"))
    assert not re.search(r"-(l3|fma|loads|stores)", str(parse("aws/graviton2")))
    assert str(parse("aws/graviton2 -l3=0 -fma=0.5")).endswith("-l3=0 -fma=0.5")


def test_each_core_has_a_part_of_the_third_level() -> None:
    assert parse_cpu("aws/graviton2").l3_share_bytes == 512 * 1024
    assert parse_cpu("raspberry-pi/4b").l3_share_bytes == 0


def test_an_unknown_cpu_is_the_highest_level_that_it_can_be() -> None:
    level = parse_cpu("x86-64-v3")
    assert best_cpu("gargantua", level.arch, frozenset(level.features)).name == "x86-64-v3"
    assert best_cpu("gargantua", level.arch, frozenset(level.features) - {"bmi2"}).name == "x86-64-v2"
    assert best_cpu("gargantua", level.arch, frozenset()).name == "x86-64"
    assert best_cpu("haswell", level.arch, frozenset()).name == "haswell"


NEW_X86 = "llvm -mtriple=x86_64-linux-gnu -mcpu=gargantuarapids -mattr=+avx512fp16,+avx99 -num-cores=3 -l2=4096"
NEW_ARM = "llvm -mtriple=aarch64-linux-gnu -mcpu=gargantua-x9 -num-cores=2"


@pytest.mark.parametrize(
    ("text", "like", "without"),
    [
        (NEW_X86, "x86-64-v4 -mattr=+avx512vnni,+avx512fp16", ""),
        (NEW_X86, "x86-64-v3", "avx512f"),
        (NEW_X86, "x86-64-v2 -mattr=+avx", "avx2"),
        (NEW_ARM, "llvm -mtriple=aarch64-linux-gnu -mattr=+dotprod,+fullfp16,+i8mm", ""),
    ],
)
def test_a_device_whose_cpu_only_its_agent_knows_is_what_its_features_allow(text: str, like: str, without: str) -> None:
    plain = parse_cpu(like)
    told = text if "avx512fp16" in plain.features else text.replace("+avx512fp16,", "")
    device = DeviceInfo(
        "new",
        plain.arch.name,
        target=told,
        cpu_features=(*plain.features, "avx99"),
        accelerators=(Accelerator("opencl", 0, "GPU", max_threads=256, shared_bytes=32768),) if not without else (),
    )
    received = convert.device_info_from_pb(convert.device_info_to_pb(device))
    with pytest.warns(CompileWarning, match=f"CPU '{told.split('-mcpu=')[1].split()[0]}' is not known"):
        target = parse_cpu(received.target)
    assert (target.arch, target.cpu, set(target.features)) == (plain.arch, plain.cpu, set(plain.features))
    assert target.num_cores == int(told.split("-num-cores=")[1].split()[0])
    with pytest.raises(TargetError, match="unknown CPU 'gargantua"):
        parse(str(told))
    for one in received.targets[:-1]:
        with pytest.warns(CompileWarning, match="is not known"):
            assert str(parse(one)).startswith("opencl")


def test_a_feature_that_only_a_devices_agent_knows_is_left_out() -> None:
    text = "llvm -mtriple=x86_64-linux-gnu -mcpu=haswell -mattr=+avx99"
    with pytest.warns(CompileWarning, match=r"CPU has avx99, which this kedge does not know") as warned:
        target = parse_cpu(ReportedTarget(text, ("avx2", "avx99")))
    assert target == parse_cpu("llvm -mtriple=x86_64-linux-gnu -mcpu=haswell") and len(warned) == 1
    with pytest.raises(TargetError, match="unknown feature 'avx99'"):
        parse(text)


def test_features_imply_others_and_go_with_what_they_need() -> None:
    assert {"avx2", "avx", "sse3", "avx512f"} <= set(parse("x86-64 -mattr=+avx512vl").required_features)
    without = parse("x86-64-v4 -mattr=-avx2").required_features
    assert not {f for f in without if f.startswith("avx512")} and "avx" in without


def test_native_lists_exactly_what_this_machine_has() -> None:
    from kedge.compiler.codegen.machine import host_cpu

    target = parse("native")
    assert set(target.features) <= set(host_cpu()[1])
    assert set(target.features) == set(host_cpu()[1]) & set(target.arch.known_features)
    assert target.num_cores >= 1 and target.l1_bytes >= 4096


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("raspbery-pi/4", "unknown target", "raspberry-pi/4b"),
        ("llvm -mcpu=cortex-a7x", "unknown CPU", "cortex-a7"),
        ("llvm -mtriple=riscv64-linux-gnu -mcpu=cortex-a72", "of riscv64", "generic-rv64"),
        ("x86-64-v3 -mattr=+avx512ff", "unknown feature", "avx512f"),
        ("x86-64-v3 -mattr=avx2", "needs a sign", "+avx2"),
        ("x86-64 -mattr=-sse2", "cannot be switched off", ""),
        ("llvm -mtripl=x", "unknown option", "-mtriple"),
        ("llvm -mtriple=aarch64-apple-darwin", "Linux only", "aarch64-linux-gnu"),
        ("llvm -mtriple=aarch64-unknown-linux-musl", "for glibc, not 'musl'", "aarch64-unknown-linux-gnu"),
        ("llvm -mtriple=aarch64-linux-android", "for glibc, not 'android'", "aarch64-unknown-linux-gnu"),
        ("llvm -mtriple=arm-linux-gnueabi", "for glibc, not 'gnueabi'", "armv7-unknown-linux-gnueabihf"),
        ("llvm -mtriple=x86_64-linux-gnux32", "for glibc, not 'gnux32'", "x86_64-unknown-linux-gnu"),
        ("llvm -mtriple=arch64-linux-gnu", "unknown architecture", "aarch64-linux-gnu"),
        ("x86-64 -num-cores=0", "at least 1", ""),
        ("x86-64 -num-cores=many", "not a number", ""),
        ("x86-64 -num-cores", "needs a value", ""),
        ("raspberry-pi/4b -mtriple=x86_64-linux-gnu", "contradicts", ""),
        ("cortex-a72", "not a target by itself", "llvm -mcpu=cortex-a72"),
        ("llvm", "which architecture", "-mtriple"),
        ("", "empty target", "native"),
        ("llvm -mcpu='x", "quot", ""),
        ("x86-64 -fma=fast", "not a number", ""),
        ("x86-64 -loads=0", "above 0", ""),
        ("x86-64 -stores=inf", "at most 64", ""),
        ("x86-64 -fma=nan", "above 0", ""),
        ("x86-64 -l3=-1", "at least 1", ""),
    ],
)
def test_a_wrong_target_is_refused_with_a_remedy(text: str, message: str, hint: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_tables_are_consistent() -> None:
    for board in BOARDS:
        assert find_cpu(board.cpu, board.arch) is not None, board.tag
    for cpu in CPUS:
        assert set(cpu.features) <= set(cpu.arch.known_features), cpu.name
        assert closure(cpu.arch, frozenset(cpu.features)) == frozenset(cpu.features), cpu.name


def test_every_feature_that_can_be_required_is_one_that_agents_report() -> None:
    from kedge.device_agent.runtime import SOURCE_DIR

    reported = set(re.findall(r'\{"([^"]+)"', (SOURCE_DIR / "cpu.c").read_text()))
    for arch in ARCHS:
        assert set(arch.known_features) <= reported, arch.name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mix_of_features_reads_back(data: st.DataObject) -> None:
    arch = data.draw(st.sampled_from(ARCHS))
    features = data.draw(st.sets(st.sampled_from(arch.known_features)))
    rate = st.floats(0, 64, exclude_min=True)
    target = Target(
        arch,
        data.draw(st.sampled_from([cpu.name for cpu in CPUS if cpu.arch is arch])),
        tuple(sorted(closure(arch, frozenset(features)))),
        3,
        4096,
        65536,
        data.draw(st.sampled_from([0, 1 << 20, 32 << 20])),
        Throughput(data.draw(rate), data.draw(st.integers(1, 99)), data.draw(rate), data.draw(rate)),
    )
    assert parse(str(target)) == target
