"""What a board is and has, asked over SSH before anything is sent to it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from kedge.deploy.errors import BoardUnsuitableError
from kedge.deploy.ssh import Connection

OLDEST_PYTHON = (3, 9)
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
    seen="$seen $python=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null; then exec "$python" - "$@"; fi
  fi
done
echo "no python:$seen"
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
home = os.path.expanduser("~")
place = os.path.expanduser(sys.argv[1])
folder = place
while not os.path.isdir(folder):
    folder = os.path.dirname(folder)
with open("/proc/meminfo") as stream:
    memory = dict(line.split(":") for line in stream if ":" in line)
print(json.dumps({
    "python": os.path.realpath(sys.executable), "version": list(sys.version_info[:3]), "abi": sys.implementation.name,
    "machine": machine, "bits": bits, "flags": flags, "libc": libc, "home": home, "place": place,
    "free_disk_mb": shutil.disk_usage(folder).free // 1000000, "writable": os.access(folder, os.W_OK),
    "memory_mb": int(memory["MemTotal"].split()[0]) // 1000,
    "kernel": os.uname().release, "hostname": os.uname().nodename, "cores": len(os.sched_getaffinity(0)),
    "systemd_user": os.path.isdir("/run/user/%d/systemd" % os.getuid()),
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
    systemd_user: bool


def probe(connection: Connection, directory: str) -> BoardInfo:
    """Ask the board; `directory` is where the agent would go (`~` allowed).

    Raises `BoardUnsuitableError` that names what the board lacks.
    """
    name = str(connection.destination)
    # The shell finds a Python and becomes it; that Python reads the second script from standard input.
    answer = connection.run(["sh", "-c", _FIND_PYTHON, "sh", directory], stdin=_ASK.encode()).stdout.strip()
    if answer.startswith("no python:"):
        seen = answer.removeprefix("no python:").strip() or "none at all"
        raise BoardUnsuitableError(
            f"{name} has no Python 3.9 or newer (found: {seen})", hint="on the board: sudo apt-get install python3"
        )
    try:
        raw = json.loads(answer)
    except ValueError as error:
        raise BoardUnsuitableError(
            f"{name} answered the probe with {answer[:200]!r}",
            hint="does a login script on the board print something? It must be silent for commands over SSH",
        ) from error
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
        raise BoardUnsuitableError(f"{name}: {raw['place']} cannot be written", hint="choose another --directory")
    if raw["free_disk_mb"] < _NEEDED_MB:
        raise BoardUnsuitableError(
            f"{name} has {raw['free_disk_mb']} MB free for {raw['place']}; the agent needs {_NEEDED_MB} MB",
            hint="make room, or choose another --directory",
        )
    major, minor = raw["libc"].split()[1].split(".")[:2]
    version = raw["version"]
    return BoardInfo(
        arch=arch,
        glibc=(int(major), int(minor)),
        python=raw["python"],
        python_version=(version[0], version[1], version[2]),
        kernel=raw["kernel"],
        hostname=raw["hostname"],
        cores=raw["cores"],
        memory_mb=raw["memory_mb"],
        free_disk_mb=raw["free_disk_mb"],
        home=raw["home"],
        directory=raw["place"],
        systemd_user=raw["systemd_user"],
    )
