"""The order of the files of tests."""

from __future__ import annotations

from support.order import LONGEST, TESTS, WAITING, in_order


def test_the_names_are_those_of_files_and_folders() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
    assert [name for name in WAITING if not (TESTS / name).is_dir()] == []


def test_long_files_come_first_and_those_that_wait_are_spread() -> None:
    computing = [TESTS / "tir" / f"test_{number}.py" for number in range(6)]
    waiting = [TESTS / "wire" / f"test_{number}.py" for number in range(3)]
    long = [TESTS / name for name in LONGEST]
    found = in_order([*computing, *waiting, *reversed(long)])
    assert found[: len(long)] == long and sorted(found) == sorted([*computing, *waiting, *long])
    assert [path in waiting for path in found[len(long) :]] == [True, False, False] * 3


def test_what_is_not_selected_does_not_matter() -> None:
    assert in_order([]) == []
    assert in_order([TESTS / "test_api.py", TESTS / LONGEST[1]]) == [TESTS / LONGEST[1], TESTS / "test_api.py"]
