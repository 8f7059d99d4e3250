"""The queue between a session's threads: bounded, and closed from either end whoever waits in it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kedge.rpc.pipe import Pipe, PipeClosed
from support.agents import wait_for


@pytest.fixture
def pipe() -> Pipe[int]:
    return Pipe(2)


class Waiting:
    """A call in a thread of its own that does not come back at once."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.got: list[object] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        self._thread.join(0.05)
        assert self._thread.is_alive()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.got.append(call())
        except PipeClosed as error:
            self.got.append(type(error))

    def result(self) -> object:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.got[0]


def test_items_come_in_order_and_the_rest_waits(pipe: Pipe[int]) -> None:
    pipe.put(1)
    pipe.put(2)
    third = Waiting(lambda: pipe.put(3))
    assert pipe.get() == 1
    assert third.result() is None
    assert [pipe.get(), pipe.get()] == [2, 3]
    with pytest.raises(TimeoutError):
        pipe.get(0.01)


def test_a_push_does_not_wait(pipe: Pipe[int]) -> None:
    for item in range(4):
        pipe.push(item)
    fifth = Waiting(lambda: pipe.put(4))
    assert [pipe.get() for _ in range(4)] == [0, 1, 2, 3]
    assert fifth.result() is None and pipe.get() == 4


def test_those_who_pushed_wait_only_while_it_is_over_its_bound(pipe: Pipe[int]) -> None:
    pipe.push(1)
    pipe.push(2)
    pipe.wait_while_over()
    pipe.push(3)
    over = Waiting(pipe.wait_while_over)
    assert pipe.get() == 1
    assert over.result() is None and [pipe.get(), pipe.get()] == [2, 3]
    pipe.close()
    with pytest.raises(PipeClosed):
        pipe.wait_while_over()


def test_who_goes_on_and_who_waits_for_more_room_do_not_take_each_others_wake_up(pipe: Pipe[int]) -> None:
    for item in range(3):
        pipe.push(item)
    fourth = Waiting(lambda: pipe.put(3))
    over = Waiting(pipe.wait_while_over)
    assert pipe.get() == 0
    assert over.result() is None and not fourth.got
    assert pipe.get() == 1
    assert fourth.result() is None and [pipe.get(), pipe.get()] == [2, 3]


def test_what_is_in_a_closed_one_can_be_got(pipe: Pipe[int]) -> None:
    pipe.put(1)
    pipe.close()
    for say in (pipe.put, pipe.push):
        with pytest.raises(PipeClosed):
            say(2)
    pipe.finish(3)  # too late
    assert list(pipe) == [1]
    for _ in range(2):
        with pytest.raises(PipeClosed):
            pipe.get(0.01)


def test_a_last_item_takes_the_place_of_those_that_wait(pipe: Pipe[int]) -> None:
    pipe.put(1)
    pipe.put(2)
    third = Waiting(lambda: pipe.put(3))
    pipe.finish(9)
    assert third.result() is PipeClosed
    assert list(pipe) == [9]


def test_nothing_is_got_from_one_that_is_broken_off(pipe: Pipe[int]) -> None:
    pipe.put(1)
    pipe.close()
    pipe.abort()
    assert list(pipe) == []


@pytest.mark.parametrize("end", [Pipe.close, Pipe.abort])
def test_all_who_wait_in_it_hear_of_its_end(pipe: Pipe[int], end: Callable[[Pipe[int]], None]) -> None:
    those = [Waiting(pipe.get) for _ in range(3)]
    end(pipe)
    assert [each.result() for each in those] == [PipeClosed] * 3


def test_nothing_is_lost_or_doubled_between_many(pipe: Pipe[int]) -> None:
    got: list[int] = []
    takers = [threading.Thread(target=lambda: got.extend(pipe)) for _ in range(3)]
    givers = [threading.Thread(target=lambda at=at: [pipe.put(at * 500 + n) for n in range(500)]) for at in range(3)]
    for thread in (*takers, *givers):
        thread.start()
    for thread in givers:
        thread.join(60)
    pipe.close()
    wait_for(lambda: not any(thread.is_alive() for thread in takers), "all to be taken")
    assert sorted(got) == list(range(1_500))
