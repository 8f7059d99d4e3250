"""What passes between the agent's own thread and that of its jobs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from kedge.device_agent.core import TELL_S
from kedge.device_agent.threads import Stages, Strand, Worker
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


Log = list[tuple[str, int]]


def strand_of(log: Log) -> Strand[Callable[[], str]]:
    """One whose events say what is to be logged, beside the thread that handled them."""
    return Strand(lambda event: log.append((event(), threading.get_ident())), lambda: None, time.monotonic)


def in_a_thread(work: Callable[[], object]) -> tuple[threading.Thread, int]:
    """It has begun, and this is its number."""
    begun = threading.Event()

    def run() -> None:
        begun.set()
        work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert begun.wait(60) and thread.ident is not None
    return thread, thread.ident


def join(thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive()


def test_an_event_is_handled_by_who_brings_it_and_what_was_posted_by_the_strands_thread() -> None:
    log: Log = []
    strand = strand_of(log)
    thread, ident = in_a_thread(lambda: strand.dispatch(lambda: "dispatched"))
    join(thread)
    assert log == [("dispatched", ident)]
    thread, ident = in_a_thread(lambda: strand.post(lambda: "posted"))
    join(thread)
    assert len(log) == 1
    strand.step(lambda: log.append(("after", 0)))
    assert log[1:] == [("posted", threading.get_ident()), ("after", 0)]


def test_what_is_dispatched_never_overtakes_what_was_posted_before() -> None:
    log: Log = []
    strand = strand_of(log)
    strand.post(lambda: "first")
    thread, _ = in_a_thread(lambda: strand.dispatch(lambda: "second"))
    join(thread)
    assert log == []
    for _ in range(2):
        strand.step(lambda: None)
    assert [what for what, _ in log] == ["first", "second"] and {who for _, who in log} == {threading.get_ident()}


def test_what_is_dispatched_while_another_event_is_handled_waits_for_the_strands_thread() -> None:
    log: Log = []
    strand = strand_of(log)
    inside, go = threading.Event(), threading.Event()

    def slow() -> str:
        inside.set()
        assert go.wait(60)
        return "slow"

    thread, ident = in_a_thread(lambda: strand.dispatch(slow))
    assert inside.wait(60)
    strand.dispatch(lambda: "next")  # comes back at once
    assert log == []
    go.set()
    join(thread)
    strand.step(lambda: None)
    assert log == [("slow", ident), ("next", threading.get_ident())]


def test_events_of_many_threads_are_handled_one_at_a_time_and_those_of_one_in_order() -> None:
    handled: dict[int, list[int]] = {}
    inside: list[int] = []
    total = 4 * 300

    def handle(event: tuple[int, int]) -> None:
        inside.append(1)
        assert len(inside) == 1
        handled.setdefault(event[0], []).append(event[1])
        inside.pop()

    strand: Strand[tuple[int, int]] = Strand(handle, lambda: None, time.monotonic)

    def bring(who: int) -> None:
        for number in range(300):
            (strand.post if number % 7 == who else strand.dispatch)((who, number))

    threads = [threading.Thread(target=bring, args=(who,), daemon=True) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        join(thread)
    strand.post((4, 0))  # the last
    while 4 not in handled:
        strand.step(lambda: None)
    assert [handled[who] for who in range(4)] == [list(range(300))] * 4
    assert sum(len(numbers) for numbers in handled.values()) == total + 1


def test_what_a_dispatched_event_raises_ends_the_strands_thread_and_nobody_elses() -> None:
    log: Log = []
    strand = strand_of(log)

    def fail() -> str:
        raise RuntimeError("no more files may be open")

    thread, _ = in_a_thread(lambda: strand.dispatch(fail))
    join(thread)
    strand.dispatch(lambda: "after a failure nothing is handled")
    with pytest.raises(RuntimeError, match="no more files may be open"):
        strand.step(lambda: None)
    assert log == []


def test_an_alarm_that_a_dispatched_event_sets_wakes_the_strands_thread() -> None:
    alarms, looked = [time.monotonic() + 3600], threading.Event()

    def alarm() -> float:
        looked.set()
        return alarms[-1]

    strand: Strand[float] = Strand(alarms.append, alarm, time.monotonic)
    thread, _ = in_a_thread(lambda: strand.step(lambda: None))
    assert looked.wait(60)
    strand.dispatch(time.monotonic())
    join(thread)


def test_a_strand_that_is_closed_handles_nothing() -> None:
    log: Log = []
    strand = strand_of(log)
    strand.close()
    strand.dispatch(lambda: "late")
    assert log == []
