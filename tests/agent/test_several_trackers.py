"""Two trackers on one PostgreSQL database, with agents and clients: one of them is lost, and work goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, aio, connect
from kedge.rpc.client.fleet import Job
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.transport import Address
from kedge.rpc.types import Deadlines, JobState
from support.agents import AgentProcess, wait_for
from support.handmade import artifact as handmade
from support.postgres import PostgresServer, postgres_server
from support.trackers import TrackerProcess

from .conftest import FUNCTIONS

X = np.arange(4, dtype=np.float32)
#: From the loss of the leader until another one gives jobs to devices: some seconds where no tests run beside it. Of a
#: lock that outlives its holder nobody would hear.
FAIL_OVER_S = 40.0


@dataclass
class Pair:
    """Two trackers: `a` has led first. `address` names both."""

    url: str
    a: TrackerProcess
    b: TrackerProcess
    postgres: PostgresServer

    @property
    def address(self) -> Address:
        return Address(self.a.address.host, self.a.address.port, (self.b.address,))

    def fleet(self) -> Fleet:
        return Fleet(self.address, self.a.tls())

    def agent(self, runner: Path, folder: Path, name: str, trackers: Address) -> AgentProcess:
        with self.a.access() as access:
            join = str(access.enrol_token(name)[0])
        environment = {**os.environ, "KEDGE_JOIN": join}
        return AgentProcess(str(trackers), runner, folder, name=name, env=environment, secure=True)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        return self.postgres.execute(statement, self.url.rpartition("/")[2])

    def leads(self, tracker: TrackerProcess) -> bool:
        return any(each.leads and each.address == str(tracker.address) for each in tracker.status().trackers)

    def check_each_job_ended_once(self, jobs: list[Job]) -> None:
        """Each job that was accepted is there with one result, and there is no other job."""
        rows = self.query("SELECT j.id, j.state, r.outcome FROM jobs j LEFT JOIN results r ON r.job_id = j.id")
        assert sorted(str(row[0]) for row in rows) == sorted(job.id for job in jobs)
        assert {row[1] for row in rows} == {"done"}
        assert self.query("SELECT count(*) FROM results") == [(len(jobs),)]


@pytest.fixture
def pair(postgres: PostgresServer, tmp_path: Path) -> Iterator[Pair]:
    yield from make_pair(postgres, tmp_path)


def make_pair(postgres: PostgresServer, folder: Path) -> Iterator[Pair]:
    url = postgres.new_database()
    with TrackerProcess(url, folder / "a") as a:
        a.wait_ready()
        with a.access() as access:
            join = access.create_token("tracker")[1]
        with TrackerProcess(url, folder / "b", "--join", str(join)) as b:
            b.wait_ready()
            wait_for(lambda: len(b.status().trackers) == 2, "both to be seen")
            yield Pair(url, a, b, postgres)


@pytest.fixture(scope="module")
def made(module: bytes) -> Artifact:
    return handmade(module, FUNCTIONS)


def add(fleet: Fleet, made: Artifact, value: int = 0, **options: object) -> Job:
    return fleet.run(made, {"x": X + value}, function="add", **options)  # type: ignore[arg-type]


def linger(fleet: Fleet, made: Artifact, run_ms: int) -> Job:
    return fleet.run(made, {"x": X}, function="linger", deadlines=Deadlines(run_ms=run_ms))


def check_added(job: Job, value: int = 0) -> None:
    np.testing.assert_array_equal(job.wait(60)["y"], X + value + 1)


def test_both_serve_clients_agents_and_administrators(pair: Pair, runner: Path, made: Artifact, tmp_path: Path) -> None:
    with pair.agent(runner, tmp_path / "agent", "rpi", pair.b.address) as agent:
        agent.wait_ready()
        with pair.a.fleet() as at_a, pair.b.fleet() as at_b:
            check_added(add(at_b, made))
            check_added(add(at_a, made))
            job = add(at_b, made, 5)
            check_added(at_a.job(job.id), 5)
            large = np.arange(700_000, dtype=np.float32)
            for here, there in ((at_a, at_b), (at_b, at_a)):
                result = there.job(here.run(made, {"x": large}, function="add").id).wait(60)
                np.testing.assert_array_equal(result["y"], large + 1)
            with at_b.session("rpi") as device:
                kept = device.tensor(X)
                np.testing.assert_array_equal(device.load(made)["add"]({"x": kept})["y"], X + 1)
            status = at_b.status()
            assert (
                (status.epoch, len(status.trackers)) == (1, 2) and pair.leads(pair.a) and not status.trackers[1].leads
            )
        with pair.b.access() as access:
            token = access.create_token("read", "ann")[0]
            access.revoke_token(token.id)
            access.revoke_device("rpi")
        agent.wait_log("was revoked")
        with pair.b.fleet() as at_b:
            wait_for(lambda: not at_b.devices("name=rpi", include_gone=True), "it to be forgotten")
    audit = (pair.a.data_dir / "security" / "audit.jsonl").read_text()
    assert '"through": "ipv4:127.0.0.1' in audit and '"event": "device revoked"' in audit


def test_a_killed_leader_is_replaced_and_every_job_ends_once(
    pair: Pair, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    at_a = pair.agent(runner, tmp_path / "agent-a", "at-a", pair.address)
    at_b = pair.agent(
        runner, tmp_path / "agent-b", "at-b", Address("127.0.0.1", pair.b.address.port, (pair.a.address,))
    )
    with at_a, at_b, pair.fleet() as fleet:
        at_a.wait_ready()
        at_b.wait_ready()
        running = [linger(fleet, made, 6_000) for _ in range(2)]
        wait_for(lambda: all(job.status().state is JobState.RUNNING for job in running), "both to run")
        queued = [add(fleet, made, number) for number in range(10)]
        pair.a.kill()
        began = time.monotonic()
        wait_for(lambda: pair.leads(pair.b), "the other one to lead")
        assert time.monotonic() - began < FAIL_OVER_S
        late = add(fleet, made, 99)
        for number, job in enumerate(queued):
            check_added(job, number)
        check_added(late, 99)
        for job in running:
            result = job.wait(60, check=False)
            assert result.outcome.kind is OutcomeKind.TIMEOUT
            assert job.status().faults == (), "its device went on with it"
        pair.check_each_job_ended_once([*running, *queued, late])
        assert pair.query("SELECT max(requeues) FROM jobs") == [(0,)]
        pair.a.start()
        pair.a.wait_log("kedge tracker ready")
        wait_for(lambda: pair.a.status().epoch == 2, "the old leader to follow")
        with pair.a.fleet() as back:
            check_added(add(back, made))


def test_jobs_are_given_to_devices_soon_after_the_leader_was_killed(
    pair: Pair, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    with pair.agent(runner, tmp_path / "agent", "rpi", pair.address) as agent, pair.fleet() as fleet:
        agent.wait_ready()
        check_added(add(fleet, made))
        pair.a.kill()
        began = time.monotonic()
        check_added(add(fleet, made, 1), 1)
        assert time.monotonic() - began < FAIL_OVER_S


def test_a_leader_that_stood_still_writes_nothing_and_follows(
    pair: Pair, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    there = Address("127.0.0.1", pair.b.address.port)
    with (
        pair.agent(runner, tmp_path / "agent", "rpi", there) as agent,
        pair.a.fleet() as at_a,
        pair.b.fleet() as at_b,
        ThreadPoolExecutor() as threads,
    ):
        agent.wait_ready()
        first = add(at_a, made)
        check_added(first)
        pair.a.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            # Already on its way to the one that stands still: it is the first thing that this one sees afterwards.
            pending = threads.submit(add, at_a, made, 7)
            wait_for(lambda: pair.leads(pair.b), "the other one to lead")
            second = add(at_b, made, 1)
            check_added(second, 1)
            assert time.monotonic() - began < FAIL_OVER_S
            before = pair.query("SELECT id FROM jobs ORDER BY id")
        finally:
            pair.a.signal(signal.SIGCONT)
        pair.a.wait_log("this tracker leads no more")
        third = pending.result(60)
        check_added(third, 7)
        pair.check_each_job_ended_once([first, second, third])
        assert len(before) == 2 and pair.query("SELECT epoch FROM leadership") == [(2,)]
        assert pair.a.status().epoch == 2 and not pair.leads(pair.a)


def test_a_killed_follower_costs_nothing(pair: Pair, runner: Path, made: Artifact, tmp_path: Path) -> None:
    trackers = Address("127.0.0.1", pair.b.address.port, (pair.a.address,))
    with pair.agent(runner, tmp_path / "agent", "rpi", trackers) as agent, Fleet(trackers, pair.a.tls()) as fleet:
        agent.wait_ready()
        lingering = linger(fleet, made, 4_000)
        wait_for(lambda: lingering.status().state is JobState.RUNNING, "the job to run")
        queued = add(fleet, made)
        pair.b.kill()
        assert lingering.wait(60, check=False).outcome.kind is OutcomeKind.TIMEOUT
        check_added(queued)
        pair.check_each_job_ended_once([lingering, queued])
        assert pair.query("SELECT max(requeues), max(faults) FROM jobs") == [(0, "[]")] and pair.leads(pair.a)


def test_a_blob_that_one_tracker_lacks_is_fetched_from_the_other(
    pair: Pair, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    """Uploads are at both; of each that is lost at one, the other's copy is taken, and checked."""
    large = np.arange(700_000, dtype=np.float32)

    def objects(tracker: TrackerProcess) -> dict[str, Path]:
        return {path.name: path for path in (tracker.data_dir / "blobs" / "objects").glob("*/*")}

    with pair.agent(runner, tmp_path / "agent", "rpi", pair.address) as agent, pair.fleet() as fleet:
        agent.wait_ready()
        job = fleet.run(made, {"x": large}, function="add")
        job.wait(60)
        assert objects(pair.a).keys() == objects(pair.b).keys() and len(objects(pair.a)) >= 4
        for path in objects(pair.a).values():
            path.unlink()
        with ThreadPoolExecutor(4) as threads:
            waits = [threads.submit(fleet.job(job.id).wait, 60) for _ in range(4)]
            for each in waits:
                np.testing.assert_array_equal(each.result()["y"], large + 1)
        fetched = [line for line in pair.a.lines if "fetched blob" in line]
        assert len(fetched) == 1, "several who want it at once fetch it once"
        again = add(Fleet(pair.address, pair.a.tls()), made)  # its artifact is said to be there, and is
        check_added(again)
        output = next(name for name in objects(pair.a) if name in fetched[0])
        objects(pair.a)[output].unlink()
        copy = objects(pair.b)[output]
        copy.write_bytes(copy.read_bytes()[:-1] + b"\xff")
        with pytest.raises(Exception, match="not on the tracker"):
            fleet.job(job.id).wait(60)


