"""The fault suite's own limit: what hangs is ended, with all stacks, and fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.agents import runs, wait_for

from .limit import time_limit

FOREVER = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(FOREVER, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None and started.stdout.readline() == b"begun\n"
        try:
            yield started
        finally:
            started.kill()


def a_thread_that_hangs(never: threading.Event) -> None:
    never.wait()


def wait_for_nothing(_: subprocess.Popen[bytes]) -> None:
    threading.Event().wait()


def wait_for_the_child(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    threading.Event().wait()


@pytest.mark.parametrize("hang", [wait_for_nothing, wait_for_the_child])
def test_what_hangs_fails_with_all_stacks_and_its_processes_have_ended(
    tmp_path: Path, child: subprocess.Popen[bytes], hang: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    before, never = signal.getsignal(signal.SIGALRM), threading.Event()
    other = threading.Thread(target=a_thread_that_hangs, args=(never,))
    other.start()
    try:
        with (
            (tmp_path / "stacks").open("wb") as stacks,
            pytest.raises(pytest.fail.Exception, match=r"not over after 0\.5 s"),
            time_limit(0.5, child.kill, stacks.fileno()),
        ):
            hang(child)
    finally:
        never.set()
        other.join()
    wait_for(lambda: not runs(child.pid), "its process to end")  # its status may be lost where its wait was interrupted
    text = (tmp_path / "stacks").read_text()
    assert hang.__name__ in text and a_thread_that_hangs.__name__ in text
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_is_over_in_time_is_left_alone(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    with (tmp_path / "stacks").open("wb") as stacks, time_limit(600, child.kill, stacks.fileno()):
        assert child.poll() is None
    assert child.poll() is None and (tmp_path / "stacks").read_bytes() == b""
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_main_thread_that_no_signal_reaches_ends_its_process(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    program = tmp_path / "stuck.py"
    program.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from limit import time_limit\n"
        "def never_listens():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "    time.sleep(600)\n"
        f"with time_limit(0.2, lambda: os.kill({child.pid}, signal.SIGKILL), 2, margin_s=0.2):\n"
        "    never_listens()\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.count("never_listens") == 2, done.stderr
    assert child.wait(60) == -signal.SIGKILL
