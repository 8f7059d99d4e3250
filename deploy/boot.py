"""What starts the agent again when its board has started. Runs on the board, standard library only.

The host sends this text through `python3 - COMMAND DIRECTORY …`, as it does with `launch.py`, whose `start` is what the
board then runs. Nothing of it needs root; the first of these that works is used:

- systemd: a unit of the user's own manager, which is told to run without a login; where root deploys, of the system's;
- cron: a line `@reboot` in the user's table.

Where neither works the board stays as it is, and the answer says why. Each command answers with one line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shlex
import subprocess
import sys
from typing import Any, Callable

SYSTEM_UNITS = "/etc/systemd/system"
LINGERING = "/var/lib/systemd/linger"
STOP_S = 15
RESTART_S = 30
#: Statuses of an agent that would end in the same way again: its errors of usage, authentication, permission.
FINAL_STATUSES = (2, 9, 10)
#: The status of `launch.py start` where the agent runs.
RUNS_ALREADY = 4
_CALL_S = 30
#: systemd ignores it: whether the installation has made the user's manager run without a login.
_LINGER = "X-KedgeMadeLinger=true\n"

IS_ROOT = os.getuid() == 0
#: What starts a unit, of a user's manager and of the system's.
TARGETS = ("default.target", "multi-user.target")


class Unavailable(Exception):
    """A way that does not work here; the text says why."""


def call(words: list[str], stdin: str | None = None) -> str:
    """Run a program and return what it says; raises Unavailable."""
    environment = dict(os.environ, LC_ALL="C")
    environment.setdefault("XDG_RUNTIME_DIR", "/run/user/%d" % os.getuid())
    try:
        done = subprocess.run(
            words, input=stdin, env=environment, timeout=_CALL_S, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable("%s: %s" % (words[0], getattr(error, "strerror", None) or error)) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["status %d" % done.returncode]
        raise Unavailable("%s: %s" % (" ".join(words), said[-1]))
    return done.stdout


def name_of(home: str) -> str:
    """What the agent in a directory is called: the same each time, and another one's for another directory."""
    return "kedge-agent-" + hashlib.sha256(os.fsencode(home)).hexdigest()[:8]


# ---- systemd ----


def manager() -> list[str]:
    """The command that talks to whoever starts the unit."""
    return ["systemctl"] if IS_ROOT else ["systemctl", "--user"]


def unit_path(home: str) -> str:
    """Where the unit of an installation lies."""
    settings = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    folder = SYSTEM_UNITS if IS_ROOT else os.path.join(settings, "systemd", "user")
    return os.path.join(folder, name_of(home) + ".service")


def unit(home: str, python: str, root: bool = IS_ROOT) -> str:
    """The unit's text. It has no PIDFile: systemd would remove it, and with `agent.lock` the lock of the next agent."""

    def quoted(word: str) -> str:
        return '"%s"' % word.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')

    script = os.path.join(home, "launch.py")
    network = "Wants=network-online.target\nAfter=network-online.target\n" if root else ""
    return (
        "[Unit]\nDescription=kedge agent\n%s"
        "ConditionPathExists=%s\n\n"
        "[Service]\nType=forking\nExecStart=%s %s start\n"
        # The agent ends its runners itself; what is left after it is killed.
        "KillMode=mixed\nTimeoutStopSec=%d\n"
        # One that crashes is started again; not one that was stopped, or that says that nothing will change: a wrong
        # option, a device that the tracker refuses. Where a deployment has killed it, another one runs by then.
        "Restart=on-failure\nRestartSec=%d\nRestartPreventExitStatus=%s\nSuccessExitStatus=%d\n"
        # Its runners' control groups are its own to make.
        "Delegate=yes\n\n"
        "[Install]\nWantedBy=%s\n"
    ) % (
        network,
        script.replace("%", "%%"),
        quoted(python),
        quoted(script).replace("$", "$$"),
        STOP_S,
        RESTART_S,
        " ".join(map(str, FINAL_STATUSES)),
        RUNS_ALREADY,
        TARGETS[root],
    )


def systemd_on(home: str, python: str) -> str:
    """Install and enable the unit, without starting it: the agent runs. Returns its name; raises Unavailable."""
    call([*manager(), "show-environment"])  # enabling alone succeeds without a manager, too
    path, text = unit_path(home), unit(home, python)
    lingers = IS_ROOT or os.path.exists(os.path.join(LINGERING, pwd.getpwuid(os.getuid()).pw_name))
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as stream:
            stream.write(text if lingers else text.replace("[Unit]\n", "[Unit]\n" + _LINGER))
        call([*manager(), "enable", os.path.basename(path)])
        if not lingers:
            call(["loginctl", "enable-linger"])
    except (OSError, Unavailable) as error:
        raise Unavailable("; ".join([str(error), *systemd_off(home)])) from error
    return os.path.basename(path)


