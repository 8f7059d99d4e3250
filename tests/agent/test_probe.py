"""The probe against boards shown to it as files, and against the compiler's own idea of targets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.codegen.machine import host_cpu
from kedge.compiler.target.arch import ARCHS, Arch, closure
from kedge.compiler.target.cpus import CPUS
from kedge.compiler.target.parse import parse, parse_cpu
from kedge.device_agent.agent import _find_gpus
from kedge.device_agent.cage import Cage, choose_user
from kedge.device_agent.cpus import ARM_PARTS, INTEL_MODELS, OPTIONAL, RELATIVES, TUNED, amd_cpu
from kedge.device_agent.health import Fitness, examine, read_health
from kedge.device_agent.probe import baseline_target, cpu_of, emulation_reason, probe, target_string, userland_arch
from kedge.device_agent.runner import Runner
from kedge.device_agent.runner_errors import RunnerTimeout
from kedge.rpc.abi import ABI_VERSION
from kedge.rpc.artifact import Found
from kedge.rpc.types import Health
from support.doubling import opencl_device

PI4_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""

Board = Callable[[dict[str, str]], Path]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    def build(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def test_a_raspberry_pi_4(board: Board) -> None:
    root = board(
        {
            "proc/cpuinfo": PI4_CPUINFO,
            "proc/meminfo": "MemTotal:        3884336 kB\nMemAvailable:    3500000 kB\n",
            "proc/sys/kernel/arch": "aarch64\n",
            "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
            "proc/device-tree/compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0",
            "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n',
        }
    )
    device = probe("pi", ["crc", "neon", "fp-armv8"], labels={"room": "lab"}, root=root, machine="aarch64")
    cores = len(os.sched_getaffinity(0))
    assert device.cpu_name == "cortex-a72"
    assert device.target == f"llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72 -mattr=+crc -num-cores={cores}"
    assert device.memory_bytes == 3884336 * 1024
    assert device.os_release == "Debian GNU/Linux 12 (bookworm)"
    assert not device.emulated
    assert device.labels == {
        "arch": "aarch64",
        "emulated": "false",
        "mem_mb": "3793",
        "os": "debian-12",
        "model": "Raspberry-Pi-4-Model-B-Rev-1.4",
        "soc": "bcm2711",
        "room": "lab",
    }
    assert (device.name, device.abi_version) == ("pi", ABI_VERSION)


def test_this_machine_is_described_for_the_compiler() -> None:
    device = probe("here", [])
    target = parse(device.target)
    assert target.arch.name == device.arch == os.uname().machine
    assert target.num_cores == device.num_cores == len(os.sched_getaffinity(0))
    assert not device.emulated
    assert device.memory_bytes > 1 << 28


def test_an_agent_and_the_compiler_describe_this_machine_alike() -> None:
    here = parse_cpu("native")
    told = parse_cpu(probe("here", host_cpu()[1]).target)
    assert (told.l1_bytes, told.l2_bytes, told.l3_bytes) == (here.l1_bytes, here.l2_bytes, here.l3_bytes)
    assert (told.features, told.num_cores) == (here.features, here.num_cores)
    assert told == here or cpu_of(here.arch.name, Path("/proc/cpuinfo").read_text()) not in TUNED[here.arch.name]


def test_caches_go_with_the_target(board: Board) -> None:
    last = max(os.sched_getaffinity(0))
    entries = {
        "index0": ("1", "Data", "32K", str(last)),
        "index1": ("1", "Instruction", "48K", str(last)),
        "index2": ("2", "Unified", "1M", "0-3"),
    }
    names = ("level", "type", "size", "shared_cpu_list")
    root = board(
        {"proc/cpuinfo": PI4_CPUINFO, "proc/sys/kernel/arch": "aarch64\n"}
        | {
            f"sys/devices/system/cpu/cpu{last}/cache/{index}/{name}": f"{value}\n"
            for index, values in entries.items()
            for name, value in zip(names, values, strict=True)
        }
    )
    told = probe("pi", [], root=root, machine="aarch64").target
    assert told.endswith("-l1=32768 -l2=262144 -l3=0")
    assert parse_cpu(told).l2_bytes == parse_cpu("raspberry-pi/4b").l2_bytes


def test_big_cores_count() -> None:
    big_little = PI4_CPUINFO.replace("0xd08", "0xd03") + PI4_CPUINFO + PI4_CPUINFO
    assert cpu_of("aarch64", big_little) == "cortex-a72"
    assert cpu_of("aarch64", "CPU implementer\t: 0x99\nCPU part\t: 0x001\n") == ""


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 17, "znver4"),
        ("AuthenticAMD", 25, 33, "znver3"),
        ("AuthenticAMD", 23, 1, ""),
        ("GenuineIntel", 6, 143, "sapphirerapids"),
        ("GenuineIntel", 6, 207, "emeraldrapids"),
        ("GenuineIntel", 6, 173, "graniterapids"),
        ("GenuineIntel", 6, 174, "graniterapids-d"),
        ("GenuineIntel", 6, 181, "arrowlake"),
        ("GenuineIntel", 6, 197, "arrowlake"),
        ("GenuineIntel", 6, 198, "arrowlake-s"),
        ("GenuineIntel", 6, 189, "lunarlake"),
        ("GenuineIntel", 6, 140, "tigerlake"),
        ("GenuineIntel", 15, 143, ""),
        ("CentaurHauls", 6, 143, ""),
    ],
)
def test_x86_models(vendor: str, family: int, model: int, name: str) -> None:
    one = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n\n"
    assert cpu_of("x86_64", one + one.replace("model\t", "model name\t")) == name


@pytest.mark.parametrize(
    ("machine", "bits", "arch"),
    [
        ("aarch64", 64, "aarch64"),
        ("aarch64", 32, "armv7l"),
        ("armv8l", 32, "armv7l"),
        ("armv7l", 32, "armv7l"),
        ("x86_64", 64, "x86_64"),
        ("riscv64", 64, "riscv64"),
    ],
)
def test_the_user_land_decides_the_architecture(machine: str, bits: int, arch: str) -> None:
    assert userland_arch(machine, bits) == arch


def test_emulation_is_seen_by_the_kernels_architecture(board: Board) -> None:
    root = board({"proc/sys/kernel/arch": "x86_64\n", "proc/cpuinfo": PI4_CPUINFO})
    assert emulation_reason("aarch64", root) == "the kernel is a x86_64 one"
    device = probe("pi", ["neon", "sve", "dotprod"], root=root, machine="aarch64")
    assert device.emulated
    assert device.labels["emulated"] == "true"
    assert device.target == f"llvm -mtriple=aarch64-linux-gnu -mcpu=generic -num-cores={device.num_cores}"


def test_a_32_bit_user_land_on_a_64_bit_kernel_is_no_emulation(board: Board) -> None:
    assert emulation_reason("armv7l", board({"proc/sys/kernel/arch": "aarch64", "proc/cpuinfo": PI4_CPUINFO})) is None


def test_emulation_is_seen_by_the_program_or_by_the_cpu(board: Board) -> None:
    root = board({"proc/cpuinfo": "vendor_id\t: AuthenticAMD\n"})
    assert emulation_reason("aarch64", root) == "/proc/cpuinfo describes a CPU of the x86 family"
    (root / "proc/thread-self").mkdir()
    (root / "proc/thread-self/exe").symlink_to("/usr/bin/qemu-aarch64-static")
    assert emulation_reason("aarch64", root) == "/usr/bin/qemu-aarch64-static executes this process"


def test_what_every_target_promises_the_device_has() -> None:
    for arch in ARCHS:
        assert set(OPTIONAL[arch.name]) == set(arch.known_features)
        for cpu in CPUS:
            if cpu.arch is arch and cpu.name in TUNED[arch.name]:
                assert TUNED[arch.name][cpu.name] == set(cpu.features), cpu
    tuned = {name for table in TUNED.values() for name in table}
    assert set(RELATIVES.values()) <= tuned
    named = set(ARM_PARTS.values()) | set(INTEL_MODELS.values())
    assert named <= tuned | set(RELATIVES)
    assert {amd_cpu(0x17, 0x71), amd_cpu(0x19, 0x21), amd_cpu(0x19, 0x61), amd_cpu(0x1A, 2)} <= tuned


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ARCHS), st.data())
def test_a_target_uses_exactly_what_is_there(arch: Arch, data: st.DataObject) -> None:
    chosen = frozenset(data.draw(st.sets(st.sampled_from(OPTIONAL[arch.name])), label="features"))
    present = frozenset(f for f in chosen if closure(arch, frozenset((f,))) <= chosen)
    cpu = data.draw(st.sampled_from(["", *TUNED[arch.name], *RELATIVES]), label="cpu")
    target = parse(target_string(arch.name, cpu, present, 3))
    assert target.arch is arch
    assert target.num_cores == 3
    assert set(target.features) == present
    assert set(parse(baseline_target(arch.name, present, 3)).features) == present & {"neon"} - set(arch.baseline)


def test_health_reads_what_is_there_and_nothing_else(board: Board) -> None:
    core = min(os.sched_getaffinity(0))
    root = board(
        {
            "proc/loadavg": "0.42 0.10 0.05 1/100 4242\n",
            "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 600 kB\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/class/thermal/thermal_zone1/temp": "51000\n",
            "sys/class/thermal/thermal_zone2/temp": "-274000\n",
            f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": "1500000\n",
            f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor": "ondemand\n",
        }
    )
    health = read_health(root, root=root)
    assert (health.load_1min, health.temperature_celsius, health.frequency_mhz) == (0.42, 51.0, 1500.0)
    assert (health.governor, health.memory_available_bytes) == ("ondemand", 600 * 1024)
    assert health.disk_free_bytes is not None


@pytest.mark.parametrize(
    ("files", "throttled"),
    [
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "0x50005\n"}, ("throttling", "under-voltage")),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "0x50000\n"}, ()),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "nonsense\n"}, ()),
        (
            {
                "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
                "sys/class/thermal/cooling_device0/cur_state": "2\n",
            },
            ("heat",),
        ),
        (
            {
                "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
                "sys/class/thermal/cooling_device0/cur_state": "3\n",
            },
            (),
        ),
    ],
)
def test_what_slows_a_device_down_now(board: Board, files: dict[str, str], throttled: tuple[str, ...]) -> None:
    root = board(files)
    assert read_health(root, root=root).throttled == throttled


@pytest.mark.parametrize(
    ("governor", "driver", "throttled"),
    [
        ("powersave", "cpufreq-dt", ("powersave governor",)),
        ("powersave", "intel_cpufreq", ("powersave governor",)),
        ("powersave", "intel_pstate", ()),  # its usual one, which raises the clock with the work
        ("powersave", "amd-pstate-epp", ()),
        ("ondemand", "cpufreq-dt", ()),
    ],
)
def test_a_governor_that_holds_the_lowest_clock(
    board: Board, governor: str, driver: str, throttled: tuple[str, ...]
) -> None:
    folder = f"sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}/cpufreq"
    root = board({f"{folder}/scaling_governor": f"{governor}\n", f"{folder}/scaling_driver": f"{driver}\n"})
    health = read_health(root, root=root)
    assert (health.governor, health.throttled) == (governor, throttled)


def test_an_unfit_device_says_why(board: Board) -> None:
    root = board(
        {
            "sys/class/thermal/thermal_zone0/temp": "99000\n",
            "proc/meminfo": "MemTotal: 900000 kB\nMemAvailable: 2048 kB\n",
        }
    )
    hot, memory = examine(root, root=root).problems
    assert "99 °C" in hot and "cool down" in hot and memory.startswith("2 MiB of memory")
    (disk,) = Fitness(min_disk_bytes=1 << 60, max_celsius=100, min_memory_bytes=0).problems(
        read_health(root, root=root)
    )
    assert "of its disk are free" in disk
    assert Fitness().problems(Health()) == (), "what could not be read is no reason"


def test_health_of_a_machine_without_sensors(tmp_path: Path) -> None:
    health = read_health(tmp_path / "absent", root=tmp_path)
    assert health == type(health)()


def test_a_control_groups_limit_bounds_the_memory(board: Board) -> None:
    root = board({"proc/meminfo": "MemTotal: 4096 kB\n", "sys/fs/cgroup/memory.max": "1048576\n"})
    assert probe("here", [], root=root, machine="x86_64").memory_bytes == 1 << 20


def test_this_kernel_answers_what_the_emulation_check_asks() -> None:
    """The files the emulation check depends on exist on this kernel and tell the truth about it."""
    assert Path("/proc/thread-self/exe").readlink() == Path("/proc/self/exe").readlink()
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    assert emulation_reason(machine) is None


def test_runners_in_a_cage_find_the_gpus_that_others_find(runner: Path, tmp_path: Path) -> None:
    """Drivers want to write files, even to say what there is; their runner's user must be able to."""
    expected = opencl_device(runner)
    (tmp_path / "jobs").mkdir()
    with Cage.build(runner, tmp_path, tmp_path / "jobs", choose_user(None)) as cage:
        assert expected in _find_gpus(runner, "opencl", cage, tmp_path / "jobs")
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_driver_that_fails_costs_the_gpus_and_nothing_else(
    runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(self: Runner, kind: str) -> Found:
        raise RunnerTimeout("load took longer than 60 s", stage="load", alive=False)

    monkeypatch.setattr(Runner, "devices", hang)
    with Cage.build(runner, tmp_path, tmp_path, None) as cage:
        assert _find_gpus(runner, "opencl", cage, tmp_path) == ()
    assert "this device offers no opencl: looking for it failed: load took longer" in caplog.text
