"""How many threads this process can keep busy: the CPUs it may run on, and what its control groups let it use.

Standard library, Python 3.9. The native runtime counts likewise (`device_agent/runtime/quota.c`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Iterable, List, Optional


def usable_threads(root: Path = Path("/")) -> int:
    """The CPUs that this process may run on, or fewer where a quota of CPU time is lower; at least one."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota)))


def cpu_list(cpus: Iterable[int]) -> str:
    """CPUs as the kernel writes them: (0, 1, 2, 8) -> "0-2,8"; however many there are, it stays readable."""
    runs: List[List[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def cpu_quota(root: Path = Path("/")) -> Optional[float]:
    """The least quota of this process's control group and those above it, in CPUs; None without one (cgroup v2)."""
    lines = _read(root / "proc/self/cgroup").splitlines()
    path = next((line[4:] for line in lines if line.startswith("0::/")), None)
    if path is None:
        return None
    mount = root / "sys/fs/cgroup"
    own = mount / path
    found = []
    for folder in (own, *own.parents):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[0]) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
        if folder == mount:
            break
    return min(found) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
