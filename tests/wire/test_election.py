"""Which of several trackers leads: what the election does with what others wrote, and with a server that is silent."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kedge.protos.v1 import fleet_pb2
from kedge.rpc.client import Fleet
from kedge.rpc.tracker import cluster, election
from kedge.rpc.tracker import database as databases
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.election import Election, Member, View
from kedge.rpc.tracker.epoch import Epoch, take_lead
from kedge.rpc.tracker.schema import StoreAwayError, StoreError, prepare
from kedge.rpc.tracker.server import start
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import Address
from support.agents import wait_for
from support.postgres import PostgresServer
from support.toys import QUICK


@pytest.fixture
def place(postgres: PostgresServer) -> Postgres:
    found = Postgres(postgres.new_database())
    with found.engine().begin() as connection:
        prepare(connection, found.name)
    return found


class Heard:
    """A tracker that takes part; what it is told comes into a queue."""

    def __init__(self, place: Postgres, name: str = "a") -> None:
        self.told: queue.Queue[Any] = queue.Queue()
        member = Member(name, Address("127.0.0.1", 1), Address("127.0.0.1", 2), "kedge")
        put = self.told.put
        self.election = Election(place, member, put, put, put, put)

    def view(self) -> View:
        """The next one."""
        while not isinstance(said := self.told.get(timeout=60), View):
            assert not isinstance(said, BaseException), said
        return said


def test_an_address_of_another_tracker_that_is_none_stops_nobody(
    postgres: PostgresServer, place: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    postgres.execute(
        "INSERT INTO trackers (name, address, peers_address, software, started_ms, seen_ms)"
        " VALUES ('b', '[my lab]:9190', '[my lab]:9193', 'kedge', 1, 9999999999999)",
        place.name.rpartition("/")[2],
    )
    one = Heard(place)
    one.election.start()
    try:
        for _ in range(2):
            assert [seen.member.name for seen in one.view().members] == ["a"]
    finally:
        one.election.stop()
    assert caplog.text.count("nobody can reach the tracker b") == 1 and "my lab" in caplog.text


@contextmanager
def still(postgres: PostgresServer, place: Postgres) -> Iterator[None]:
    """The server's processes for this database stand still, and their kernel goes on acknowledging."""
    name = place.name.rpartition("/")[2]
    asked = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"
    pids = [int(str(row[0])) for row in postgres.execute(asked)]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_server_that_stands_still_ends_a_leadership_and_holds_up_no_stop(
    postgres: PostgresServer, place: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_LOCK_UNANSWERED_S", 3.0)
    one, other = Heard(place), Heard(place, "b")
    one.election.start()
    assert isinstance(one.told.get(timeout=60), Epoch)
    one.view()
    other.election.start()
    other.view()
    with still(postgres, place):
        other.election.stop()
        while not (isinstance(said := one.told.get(timeout=60), str) and "does not answer" in said):
            assert not isinstance(said, BaseException), said
        one.election.stop()


def test_a_leader_that_may_be_one_no_more_answers_nobody(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(election, "_SURE_S", 1.0)
    monkeypatch.setattr(election, "_SILENCE_MS", 600_000)  # nothing else ends its session, however slow this machine is
    for limit in ("_LOCK_UNANSWERED_S", "_UNANSWERED_S"):
        monkeypatch.setattr(databases, limit, 600.0)
    url = postgres.new_database()
    with start(port=0, data_dir=tmp_path / "t", settings=QUICK, database=url) as running:
        assert running.serving.keys is not None
        with Fleet(running.address, running.serving.keys.admin_tls()) as fleet:

            def refusal() -> str:
                try:
                    fleet._stub.Status(fleet_pb2.StatusRequest(), timeout=60)
                except grpc.RpcError as error:
                    return str(error.details())
                return ""

            wait_for(lambda: not refusal(), "it to lead")
            with still(postgres, Postgres(url)):
                caplog.clear()
                wait_for(lambda: "no tracker of this fleet leads" in refusal(), "it not to answer")
                assert "leads no more" not in caplog.text, "it has not found out itself"
            wait_for(lambda: not refusal(), "it to lead again")


def test_a_store_whose_server_stands_still_fails(
    postgres: PostgresServer, place: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "_UNANSWERED_S", 3.0)
    monkeypatch.setattr(Postgres, "patience_s", 0.5)
    with place.engine().begin() as connection:
        epoch = take_lead(connection, "a", 5)
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(place, epoch=epoch, on_failure=failures.put)
    durable = threading.Event()
    with still(postgres, place):
        store.append([], durable.set)
        error = failures.get(timeout=60)
        assert isinstance(error, StoreAwayError) and "does not answer" in str(error) and not durable.is_set()
        store.close()


@pytest.mark.parametrize("step", ["StoredOwners", "RetainedBlobs"])
def test_a_database_that_is_lost_while_a_tracker_takes_the_lead_costs_that_lead(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    works, stores = getattr(cluster, step), []

    def lost_once(*arguments: Any) -> Any:
        stores.extend(each for each in arguments if isinstance(each, Store))
        if len(stores) == 1:
            raise StoreAwayError("the connection was lost")
        return works(*arguments)

    monkeypatch.setattr(cluster, step, lost_once)
    with start(port=0, data_dir=tmp_path / "t", settings=QUICK, database=postgres.new_database()) as running:
        assert running.serving.keys is not None
        with Fleet(running.address, running.serving.keys.admin_tls()) as fleet:
            assert fleet.status().epoch == 2
        wait_for(lambda: not stores[0]._thread.is_alive(), "the first store to be closed")


def test_two_trackers_on_one_database_do_not_share_a_folder(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    url, folder = postgres.new_database(), tmp_path / "t"
    with start(port=0, data_dir=folder, settings=QUICK, database=url):
        with pytest.raises(StoreError, match=f"another tracker uses .*: process {os.getpid()}\\b") as no:
            start(port=0, data_dir=folder, settings=QUICK, database=url)
        assert "--data-dir" in str(no.value.hint)
    with start(port=0, data_dir=folder, settings=QUICK, database=url):
        pass  # it lets go of the folder when it stops
