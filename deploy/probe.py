"""What a board is and has, asked over SSH before anything is sent to it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kedge.deploy.errors import BoardUnsuitableError
from kedge.deploy.ssh import Connection

_NEEDED_MB = 120

# A 64-bit kernel often runs a 32-bit system, so the architecture is read from Python's own ELF header, never uname.
_MACHINES = {
    (0xB7, 64): "aarch64",
    (0x28, 32): "armv7l",
    (0xF3, 64): "riscv64",
    (0x3E, 64): "x86_64",
}
_ARM_HARD_FLOAT = 0x400

_FIND_PYTHON = r"""
for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9; do
  if command -v "$python" >/dev/null 2>&1; then
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then exec "$python" - "$@"; fi
    seen="$seen $python=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
  fi
done
echo "no python:$seen"
"""

# What a login script prints comes before this.
_MARK = "kedge answers: "

_LOCATE = r"""
import json, os, sys
print("kedge answers: " + json.dumps({
    "python": os.path.realpath(sys.executable), "home": os.path.expanduser("~"),
    "directory": os.path.expanduser(sys.argv[1]), "hostname": os.uname().nodename,
}))
"""

_ASK = r"""
import json, os, shutil, struct, sys
with open(os.path.realpath(sys.executable), "rb") as stream:
    header = stream.read(52)
bits = 64 if header[4] == 2 else 32
machine = struct.unpack_from("<H", header, 18)[0]
flags = struct.unpack_from("<I", header, 36 if bits == 32 else 48)[0]
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
except ValueError:
    libc = None
folder = sys.argv[1]
while not os.path.isdir(folder):
    folder = os.path.dirname(folder)
with open("/proc/meminfo") as stream:
    memory = dict(line.split(":") for line in stream if ":" in line)
print("kedge answers: " + json.dumps({
    "version": list(sys.version_info[:3]), "abi": sys.implementation.name,
    "machine": machine, "bits": bits, "flags": flags, "libc": libc,
    "free_disk_mb": shutil.disk_usage(folder).free // 1000000, "writable": os.access(folder, os.W_OK),
    "memory_mb": int(memory["MemTotal"].split()[0]) // 1000,
    "kernel": os.uname().release, "cores": len(os.sched_getaffinity(0)),
}))
"""


@dataclass(frozen=True, slots=True)
class BoardInfo:
    """A board that can run the agent. Sizes in MB of 10^6 bytes."""

    arch: str
    glibc: tuple[int, int]
    python: str
    python_version: tuple[int, int, int]
    kernel: str
    hostname: str
    cores: int
    memory_mb: int
    free_disk_mb: int
    home: str
    directory: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where the agent lives on a board, and the Python that works there: enough to look at it and to remove it."""

    python: str
    home: str
    directory: str
    hostname: str
    noise: str
    """What the board says before every answer; a login script's words."""


def locate(connection: Connection, directory: str) -> Place:
    """Find the board's Python and the directory (`~` allowed); asks for nothing else, so that removal always works.

    Raises `BoardUnsuitableError` where there is no Python.
    """
    # The shell finds a Python and becomes it; that Python reads the second script from standard input.
    said = connection.run(["sh", "-c", _FIND_PYTHON, "sh", directory], stdin=_LOCATE.encode()).stdout
    noise, mark, answer = said.rpartition(_MARK)
    if mark:
        found = json.loads(answer)
        return Place(found["python"], found["home"], found["directory"], found["hostname"], noise.strip())
    _, none, seen = said.rpartition("no python:")
    name = str(connection.destination)
    if none:
        raise BoardUnsuitableError(
            f"{name} has no Python 3.9 or newer (found: {seen.strip() or 'none at all'})",
            hint="on the board: sudo apt-get install python3",
        )
    raise BoardUnsuitableError(f"{name} answered the probe with {said.strip()[:200]!r}", hint=_SILENT)


_SILENT = "does a login script on the board print something? It must be silent for commands over SSH"


def probe(connection: Connection, place: Place) -> BoardInfo:
    """Ask whether the agent can live there. Raises `BoardUnsuitableError` that names what the board lacks."""
    name = str(connection.destination)
    if place.noise:  # file transfer does not survive that
        raise BoardUnsuitableError(f"{name} answered the probe with {place.noise[:200]!r}", hint=_SILENT)
    answer = connection.run([place.python, "-", place.directory], stdin=_ASK.encode()).stdout
    raw = json.loads(answer.rpartition(_MARK)[2])
    arch = _MACHINES.get((raw["machine"], raw["bits"]))
    if arch is None or (arch == "armv7l" and not raw["flags"] & _ARM_HARD_FLOAT):
        raise BoardUnsuitableError(
            f"{name} has an architecture without an agent (ELF machine {raw['machine']}, {raw['bits']} bits)",
            hint="supported: " + ", ".join(_MACHINES.values()) + " (32-bit ARM with hard float)",
        )
    if raw["abi"] != "cpython" or not (raw["libc"] or "").startswith("glibc "):
        raise BoardUnsuitableError(
            f"{name} runs {raw['abi']} on {raw['libc'] or 'another C library'}; the agent needs CPython on glibc"
        )
    if not raw["writable"]:
        raise BoardUnsuitableError(
            f"{name}: {place.directory} cannot be written", hint=f"who owns it? On the board: ls -ld {place.home}"
        )
    if raw["free_disk_mb"] < _NEEDED_MB:
        raise BoardUnsuitableError(
            f"{name} has {raw['free_disk_mb']} MB free for {place.directory}; the agent needs {_NEEDED_MB} MB",
            hint=f"make room; df -h {place.home} on the board shows it",
        )
    major, minor = raw["libc"].split()[1].split(".")[:2]
    version = raw["version"]
    return BoardInfo(
        arch=arch,
        glibc=(int(major), int(minor)),
        python=place.python,
        python_version=(version[0], version[1], version[2]),
        kernel=raw["kernel"],
        hostname=place.hostname,
        cores=raw["cores"],
        memory_mb=raw["memory_mb"],
        free_disk_mb=raw["free_disk_mb"],
        home=place.home,
        directory=place.directory,
    )
