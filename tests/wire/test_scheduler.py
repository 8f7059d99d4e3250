from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc.artifact import Need
from kedge.rpc.tracker.scheduler import Queue, Want

NEEDS = (Need("x86_64"),)


def want(text: str) -> Want:
    return Want(text, NEEDS)


def by_letters(wanted: Want, device: str) -> bool:
    """A want is a set of letters, each of which is a device."""
    return device in wanted.selector


def queue_of(*jobs: tuple[str, str, int]) -> Queue:
    queue = Queue()
    for seq, (job_id, text, priority) in enumerate(jobs):
        queue.push(job_id, want(text), priority, seq)
    return queue


def test_first_come_first_served() -> None:
    queue = queue_of(("1", "a", 0), ("2", "a", 0), ("3", "a", 0))
    assert [queue.assign(["a"], by_letters) for _ in range(4)] == [[("1", "a")], [("2", "a")], [("3", "a")], []]


def test_priority_goes_first_across_lines() -> None:
    queue = queue_of(("low", "ab", 0), ("high", "a", 5), ("mid", "ab", 1))
    assert queue.assign(["a"], by_letters) == [("high", "a")]
    assert queue.assign(["a"], by_letters) == [("mid", "a")]


def test_a_modest_job_leaves_the_rare_device_to_the_one_that_needs_it() -> None:
    for idle in itertools.permutations("abc"):
        queue = queue_of(("modest", "abc", 0), ("demanding", "b", 0))
        assert dict(queue.assign(idle, by_letters))["demanding"] == "b"


def test_a_job_that_nothing_fits_holds_up_nobody() -> None:
    queue = queue_of(("stuck", "z", 9), ("fine", "a", 0))
    assert queue.assign(["a", "b"], by_letters) == [("fine", "a")]
    assert "stuck" in queue and len(queue) == 1


def test_a_removed_job_is_not_assigned_and_a_returning_one_keeps_its_place() -> None:
    queue = queue_of(("1", "a", 0), ("2", "a", 0), ("3", "a", 0))
    queue.remove("2")
    assert queue.assign(["a"], by_letters) == [("1", "a")]
    queue.push("1", want("a"), 0, 0)
    queue.push("2", want("a"), 0, 1)
    assert [queue.assign(["a"], by_letters)[0][0] for _ in range(3)] == ["1", "2", "3"]
    assert list(queue.wants()) == []


jobs = st.lists(
    st.tuples(st.text("abcd", min_size=1, max_size=3), st.integers(0, 2), st.booleans()), min_size=1, max_size=12
)


@given(jobs, st.sets(st.sampled_from("abcd")))
@settings(max_examples=200, deadline=None)
def test_every_plan_is_lawful(items: list[tuple[str, int, bool]], idle: set[str]) -> None:
    queue, alive = Queue(), {}
    for seq, (text, priority, removed) in enumerate(items):
        queue.push(str(seq), want(text), priority, seq)
        if removed:
            queue.remove(str(seq))
        else:
            alive[str(seq)] = (text, (-priority, seq))
    plan = queue.assign(sorted(idle), by_letters)
    given_out = [device for _, device in plan]
    assert len(set(given_out)) == len(given_out) and set(given_out) <= idle
    for job_id, device in plan:
        text, place = alive.pop(job_id)
        assert device in text
        # Nobody with the same wish was passed over.
        assert not [
            other
            for other, (wish, better) in alive.items()
            if wish == text and better < place and other not in dict(plan)
        ]
    left = idle - set(given_out)
    assert not [wish for wish, _ in alive.values() if set(wish) & left]
    assert len(queue) == len(alive)
