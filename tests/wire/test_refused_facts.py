"""What a database will never take is the trouble of whoever asked for it, and of nobody else."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kedge.rpc import messages as m
from kedge.rpc.errors import UsageError
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.facts import ANYWHERE, JobAccepted, Reserved
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import NO_BLOB, Health, JobResult, JobSpec, JobState, Reservation, SessionTask
from support.postgres import PostgresServer
from support.toys import device_info

#: Half of a character, which no encoding has.
NEVER = "\ud800"
SESSION = JobSpec(NO_BLOB, "", SessionTask(), "")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Postgres:
    if request.param == "sqlite":
        return tmp_path
    server: PostgresServer = request.getfixturevalue("postgres")
    return Postgres(server.new_database())


def accepted(job_id: str, seq: int) -> JobAccepted:
    return JobAccepted(job_id, seq, SESSION, ANYWHERE, "", seq)


def reservation(until: int) -> Reserved:
    return Reserved(Reservation("r", "a", "ann", 0, until, ""))


def test_the_others_of_one_commit_are_stored(place: Path | Postgres) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(place, on_failure=failures.put)
    told: queue.Queue[StoreError] = queue.Queue()
    hold, held, stored = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        assert hold.wait(60)

    store.append([accepted("first", 1)], wait)
    assert held.wait(60)
    # What gathers meanwhile is one commit.
    store.append([accepted("second", 2)], lambda: None)
    store.append([accepted("third", 3), reservation(1 << 64)], lambda: None, told.put)
    store.append([accepted("second", 4)], lambda: None, told.put)
    store.append([accepted("fourth", 5)], stored.set)
    hold.set()
    assert stored.wait(60)
    assert [isinstance(told.get(timeout=60), StoreError) for _ in range(2)] == [True, True]
    assert store.problem is None and failures.empty()
    store.close()
    again = Store(place)
    assert [record.accepted.job_id for record in again.found.records] == ["first", "second", "third", "fourth"]
    again.close()


def test_a_key_that_no_index_takes_is_no_trouble_of_the_database(postgres: PostgresServer) -> None:
    """PostgreSQL calls it an error of its operation, as those are that pass."""
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(Postgres(postgres.new_database()), on_failure=failures.put)
    key = f"{random.Random(1).getrandbits(80_000):x}"  # which does not compress
    told: queue.Queue[StoreError] = queue.Queue()
    store.append([replace(accepted("long", 1), key=key)], lambda: None, told.put)
    assert "index" in told.get(timeout=60).message
    assert store.problem is None
    store.close()
    assert failures.empty()


async def refused_and_forgotten(store: Store) -> None:
    shell = Shell(store)
    said: list[m.TrackerBody | None] = []
    hello = m.Hello(local_protocol(), device_info("a"), "one", health=Health())
    connection = shell.agent_connected(hello, said.append)
    with pytest.raises(StoreError):
        await shell.reserve("a", "ann", 0, 1_000, NEVER)
    with pytest.raises(StoreError):
        await shell.set_maintenance("a", True, NEVER, "root")
    await shell._durable(shell._barrier())  # nothing waits for the store any more: a job that comes is begun at once
    with pytest.raises(StoreError):
        await shell.submit(SESSION, ANYWHERE, NEVER, "ann")
    assert shell.state.reservations() == [] and shell.state.live_jobs() == []
    begun, called_off = said[-2:]
    assert isinstance(begun, m.AssignJob) and isinstance(called_off, m.AbortJob)
    assert called_off.lease.job_id == begun.lease.job_id
    shell.agent_said(connection, m.JobFinished(begun.lease, JobResult(Outcome(OutcomeKind.CANCELLED))))
    job_id, existed = await shell.submit(SESSION, ANYWHERE, "key", "ann")
    job = await shell.job(job_id)
    assert not existed and job.state is JobState.ASSIGNED, "the device is as free as before"
    assert [body.lease.job_id for body in said if isinstance(body, m.AssignJob)] == [begun.lease.job_id, job_id]
    shell.close()


def test_who_asked_is_told_and_what_followed_from_it_is_undone(place: Path | Postgres) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(place, on_failure=failures.put)
    asyncio.run(refused_and_forgotten(store))
    store.close()
    assert failures.empty()


def test_a_reservation_begins_within_a_year(tmp_path: Path) -> None:
    async def reserve(store: Store) -> None:
        shell = Shell(store)
        shell.agent_connected(m.Hello(local_protocol(), device_info("a"), "one", health=Health()), lambda body: None)
        for begin in (2**63 - 1, shell.now_ms + 367 * 86_400_000):
            with pytest.raises(UsageError, match="begins too late"):
                await shell.reserve("a", "ann", begin, 1_000, "")
        await shell.reserve("a", "ann", shell.now_ms + 365 * 86_400_000, 1_000, "")
        shell.close()

    store = Store(tmp_path)
    asyncio.run(reserve(store))
    store.close()
