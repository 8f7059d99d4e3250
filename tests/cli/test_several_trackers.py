"""What people see of several trackers: the command's table, the doctor, metrics."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedge.fleet_diagnosis import hops
from kedge.rpc.client import connect
from kedge.rpc.client.access import Access
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address
from support.agents import wait_for
from support.commands import Kedge
from support.postgres import PostgresServer, postgres
from support.toys import QUICK

__all__ = ["postgres"]


@pytest.fixture
def first(postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningTracker]:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    options = {"settings": QUICK, "database": postgres.new_database(), "metrics": Address("127.0.0.1", 0)}
    with start(port=0, data_dir=tmp_path / "first", **options) as running:
        yield running


def trackers(address: object) -> tuple[str, str]:
    (finding,) = [finding for finding in hops(str(address), None) if finding.check == "trackers"]
    return finding.status, finding.found


def metrics(tracker: RunningTracker) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{tracker.serving.metrics}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_second_tracker_is_seen_and_takes_over(
    first: RunningTracker, postgres: PostgresServer, kedge: Kedge, tmp_path: Path
) -> None:
    assert trackers(first.address)[0] == "note", "one alone is not what several are for"
    assert first.serving.keys is not None
    with Access(first.address, first.serving.keys.admin_tls()) as access:
        join = access.create_token("tracker")[1]
    url = postgres.url(f"kedge_{postgres._databases}")
    scraped = Address("127.0.0.1", 0)
    with start(
        port=0, data_dir=tmp_path / "second", settings=QUICK, database=url, join=join, metrics=scraped
    ) as second:
        both = f"{first.address},{second.address}"
        with connect(both) as fleet:
            wait_for(lambda: len(fleet.status().trackers) == 2, "both to be seen")
        assert trackers(both) == ("ok", f"2 alive; {first.address} leads, in epoch 1")
        listed = kedge("tracker", "status", "--tracker", both)
        assert listed.returncode == 0 and listed.stdout.count("leads, epoch 1") == 1 and "follows" in listed.stdout
        assert (metrics(first)["kedge_tracker_is_leader"], metrics(second)["kedge_tracker_is_leader"]) == (1, 0)
        assert "kedge_agents_connected" in metrics(first) and "kedge_agents_connected" not in metrics(second)
        first.stop()
        with connect(both) as fleet:
            wait_for(lambda: fleet.status().epoch == 2, "the other one to lead")
        said = json.loads(kedge("tracker", "status", "--tracker", both, "--json").stdout)
        assert said["epoch"] == 2
        assert [each["address"] for each in said["trackers"] if each["leads"]] == [str(second.address)]
        now = metrics(second)
        assert (now["kedge_tracker_is_leader"], now["kedge_tracker_epoch"]) == (1, 2)
        assert now["kedge_tracker_leaderships_total"] == 1 and now["kedge_agents_connected"] == 0


def test_options_that_need_a_database(kedge_here: Kedge, tmp_path: Path) -> None:
    done = kedge_here("tracker", "start", "--port", "0", "--data-dir", tmp_path / "t", "--advertise", "a")
    assert done.returncode == 2 and "name their --database" in done.stderr
    done = kedge_here("tracker", "start", "--port", "0", "--data-dir", tmp_path / "t", "--database", "mysql://a/b")
    assert done.returncode == 2 and "postgresql://" in done.stderr
    database = ("--database", "postgresql://db.invalid/kedge")
    done = kedge_here(
        "tracker", "start", "--port", "0", "--data-dir", tmp_path / "t", *database, "--advertise", "lab:9190"
    )
    assert done.returncode == 2 and "'lab:9190' is neither a host name" in done.stderr
