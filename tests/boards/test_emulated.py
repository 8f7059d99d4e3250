"""The emulated boards themselves: real ARM programs behind a real SSH server, and nothing left afterwards."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kedge.deploy import ssh
from kedge.deploy.emulated import EmulatedBoard, init
from kedge.deploy.emulated import board as module
from kedge.deploy.errors import EmulationError
from kedge.deploy.probe import locate, probe
from support.boards import BOARDS_CACHE, destination, require

pytestmark = pytest.mark.board

EXPECTED = {"arm64": ("aarch64", 64, "0xd08"), "armhf": ("armv7l", 32, "0xc07")}

# From bit 0 upwards, as Linux names them in arch/*/include/uapi/asm/hwcap.h.
HWCAP_BITS = {
    "arm64": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid",
    "armhf": "swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls vfpv4 "
    "idiva idivt vfpd32 lpae",
}

ASK = """
import ctypes, json, os, platform, socket, ssl, sqlite3, struct
cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("CPU part")]
print(json.dumps([platform.machine(), 8 * struct.calcsize("P"), cpu[0], os.getuid(), socket.gethostname(), len(cpu)]))
"""


def mounts(folder: Path) -> list[str]:
    """What this machine has mounted of a board; elsewhere other tests do as they like."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line for line in lines if str(folder) in line or str(BOARDS_CACHE) in line]


def supervisors() -> list[str]:
    """Command lines of this machine's processes that belong to some emulated board."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                line = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if str(init.__file__) in line:
                found.append(line)
    return found


def test_it_is_the_board_it_says(board: EmulatedBoard) -> None:
    machine, bits, part = EXPECTED[board.arch]
    with ssh.connect(destination(board)) as connection:
        assert connection.run(["uname", "-m"]).stdout.strip() == machine == board.machine
        told = json.loads(connection.run(["python3", "-"], stdin=ASK.encode()).stdout)
    assert told == [machine, bits, part, init.BOARD_UID, board.alias, os.cpu_count()]


def test_the_processor_that_is_shown_is_the_one_emulated(board: EmulatedBoard) -> None:
    """The features in /proc/cpuinfo are the bits of AT_HWCAP, which compiled code asks for."""
    bits = HWCAP_BITS[board.arch]
    question = 'import ctypes; print(ctypes.CDLL(None).getauxval(16)); print(open("/proc/cpuinfo").read())'
    with ssh.connect(destination(board)) as connection:
        word, text = connection.run(["python3", "-c", question]).stdout.split("\n", 1)
    features = next(line.split(":")[1].split() for line in text.splitlines() if line.startswith("Features"))
    from_auxv = {name for n, name in enumerate(bits.split()) if int(word) >> n & 1}
    assert set(features) <= from_auxv
    assert {"neon", "vfpv4", "asimd", "aes"} & from_auxv == {"neon", "vfpv4", "asimd", "aes"} & set(features)


def test_it_reaches_the_hosts_loopback(arm64: EmulatedBoard) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ssh.connect(destination(arm64)) as connection:
        port = server.getsockname()[1]
        question = f"import socket; socket.create_connection(('localhost', {port})).sendall(b'hello')"
        connection.run(["python3", "-c", question])
        with server.accept()[0] as peer:
            assert peer.recv(5) == b"hello"


def test_boards_do_not_see_each_others_files(arm64: EmulatedBoard) -> None:
    with (
        EmulatedBoard("arm64", BOARDS_CACHE) as other,
        ssh.connect(destination(arm64)) as one,
        ssh.connect(destination(other)) as two,
    ):
        one.run(["touch", "/home/board/mine"])
        assert two.run(["test", "-e", "/home/board/mine"], check=False).status == 1
        one.run(["rm", "/home/board/mine"])
        # Nor may either write to the system that both share.
        assert two.run(["touch", "/usr/bin/evil"], check=False).status != 0


def test_a_full_disk_is_the_boards_own() -> None:
    require("arm64")
    with EmulatedBoard("arm64", BOARDS_CACHE, disk_mb=8) as board, ssh.connect(destination(board)) as connection:
        for folder in ("/home/board", "/tmp", "/dev/shm"):
            told = connection.run(["dd", "if=/dev/zero", f"of={folder}/big", "bs=1M", "count=20"], check=False)
            assert told.status == 1
            assert "No space left" in told.stderr


def test_nothing_is_left_when_it_ends() -> None:
    require("arm64")
    with EmulatedBoard("arm64", BOARDS_CACHE) as board:
        folder = board.folder
        with ssh.connect(destination(board)) as connection:
            # A daemon that outlives its SSH session, ignores every signal it can, and holds a file open.
            connection.run(["sh", "-c", "trap '' TERM HUP INT; setsid sleep 1000 > ~/held 2>&1 < /dev/null &"])
        assert any("sleep 1000" in line for line in board.processes())
        assert mounts(folder) == []
    assert not folder.exists()
    assert mounts(folder) == []
    assert not [line for line in supervisors() if str(folder) in line]
    assert not [line for line in all_command_lines() if "sleep 1000" in line and "qemu" in line]


def all_command_lines() -> list[str]:
    lines = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                lines.append((process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
            except OSError:
                continue
    return lines


def test_it_ends_when_whoever_started_it_is_killed() -> None:
    require("arm64")
    program = (
        "import sys, time; from pathlib import Path; from kedge.deploy.emulated import EmulatedBoard\n"
        f"with EmulatedBoard('arm64', Path({str(BOARDS_CACHE)!r})) as board:\n"
        "    print(board.folder, board.pid, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder, pid = owner.stdout.readline().split()
        supervisor = os.pidfd_open(int(pid))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert select.select([supervisor], [], [], 20)[0], "the supervisor lives on"
    os.close(supervisor)
    assert not Path(folder).exists()
    assert not [line for line in supervisors() if folder in line]


def test_probing_reads_the_truth(board: EmulatedBoard) -> None:
    with ssh.connect(destination(board)) as connection:
        info = probe(connection, locate(connection, "~/.local/share/kedge-agent"))
    assert info.arch == EXPECTED[board.arch][0]
    assert info.glibc >= (2, 31)
    assert info.python_version >= (3, 9)
    assert info.hostname == board.alias
    assert info.directory == "/home/board/.local/share/kedge-agent"
    assert 0 < info.free_disk_mb <= 1074
    assert info.cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("registration", "words"),
    [
        (None, "apt-get install qemu-user-static binfmt-support"),
        ("disabled\nflags: PF\n", "update-binfmts --enable qemu-aarch64"),
        ("enabled\nflags: \n", "fix-binary"),
    ],
)
def test_what_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registration: str | None, words: str
) -> None:
    monkeypatch.setattr(module, "_BINFMT", tmp_path)
    if registration is not None:
        (tmp_path / "qemu-aarch64").write_text(registration)
    missing = EmulatedBoard.missing_requirements("arm64")
    assert missing is not None
    assert words in missing
    assert "\n" not in missing
    with pytest.raises(EmulationError) as refused:
        EmulatedBoard("arm64", BOARDS_CACHE).start()
    assert refused.value.message == missing


def test_without_namespaces_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe really runs; here in a process that may not make namespaces."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, to give up the right")
    command = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", sys.executable]
    done = subprocess.run(
        [*command, "-I", str(init.__file__), "--probe", "/tmp"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "unshare: Operation not permitted\n"
