"""What this device is: architecture, CPU, cores, memory, labels, and the target string that compiles for it.

Everything is read from the kernel below `root`, so that tests can show a board that is not there. CPU features are
the exception: they come from the runner's greeting, since the runner is what will execute the code.
"""

from __future__ import annotations

import os
import platform
import re
import struct
from pathlib import Path
from typing import AbstractSet, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Tuple

from kedge.device_agent.cpus import (
    ARM_PARTS,
    GENERIC,
    INTEL_MODELS,
    OPTIONAL,
    RELATIVES,
    TRIPLES,
    TUNED,
    X86_LEVELS,
    amd_cpu,
)
from kedge.rpc.abi import ABI_VERSION
from kedge.rpc.caches import Caches, read_caches
from kedge.rpc.selector import label_value
from kedge.rpc.types import Accelerator, DeviceInfo


def probe(
    name: str,
    features: Iterable[str],
    *,
    labels: Optional[Mapping[str, str]] = None,
    accelerators: Sequence[Accelerator] = (),
    root: Path = Path("/"),
    machine: Optional[str] = None,
    pointer_bits: Optional[int] = None,
    cpus: Optional[AbstractSet[int]] = None,
) -> DeviceInfo:
    """Describe the device below `root`.

    Args:
        name: what the fleet calls it.
        features: what the runner found, in LLVM's names.
        labels: the owner's own; they win over those found here.
        accelerators: the GPUs that the runner found.
        root: where /proc, /sys and /etc are looked up.
        machine: what `uname -m` prints; None asks the kernel.
        pointer_bits: 32 or 64, of the programs that run here; None takes this one's.
        cpus: the cores that it offers; None takes those that this process may run on.
    """
    names = tuple(sorted(set(features)))
    arch = userland_arch(machine or platform.machine(), pointer_bits or struct.calcsize("P") * 8)
    cpuinfo = _read(root / "proc/cpuinfo")
    emulated = emulation_reason(arch, root) is not None
    cpu_name = "" if emulated else cpu_of(arch, cpuinfo)
    cpus = os.sched_getaffinity(0) if cpus is None else cpus
    cores = len(cpus)
    memory = memory_total(root)
    release = _os_release(root)
    found = {
        "arch": arch,
        "emulated": "true" if emulated else "false",
        "mem_mb": str(memory >> 20),
        "os": label_value("-".join(release[key] for key in ("ID", "VERSION_ID") if key in release) or "linux"),
    }
    if not emulated:
        found.update(_board(root))
    found.update(labels or {})
    return DeviceInfo(
        name=name,
        arch=arch,
        cpu_name=cpu_name or "generic",
        cpu_features=names,
        num_cores=cores,
        memory_bytes=memory,
        target=baseline_target(arch, frozenset(names), cores)
        if emulated
        else target_string(arch, cpu_name, frozenset(names), cores, read_caches(cpus, root)),
        emulated=emulated,
        os_release=release.get("PRETTY_NAME", platform.release()),
        labels=found,
        abi_version=ABI_VERSION,
        accelerators=tuple(accelerators),
    )


def userland_arch(machine: str, pointer_bits: int) -> str:
    """The architecture that programs here are built for, as `uname -m` would print it on a device of its own.

    A 32-bit ARM user land on a 64-bit kernel sees `aarch64` or `armv8l`; its programs are `armv7l` ones.
    """
    if machine in ("aarch64", "arm64"):
        return "aarch64" if pointer_bits == 64 else "armv7l"
    if machine == "armv8l":
        return "armv7l"
    if machine in ("x86_64", "AMD64"):
        return "x86_64" if pointer_bits == 64 else "i686"
    return machine


def emulation_reason(arch: str, root: Path = Path("/")) -> Optional[str]:
    """Why this is taken for an emulated device (qemu's user mode), or None.

    The emulator answers `uname` and rewrites /proc/self, but lets other files through to the real kernel:
    the kernel's own architecture (/proc/sys/kernel/arch, Linux 6.1), the program that really runs, under a name of
    /proc/self that it does not rewrite (/proc/thread-self/exe), and, before QEMU 8.2, the real CPU's /proc/cpuinfo.
    """
    kernel = _read(root / "proc/sys/kernel/arch").strip()
    if kernel and _family(kernel) != _family(arch):
        return f"the kernel is a {kernel} one"
    try:
        program = (root / "proc/thread-self/exe").readlink()
    except OSError:
        program = Path()
    if program.name.startswith("qemu-"):
        return f"{program} executes this process"
    shape = _cpuinfo_family(_read(root / "proc/cpuinfo"))
    if shape is not None and shape != _family(arch):
        return f"/proc/cpuinfo describes a CPU of the {shape} family"
    return None


