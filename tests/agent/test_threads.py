"""What passes between the agent's own thread and that of its jobs."""

from __future__ import annotations

import queue
import threading

import pytest

from kedge.device_agent.agent import Stages, Worker
from kedge.device_agent.core import TELL_S
from kedge.rpc.outcome import Stage
from kedge.rpc.types import Lease


def test_one_thread_does_all_jobs_in_turn_whatever_one_raises(caplog: pytest.LogCaptureFixture) -> None:
    done: queue.Queue[tuple[str, int]] = queue.Queue()
    go = threading.Event()
    worker = Worker("kedge-job")

    def fail() -> None:
        done.put(("fails", threading.get_ident()))
        raise RuntimeError("its folder is gone")

    worker.put(lambda: (go.wait(60), done.put(("waits", threading.get_ident())))[1])
    worker.put(fail)
    worker.put(lambda: done.put(("is last", threading.get_ident())))
    assert done.empty()
    go.set()
    worker.end(60)
    ended = [done.get_nowait() for _ in range(3)]
    assert [what for what, _ in ended] == ["waits", "fails", "is last"]
    assert len({ident for _, ident in ended}) == 1
    assert "kedge-job failed" in caplog.text and "its folder is gone" in caplog.text


def test_a_worker_that_never_had_anything_to_do_ends() -> None:
    worker = Worker("kedge-job")
    worker.end(60)
    assert worker._thread.ident is None


def test_a_short_jobs_stages_wake_nobody_and_those_of_a_long_one_do() -> None:
    now, woken = [5.0], []
    stages = Stages(Lease("j", 1), lambda: woken.append(now[0]), lambda: now[0])
    assert stages.look_at == 5.0 + TELL_S
    stages.enter(Stage.TRANSFER)
    now[0] += TELL_S / 2
    stages.enter(Stage.LOAD)
    assert list(stages.take()) == [(Stage.TRANSFER, 5.0), (Stage.LOAD, 5.0 + TELL_S / 2)] and woken == []
    assert stages.look_at == 5.0 + TELL_S, "nobody has been asked to wake yet"
    now[0] = 5.0 + TELL_S
    assert list(stages.take()) == [] and stages.look_at is None
    now[0] = 6.0
    stages.enter(Stage.RUN)
    assert woken == [6.0] and list(stages.take()) == [(Stage.RUN, 6.0)]
