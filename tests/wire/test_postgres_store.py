"""What holds for the store on PostgreSQL alone: fencing, lost connections, and what it refuses."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from kedge.rpc.errors import UsageError
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.tracker import database as databases
from kedge.rpc.tracker import schema
from kedge.rpc.tracker.cluster import check_database
from kedge.rpc.tracker.database import Postgres, database
from kedge.rpc.tracker.epoch import Epoch, FencedError, take_lead
from kedge.rpc.tracker.facts import Fact, JobAccepted, JobDone, Serviced
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreAwayError, StoreError, prepare
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import Blob, JobFilter, JobResult, JobSpec, JobState, RunTask
from support.logged import wait_for
from support.postgres import PostgresServer, postgres_server

SPEC = JobSpec(Blob("0" * 64, 9), "main", RunTask(()), "")


@pytest.fixture
def place(postgres: PostgresServer) -> Postgres:
    return Postgres(postgres.new_database())


def accepted(job_id: str, seq: int) -> JobAccepted:
    return JobAccepted(job_id, seq, SPEC, (), f"key-{job_id}", 100 + seq)


def lead(place: Postgres) -> Epoch:
    engine = place.engine()
    with engine.begin() as connection:
        prepare(connection, place.name)
        return take_lead(connection, "a", 5)


def write(store: Store, *facts: Fact) -> None:
    durable = threading.Event()
    store.append(facts, durable.set)
    assert durable.wait(60)


def end_sessions(postgres: PostgresServer, place: Postgres) -> None:
    name = place.name.rpartition("/")[2]
    postgres.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"
    )


def test_epochs_grow_and_only_the_newest_writes(place: Postgres) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    old = Store(place, epoch=lead(place), on_failure=failures.put)
    write(old, accepted("a", 1))
    newer = lead(place)
    assert newer.number == 2
    told = threading.Event()
    old.append([accepted("b", 2)], told.set)
    assert isinstance(failures.get(timeout=60), FencedError)
    new = Store(place, epoch=newer)
    assert [record.accepted.job_id for record in new.found.records] == ["a"] and not told.is_set()
    write(new, accepted("c", 2))
    with pytest.raises(StoreError, match="is closed"):
        old.job("a").result(60)
    old.close()
    new.close()


def test_whoever_reads_from_an_old_leader_is_told_that_it_leads_no_more(place: Postgres) -> None:
    """Also who waits for the commit that finds it out."""
    hold, held = threading.Event(), threading.Event()
    old = Store(place, epoch=lead(place))

    def wait() -> None:
        held.set()
        assert hold.wait(60)

    old.append([accepted("a", 1)], wait)
    assert held.wait(60)
    lead(place)
    reads = [old.job("a")]
    old.append([accepted("b", 2)], lambda: None)
    reads.append(old.job("b"))
    hold.set()
    for read in reads:
        with pytest.raises(StoreAwayError, match="is closed"):
            read.result(60)
    old.close()


def test_what_an_old_leader_has_in_mid_transaction_is_whole_or_nothing_and_never_late(place: Postgres) -> None:
    """One that stands still there is ended by the server: the next leader waits no longer than that takes."""
    epoch = lead(place)
    engine = place.engine()
    with engine.connect() as stopped:
        transaction = stopped.begin()
        epoch.enter(stopped)
        stopped.execute(sa.text("INSERT INTO idempotency_keys VALUES ('late', 'j')"))
        assert lead(place).number == 2  # where nobody ends that session, it fails after a statement's longest time
        with pytest.raises(sa.exc.DBAPIError) as ended:
            transaction.commit()
        assert ended.value.connection_invalidated
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM idempotency_keys")).scalar_one() == 0


def test_a_lost_connection_is_made_again_and_nothing_is_stored_twice(postgres: PostgresServer, place: Postgres) -> None:
    troubles: queue.Queue[bool] = queue.Queue()
    store = Store(place, epoch=lead(place), on_trouble=troubles.put)
    for number in range(1, 9):
        end_sessions(postgres, place)
        write(store, accepted(f"j{number}", number))
    assert troubles.get(timeout=60) is True and troubles.get(timeout=60) is False
    assert len(store.jobs(100, ()).result(60).jobs) == 8
    store.close()


@contextmanager
def answers_lost(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list[bool]]:
    """So many commits are done and look as if they were not; the list is empty once it was so."""
    commit = sa.engine.base.RootTransaction._connection_commit_impl  # type: ignore[attr-defined]
    lost = [True] * number

    def answer_lost(transaction: sa.engine.base.RootTransaction) -> None:
        commit(transaction)
        if lost and lost.pop():
            raise sa.exc.OperationalError("COMMIT", {}, Exception("the connection was lost"))

    with monkeypatch.context() as patched:
        patched.setattr(sa.engine.base.RootTransaction, "_connection_commit_impl", answer_lost)
        yield lost


def test_a_commit_whose_answer_was_lost_counts(place: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(place, epoch=lead(place))
    with answers_lost(monkeypatch, 2) as lost:
        write(store, accepted("a", 1))
        write(store, accepted("b", 2), JobDone("b", JobResult(Outcome(OutcomeKind.OK)), 5))
        assert not lost
    assert [job.id for job in store.jobs(10, ()).result(60).jobs] == ["b", "a"]
    store.close()


def test_what_was_forgotten_in_a_commit_whose_answer_was_lost_is_told(
    place: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Retention(jobs=0, days=0.0, least_s=0.0, every_s=0.01)
    store = Store(place, epoch=lead(place), keep=keep)
    write(store, accepted("a", 1), JobDone("a", JobResult(Outcome(OutcomeKind.OK)), 5))
    told: queue.Queue[list[str]] = queue.Queue()
    with answers_lost(monkeypatch, 1) as lost:
        store.when_forgotten(lambda _ids, keys: told.put(list(keys)))
        assert told.get(timeout=60) == ["key-a"] and not lost
    assert store.jobs(10, ()).result(60).jobs == []
    store.close()


def test_a_server_that_is_gone_is_tried_for_some_seconds_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    monkeypatch.setattr(Postgres, "patience_s", 2.0)
    with postgres_server() as server:
        place = Postgres(server.new_database())
        store = Store(place, epoch=lead(place), on_failure=failures.put)
        write(store, accepted("a", 1))
        server.stop()
        told = threading.Event()
        store.append([accepted("b", 2)], told.set)
        error = failures.get(timeout=60)
        assert isinstance(error, StoreError) and "PostgreSQL server runs" in str(error)
        store.close()
        server.start()
        again = Store(place, epoch=lead(place))
        assert [record.accepted.job_id for record in again.found.records] == ["a"] and not told.is_set()
        again.close()


def test_text_with_a_nul_character_is_stored(place: Postgres) -> None:
    store = Store(place)
    key = "k\0ey"
    write(store, replace(accepted("a", 1), key=key), Serviced("d", "why\0so", "root", 5))
    assert store.job_of_key(key).result(60) == "a"
    store.close()
    again = Store(place)
    assert again.found.serviced == (Serviced("d", "why\ufffdso", "root", 5),)
    again.close()


def test_artifacts_are_found_by_how_they_begin_in_a_database_of_any_language(postgres: PostgresServer) -> None:
    """Danish has "aa" behind "z"; so has what a database of an older kedge becomes."""
    if not postgres.execute("SELECT 1 FROM pg_collation WHERE collprovider = 'i'"):
        pytest.skip("needs a PostgreSQL server that was built with ICU")
    how = "TEMPLATE template0 ENCODING 'UTF8' LOCALE_PROVIDER icu ICU_LOCALE 'da' LC_COLLATE 'C' LC_CTYPE 'C'"
    postgres.execute(f"CREATE DATABASE kedge_danish {how}")
    place = Postgres(postgres.url("kedge_danish"))
    digests = ["aa" * 32, "a0" * 32, "af" * 32, "ff" * 32, "b" * 64]
    for upgraded in (False, True):
        store = Store(place)
        if upgraded:
            assert postgres.execute("SELECT 'aa' > 'af'", "kedge_danish") == [(True,)]
        for number, digest in enumerate(digests, 1) if not upgraded else ():
            one = replace(accepted(f"j{number}", number), spec=replace(SPEC, manifest=Blob(digest, 9)))
            other = replace(one, job_id=f"k{number}", seq=10 + number, key=f"other-{number}")
            write(store, one, JobDone(one.job_id, JobResult(Outcome(OutcomeKind.OK)), 5), other)
        for beginning in ("a", "aa", "aaa", "af", "f", "ff", "b", "bb", "a0"):
            fit = [number for number, digest in enumerate(digests, 1) if digest.startswith(beginning)][::-1]
            wanted = JobFilter(artifact=beginning)
            live = [f"k{number}" for number in fit]
            found = [job.id for job in store.jobs(20, (), wanted=wanted).result(60).jobs]
            assert found == [*live, *(f"j{number}" for number in fit)], beginning
            queued = store.jobs(20, (JobState.QUEUED,), wanted=wanted).result(60).jobs
            assert [job.id for job in queued] == live, beginning
        store.close()
        for statement in (
            "ALTER TABLE jobs DROP COLUMN artifact",
            "UPDATE meta SET value = '10' WHERE name = 'schema'",
        ):
            postgres.execute(statement, "kedge_danish")


def test_trackers_that_start_at_once_make_the_tables_once(place: Postgres) -> None:
    ids: queue.Queue[str] = queue.Queue()

    def start() -> None:
        with place.engine().begin() as connection:
            ids.put(prepare(connection, place.name))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert len({ids.get(timeout=60) for _ in threads}) == 1


def test_tables_are_brought_up_to_date_however_long_that_takes(
    postgres: PostgresServer, place: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(place).close()
    postgres.execute("UPDATE meta SET value = '5' WHERE name = 'schema'", place.name.rpartition("/")[2])
    monkeypatch.setattr(databases, "_STATEMENT_MS", 300)
    monkeypatch.setattr(databases, "_UNANSWERED_S", 0.5)
    monkeypatch.setattr(databases, "_IDLE_IN_TRANSACTION_MS", 300)

    def at_length(connection: sa.Connection) -> None:
        connection.execute(sa.text("SELECT pg_sleep(1)"))
        time.sleep(0.5)  # what it does in Python between two statements

    monkeypatch.setattr(schema, "_to_schema_6", at_length)
    check_database(place, None)
    monkeypatch.setattr(schema, "_to_schema_6", lambda connection: pytest.fail("it was done"))
    check_database(place, None)


def test_a_newer_schema_is_refused(postgres: PostgresServer, place: Postgres) -> None:
    Store(place).close()
    postgres.execute("UPDATE meta SET value = '99' WHERE name = 'schema'", place.name.rpartition("/")[2])
    with pytest.raises(StoreError, match="newer kedge"):
        Store(place)


def test_what_is_no_database_is_refused_with_a_remedy(postgres: PostgresServer) -> None:
    with pytest.raises(UsageError, match="no URL") as caught:
        Postgres("not a url")
    assert "postgresql://" in str(caught.value)
    with pytest.raises(UsageError, match="'mysql' are not known"):
        Postgres("mysql://db/kedge")
    with pytest.raises(StoreError, match="PostgreSQL server runs there") as caught_store:
        Store(Postgres(postgres.url("no_such").replace("kedge@", "kedge:secret@")))
    assert "no_such" in str(caught_store.value) and "secret" not in str(caught_store.value)


def test_commits_are_durable_whatever_the_server_is_set_to(postgres: PostgresServer, place: Postgres) -> None:
    name = place.name.rpartition("/")[2]
    postgres.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    assert postgres.execute("SHOW synchronous_commit", name) == [("off",)]
    for engine in (place.engine(), place.lock_engine(9_000)):
        with engine.connect() as connection:
            assert connection.execute(sa.text("SHOW synchronous_commit")).scalar_one() == "on"


def test_names_of_databases_hold_no_secrets() -> None:
    secret = "postgresql://kedge:hidden1@/kedge?host=db.lab&password=hidden2&sslpassword=hidden3&sslmode=require"
    assert Postgres(secret).name == "postgresql://kedge:***@/kedge?host=db.lab"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match="'psycopg', which is not installed") as caught:
        database("postgresql://db/kedge", None)  # type: ignore[arg-type]
    assert "kedge[postgres]" in str(caught.value)


class Leaders(RuleBasedStateMachine):
    """Trackers take the lead from each other and write, also after they have lost it, over connections that break."""

    server: PostgresServer

    def __init__(self) -> None:
        super().__init__()
        self.place = Postgres(self.server.new_database())
        self.stores: list[Store] = []
        self.number = 0
        #: Jobs whose storing was told, in the order of their numbers.
        self.told: list[str] = []
        self.pending: list[tuple[str, Store, threading.Event]] = []

    @rule()
    def take_the_lead(self) -> None:
        epoch = lead(self.place)
        assert epoch.number == len(self.stores) + 1
        self.settle()
        store = Store(self.place, epoch=epoch)
        assert [record.accepted.job_id for record in store.found.records] == self.told, "all that was told, and no more"
        self.stores.append(store)

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), facts=st.integers(1, 3))
    def write(self, data: st.DataObject, facts: int) -> None:
        store = self.stores[data.draw(st.integers(0, len(self.stores) - 1), label="tracker")]
        for _ in range(facts):
            self.number += 1
            durable = threading.Event()
            store.append([accepted(f"j{self.number}", self.number)], durable.set)
            self.pending.append((f"j{self.number}", store, durable))

    @precondition(lambda self: self.stores)
    @rule()
    def lose_connections(self) -> None:
        end_sessions(self.server, self.place)

    @precondition(lambda self: self.stores)
    @rule()
    def look(self) -> None:
        self.settle()
        assert [job.id for job in self.stores[-1].jobs(1000, ()).result(60).jobs][::-1] == self.told

    def settle(self) -> None:
        """Wait for what the newest leader was given; of older ones nothing may have been stored since."""
        pending, self.pending = self.pending, []
        for job_id, store, durable in pending:
            if store is self.stores[-1]:
                wait_for(lambda: durable.is_set() or not store._thread.is_alive(), "it to be stored")  # noqa: B023
            else:
                store._thread.join(60)
                assert not store._thread.is_alive(), "it has found out that it leads no more"
            if durable.is_set():
                self.told.append(job_id)

    def teardown(self) -> None:
        for store in self.stores:
            store.close()


def test_whoever_leads_nothing_is_lost_and_nothing_comes_late(postgres: PostgresServer) -> None:
    machine = type("Machine", (Leaders,), {"server": postgres})
    run_state_machine_as_test(machine, settings=settings(max_examples=10, stateful_step_count=8, deadline=None))
