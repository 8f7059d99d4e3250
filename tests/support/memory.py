"""What processes occupy."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any


def peak_bytes(pid: int) -> int:
    """The most bytes of a process that were in memory at a time, since it began or since `forget_peak`."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> int:
    """Have its peak begin anew; bytes of it that are in memory now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status(pid, "VmRSS")


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def huge_bytes(data: Any) -> int:
    """Bytes in huge pages of the mapping that the array lies in."""
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        first, end = (int(text, 16) for text in entry.split(maxsplit=1)[0].split("-"))
        if first <= data.ctypes.data < end:
            found = re.search(r"^AnonHugePages: +(\d+) kB", entry, re.MULTILINE)
            return int(found[1]) << 10 if found else 0
    raise AssertionError("no mapping holds the array")
