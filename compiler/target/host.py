"""`native`: the machine that the compiler runs on."""

from __future__ import annotations

import functools
import os
import platform

from kedge.compiler.errors import TargetError
from kedge.compiler.target.arch import ARCHS, closure
from kedge.compiler.target.cpus import best_cpu
from kedge.compiler.target.model import Target, throughput_of
from kedge.rpc import cores
from kedge.rpc.caches import Caches, read_caches


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
    cpu = best_cpu(name, arch, usable)
    caches = read_caches(usable_cpus()) or Caches(cpu.l1_bytes, cpu.l2_bytes, cpu.l3_bytes)
    return Target(
        arch,
        cpu.name,
        tuple(sorted(usable)),
        usable_threads(),
        caches.l1_bytes,
        caches.l2_bytes or cpu.l2_bytes,
        caches.l3_bytes,
        throughput_of(arch, cpu.name, usable),
    )


def usable_threads() -> int:
    """How many CPUs this process may run on, or fewer where its control groups let it use less of their time."""
    return cores.usable_threads()


def usable_cpus() -> tuple[int, ...]:
    """The system's numbers of the CPUs that this process may run on; at least one."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