def test_blobs_of_jobs_outlive_the_tracker_that_took_them(
    pair: Pair, runner: Path, made: Artifact, tmp_path: Path
) -> None:
    """Its disk is gone for good; a job that waits has all that it needs all the same."""
    large = np.arange(700_000, dtype=np.float32)
    with pair.a.fleet() as fleet:
        job = fleet.run(made, {"x": large}, function="add", device="gpu=none")
        pair.a.kill()
    with pair.b.fleet() as fleet:
        wait_for(lambda: pair.leads(pair.b), "the other one to lead")
        same = fleet.run(made, {"x": large}, function="add")
        assert fleet.job(job.id).status().state is JobState.QUEUED
        with pair.b.access() as access:
            join = str(access.enrol_token("rpi")[0])
        environment = {**os.environ, "KEDGE_JOIN": join}
        with AgentProcess(
            str(pair.b.address), runner, tmp_path / "agent", name="rpi", env=environment, secure=True
        ) as agent:
            agent.wait_ready()
            np.testing.assert_array_equal(same.wait(60)["y"], large + 1)


def test_a_database_that_goes_away_and_comes_back_loses_nothing(runner: Path, made: Artifact, tmp_path: Path) -> None:
    with postgres_server() as server:
        for pair in make_pair(server, tmp_path):
            with pair.agent(runner, tmp_path / "agent", "rpi", pair.address) as agent, pair.fleet() as fleet:
                agent.wait_ready()
                before = [linger(fleet, made, 3_000), add(fleet, made)]
                wait_for(lambda: before[0].status().state is JobState.RUNNING, "the first to run")  # noqa: B023
                server.stop()
                with ThreadPoolExecutor() as threads:
                    meanwhile = threads.submit(add, fleet, made, 3)
                    pair.a.wait_log("leads no more")
                    assert not meanwhile.done()
                    server.start()
                    job = meanwhile.result(60)
                check_added(job, 3)
                assert before[0].wait(60, check=False).outcome.kind is OutcomeKind.TIMEOUT
                check_added(before[1])
                pair.check_each_job_ended_once([*before, job])


def test_several_addresses_are_one_fleet(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients, also by name; who was joined at one is known at all."""
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(pair.a.data_dir.with_name("a-config")))
    gone = "127.0.0.1:1"
    for text in (f"{gone},{pair.a.address}", f"{pair.a.address},{pair.b.address}", f"localhost:1,{pair.a.address}"):
        with connect(text) as fleet:
            assert len(fleet.status().trackers) == 2 and fleet.devices() == []

        async def ask(text: str = text) -> int:
            async with await aio.connect(text) as fleet:
                return len((await fleet.status()).trackers)

        assert asyncio.run(ask()) == 2