def systemd_off(home: str) -> list[str]:
    """Remove the unit, and what was made for it; returns what did not work."""
    path = unit_path(home)
    if not os.path.exists(path):
        return []
    folder, name = os.path.split(path)
    wants = os.path.join(folder, TARGETS[IS_ROOT] + ".wants")
    with open(path) as stream:
        made_linger = _LINGER in stream.read()
    # By hand, as `disable` does it: that needs a manager, which may be gone.
    for each in (os.path.join(wants, name), path):
        if os.path.lexists(each):
            os.unlink(each)
    others = any(other.startswith("kedge-agent-") for other in os.listdir(folder))
    systemd = os.path.dirname(folder)
    for empty in (wants, folder, systemd, os.path.dirname(systemd)):
        if not IS_ROOT and os.path.isdir(empty) and not os.listdir(empty):
            os.rmdir(empty)
    failed = []
    for words in ([*manager(), "daemon-reload"], ["loginctl", "disable-linger"]):
        if words[0] == "systemctl" or (made_linger and not others):
            try:
                call(words)
            except Unavailable as error:
                failed.append(str(error))
    return failed


# ---- cron ----


def cron_lines() -> list[str]:
    """The user's table; raises Unavailable where it cannot be read."""
    try:
        return call(["crontab", "-l"]).splitlines()
    except Unavailable as error:
        # Anything else must not be taken for an empty one, which would be written back. The second is busybox's.
        if "no crontab for" in str(error) or "crontab: can't open" in str(error):
            return []
        raise


def cron_line(home: str, python: str) -> str:
    """What cron runs at the board's start. A percent sign would end the command."""
    words = (shlex.quote(word) for word in (python, os.path.join(home, "launch.py"), "start"))
    return "@reboot %s >/dev/null 2>&1 # %s" % (" ".join(words).replace("%", "\\%"), name_of(home))


def cron_on(home: str, python: str) -> str:
    """Add the line; returns it; raises Unavailable."""
    line = cron_line(home, python)
    call(["crontab", "-"], "".join(each + "\n" for each in [*cron_lines(), line]))
    return line


def cron_off(home: str) -> list[str]:
    """Take the line out; returns what did not work."""
    try:
        lines = cron_lines()
        left = [line for line in lines if not line.endswith("# " + name_of(home))]
        if not left and lines:
            call(["crontab", "-r"])
        elif left != lines:
            call(["crontab", "-"], "".join(line + "\n" for line in left))
    except Unavailable as error:
        return [str(error)]
    return []


# ---- Commands ----


def show(home: str) -> dict[str, Any]:
    """What starts the agent: `by` is "systemd", "cron" or None, `what` the unit or the line."""
    if os.path.exists(unit_path(home)):
        return {"by": "systemd", "what": name_of(home) + ".service", "why": ""}
    try:
        lines = [line for line in cron_lines() if line.endswith("# " + name_of(home))]
    except Unavailable:  # no cron, no line
        lines = []
    return {"by": "cron" if lines else None, "what": "".join(lines), "why": ""}


def on(home: str, python: str) -> dict[str, Any]:
    """Have the board start the agent; `why` says what is in the way where `by` is None."""
    off(home)
    reasons: list[str] = []
    ways: list[tuple[str, Callable[[str, str], str]]] = [("systemd", systemd_on), ("cron", cron_on)]
    for by, way in ways:
        try:
            return {"by": by, "what": way(home, python), "why": "; ".join(reasons)}
        except Unavailable as error:
            reasons.append(str(error))
    return {"by": None, "what": "", "why": "; ".join(reasons)}


def off(home: str) -> dict[str, Any]:
    """Have nothing start it any more; where something still does, `why` says what did not work."""
    failed = [*systemd_off(home), *cron_off(home)]
    found = show(home)
    return dict(found, why="; ".join(failed) if found["by"] else "")


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {"on": on, "off": off, "show": show}


def main() -> int:
    """`python3 boot.py COMMAND DIRECTORY [PYTHON]`."""
    print(json.dumps(COMMANDS[sys.argv[1]](os.path.abspath(sys.argv[2]), *sys.argv[3:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
