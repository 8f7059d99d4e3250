"""How commands end when they are asked to, or made to: nothing they started outlives them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kedge.demo import scenario
from support.agents import descendants, runs, wait_for
from support.commands import interruptible_command


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`kedge demo --no-arm`, at the moment when its tracker and its agent run; its files go into `folder`."""
    process = subprocess.Popen(
        interruptible_command("demo", "--no-arm"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if "compiling the digits model" in line:
                break
        yield process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_the_demo_ends_everything_that_it_started(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path) as process:
        started = descendants(process.pid)
        assert len(started) >= 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    status = 130 if number is signal.SIGINT else -number
    assert process.returncode == status and "Traceback" not in errors, errors
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in started if runs(pid)]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_whoever_ends_a_run_on_this_machine_ends_its_runner(
    digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = interruptible_command("bench", digits, "--repeat", "1", "--min-repeat-ms", "60000")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(lambda: "kedge-runner" in commands(descendants(process.pid)), "the runner to start")
        started = descendants(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -number and "Traceback" not in errors, errors
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in started if runs(pid)]


def commands(pids: list[int]) -> str:
    """The command lines of processes."""
    text = ""
    for pid in pids:
        with contextlib.suppress(OSError):
            text += Path(f"/proc/{pid}/cmdline").read_text()
    return text


def test_the_demo_runs_beside_modules_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the user has a queue of his own')\n")
    command = [sys.executable, "-P", "-m", "kedge", "demo", "--no-arm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "this-machine" in done.stdout, done.stderr


def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        started = descendants(process.pid)
        assert len(started) >= 2
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not [pid for pid in started if runs(pid)], "the tracker and the agent to end")


def test_nohup_keeps_the_demo_running(tmp_path: Path) -> None:
    command = ["nohup", *interruptible_command("demo", "--no-arm")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "compiling the digits model" in line:
                break
        process.send_signal(signal.SIGHUP)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "this-machine" in out, errors


def test_a_stage_is_one_line_and_ends_once_stopped() -> None:
    stopped = threading.Event()
    lines: list[str] = []
    say = scenario._stage_lines(lines.append, stopped)
    for percent in (0, 25, 50, 75, 100):
        say(f"board: sending grpcio and protobuf: {percent} % of 7.1 MB")
    say("board: unpacking on the board")
    assert lines == ["board: sending grpcio and protobuf", "board: unpacking on the board"]
    stopped.set()
    with pytest.raises(KeyboardInterrupt):
        say("board: starting the agent")
