"""An ARM board that is not there: Debian for ARM under qemu's user-mode emulation, reached through real SSH."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import paramiko

from kedge.deploy.cachedir import Progress, default_cache_dir, silent
from kedge.deploy.emulated import init
from kedge.deploy.emulated.sources import Distribution, host_distribution
from kedge.deploy.emulated.userland import fetch_userland
from kedge.deploy.errors import EmulationError

_USER = "board"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")


@dataclass(frozen=True, slots=True)
class _Machine:
    """What one Debian architecture is called elsewhere, and the processor that the board pretends to have."""

    binfmt: str
    uname: str
    qemu_cpu: str
    cpuinfo: str
    words: str


# The processor is fixed, so that a feature it lacks is refused as on the real board. The text is what Linux shows.
_MACHINES = {
    "arm64": _Machine(
        "qemu-aarch64",
        "aarch64",
        "cortex-a72",
        "BogoMIPS\t: 108.00\nFeatures\t: fp asimd aes pmull sha1 sha2 crc32 cpuid\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n",
        "64-bit ARM",
    ),
    "armhf": _Machine(
        "qemu-arm",
        "armv7l",
        "cortex-a7",
        "model name\t: ARMv7 Processor rev 5 (v7l)\nBogoMIPS\t: 38.40\n"
        "Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae\n"
        "CPU implementer\t: 0x41\nCPU architecture: 7\nCPU variant\t: 0x0\nCPU part\t: 0xc07\nCPU revision\t: 5\n",
        "32-bit ARM",
    ),
}

ARCHITECTURES = tuple(_MACHINES)


class EmulatedBoard:
    """A context manager that is an ARM board with an SSH server on a free port of the loopback interface.

    The user land is fetched once per cache; every board has its own writable copy in memory and its own keys, logs
    in as an unprivileged user, and leaves nothing behind: no process, mount or folder, even if this process is
    killed. The board shares the host's network, so an address on the host's loopback interface works from inside.

    `disk_mb` (MB) is what its own changes to the root file system may take, and again what /tmp and /dev/shm may each
    hold: three file systems in the host's memory, which so may give a board up to three times as much.

    Results are right, times mean nothing; an agent there says of itself that it is emulated.
    """

    def __init__(
        self,
        arch: str = "arm64",
        cache_dir: Path | None = None,
        *,
        distribution: Distribution | None = None,
        disk_mb: int = 1024,
        progress: Progress = silent,
    ) -> None:
        if arch not in _MACHINES:
            raise EmulationError(f"no emulated board of architecture {arch!r}", hint="one of " + ", ".join(_MACHINES))
        self.arch = arch
        self.machine = _MACHINES[arch].uname
        self.host = "127.0.0.1"
        self.user = _USER
        self.port = 0
        self.alias = f"kedge-{arch}"
        """The name under which `ssh_config_path` knows the board."""
        self._cache_dir = cache_dir if cache_dir is not None else default_cache_dir()
        self._distribution = distribution
        self._disk_mb = disk_mb
        self._progress = progress
        self._folder: Path | None = None
        self._supervisor: subprocess.Popen[str] | None = None

    @classmethod
    def missing_requirements(cls, arch: str = "arm64") -> str | None:
        """Why this machine cannot run such a board, in one line that says what to do; None if it can."""
        machine = _MACHINES[arch]
        if not sys.platform.startswith("linux"):
            return "emulated boards need Linux"
        lacking = [tool for tool in ("apt-get", "dpkg-deb", "tar") if shutil.which(tool) is None]
        if lacking:
            return f"{' and '.join(lacking)} not found: emulated boards are built from Debian packages"
        registered = _BINFMT / machine.binfmt
        if not registered.exists():
            return (
                f"{machine.words} programs cannot be run on this machine: "
                f"sudo apt-get install qemu-user-static binfmt-support (then {registered} must exist)"
            )
        registration = registered.read_text().split("\n")
        if registration[0] != "enabled":
            return f"{machine.words} emulation is switched off: sudo update-binfmts --enable {machine.binfmt}"
        flags = next((line.removeprefix("flags: ") for line in registration if line.startswith("flags:")), "")
        if "F" not in flags:
            return f"{registered} lacks the flag F (fix-binary), so the emulator is lost inside the board's root"
        return _namespaces_refused()

    @property
    def folder(self) -> Path:
        """Keys, known_hosts and the SSH server's log of the running board."""
        if self._folder is None:
            raise EmulationError("the emulated board is not running")
        return self._folder

    @property
    def key_path(self) -> Path:
        """The private key that the board accepts."""
        return self.folder / "id"

    @property
    def known_hosts_path(self) -> Path:
        """A known_hosts file with the board's host key and nothing else."""
        return self.folder / "known_hosts"

    @property
    def ssh_config_path(self) -> Path:
        """A configuration for `ssh -F` in which `alias` names the board."""
        return self.folder / "ssh_config"

    @property
    def pid(self) -> int:
        """Process id, on this machine, of the supervisor: every process of the board descends from it."""
        if self._supervisor is None:
            raise EmulationError("the emulated board is not running")
        return self._supervisor.pid

    def start(self) -> Self:
        """Fetch the user land if it is not cached, then boot. Raises `EmulationError` or `FetchError`."""
        missing = self.missing_requirements(self.arch)
        if missing is not None:
            raise EmulationError(missing)
        distribution = self._distribution if self._distribution is not None else host_distribution(self.arch)
        userland = fetch_userland(self._cache_dir, self.arch, distribution, self._progress)
        if os.getuid() not in (0, userland.stat().st_uid):
            # Inside a user namespace nobody, not even its root, may write where another user's folder is below.
            raise EmulationError(f"{userland} belongs to another user", hint="use another cache folder")
        self._progress(f"starting the {self.arch} board")
        self._folder = Path(tempfile.mkdtemp(prefix="kedge-board-"))
        try:
            self._boot(userland, self._folder)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Kill every process of the board and remove its files. Safe to call twice."""
        if self._supervisor is not None:
            for stream in (self._supervisor.stdin, self._supervisor.stdout, self._supervisor.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self._supervisor.wait()
            self._supervisor = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def processes(self) -> list[str]:
        """Command lines of the board's processes, read from outside; the first process and emulators stripped."""
        namespace = _pid_namespace_of_child(self.pid)
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if (process / "ns" / "pid").stat().st_ino == namespace:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    found.append(b" ".join(words).decode(errors="replace").strip())
        return [line for line in found if line and str(init.__file__) not in line]

    def _boot(self, userland: Path, folder: Path) -> None:
        host_key, client_key = paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate()
        client_key.write_private_key_file(str(folder / "id"))
        host_key.write_private_key_file(str(folder / "host_key"))
        machine = _MACHINES[self.arch]
        processor = "".join(f"processor\t: {n}\n{machine.cpuinfo}\n" for n in range(os.cpu_count() or 1))
        (folder / "cpuinfo").write_text(processor)
        (folder / "memory").mkdir()
        config = {
            "userland": str(userland),
            "memory": str(folder / "memory"),
            "folder": str(folder),
            "log": str(folder / "sshd.log"),
            "size_mb": self._disk_mb,
            "hostname": self.alias,
            "cpuinfo": str(folder / "cpuinfo"),
            "server": ["/usr/sbin/sshd", "-i", "-e", "-f", "/etc/ssh/sshd_config"],
            "environment": {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "QEMU_CPU": machine.qemu_cpu},
            "files": self._files(host_key_text=(folder / "host_key").read_text(), client_key=client_key),
        }
        (folder / "config.json").write_text(json.dumps(config))
        self.port = self._spawn(folder)
        address = f"[{self.host}]:{self.port}"
        self.known_hosts_path.write_text(f"{address} {host_key.get_name()} {host_key.get_base64()}\n")
        self.ssh_config_path.write_text(
            f"Host {self.alias}\n  HostName {self.host}\n  Port {self.port}\n  User {self.user}\n"
            f"  IdentityFile {self.key_path}\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts_path}\n"
        )

    def _spawn(self, folder: Path) -> int:
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", str(init.__file__), str(folder / "config.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C on the terminal must reach the caller, who still wants to talk to the board.
            start_new_session=True,
        )
        assert self._supervisor.stdout is not None and self._supervisor.stderr is not None
        line = self._supervisor.stdout.readline()
        if not line.startswith("listening "):
            reason = self._supervisor.stderr.read().strip()
            raise EmulationError(f"the {self.arch} board did not start: {reason or 'no reason was given'}")
        return int(line.split()[1])

    def _files(self, host_key_text: str, client_key: paramiko.PKey) -> dict[str, tuple[str, int, bool]]:
        """Everything that a package's maintainer script or an administrator would have written."""
        home, machine = f"/home/{_USER}", _MACHINES[self.arch]
        users = f"root:*:0:0:root:/root:/bin/bash\n{_USER}:*:{init.BOARD_UID}:{init.BOARD_UID}::{home}:/bin/bash\n"
        groups = f"root:x:0:\ntty:x:5:\n{_USER}:x:{init.BOARD_UID}:\n"
        sshd = (
            "HostKey /etc/ssh/ssh_host_key\nUsePAM no\nPasswordAuthentication no\nPrintMotd no\nPidFile none\n"
            # The emulator has no seccomp of its own; it reads the processor to show from the environment.
            f"UseDNS no\nLogLevel VERBOSE\nSetEnv QEMU_CPU={machine.qemu_cpu}\n"
            "Subsystem sftp /usr/lib/openssh/sftp-server\n"
        )
        resolver = Path("/etc/resolv.conf")
        return {
            "/etc/passwd": (users, 0o644, False),
            "/etc/group": (groups, 0o644, False),
            "/etc/hosts": (f"127.0.0.1 localhost {self.alias}\n", 0o644, False),
            "/etc/hostname": (f"{self.alias}\n", 0o644, False),
            "/etc/nsswitch.conf": ("passwd: files\ngroup: files\nhosts: files dns\n", 0o644, False),
            "/etc/resolv.conf": (resolver.read_text() if resolver.is_file() else "", 0o644, False),
            "/etc/ssh/sshd_config": (sshd, 0o644, False),
            "/etc/ssh/ssh_host_key": (host_key_text, 0o600, True),
            f"{home}/.ssh/authorized_keys": (f"{client_key.get_name()} {client_key.get_base64()}\n", 0o600, True),
        }


def _pid_namespace_of_child(pid: int) -> int:
    return Path(f"/proc/{pid}/ns/pid_for_children").stat().st_ino


def _namespaces_refused() -> str | None:
    with tempfile.TemporaryDirectory(prefix="kedge-probe-") as folder:
        done = subprocess.run(
            [sys.executable, "-I", str(init.__file__), "--probe", folder], capture_output=True, text=True, check=False
        )
    if done.returncode == 0:
        return None
    reason = done.stderr.strip() or f"status {done.returncode}"
    if os.getuid() == 0:
        return f"root may not make mount and PID namespaces here ({reason}): in a container, start it with --privileged"
    return (
        f"unprivileged user namespaces are not allowed here ({reason}): run as root, or "
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces=10000 (others)"
    )
