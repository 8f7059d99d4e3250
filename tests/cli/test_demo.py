"""What the demo says and how it ends when something is wrong or missing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kedge import cli
from kedge.demo import processes, scenario

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `kedge demo` in this process; gives status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kedge", "demo", *arguments])
        status = cli.main()
        return (status, *capfd.readouterr())

    return run


def test_without_an_emulator_it_says_so_once_and_goes_on(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "missing_for_board", lambda arch: "no emulator: apt-get install it")
    status, out, err = demo()
    assert status == 0
    assert err.count("no ARM device: no emulator: apt-get install it") == 1
    assert "this-machine" in out and "emulated" not in out and "98.89%" in out


def test_a_wrong_device_is_named_and_fails(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scenario._held_out

    def wrong() -> scenario.HeldOut:
        held_out = right()
        return replace(held_out, reference=held_out.reference + np.float32(0.5))

    monkeypatch.setattr(scenario, "_held_out", wrong)
    status, out, _ = demo("--no-arm")
    assert status == 1
    assert "largest error against the reference is 0.5" in out


def test_a_missing_device_is_a_row_and_fails(demo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(processes, "agent", broken)
    status, out, _ = demo("--no-arm")
    assert status == 1
    assert "this-machine" in out and "no more processes" in out


def test_an_interrupt_that_wakes_nobody_is_seen() -> None:
    """As one is that comes when Python is about to wait; here because another thread takes the signal."""
    joining: Future[None] = Future()
    over = threading.Event()

    def interrupt() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        over.wait(60)
        joining.set_result(None)

    thread = threading.Thread(target=interrupt)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            scenario._row(None, "board", joining, None, print)  # type: ignore[arg-type]
        assert not joining.done()
    finally:
        signal.signal(signal.SIGINT, usual)
        over.set()
        thread.join()
