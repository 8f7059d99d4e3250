"""Filling weights on several cores."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kedge.compiler import pages


def test_items_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: 3)
    together, done = threading.Barrier(3), []

    def work(item: int) -> None:
        together.wait(60)
        done.append(item)

    pages.spread(work, range(6))
    assert sorted(done) == list(range(6))


@pytest.mark.parametrize(("usable", "items"), [(1, 5), (4, 1)])
def test_without_a_second_core_or_item_there_are_no_threads(
    monkeypatch: pytest.MonkeyPatch, usable: int, items: int
) -> None:
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: usable)
    where: list[threading.Thread] = []
    pages.spread(lambda _: where.append(threading.current_thread()), range(items))
    assert where == [threading.current_thread()] * items


@pytest.mark.parametrize("usable", [1, 3])
def test_what_goes_wrong_is_raised(monkeypatch: pytest.MonkeyPatch, usable: int) -> None:
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: usable)

    def work(item: int) -> None:
        if item > 1:
            raise MemoryError(f"for item {item}")

    with pytest.raises(MemoryError, match="for item 2"):
        pages.spread(work, range(8))


@pytest.mark.parametrize("startable", [0, 1])
def test_where_no_more_threads_can_be_started_there_are_fewer(monkeypatch: pytest.MonkeyPatch, startable: int) -> None:
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: 4)
    start, started, done = threading.Thread.start, [], []

    def limited(thread: threading.Thread) -> None:
        if len(started) == startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    pages.spread(done.append, range(100))
    assert sorted(done) == list(range(100)) and len(started) == startable
    assert not any(thread.is_alive() for thread in started)


def test_all_threads_treat_numbers_as_the_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.rpc.cores.usable_threads", lambda: 3)
    together, seen = threading.Barrier(3), []

    def work(item: int) -> None:
        together.wait(60)
        seen.append((threading.get_ident(), np.geterr()))

    with np.errstate(over="raise", divide="ignore", under="print", invalid="raise"):
        mine = np.geterr()
        pages.spread(work, range(3))
    assert len({thread for thread, _ in seen}) == 3 and [state for _, state in seen] == [mine] * 3
