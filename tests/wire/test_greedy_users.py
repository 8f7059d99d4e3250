"""What one user asks of the tracker costs the others nothing: jobs that differ, watchers, memory, deadlines, blame."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from kedge.rpc import messages as m
from kedge.rpc.artifact import Need
from kedge.rpc.errors import InputError
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import local_protocol
from kedge.rpc.selector import Selector, parse
from kedge.rpc.status import QueueFullError
from kedge.rpc.tracker import devices
from kedge.rpc.tracker.devices import Roster
from kedge.rpc.tracker.estimate import waits
from kedge.rpc.tracker.facts import ANYWHERE, Effects, JobAssigned, JobDone
from kedge.rpc.tracker.scheduler import Queue, Want
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.tracker.state import TrackerState
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import (
    NO_BLOB,
    Blob,
    Deadlines,
    DeviceState,
    Health,
    JobFilter,
    JobResult,
    JobSpec,
    Lease,
    RunTask,
    SessionTask,
    Tensor,
)
from support.toys import device_info
from support.watched import Watched

NEEDS = (Need("x86_64"),)


def spec(selector: str = "", data: bytes = b"", **deadlines: int) -> JobSpec:
    task = RunTask((Tensor("x", "int8", (len(data),), data),))
    return JobSpec(Blob("0" * 64, 1), "main", task, selector, Deadlines(**deadlines))


def fleet_of(count: int, settings: Settings | None = None) -> TrackerState:
    state = TrackerState("t", settings)
    for number in range(count):
        hello = m.Hello(local_protocol(), device_info(f"d{number}"), str(number), health=Health())
        state.connect(number, hello, 0)
    return state


def refused(state: TrackerState, spec: JobSpec, user: str = "eve") -> str:
    with pytest.raises(QueueFullError) as caught:
        state.check_room(spec, NEEDS, user)
    return caught.value.message


def test_a_user_waits_for_so_many_different_things() -> None:
    state = fleet_of(0, Settings(max_wants_per_user=2))
    for number in range(2):
        state.check_room(spec(f"d{number}"), NEEDS, "eve")
        state.submit(f"j{number}", spec(f"d{number}"), NEEDS, "", 0, "eve")
    assert "2 different selections" in refused(state, spec("d2"))
    state.check_room(spec("d1"), NEEDS, "eve")
    state.check_room(spec("d2"), NEEDS, "ann")
    state.cancel("j0", "enough", 1)
    state.check_room(spec("d2"), NEEDS, "eve")


def test_all_users_together_wait_for_so_many_different_things_and_each_has_a_share() -> None:
    state = fleet_of(0, Settings(max_wants_per_user=4, max_wants=6))
    for number in range(6):
        state.submit(f"j{number}", spec(f"d{number}"), NEEDS, "", 0, "eve" if number < 4 else "bob")
    for number in range(2):
        state.check_room(spec(f"d{number}"), NEEDS, "ann")
        state.submit(f"a{number}", spec(f"d{number}"), NEEDS, "", 0, "ann")
    assert "may for 2 now" in refused(state, spec("d9"), "ann")
    assert "may for 2 now" in refused(state, spec("d9"), "eve")
    state.check_room(spec("d0"), NEEDS, "eve")
    for number in range(4):
        state.cancel(f"j{number}", "enough", 1)
    state.check_room(spec("d9"), NEEDS, "ann")


def test_what_a_users_jobs_carry_is_bounded_until_they_are_done() -> None:
    state = fleet_of(0, Settings(max_carried_bytes_per_user=10))
    state.submit("a", spec(data=b"x" * 6), NEEDS, "", 0, "eve")
    assert not state.may_carry(spec(data=b"x" * 5), "eve")
    assert state.may_carry(spec(data=b"x" * 4), "eve")
    assert state.may_carry(spec(data=b"x" * 10), "ann")
    state.submit("b", spec(data=b"x" * 4), NEEDS, "k", 0, "eve")
    state.withdraw("b", "k", 0)
    state.cancel("a", "enough", 0)
    assert state.may_carry(spec(data=b"x" * 10), "eve")


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Want]:
    """The wants that devices are looked for, from now on."""
    seen: list[Want] = []
    takers = Roster.takers

    def counted(self: Roster, want: Want, names: list[str], now: int) -> list[str]:
        seen.append(want)
        return takers(self, want, names, now)

    monkeypatch.setattr(Roster, "takers", counted)
    return seen


def test_a_heartbeat_that_says_nothing_new_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fleet_of(1)
    for number in range(20):
        state.submit(f"j{number}", spec(f"nobody{number}"), NEEDS, "", 0, "eve")
    seen = looked_at(monkeypatch)
    state.receive(0, m.Heartbeat(), 1)
    assert seen == []
    state.receive(0, m.Heartbeat(Health(problems=("hot",))), 2)
    state.receive(0, m.Heartbeat(), 3)
    assert len(seen) == 20, "a device came back"


def test_what_many_users_wait_for_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_REMEMBERED", 3)
    worked_out: list[str] = []

    def counted(text: str) -> Selector:
        worked_out.append(text)
        return parse(text)

    monkeypatch.setattr(devices, "parse", counted)
    state = fleet_of(1)
    for number in range(20):
        state.submit(f"j{number}", spec(f"nobody{number}"), NEEDS, "", 0, f"user{number // 4}")
    state.receive(0, m.Heartbeat(Health(problems=("hot",))), 1)
    state.receive(0, m.Heartbeat(), 2)
    assert len(worked_out) == 20
    for number in range(20):
        state.cancel(f"j{number}", "enough", 3)
    state.submit("another", spec("nowhere"), NEEDS, "", 4)
    assert list(state._devices._fits)[-1][0] == "nowhere" and len(state._devices._fits) == 1 + 3


def test_a_device_that_leaves_gives_its_rival_a_job_that_failed_there_once() -> None:
    """Nothing more is heard of the other, and need not be."""
    state = fleet_of(1, Settings(max_device_faults=3))
    state.submit("j", spec(), NEEDS, "", 0)
    state.assignment_leaves(Lease("j", 1), 0)
    state.connect(1, m.Hello(local_protocol(), device_info("d1"), "1", health=Health()), 0)
    state.start_maintenance("d1", "", "root", 0)
    fault = JobResult(Outcome(OutcomeKind.DEVICE_FAULT))
    state.end_maintenance("d1", 0)
    state.submit("other", spec("d1"), NEEDS, "", 0)
    assert not assigned(state.receive(0, m.JobFinished(Lease("j", 1), fault), 1)), "the other one shall have it"
    assert assigned(state.disconnect(1, 2)) == [("j", "d0")]


def assigned(effects: Effects) -> list[tuple[str, str]]:
    return [(fact.job_id, fact.device) for fact in effects.facts if isinstance(fact, JobAssigned)]


def test_lines_of_the_same_devices_are_one_when_waits_are_told() -> None:
    asked: list[str] = []

    def free_in(name: str) -> float:
        asked.append(name)
        return 100.0

    order = [(f"j{number}", Want(f"s{number}", NEEDS)) for number in range(300)]
    found = waits(order, lambda _: frozenset(("a", "b")), free_in, lambda _: 10.0)
    assert [found[f"j{number}"].position for number in (0, 299)] == [1, 300]
    assert found["j299"].eta_ms == round((200 + 2990) / 2) and sorted(asked) == ["a", "b"]


def test_lines_that_overlap_in_many_ways_are_told_of_as_far_as_that_is_cheap() -> None:
    names = [f"d{number}" for number in range(300)]
    order = [(f"j{number}", Want(f"{number % 300}", NEEDS)) for number in range(3_000)]
    found = waits(order, lambda want: frozenset(names) - {names[int(want.selector)]}, lambda _: 0.0, lambda _: 1.0)
    assert found["j0"].position == 1 and 300 < len(found) < 1_000


def test_places_and_alarms_of_jobs_that_left_do_not_gather() -> None:
    state = fleet_of(0)
    patient = spec("nobody", queue_ms=state.settings.longest.queue_ms)
    state.submit("head", patient, NEEDS, "", 0, "eve")
    for number in range(2_000):
        state.submit(f"j{number}", patient, NEEDS, "", number, "eve")
        state.cancel(f"j{number}", "enough", number)
    assert sum(map(len, state._jobs.queue._lines.values())) < 50
    assert len(state._alarms) < 200
    due = state.next_alarm()
    assert due is not None
    effects = state.tick(state.settings.longest.queue_ms + 1)
    assert [fact.job_id for fact in effects.facts if isinstance(fact, JobDone)] == ["head"], "its alarm is kept"


def test_a_line_made_anew_keeps_its_order() -> None:
    queue, want = Queue(), Want("", NEEDS)
    for number in range(100):
        queue.push(str(number), want, 0, number)
    for number in [*range(1, 50), *range(51, 100)]:
        queue.remove(str(number))
    assert [queue_head(queue) for _ in range(2)] == ["0", "50"]
    assert len(queue) == 0 and queue.count_wants("") == 0


def queue_head(queue: Queue) -> str:
    (line,) = queue._lines.values()
    job_id = line[0][2]
    queue.remove(job_id)
    return job_id


def test_no_job_asks_for_longer_than_the_tracker_allows() -> None:
    longest = Deadlines(queue_ms=10, transfer_ms=20, load_ms=30, run_ms=40)
    state = fleet_of(0, Settings(longest=longest, longest_session_ms=50))
    session = JobSpec(NO_BLOB, "", SessionTask(0), "", replace(longest, run_ms=50))
    for most in (replace(spec(), deadlines=longest), session):
        state.check_room(most, NEEDS, "eve")
        for name in Deadlines.__dataclass_fields__:
            limit = getattr(most.deadlines, name)
            more = replace(most, deadlines=replace(most.deadlines, **{name: limit + 1}))
            with pytest.raises(InputError, match=rf"the deadline {name} is {limit + 1}, .* to {limit}"):
                state.check_room(more, NEEDS, "eve")
    for number, asked in enumerate((spec(run_ms=1), replace(session, deadlines=Deadlines()))):
        state.submit(str(number), asked, ANYWHERE, "", 0)
    own, defaults = (job.spec.deadlines for job in state.live_jobs())
    assert own == replace(longest, run_ms=1), "the tracker's own are cut"
    assert defaults == replace(longest, run_ms=50)


def test_calling_jobs_off_before_a_second_device_has_tried_blames_no_device() -> None:
    state = fleet_of(1)
    fault = JobResult(Outcome(OutcomeKind.DEVICE_FAULT, message="so it says"))
    for number in range(4):
        job_id = f"j{number}"
        state.submit(job_id, spec(), NEEDS, "", 0, "eve")
        for epoch, result in ((1, fault), (2, JobResult(Outcome(OutcomeKind.CANCELLED)))):
            lease = Lease(job_id, epoch)
            assert state.assignment_leaves(lease, 0)
            state.receive(0, m.JobStarted(lease), 0)
            if epoch == 2:
                state.cancel(job_id, "a client cancelled it", 0)
            state.receive(0, m.JobFinished(lease, result), 0)
            state.receive(0, m.Heartbeat(), 0)
    assert state.devices()[0].state is DeviceState.IDLE


def test_why_jobs_wait_is_found_out_once_for_all_that_want_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    state = fleet_of(1)
    for number in range(10):
        state.submit(f"j{number}", spec(f"nobody{number % 2}"), NEEDS, "", 0, "eve")
    asked: list[Want] = []
    why = Roster.why_waiting

    def counted(self: Roster, want: Want, now: int) -> str:
        asked.append(want)
        return why(self, want, now)

    monkeypatch.setattr(Roster, "why_waiting", counted)
    reasons: dict[Want, str] = {}
    told = [state.still_waiting(f"j{number}", reasons) for number in range(10)]
    assert len(asked) == 2
    assert {job.detail for job in told if job is not None} == {
        "no connected device matches 'nobody0'",
        "no connected device matches 'nobody1'",
    }
    assert state.still_waiting("unknown", reasons) is None


def test_who_watches_without_reading_holds_the_newest_alone(tmp_path: Path) -> None:
    async def watch(store: Store) -> None:
        shell = Shell(store)
        job_id, _ = await shell.submit(JobSpec(NO_BLOB, "", SessionTask(0), "nobody"), ANYWHERE, "")
        changes = shell.watch(job_id)
        for _ in range(3):
            shell._retell()
        await shell.cancel(job_id, "enough")
        newest = await changes.get()
        assert newest is not None and newest.result is not None, "and not the first of all that came before"
        nothing = asyncio.ensure_future(changes.get())
        await asyncio.sleep(0)
        assert not nothing.done()
        shell.close()
        assert await nothing is None

    store = Store(tmp_path)
    asyncio.run(watch(store))
    store.close()


def test_many_watchers_are_told_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.rpc.tracker.shell._RETELL_AT_ONCE_S", 0.0)
    monkeypatch.setattr("kedge.rpc.tracker.shell._RETELL_S", 0.001)

    async def watch(store: Store) -> None:
        shell = Shell(store)
        session = JobSpec(NO_BLOB, "", SessionTask(0), "nobody")
        watched = [shell.watch((await shell.submit(session, ANYWHERE, ""))[0]) for _ in range(5)]
        shell.agent_connected(m.Hello(local_protocol(), device_info("d"), "1", health=Health()), lambda body: None)
        for changes in watched:
            async with asyncio.timeout(60):
                job = await changes.get()
                while job is not None and "no device is connected" in job.detail:
                    job = await changes.get()
            assert job is not None and job.detail == "no connected device matches 'nobody'"
        shell.close()

    store = Store(tmp_path)
    asyncio.run(watch(store))
    store.close()


def test_whoever_lists_jobs_lets_others_submit_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many list, and however much, one page at most is read before a job is stored."""
    monkeypatch.setattr("kedge.rpc.tracker.shell._PAGE", 2)

    async def serve(store: Store) -> None:
        shell = Shell(store)
        session = JobSpec(NO_BLOB, "", SessionTask(0), "nobody")
        submitted = [(await shell.submit(session, ANYWHERE, "", "ann"))[0] for _ in range(9)]

        async def listed(limit: int, **choice: bool) -> list[str]:
            pages = [[job.id for job in page] async for page in shell.jobs(limit, (), **choice)]
            assert all(len(page) <= 2 for page in pages)
            return list(itertools.chain(*pages))

        listing = [asyncio.create_task(listed(8)) for _ in range(5)]
        await asyncio.sleep(0)  # each asks for its first page
        newest, _ = await shell.submit(session, ANYWHERE, "", "bob")
        assert not any(task.done() for task in listing)
        without, with_it = submitted[:0:-1], [newest, *submitted[:1:-1]]
        assert await listing[0] in (without, with_it), "a page and a job that are asked for at once, in either order"
        assert await listing[4] == with_it, "its turn came after"
        assert await listed(100, oldest_first=True) == [*submitted, newest]
        assert await listed(3) == [newest, submitted[8], submitted[7]]
        await asyncio.gather(*listing)
        since = [[job.id for job in page] async for page in shell.jobs(100, (), wanted=JobFilter(since_unix_ms=1))]
        assert list(itertools.chain(*since)) == [newest, *submitted[::-1]]
        shell.close()

    database = Watched(tmp_path)
    store = Store(database)
    asyncio.run(serve(store))
    assert len([1 for statement, _ in database.each if "min(" in statement]) == 1, "since when is looked up once a list"
    store.close()
