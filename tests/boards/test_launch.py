"""`launch.py`, the board's side of a deployment, with stand-in agents on this machine: real processes, real locks."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.deploy import agent_main, launch
from support.agents import wait_for

OBEDIENT = """
    import signal, sys
    print("up", *sys.argv[1:], flush=True)
    signal.pause()
"""

STUBBORN = """
    import signal, subprocess, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    print("child", child.pid, flush=True)
    signal.pause()
"""

CRASHING = """
    import sys
    print("about to fail", flush=True)
    sys.exit("no tracker for me")
"""


def call(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """As the host does it: the script comes through standard input."""
    script = Path(launch.__file__).read_text()
    command = [sys.executable, "-", *arguments]
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "share" / "kedge-agent"
    assert call("setup", str(folder)).returncode == 0
    yield folder
    call("stop", str(folder))


def install(home: Path, agent: str, *arguments: str) -> None:
    with zipfile.ZipFile(home / "agent.pyz", "w") as archive:
        archive.writestr("__main__.py", textwrap.dedent(agent))
    (home / "site-0").mkdir(exist_ok=True)
    config = {"python": sys.executable, "site": "site-0", "name": "n", "tracker": "t:1", "arguments": list(arguments)}
    (home / "agent.json").write_text(json.dumps(config))


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def started(home: Path) -> int:
    done = call("start", str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


def follow(file: Path) -> subprocess.Popen[str]:
    command = ["tail", "-c", "+1", "-F", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for_log(home: Path, text: str) -> str:
    """Blocks until the agent has written `text`; the log grows by its writes only."""
    with subprocess.Popen(
        ["tail", "-n", "+1", "-F", home / "agent.log"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as f:
        assert f.stdout is not None
        lines = ""
        for line in f.stdout:
            lines += line
            if text in line:
                break
        f.terminate()
    return lines


def test_an_agent_is_detached_told_apart_and_stopped(home: Path) -> None:
    install(home, OBEDIENT, "--name=x y", "$HOME")
    pid = started(home)
    assert "up --name=x y $HOME" in wait_for_log(home, "up")
    assert os.getsid(pid) not in (os.getsid(0), 0)
    assert str(Path(f"/proc/{pid}/fd/0").readlink()) == os.devnull
    state = json.loads(call("status", str(home)).stdout)
    assert state == {"installed": True, "pid": pid, "name": "n", "tracker": "t:1", "deployment": None}
    assert call("stop", str(home)).stdout == ""
    assert not alive(pid)
    assert json.loads(call("status", str(home)).stdout)["pid"] is None


def test_the_lock_and_not_the_number_tells_whether_it_runs(home: Path) -> None:
    install(home, OBEDIENT)
    # A stale file that names a process which is not ours must neither be believed nor killed.
    (home / "agent.lock").write_text(str(os.getpid()))
    assert json.loads(call("status", str(home)).stdout)["pid"] is None
    assert call("stop", str(home)).returncode == 0


def test_a_second_start_is_refused(home: Path) -> None:
    install(home, OBEDIENT)
    pid = started(home)
    again = call("start", str(home))
    assert again.returncode == launch.EXIT_RUNNING
    assert "already" in again.stdout
    assert alive(pid)


def test_of_parallel_starts_one_wins(home: Path) -> None:
    install(home, OBEDIENT)
    script = Path(launch.__file__).read_text()
    racers = [
        subprocess.Popen([sys.executable, "-c", script, "start", str(home)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    winners = [racer for racer in racers if racer.returncode == 0]
    assert len(winners) == 1, said


def test_one_that_ignores_sigterm_is_killed_with_its_children(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(home, STUBBORN)
    pid = started(home)
    child = int(wait_for_log(home, "child").split()[1])
    script = Path(launch.__file__).read_text().replace("STOP_GRACE_S = 10", "STOP_GRACE_S = 1")
    command = [sys.executable, "-", "stop", str(home)]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60, check=True)
    assert "ignored SIGTERM" in done.stderr
    assert not alive(pid)
    assert not alive(child)


def test_children_left_by_a_killed_agent_are_killed_too(home: Path) -> None:
    install(home, STUBBORN)
    pid = started(home)
    child = int(wait_for_log(home, "child").split()[1])
    os.kill(pid, signal.SIGKILL)
    assert call("stop", str(home)).returncode == 0
    assert not alive(child)


def test_waiting_ends_with_the_agent_and_shows_its_log(home: Path) -> None:
    install(home, CRASHING)
    started(home)
    (home / "launch.py").write_bytes(Path(launch.__file__).read_bytes())
    with subprocess.Popen(
        [sys.executable, home / "launch.py", "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as waiter:
        assert waiter.stdout is not None
        log = waiter.stdout.read()
    assert "about to fail" in log
    assert "no tracker for me" in log


def test_waiting_ends_when_nobody_waits_any_more(home: Path) -> None:
    install(home, OBEDIENT)
    pid = started(home)
    (home / "launch.py").write_bytes(Path(launch.__file__).read_bytes())
    with subprocess.Popen([sys.executable, home / "launch.py", "wait"], stdin=subprocess.PIPE) as waiter:
        assert waiter.stdin is not None
        waiter.stdin.close()
        assert waiter.wait(60) == 0
    assert alive(pid)


def test_launching_replaces_and_then_waits(home: Path) -> None:
    install(home, OBEDIENT)
    old = started(home)
    (home / "launch.py").write_bytes(Path(launch.__file__).read_bytes())
    command = [sys.executable, str(home / "launch.py"), "launch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        new = int(launcher.stdout.readline())
        assert new != old
        assert not alive(old)
        wait_for_log(home, "up")
        os.kill(new, signal.SIGTERM)
        assert launcher.stdout.read() == "up\n"


def test_a_program_that_is_missing_is_told(home: Path) -> None:
    install(home, OBEDIENT)
    config = json.loads((home / "agent.json").read_text()) | {"python": "/nowhere/python"}
    (home / "agent.json").write_text(json.dumps(config))
    done = call("start", str(home))
    assert done.returncode == 1
    assert "/nowhere/python" in done.stdout


def test_removal_leaves_no_trace(tmp_path: Path, home: Path) -> None:
    install(home, OBEDIENT)
    pid = started(home)
    assert call("remove", str(home)).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert not alive(pid)
    assert call("remove", str(home)).returncode == launch.EXIT_NOT_RUNNING


def test_removal_keeps_directories_that_others_use(tmp_path: Path, home: Path) -> None:
    (tmp_path / "share" / "theirs").touch()
    assert call("remove", str(home)).returncode == 0
    assert [path.name for path in (tmp_path / "share").iterdir()] == ["theirs"]


def site_archive() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        info = tarfile.TarInfo("package/module.py")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"x = 1"))
    return stream.getvalue()


def test_a_site_is_unpacked_whole_or_not_at_all(home: Path) -> None:
    data = site_archive()
    digest = hashlib.sha256(data).hexdigest()[:16]
    (home / "site.tar.gz").write_bytes(data[:-1])
    damaged = call("unpack", str(home), digest)
    assert damaged.returncode == 1
    assert "damaged" in damaged.stdout
    assert not (home / f"site-{digest}").exists()
    (home / "site.tar.gz").write_bytes(data)
    assert call("unpack", str(home), digest).returncode == 0
    assert (home / f"site-{digest}" / "package" / "module.py").read_text() == "x = 1"
    told = json.loads(call("setup", str(home)).stdout)
    assert told["sites"] == [f"site-{digest}"]


def test_an_older_site_goes_when_the_deployment_is_settled(home: Path) -> None:
    install(home, OBEDIENT)
    (home / "site-old").mkdir()
    started(home)
    assert (home / "site-old").is_dir()
    assert call("settle", str(home)).returncode == 0
    assert sorted(path.name for path in home.glob("site*")) == ["site", "site-0"]


def test_setup_tells_true_digests(home: Path) -> None:
    (home / "kedge-runner").write_bytes(b"abc")
    told = json.loads(call("setup", str(home)).stdout)["digests"]
    assert told == {"kedge-runner": hashlib.sha256(b"abc").hexdigest()}


def stage(home: Path, agent: str, name: str = "next") -> None:
    """What a deployment sends: the agent and its configuration, not yet in place."""
    (home / "new").mkdir(exist_ok=True)
    with zipfile.ZipFile(home / "new" / "agent.pyz", "w") as archive:
        archive.writestr("__main__.py", textwrap.dedent(agent))
    config = {"python": sys.executable, "site": "site-0", "name": name, "tracker": "t:1", "arguments": []}
    (home / "new" / "agent.json").write_text(json.dumps(config))


def launched(home: Path) -> tuple[int, subprocess.Popen[str]]:
    script = Path(launch.__file__).read_text()
    command = [sys.executable, "-c", script, "launch", str(home)]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    return int(launcher.stdout.readline()), launcher


def test_what_a_launch_replaced_comes_back_and_runs_again(home: Path) -> None:
    install(home, OBEDIENT)
    (home / "site-next").mkdir()
    old = started(home)
    stage(home, CRASHING)
    pid, launcher = launched(home)
    with launcher:
        assert launcher.stdout is not None
        assert "no tracker for me" in launcher.stdout.read()
    assert not alive(old)
    wait_for(lambda: not alive(pid), "the end of the agent, whose lock goes first")
    back = call("rollback", str(home))
    assert back.returncode == 0, back.stdout + back.stderr
    assert "up" in wait_for_log(home, "up")
    state = json.loads(call("status", str(home)).stdout)
    assert state["name"] == "n" and state["pid"] == int(back.stdout)
    assert sorted(path.name for path in home.glob("site-*")) == ["site-0"]
    assert not (home / "old").exists() and not (home / "new").exists()


def test_an_agent_that_was_stopped_runs_again_though_nothing_was_replaced(home: Path) -> None:
    """The launch broke off between stopping the old agent and putting the new one in its place."""
    install(home, OBEDIENT)
    old = started(home)
    stage(home, OBEDIENT)
    script = Path(launch.__file__).read_text().replace("        swap(home, NEW, OLD)", "        sys.exit('broken off')")
    done = subprocess.run([sys.executable, "-c", script, "launch", home], capture_output=True, text=True, check=False)
    assert "broken off" in done.stderr and not alive(old)
    back = call("rollback", str(home))
    assert back.returncode == 0 and alive(int(back.stdout)), back.stdout + back.stderr


@pytest.mark.parametrize("command", ["settle", "rollback", "launch", "remove"])
def test_changes_wait_for_one_that_is_still_at_work(home: Path, command: str) -> None:
    """Its host was interrupted and went on to the next."""
    install(home, OBEDIENT)
    stage(home, OBEDIENT)
    (home / "old").mkdir()
    before = sorted(home.rglob("*"))
    script = Path(launch.__file__).read_text()
    with (home / "change.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with subprocess.Popen(
            [sys.executable, "-c", script, command, home], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(0.5)
            assert sorted(path for path in home.rglob("*") if path.name != "install.lock") == [
                path for path in before if path.name != "install.lock"
            ]
            fcntl.flock(other, fcntl.LOCK_UN)
            waiting.wait(60)
    assert not (home / "old").exists() or command == "launch"


def test_an_agent_that_did_not_run_is_restored_but_not_started(home: Path) -> None:
    install(home, OBEDIENT)
    stage(home, CRASHING)
    with launched(home)[1] as launcher:
        assert launcher.stdout is not None
        launcher.stdout.read()
    assert call("rollback", str(home)).returncode == launch.EXIT_NOT_RUNNING
    state = json.loads(call("status", str(home)).stdout)
    assert (state["name"], state["pid"]) == ("n", None)


def test_nothing_launched_is_nothing_to_bring_back(home: Path) -> None:
    install(home, OBEDIENT)
    pid = started(home)
    stage(home, CRASHING)
    assert call("rollback", str(home)).returncode == launch.EXIT_NOT_RUNNING
    assert alive(pid) and not (home / "new").exists()


def test_of_two_deployments_the_second_is_refused(home: Path) -> None:
    script = Path(launch.__file__).read_text()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-c", script, "prepare", str(home), "127.0.0.1", port]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None and first.stdin is not None
            assert json.loads(first.stdout.readline())["agent"]["installed"] is False
            second = call("prepare", str(home), "127.0.0.1", port)
            assert second.returncode == launch.EXIT_BUSY and "another deployment" in second.stdout
            assert call("remove", str(home)).returncode == launch.EXIT_BUSY
            # The host went away: its channel is closed, and the lock with it.
            first.stdin.close()
            assert first.wait(60) == 0
        assert call("prepare", str(home), "127.0.0.1", port).returncode == 0


def test_the_site_is_switched_in_one_step(home: Path) -> None:
    """An interrupted switch leaves its half behind, which must not stop the next one."""
    install(home, OBEDIENT)
    (home / "site").symlink_to("site-9")
    (home / ".site.part").symlink_to("site-8")
    started(home)
    assert (home / "site").readlink() == Path("site-0")
    assert not (home / ".site.part").is_symlink()


def test_the_number_of_the_one_before_is_not_believed(home: Path) -> None:
    """Between taking the lock and writing its number, an agent's lock file names the process before it."""
    install(home, OBEDIENT)
    pid = started(home)
    wait_for_log(home, "up")
    (home / "agent.lock").write_text(str(os.getpid()))
    script = Path(launch.__file__).read_text()
    command = [sys.executable, "-c", script, "status", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        with pytest.raises(subprocess.TimeoutExpired):  # it asks again instead of believing
            asking.wait(0.5)
        (home / "agent.lock").write_text(str(pid))
        assert asking.stdout is not None
        assert json.loads(asking.stdout.read())["pid"] == pid


def test_an_agent_that_ends_while_it_is_stopped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`running_pid` saw it, and then it was gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    monkeypatch.setattr(launch, "running_pid", lambda _home: ended.pid)
    assert launch.stop(str(home)) == 0


def test_removal_from_folders_made_read_only(tmp_path: Path, home: Path) -> None:
    install(home, OBEDIENT)
    pid = started(home)
    (home / "site-0").chmod(0o500)
    home.chmod(0o500)
    script = Path(launch.__file__).read_text()
    # Even root must not be able to write anywhere, for once.
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if os.getuid() == 0 else []
    command = [*powerless, sys.executable, "-", "remove", str(home)]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not alive(pid) and list(tmp_path.iterdir()) == []


def test_the_tracker_is_tried_from_the_board_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert json.loads(call("prepare", str(tmp_path / "a"), "127.0.0.1", port).stdout) == {
            "digests": {},
            "sites": [],
            "agent": {"installed": False, "pid": None, "name": None, "tracker": None, "deployment": None},
        }
        agents = call("prepare", str(tmp_path / "c"), "127.0.0.1", port, "1")
        assert agents.returncode == launch.EXIT_UNREACHABLE and agents.stdout.startswith("port 1: ")
    refused = call("prepare", str(tmp_path / "b"), "127.0.0.1", port)
    assert refused.returncode == launch.EXIT_UNREACHABLE
    assert "refused" in refused.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_deployment_that_ends_before_its_launch_leaves_what_was_there(tmp_path: Path, home: Path) -> None:
    """Its host went away while the tracker was tried, or while files were sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        tracker = ("127.0.0.1", str(server.getsockname()[1]))
        assert call("prepare", str(tmp_path / "first" / "agent"), *tracker).returncode == 0
        assert not (tmp_path / "first").exists()
        install(home, OBEDIENT)
        pid = started(home)
        assert call("prepare", str(home), *tracker).returncode == 0
        assert alive(pid) and not (home / "new").exists() and (home / "agent.pyz").exists()


ROUNDS = """
import os, shutil, sys
from kedge.deploy import agent_main

agent_main.HOME, agent_main.LOG_LIMIT_BYTES = sys.argv[1], 10
LOG = os.path.join(sys.argv[1], "agent.log")

class Stopped:
    # What happens before each round; the last one ends it.
    rounds = [lambda: print("x" * 20, flush=True), lambda: shutil.rmtree(LOG + ".1"), lambda: print("on", flush=True)]

    def wait(self, _seconds):
        self.rounds.pop(0)()
        return not self.rounds

agent_main.keep_log_small(Stopped())
"""


def test_a_log_that_cannot_be_moved_is_moved_when_it_can(tmp_path: Path) -> None:
    (tmp_path / "agent.log.1" / "in the way").mkdir(parents=True)
    with (tmp_path / "agent.log").open("ab") as log:
        subprocess.run([sys.executable, "-c", ROUNDS, tmp_path], stdout=log, check=True, timeout=60)
    assert (tmp_path / "agent.log.1").read_text() == "x" * 20 + "\n"
    assert (tmp_path / "agent.log").read_text() == "on\n"


def test_the_log_is_moved_aside_when_it_grows(home: Path) -> None:
    """The rotation of the zipapp's own `__main__`, with a small limit and an agent that writes a lot."""
    agent = (
        "import signal, threading\n"
        "def main():\n"
        "    stop = threading.Event()\n"
        "    signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "    print('x' * 5000, flush=True)\n"
        "    stop.wait()\n"
        "    print('bye', flush=True)\n"
    )
    source = Path(agent_main.__file__).read_text()
    source = source.replace("4 * 1024 * 1024", "1000").replace("CHECK_INTERVAL_S = 30", "CHECK_INTERVAL_S = 0.05")
    install(home, "")
    with zipfile.ZipFile(home / "agent.pyz", "w") as archive:
        archive.writestr("__main__.py", source)
        for package in ("kedge", "kedge/device_agent"):
            archive.writestr(f"{package}/__init__.py", "")
        archive.writestr("kedge/device_agent/__main__.py", agent)
    started(home)
    with subprocess.Popen(
        ["tail", "-c", "+1", "-F", home / "agent.log.1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as f:
        assert f.stdout is not None
        assert f.stdout.read(5001) == b"x" * 5000 + b"\n"
        f.terminate()
    call("stop", str(home))
    assert (home / "agent.log").read_bytes() == b"bye\n"
