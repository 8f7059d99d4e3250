"""Caches as Linux describes them, on machines shown as files."""

from __future__ import annotations

from pathlib import Path

from kedge.rpc.caches import Caches, read_caches


def describe(root: Path, cpu: int, *entries: tuple[str, str, str, str]) -> None:
    for number, values in enumerate(entries):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{number}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(value + "\n")


def test_threads_of_a_core_share_its_caches_whole(tmp_path: Path) -> None:
    describe(
        tmp_path,
        0,
        ("1", "Data", "48K", "0,64"),
        ("1", "Instruction", "32K", "0,64"),
        ("2", "Unified", "2048K", "0,64"),
        ("3", "Unified", "105M", "0-31,64-95"),
    )
    assert read_caches([0, 1], tmp_path) == Caches(48 << 10, 2 << 20, 105 << 20)


def test_a_second_level_of_a_cluster_counts_by_its_part(tmp_path: Path) -> None:
    describe(tmp_path, 3, ("1", "Data", "32K", "3"), ("2", "Unified", "1024K", "0-3"))
    assert read_caches([0, 1, 2, 3], tmp_path) == Caches(32 << 10, 256 << 10, 0)


def test_the_larger_of_two_kinds_of_cores_counts(tmp_path: Path) -> None:
    describe(tmp_path, 0, ("1", "Data", "32K", "0"), ("2", "Unified", "512K", "0-3"))
    describe(tmp_path, 5, ("1", "Data", "32K", "5"), ("2", "Unified", "1024K", "4-5"))
    assert read_caches(range(6), tmp_path) == Caches(32 << 10, 512 << 10, 0)
    assert read_caches(range(4), tmp_path) == Caches(32 << 10, 128 << 10, 0)


def test_what_the_kernel_does_not_say_is_not_known(tmp_path: Path) -> None:
    assert read_caches([0], tmp_path) is None
    describe(tmp_path, 0, ("2", "Unified", "512K", "0"), ("1", "Data", "", "0"))
    assert read_caches([0], tmp_path) is None