def cpu_of(arch: str, cpuinfo: str) -> str:
    """The CPU by LLVM's name, or "" where the tables do not know it.

    Where cores differ (big.LITTLE), the last distinct kind: kernels number the big cores last.
    """
    pairs = _cpuinfo_pairs(cpuinfo)
    if _family(arch) == "x86":
        return _x86_cpu(dict(reversed(pairs)))
    kinds: List[str] = []
    implementer = ""
    for key, value in pairs:
        if key == "CPU implementer":
            implementer = value.lower()
        elif key == "CPU part":
            name = ARM_PARTS.get((implementer, value.lower()))
            if name is not None and name not in kinds:
                kinds.append(name)
    return kinds[-1] if kinds else ""


def _x86_cpu(fields: Mapping[str, str]) -> str:
    try:
        family, model = int(fields["cpu family"]), int(fields["model"])
    except (KeyError, ValueError):
        return ""
    if fields.get("vendor_id") == "GenuineIntel":
        return INTEL_MODELS.get(model, "") if family == 6 else ""
    return amd_cpu(family, model) or "" if fields.get("vendor_id") == "AuthenticAMD" else ""


def target_string(
    arch: str, cpu_name: str, features: AbstractSet[str], cores: int, caches: Optional[Caches] = None
) -> str:
    """The target that compiles for this device, with its caches where the kernel describes them.

    It names the CPU (or its nearest relative) only where the device has everything that name promises, since a
    virtual machine may hide features; then every further feature that is there. It never promises a missing one.
    """
    name, promised = _tuned(arch, cpu_name, features)
    parts = ["llvm", f"-mtriple={TRIPLES.get(arch, arch + '-linux-gnu')}", f"-mcpu={name}"]
    extra = [f"+{feature}" for feature in OPTIONAL.get(arch, ()) if feature in features and feature not in promised]
    if extra:
        parts.append(f"-mattr={','.join(extra)}")
    parts.append(f"-num-cores={cores}")
    if caches is not None:
        parts.append(f"-l1={caches.l1_bytes}")
        if caches.l2_bytes:
            parts.append(f"-l2={caches.l2_bytes}")
        parts.append(f"-l3={caches.l3_bytes}")
    return " ".join(parts)


def baseline_target(arch: str, features: AbstractSet[str], cores: int) -> str:
    """The target of an emulated device: what every machine of the architecture has, plus NEON on 32-bit ARM.

    An emulator reports every extension it can imitate; code for real boards should not depend on them.
    """
    return target_string(arch, "", features & {"neon"} if arch == "armv7l" else frozenset(), cores)


def _tuned(arch: str, cpu_name: str, features: AbstractSet[str]) -> Tuple[str, FrozenSet[str]]:
    """The CPU to tune for, and what naming it promises."""
    tuned = TUNED.get(arch, {})
    for candidate in (cpu_name, RELATIVES.get(cpu_name, "")):
        if candidate in tuned and features >= tuned[candidate]:
            return candidate, tuned[candidate]
    name: str = GENERIC.get(arch, "generic")
    promised: FrozenSet[str] = frozenset()
    if arch == "x86_64":
        for level, needs in X86_LEVELS:
            if features >= needs:
                name, promised = level, needs
    return name, promised


def memory_total(root: Path = Path("/")) -> int:
    """Bytes of memory this process may hope for: the machine's, or its control group's limit where that is lower."""
    total = meminfo(root).get("MemTotal", 0)
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() and total else total


def meminfo(root: Path = Path("/")) -> Dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in _read(root / "proc/meminfo").splitlines():
        match = re.match(r"(\w+):\s+(\d+) kB", line)
        if match:
            found[match.group(1)] = int(match.group(2)) * 1024
    return found


def _board(root: Path) -> Dict[str, str]:
    """`model` and `soc` from the device tree; the last `compatible` entry names the chip ("brcm,bcm2711")."""
    labels = {}
    model = label_value(_read(root / "proc/device-tree/model").replace("\0", ""))
    if model:
        labels["model"] = model
    compatible = [item for item in _read(root / "proc/device-tree/compatible").split("\0") if item]
    if compatible:
        labels["soc"] = label_value(compatible[-1].split(",")[-1])
    return labels


def _family(arch: str) -> str:
    if arch.startswith(("aarch64", "arm")):
        return "arm"
    if arch in ("x86_64", "AMD64") or re.fullmatch(r"i[3-6]86", arch):
        return "x86"
    return "riscv" if arch.startswith("riscv") else arch


def _cpuinfo_family(cpuinfo: str) -> Optional[str]:
    keys = {key for key, _ in _cpuinfo_pairs(cpuinfo)}
    for key, family in (("vendor_id", "x86"), ("CPU implementer", "arm"), ("isa", "riscv")):
        if key in keys:
            return family
    return None


def _cpuinfo_pairs(cpuinfo: str) -> Sequence[Tuple[str, str]]:
    pairs = (line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    return [(key.strip(), value.strip()) for key, value in pairs]


def _os_release(root: Path) -> Dict[str, str]:
    pairs = (line.split("=", 1) for line in _read(root / "etc/os-release").splitlines() if "=" in line)
    return {key: value.strip().strip('"') for key, value in pairs}


def _read(path: Path) -> str:
    """The text of a kernel file, or "" where there is none: what cannot be read is not known."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
