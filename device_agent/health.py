"""The device's condition at one moment, and whether it is fit for work.

What cannot be read is absent: a guess would pass for a reading.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import List, Optional, Tuple

from kedge.device_agent.probe import meminfo
from kedge.rpc.measure import POWERSAVE
from kedge.rpc.types import Health

#: Sensors that are off or broken report values outside what silicon survives.
_PLAUSIBLE_CELSIUS = (-55.0, 150.0)
#: What the firmware of a Raspberry Pi says of this moment, by the bits of its word; the rest is what was before.
_PI_THROTTLING = ((0x1, "under-voltage"), (0x2, "frequency cap"), (0x4, "throttling"), (0x8, "heat"))
#: Drivers that choose the clock themselves: to them "powersave" is a wish, to all others the lowest clock there is.
_AUTONOMOUS = ("intel_pstate", "amd-pstate-epp")
_MIB = 1 << 20


@dataclass(frozen=True)
class Fitness:
    """Beyond which readings a device takes no jobs."""

    max_celsius: float = 95.0
    min_memory_bytes: int = 32 * _MIB
    min_disk_bytes: int = 64 * _MIB

    def problems(self, health: Health) -> Tuple[str, ...]:
        """What makes the device unfit, each with its remedy; nothing that could not be read."""
        found = []
        celsius, memory, disk = health.temperature_celsius, health.memory_available_bytes, health.disk_free_bytes
        if celsius is not None and celsius > self.max_celsius:
            found.append(f"it is {celsius:.0f} °C hot, more than {self.max_celsius:.0f}: let it cool down")
        if memory is not None and memory < self.min_memory_bytes:
            found.append(f"{memory // _MIB} MiB of memory are free, less than {self.min_memory_bytes // _MIB}")
        if disk is not None and disk < self.min_disk_bytes:
            found.append(f"{disk // _MIB} MiB of its disk are free, less than {self.min_disk_bytes // _MIB}: clear it")
        return tuple(found)


def examine(data_dir: Path, fitness: Fitness = Fitness(), *, root: Path = Path("/")) -> Health:
    """`read_health`, with the problems that it shows."""
    health = read_health(data_dir, root=root)
    return replace(health, problems=fitness.problems(health))


def read_health(data_dir: Path, *, cpu: Optional[int] = None, root: Path = Path("/")) -> Health:
    """Read the sensors below `root`; `disk_free_bytes` is that of the disk that holds `data_dir`.

    `frequency_mhz` and `governor` are those of core `cpu`; None: of the first that this process may run on.
    """
    clock = _cpufreq(root, cpu)
    frequency = None if clock is None else _integer(clock / "scaling_cur_freq")
    return Health(
        load_1min=_load(root),
        temperature_celsius=_hottest(root),
        frequency_mhz=None if frequency is None else frequency / 1000,
        governor="" if clock is None else _text(clock / "scaling_governor") or "",
        memory_available_bytes=meminfo(root).get("MemAvailable"),
        disk_free_bytes=_disk_free(data_dir),
        throttled=_throttled(root, clock),
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


def _throttled(root: Path, clock: Optional[Path]) -> Tuple[str, ...]:
    """What slows the processor down now: a Raspberry Pi's firmware, a cooling device at work, or the governor."""
    found = []
    if clock is not None and _text(clock / "scaling_governor") == "powersave":
        found += [POWERSAVE] if _text(clock / "scaling_driver") not in _AUTONOMOUS else []
    word = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    try:
        bits = int(word, 16) if word else 0
    except ValueError:
        bits = 0
    found += [name for bit, name in _PI_THROTTLING if bits & bit]
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        kind = (_text(device / "type") or "").lower()
        if kind.startswith(("processor", "cpufreq", "thermal-cpufreq")) and (_integer(device / "cur_state") or 0) > 0:
            found.append("heat")
    return tuple(sorted(set(found)))


def _cpufreq(root: Path, cpu: Optional[int]) -> Optional[Path]:
    """The frequency directory of a core, or of the first core this process may run on."""
    number = min(os.sched_getaffinity(0)) if cpu is None else cpu
    folder = root / f"sys/devices/system/cpu/cpu{number}/cpufreq"
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
