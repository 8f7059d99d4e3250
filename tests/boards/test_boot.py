"""What starts an agent with its board: `boot.py` with stand-ins for systemd and cron; what they start runs for real."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards.test_launch import OBEDIENT, alive, call, install

from kedge.deploy import boot, launch
from kedge.rpc.errors import AuthenticationError, PermissionDeniedError, UsageError
from support.boot_programs import CALLS, PROGRAMS, TABLE

UNIT = """\
[Unit]
Description=kedge agent
ConditionPathExists=/home/pi/.local/share/kedge-agent/launch.py

[Service]
Type=forking
ExecStart="/usr/bin/python3.11" "/home/pi/.local/share/kedge-agent/launch.py" start
KillMode=mixed
TimeoutStopSec=15
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2 9 10
SuccessExitStatus=4
Delegate=yes

[Install]
WantedBy=default.target
"""


class Machine:
    """A user's home with an agent installed in a directory that no shell and no unit would take as it is."""

    def __init__(self, folder: Path, *programs: str) -> None:
        self.home = folder / "home"
        self.agent = self.home / "a b" / "100%$x;'\"\\"
        self._path = folder / "bin"
        self._path.mkdir()
        self.home.mkdir()
        for name in programs:
            (self._path / name).write_text(PROGRAMS[name])
            (self._path / name).chmod(0o755)
        assert call("setup", str(self.agent)).returncode == 0
        install(self.agent, OBEDIENT)
        (self.agent / "launch.py").write_bytes(Path(launch.__file__).read_bytes())

    @property
    def environment(self) -> dict[str, str]:
        # Nothing of this machine's own: it may have systemd, and a user that has a table.
        return {**os.environ, "HOME": str(self.home), "PATH": f"{self._path}:{self._path}/system"}

    def refuse(self, what: str, why: str) -> None:
        (self.home / f".no-{what}").write_text(f"{why}\n")

    def boot(self, command: str) -> dict[str, Any]:
        script = Path(boot.__file__).read_text().replace("os.getuid() == 0", "False")
        script = script.replace("/var/lib/systemd/linger", str(self.home / "lingering"))
        words = [sys.executable, "-", command, str(self.agent), *([sys.executable] if command == "on" else [])]
        done = subprocess.run(words, input=script, env=self.environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def calls(self) -> list[str]:
        lines = (self.home / CALLS).read_text().splitlines()
        (self.home / CALLS).write_text("")
        return lines

    def files(self) -> set[str]:
        found = (str(path.relative_to(self.home)) for path in self.home.rglob("*") if self.agent not in path.parents)
        return {name for name in found if name != CALLS}

    def starts(self, words: list[str]) -> None:
        """What systemd or cron runs starts the agent, and only once."""
        assert subprocess.run(words, env=self.environment, check=False).returncode == 0
        pid = json.loads(call("status", str(self.agent)).stdout)["pid"]
        assert pid is not None and alive(pid)
        assert subprocess.run(words, env=self.environment, check=False).returncode == launch.EXIT_RUNNING
        assert json.loads(call("status", str(self.agent)).stdout)["pid"] == pid


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path, "systemctl", "loginctl", "crontab")
    (tmp_path / "bin" / "system").symlink_to("/bin")  # what the stand-ins themselves need
    for name in PROGRAMS:  # and no more
        assert (tmp_path / "bin" / name).exists()
    yield found
    call("stop", str(found.agent))


def test_what_systemd_does_not_start_again() -> None:
    """The board's script knows the statuses by number only."""
    errors = UsageError, AuthenticationError, PermissionDeniedError
    assert tuple(error.exit_status for error in errors) == boot.FINAL_STATUSES
    assert boot.RUNS_ALREADY == launch.EXIT_RUNNING


def test_the_unit() -> None:
    assert boot.unit("/home/pi/.local/share/kedge-agent", "/usr/bin/python3.11", root=False) == UNIT
    of_root = boot.unit("/root/.local/share/kedge-agent", "/usr/bin/python3.11", root=True)
    assert "WantedBy=multi-user.target\n" in of_root
    assert "Wants=network-online.target\nAfter=network-online.target\n" in of_root


