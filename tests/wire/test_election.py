"""Which of several trackers leads: what the election does with what others wrote, and with a server that is silent."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.election import Election, Member, View
from kedge.rpc.tracker.schema import prepare
from kedge.rpc.transport import Address
from support.postgres import PostgresServer


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
        while not isinstance(said := self.told.get(timeout=20), View):
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
