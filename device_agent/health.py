"""The device's condition at one moment. What cannot be read is absent: a guess would pass for a reading."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import List, Optional

from kedge.device_agent.probe import meminfo
from kedge.rpc.types import Health

#: Sensors that are off or broken report values outside what silicon survives.
_PLAUSIBLE_CELSIUS = (-55.0, 150.0)


def read_health(data_dir: Path, *, root: Path = Path("/")) -> Health:
    """Read the sensors below `root`; `disk_free_bytes` is that of the disk that holds `data_dir`."""
    cpu = _cpufreq(root)
    frequency = None if cpu is None else _integer(cpu / "scaling_cur_freq")
    return Health(
        load_1min=_load(root),
        temperature_celsius=_hottest(root),
        frequency_mhz=None if frequency is None else frequency / 1000,
        governor="" if cpu is None else _text(cpu / "scaling_governor") or "",
        memory_available_bytes=meminfo(root).get("MemAvailable"),
        disk_free_bytes=_disk_free(data_dir),
    )


def _load(root: Path) -> Optional[float]:
    text = _text(root / "proc/loadavg")
    try:
        return float(text.split()[0]) if text else None
    except ValueError:
        return None


def _hottest(root: Path) -> Optional[float]:
    """The highest plausible thermal zone; sysfs gives thousandths of a degree."""
    found: List[float] = []
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*/temp")):
        millidegrees = _integer(zone)
        if millidegrees is not None and _PLAUSIBLE_CELSIUS[0] < millidegrees / 1000 < _PLAUSIBLE_CELSIUS[1]:
            found.append(millidegrees / 1000)
    return max(found) if found else None


def _cpufreq(root: Path) -> Optional[Path]:
    """The frequency directory of the first core this process may run on."""
    folder = root / f"sys/devices/system/cpu/cpu{min(os.sched_getaffinity(0))}/cpufreq"
    return folder if folder.is_dir() else None


def _disk_free(folder: Path) -> Optional[int]:
    try:
        return shutil.disk_usage(str(folder)).free
    except OSError:
        return None


def _integer(path: Path) -> Optional[int]:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