def test_systemd_starts_it_and_nothing_is_left_of_that(machine: Machine) -> None:
    before = machine.files()
    answer = machine.boot("on")
    unit = answer["what"]
    assert answer == {"by": "systemd", "what": unit, "why": ""}
    assert machine.calls() == [
        "systemctl --user show-environment", f"systemctl --user enable {unit}", "loginctl enable-linger"
    ]  # fmt: skip
    assert machine.boot("show") == answer and not (machine.home / TABLE).exists()
    text = (machine.home / ".config/systemd/user/default.target.wants" / unit).read_text()
    condition, start = (
        next(line for line in text.splitlines() if line.startswith(f"{key}=")).partition("=")[2].replace("%%", "%")
        for key in ("ConditionPathExists", "ExecStart")
    )
    assert Path(condition).exists()
    machine.starts(shlex.split(start.replace("$$", "$")))
    assert machine.boot("on") == answer, "as a second deployment does it"
    machine.calls()
    assert machine.boot("off") == {"by": None, "what": "", "why": ""}
    assert machine.calls() == ["systemctl --user daemon-reload", "loginctl disable-linger"]
    assert machine.files() == before


def test_who_lingered_before_goes_on_lingering(machine: Machine) -> None:
    (machine.home / "lingering").mkdir()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    (machine.home / "lingering" / user).touch()
    machine.boot("on")
    machine.boot("off")
    assert not [line for line in machine.calls() if line.startswith("loginctl")]


@pytest.mark.parametrize("lacking", ["systemd", "linger"])
def test_without_systemd_cron_starts_it(machine: Machine, lacking: str) -> None:
    machine.refuse(lacking, "not for you")
    (machine.home / TABLE).write_text("5 4 * * * theirs\n")
    before = machine.files()
    answer = machine.boot("on")
    assert answer["by"] == "cron" and "not for you" in answer["why"]
    assert machine.boot("on") == answer
    assert (machine.home / TABLE).read_text() == f"5 4 * * * theirs\n{answer['what']}\n"
    assert machine.boot("show")["by"] == "cron" and machine.files() == before
    command = answer["what"].removeprefix("@reboot ").replace("\\%", "%")  # as cron reads it
    machine.starts(["/bin/sh", "-c", command])
    assert machine.boot("off")["by"] is None
    assert (machine.home / TABLE).read_text() == "5 4 * * * theirs\n"


def test_a_table_that_was_made_for_it_goes_with_it(machine: Machine) -> None:
    machine.refuse("systemd", "no bus")
    assert machine.boot("on")["by"] == "cron"
    machine.boot("off")
    assert not (machine.home / TABLE).exists()


def test_a_table_that_cannot_be_read_is_left_alone(machine: Machine) -> None:
    (machine.home / TABLE).write_text("5 4 * * * theirs\n")
    for what in ("systemd", "cron"):
        machine.refuse(what, f"no {what} here")
    answer = machine.boot("on")
    assert answer["by"] is None and "no systemd here" in answer["why"] and "no cron here" in answer["why"]
    assert (machine.home / TABLE).read_text() == "5 4 * * * theirs\n"
    assert machine.boot("off") == {"by": None, "what": "", "why": ""}


def test_a_machine_with_neither(tmp_path: Path) -> None:
    bare = Machine(tmp_path)
    before = bare.files()
    answer = bare.boot("on")
    assert answer["by"] is None and "systemctl: No such file" in answer["why"] and "crontab: No such" in answer["why"]
    assert bare.files() == before


def test_what_was_removed_by_hand_leaves_a_unit_that_is_removed_all_the_same(machine: Machine) -> None:
    before = machine.files()
    machine.boot("on")
    assert call("remove", str(machine.agent)).returncode == 0
    assert machine.boot("off")["by"] is None
    assert machine.files() <= before
