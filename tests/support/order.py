"""In which order the files of tests run: no worker is idle for long, neither meanwhile nor at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
#: Folders whose tests wait more than they compute: for processes to start, for leases to end.
WAITING = ("agent", "boards", "faults", "wire")
#: Files that take half a minute or more. One that began last would run alone; those that wait and those that compute
#: take turns.
LONGEST = (
    "boards/test_deploy.py", "frontend/test_operators.py", "agent/test_several_trackers.py", "codegen/test_together.py",
    "agent/test_fleet.py", "frontend/test_conformance.py", "boards/test_architectures.py", "codegen/test_accuracy.py",
    "faults/test_faults.py", "frontend/test_free_shapes.py", "agent/test_secure.py", "codegen/test_kernels.py",
    "cli/test_commands.py",
)  # fmt: skip


def in_order(files: Iterable[Path]) -> list[Path]:
    """The longest ones first; then those whose tests wait spread evenly among those whose tests compute."""
    place: dict[Path, float] = {}
    rest = list(files)
    for number, name in enumerate(LONGEST):
        if TESTS / name in rest:
            rest.remove(TESTS / name)
            place[TESTS / name] = number - len(LONGEST)
    for waits in (True, False):
        group = [path for path in rest if (path.parent.name in WAITING) is waits]
        place |= {path: number / len(group) for number, path in enumerate(group)}
    return sorted(place, key=place.__getitem__)
