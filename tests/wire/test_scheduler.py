from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.rpc.artifact import Need
from kedge.rpc.tracker.scheduler import Queue, Shares, Want

NEEDS = (Need("x86_64"),)


def want(text: str) -> Want:
    return Want(text, NEEDS)


def by_letters(wanted: Want, devices: Sequence[str]) -> list[str]:
    """A want is a set of letters, each of which is a device."""
    return [device for device in devices if device in wanted.selector]


def queue_of(*jobs: tuple[str, str, int]) -> Queue:
    queue = Queue()
    for seq, (job_id, text, priority) in enumerate(jobs):
        queue.push(job_id, want(text), priority, seq)
    return queue


def test_first_come_first_served() -> None:
    queue = queue_of(("1", "a", 0), ("2", "a", 0), ("3", "a", 0))
    assert [queue.assign(["a"], by_letters, Shares(1_000), 0) for _ in range(4)] == [
        [("1", "a")],
        [("2", "a")],
        [("3", "a")],
        [],
    ]


def test_priority_goes_first_across_lines() -> None:
    queue = queue_of(("low", "ab", 0), ("high", "a", 5), ("mid", "ab", 1))
    assert queue.assign(["a"], by_letters, Shares(1_000), 0) == [("high", "a")]
    assert queue.assign(["a"], by_letters, Shares(1_000), 0) == [("mid", "a")]


def test_a_modest_job_leaves_the_rare_device_to_the_one_that_needs_it() -> None:
    for idle in itertools.permutations("abc"):
        queue = queue_of(("modest", "abc", 0), ("demanding", "b", 0))
        assert dict(queue.assign(idle, by_letters, Shares(1_000), 0))["demanding"] == "b"


def test_a_job_that_nothing_fits_holds_up_nobody() -> None:
    queue = queue_of(("stuck", "z", 9), ("fine", "a", 0))
    assert queue.assign(["a", "b"], by_letters, Shares(1_000), 0) == [("fine", "a")]
    assert "stuck" in queue and len(queue) == 1


def test_a_removed_job_is_not_assigned_and_a_returning_one_keeps_its_place() -> None:
    queue = queue_of(("1", "a", 0), ("2", "a", 0), ("3", "a", 0))
    queue.remove("2")
    assert queue.assign(["a"], by_letters, Shares(1_000), 0) == [("1", "a")]
    queue.push("1", want("a"), 0, 0)
    queue.push("2", want("a"), 0, 1)
    assert [queue.assign(["a"], by_letters, Shares(1_000), 0)[0][0] for _ in range(3)] == ["1", "2", "3"]
    assert list(queue.wants()) == []


def test_of_one_priority_the_user_goes_first_who_has_the_least() -> None:
    queue, shares = Queue(), Shares(1_000)
    for seq, (job_id, user, priority) in enumerate([("1", "ann", 0), ("2", "ann", 0), ("3", "bob", 0), ("4", "cy", 1)]):
        queue.push(job_id, Want("abcd", NEEDS, user), priority, seq)
    shares.begin("ann")
    assert [job for job, _ in queue.assign("abcd", by_letters, shares, 0)] == ["4", "3", "1", "2"]


def test_device_time_of_long_ago_counts_less() -> None:
    shares = Shares(half_life_ms=1_000)
    shares.begin("ann")
    shares.end("ann", 800, 0)
    assert [shares.used("ann", now) for now in (0, 1_000, 3_000)] == [800, 400, 100]
    assert shares.used("bob", 0) == 0
    shares.forget(5_000)
    assert shares.used("ann", 5_000) == 25
    shares.forget(20_000)
    assert shares._used == {}


def test_the_order_interleaves_the_users() -> None:
    queue, shares = Queue(), Shares(1_000)
    for seq, (job_id, user) in enumerate([("1", "ann"), ("2", "ann"), ("3", "ann"), ("4", "bob")]):
        queue.push(job_id, Want("a", NEEDS, user), 0, seq)
    queue.push("5", Want("b", NEEDS, "ann"), 1, 9)
    queue.remove("2")
    assert [job for job, _ in queue.order(shares, 0)] == ["5", "1", "4", "3"]
    assert (queue.count("ann"), queue.count("bob"), queue.count("cy")) == (3, 1, 0)


def test_thousands_of_lines_cost_a_device_one_look_at_each() -> None:
    """They were ranked anew for every line that wanted the device that had gone: seconds for each job that ended."""
    looks = 0

    class Counted(Shares):
        def held(self, user: str) -> int:
            nonlocal looks
            looks += 1
            return super().held(user)

    queue = Queue()
    for seq in range(2_000):
        queue.push(str(seq), Want(f"a{seq}", NEEDS, f"user{seq % 4}"), 0, seq)
    queue.push("other", Want("b", NEEDS, "user0"), 0, 9_999)
    assert queue.assign(["a", "b"], by_letters, Counted(1_000), 0) == [("0", "a"), ("other", "b")]
    assert looks < 100


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
    plan = queue.assign(sorted(idle), by_letters, Shares(1_000), 0)
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
