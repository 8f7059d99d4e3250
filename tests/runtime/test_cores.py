"""Quotas of CPU time: the runtime and Python read the same ones."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import pytest

from kedge.rpc.cores import cpu_list, cpu_quota, usable_threads
from support import native

PROGRAM = Path(__file__).with_name("programs") / "print_quota.c"
NONE = 2**31 - 1
#: /proc/self/cgroup, cpu.max by group, the quota in CPUs.
CASES: dict[str, tuple[str, dict[str, str], float | None]] = {
    "one and a half": ("0::/job\n", {"job": "150000 100000"}, 1.5),
    "no limit": ("0::/job\n", {"job": "max 100000", "": "max 100000"}, None),
    "above": ("0::/a/b/c\n", {"a/b/c": "max 100000", "a/b": "400000 100000", "a": "200000 100000"}, 2.0),
    "at the top of a container": ("0::/\n", {"": "50000 100000"}, 0.5),
    "both versions": ("3:cpu:/x\n1:name=systemd:/y\n0::/z\n", {"z": "300000 100000", "x": "100000 100000"}, 3.0),
    "the first version alone": ("3:cpu:/x\n", {"x": "100000 100000"}, None),
    "nonsense": ("0::/a\n", {"a": "a lot"}, None),
    "no time at all": ("0::/a\n", {"a": "0 100000"}, None),
    "nothing to read": ("", {}, None),
}


@pytest.fixture
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    membership, quotas, _ = CASES[request.param]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    for group, text in quotas.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{text}\n")
    return tmp_path


@pytest.mark.parametrize(("root", "quota"), [(name, case[2]) for name, case in CASES.items()], indirect=["root"])
def test_both_find_the_same(root: Path, quota: float | None) -> None:
    program = native.compile_c([PROGRAM, native.library()])
    printed = subprocess.run([program, root], capture_output=True, text=True, check=True).stdout
    assert int(printed) == (NONE if quota is None else math.ceil(quota))
    assert cpu_quota(root) == quota
    cpus = len(os.sched_getaffinity(0))
    assert usable_threads(root) == (cpus if quota is None else min(cpus, math.ceil(quota)))


@pytest.mark.parametrize(
    ("cpus", "text"),
    [((), ""), ((3,), "3"), ((2, 3), "2-3"), ((9, 0, 1, 2, 5, 5), "0-2,5,9"), (tuple(range(1_024)), "0-1023")],
)
def test_cpus_are_written_as_the_kernel_writes_them(cpus: tuple[int, ...], text: str) -> None:
    assert cpu_list(cpus) == text
