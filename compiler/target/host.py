"""`native`: the machine that the compiler runs on."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

from kedge.compiler.errors import TargetError
from kedge.compiler.target.arch import ARCHS, closure
from kedge.compiler.target.cpus import find_cpu
from kedge.compiler.target.model import Target

_CACHE_ROOT = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def native() -> Target:
    """The host as a target: its CPU's name, every feature it has that kedge knows, and the threads we may use.

    Raises:
        TargetError: the host is not a Linux machine of a known architecture.
    """
    from kedge.compiler.codegen.machine import host_cpu

    machine = platform.machine()
    arch = next((arch for arch in ARCHS if machine == arch.name or machine in arch.aliases), None)
    if arch is None or platform.system() != "Linux":
        raise TargetError(
            f"native: kedge makes no code for {platform.system()} on {machine}",
            hint="name the device instead, for instance --target raspberry-pi/4b",
        )
    name, features = host_cpu()
    usable = closure(arch, frozenset(features) & frozenset(arch.known_features)) & frozenset(features)
    cpu = find_cpu(name, arch) or find_cpu(arch.generic_cpu, arch)
    assert cpu is not None, f"no generic CPU for {arch.name}"
    return Target(
        arch,
        cpu.name,
        tuple(sorted(usable)),
        usable_threads(),
        _cache_bytes(1) or cpu.l1_bytes,
        _cache_bytes(2) or cpu.l2_bytes,
    )


def usable_threads() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _cache_bytes(level: int, root: Path = _CACHE_ROOT) -> int | None:
    """Bytes of the data cache of `level`, or None where the kernel does not say."""
    for index in sorted(root.glob("index*")):
        try:
            found = int((index / "level").read_text())
            kind = (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if found == level and kind in ("Data", "Unified") and size.endswith("K"):
            return int(size[:-1]) * 1024
    return None
