from __future__ import annotations

import itertools
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kedge.rpc import convert
from kedge.rpc.artifact import Need, VariantDevice
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.database import Postgres, Sqlite
from kedge.rpc.tracker.facts import (
    BlobForgotten,
    BlobOwned,
    DeviceForgotten,
    DeviceSeen,
    Fact,
    JobAccepted,
    JobAssigned,
    JobCancelling,
    JobDone,
    JobRecord,
    JobRequeued,
    JobWithdrawn,
    NoiseKept,
    ReservationEnded,
    Reserved,
    Serviced,
    ServiceEnded,
)
from kedge.rpc.tracker.needed import Needed
from kedge.rpc.tracker.observer import Observer
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import (
    Blob,
    DeviceFault,
    DeviceInfo,
    JobFilter,
    JobResult,
    JobSpec,
    JobState,
    Measurement,
    NoiseSample,
    Reservation,
    RunTask,
    StepSamples,
    Tensor,
    TimeOptions,
    Verdict,
)
from support.postgres import PostgresServer
from support.watched import Watched

#: Where a store's tables are: everything that is not SQLite's own business holds for both.
Place = Path | Postgres

NEEDS = (
    Need("x86_64", frozenset({"avx2", "fma"})),
    Need("aarch64"),
    Need("x86_64", device=VariantDevice("cuda", "sm_80", 512, 1 << 14, ("fp16",)), index=1),
)
SPEC = JobSpec(Blob("0" * 64, 9), "main", RunTask((Tensor("x", "int8", (3,), b"abc"),)), "arch=x86_64", priority=3)
RESULT = JobResult(Outcome(OutcomeKind.OK), (Tensor("y", "int8", (1,), b"z"),), device="a")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        return tmp_path
    server: PostgresServer = request.getfixturevalue("postgres")
    return Postgres(server.new_database())


def accepted(job_id: str, seq: int, key: str = "") -> JobAccepted:
    return JobAccepted(job_id, seq, SPEC, NEEDS, key, 100 + seq)


def write(store: Store, *facts: Fact) -> None:
    durable = threading.Event()
    store.append(facts, durable.set)
    assert durable.wait(60)


def test_what_is_stored_is_found_again(place: Place) -> None:
    store = Store(place)
    tracker_id = store.found.tracker_id
    waiting, running = accepted("w", 1, "kw"), accepted("r", 2)
    assigned = JobAssigned("r", "a", "instance", 1)
    write(store, waiting, running, accepted("d", 3, "kd"), accepted("q", 4), assigned)
    write(store, JobAssigned("d", "a", "i", 1), JobDone("d", RESULT, 500))
    write(store, JobAssigned("q", "a", "i", 1), JobRequeued("q", 700, 1), JobCancelling("r", "enough"))
    store.close()
    again = Store(place)
    assert again.found.tracker_id == tracker_id
    assert again.found.records == (
        JobRecord(waiting),
        JobRecord(running, assigned, 1, "enough"),
        JobRecord(accepted("q", 4), None, 1, requeued=JobRequeued("q", 700, 1)),
    )
    assert again.found.ended == (("d", 1),)
    assert again.found.keys == (("kw", "w"), ("kd", "d"))
    assert again.found.last_seq == 4
    job = again.job("d").result(60)
    assert job is not None
    assert (job.state, job.result, job.spec, job.device) == (JobState.DONE, RESULT, SPEC, "a")
    assert (job.submitted_unix_ms, job.finished_unix_ms) == (103, 500)
    assert again.job("unknown").result(60) is None
    assert [job.id for job in again.jobs(2, ()).result(60).jobs] == ["q", "d"]
    assert [job.id for job in again.jobs(9, (JobState.QUEUED,)).result(60).jobs] == ["q", "w"]
    assert [job.id for job in again.jobs(9, (JobState.RUNNING,)).result(60).jobs] == ["r"]
    again.close()


def test_users_faults_maintenance_and_reservations_are_found_again(place: Place) -> None:
    faults = (DeviceFault("a", "the disk is full"), DeviceFault("b", "it was lost"))
    mine = replace(accepted("j", 1), user="ann")
    serviced = Serviced("a", "a new disk", "root", 50)
    kept, ended = (Reservation(name, "b", "ann", 60, 70, "a demo") for name in ("kept", "ended"))
    store = Store(place)
    write(store, mine, JobAssigned("j", "a", "i", 1), JobRequeued("j", 700, 0, faults), Reserved(kept), Reserved(ended))
    write(store, serviced, Serviced("b", "", "", 51), ServiceEnded("b"), ReservationEnded("ended"))
    store.close()
    again = Store(place)
    assert again.found.records == (JobRecord(mine, None, 1, requeued=JobRequeued("j", 700, 0, faults)),)
    assert (again.found.serviced, again.found.reservations) == ((serviced,), (kept,))
    job = again.job("j").result(60)
    assert job is not None and (job.user, job.faults) == ("ann", faults)
    again.close()


def test_the_noise_of_devices_is_found_again_without_what_is_forgotten(place: Place) -> None:
    old = NoiseSample("1", "a", "ann", 0.02, 1, "cpu", "llvm", "kedge 0.1", "performance", 1 << 40)
    new = replace(old, id="2", relative=0.1 / 3, on="cuda:0", governor="")
    store = Store(place)
    write(store, NoiseKept(old), NoiseKept(replace(old, id="gone")))
    write(store, NoiseKept(new, ("gone", "never there")))
    store.close()
    again = Store(place)
    assert again.found.noise == (old, new)
    again.close()


def test_a_database_of_the_sixth_schema_gets_room_for_noise(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    store = Store(place)
    write(store, accepted("w", 1))
    store.close()
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE noise"))
        connection.execute(sa.text("UPDATE meta SET value = '6' WHERE name = 'schema'"))
    engine.dispose()
    sample = NoiseSample("1", "a", "ann", 0.02, 1, "cpu", "llvm", "kedge 0.1", "performance", 100)
    store = Store(place)
    assert (store.found.noise, store.found.records) == ((), (JobRecord(accepted("w", 1)),))
    write(store, NoiseKept(sample))
    store.close()
    again = Store(place)
    assert again.found.noise == (sample,)
    again.close()


def test_sequence_numbers_are_remembered_when_every_job_is_done(place: Place) -> None:
    store = Store(place)
    assert store.found.last_seq == 0
    write(store, accepted("d", 7), JobAssigned("d", "a", "i", 1), JobDone("d", RESULT, 500))
    store.close()
    again = Store(place)
    assert (again.found.records, again.found.last_seq) == ((), 7)
    again.close()


def test_facts_are_durable_in_the_order_in_which_they_came(place: Place) -> None:
    store, order, all_done = Store(place), [], threading.Event()
    for number in range(200):

        def done(number: int = number) -> None:
            order.append(number)
            if number == 199:
                all_done.set()

        store.append([accepted(f"j{number}", number)], done)
    assert all_done.wait(60)
    assert order == list(range(200))
    assert len(store.jobs(1000, ()).result(60).jobs) == 200
    store.close()


@pytest.mark.parametrize("together", [2, 3, 5, 20])
def test_what_one_commit_says_is_stored_as_if_it_were_said_bit_by_bit(tmp_path: Path, together: int) -> None:
    """Of each job a row is written once for all that a commit says of it."""
    named = replace(RESULT, outputs=(Tensor("y", "int8", (9,), Blob("1" * 64, 9)),))
    facts = [
        accepted("a", 1, "ka"),
        JobAssigned("a", "one", "i", 1),
        accepted("b", 2),
        JobRequeued("a", 700, 1, (DeviceFault("one", "it broke"),)),
        JobCancelling("b", "enough"),
        JobAssigned("a", "two", "j", 2),
        accepted("c", 3, "kc"),
        JobAssigned("c", "one", "i", 1),
        JobWithdrawn("c"),
        JobDone("a", named, 900, (DeviceFault("one", "it broke"),)),
        accepted("c", 4, "kc"),
        accepted("d", 5),
        JobAssigned("d", "one", "i", 1),
        JobDone("d", RESULT, 950),
        JobDone("b", replace(RESULT, device=""), 960),
    ]

    def tables(name: str, step: int) -> dict[str, list[Any]]:
        store = Store(tmp_path / name)
        for at in range(0, len(facts), step):
            write(store, *facts[at : at + step])
        store.close()
        database = sqlite3.connect(tmp_path / name / "tracker.db")
        return {
            table: sorted(database.execute(f"SELECT * FROM {table}"))
            for table in ("jobs", "results", "idempotency_keys", "outputs")
        }

    single = tables("single", 1)
    assert [len(rows) for rows in single.values()] == [4, 3, 2, 1]
    assert tables("together", together) == single


def test_reading_sees_what_was_queued_before(place: Place) -> None:
    store = Store(place)
    store.append([accepted("j", 1)], lambda: None)
    job = store.job("j").result(60)
    assert job is not None and job.id == "j"
    store.close()


class Commits(Observer):
    """How many facts each commit had."""

    def __init__(self) -> None:
        self.facts: list[int] = []

    def committed(self, facts: int, duration_s: float) -> None:
        self.facts.append(facts)


def test_whoever_reads_in_between_does_not_part_what_is_committed_together(place: Place) -> None:
    commits, hold, held = Commits(), threading.Event(), threading.Event()
    store = Store(place, observer=commits)

    def wait() -> None:
        held.set()
        assert hold.wait(60)

    store.append([accepted("first", 1)], wait)
    assert held.wait(60)
    found = []
    for number in (2, 3, 4):
        store.append([accepted(f"j{number}", number)], lambda: None)
        found.append(store.job(f"j{number}"))
    hold.set()
    assert [job.id for each in found if (job := each.result(60)) is not None] == ["j2", "j3", "j4"]
    store.close()
    assert commits.facts == [1, 3]


def test_closing_stores_what_was_queued(place: Place) -> None:
    store = Store(place)
    for number in range(50):
        store.append([accepted(f"j{number}", number)], lambda: None)
    store.close()
    again = Store(place)
    assert len(again.found.records) == 50
    again.close()


def test_a_second_tracker_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="another tracker uses the data folder") as caught:
        Store(tmp_path)
    assert "--data-dir" in str(caught.value)
    store.close()
    Store(tmp_path).close()


def test_a_reader_that_gave_up_does_no_harm(place: Place) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(place, on_failure=failures.put)
    busy, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        assert go_on.wait(60)

    store.append([accepted("j", 1)], hold)
    assert busy.wait(60)
    given_up = store.jobs(10, ())
    assert given_up.cancel()
    go_on.set()
    job = store.job("j").result(60)
    assert job is not None and job.id == "j" and failures.empty()
    store.close()


def test_a_row_that_cannot_be_read_is_its_readers_trouble_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store, accepted("rotten", 1), JobDone("rotten", RESULT, 5), accepted("sound", 2))
    store.close()
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        connection.execute("UPDATE jobs SET spec = x'ff' WHERE id = 'rotten'")
    connection.close()
    again = Store(tmp_path)
    with pytest.raises(Exception, match="parsing"):
        again.job("rotten").result(60)
    assert [job.id for job in again.jobs(10, ()).result(60).jobs] == ["sound", "rotten"], "lists read briefs alone"
    again.close()


def test_lists_are_brief(place: Place) -> None:
    store = Store(place)
    profile = StepSamples(((1.0, 2.0, 3.0),) * 1_000, 1e9, (1e9,))
    measured = Measurement(TimeOptions(repeat=3), (1.0, 2.0, 3.0), verdict=Verdict.VALID, profile=profile)
    long = JobResult(Outcome(OutcomeKind.CRASH, message="x" * 4_000), RESULT.outputs, measured, device="a")
    write(store, accepted("j", 1), JobDone("j", long, 5))
    (listed,) = store.jobs(10, ()).result(60).jobs
    assert listed.spec.task.inputs == () and listed.result is not None and listed.result.measurement is not None
    assert (listed.result.outputs, listed.result.measurement.samples_ns) == ((), ())
    assert listed.result.measurement.profile is None
    assert listed.result.measurement.options.repeat == 3 and len(listed.result.outcome.message) == 500
    whole = store.job("j").result(60)
    assert whole is not None and whole.result == long
    store.close()


def test_what_was_withdrawn_is_not_found_again(place: Place) -> None:
    store = Store(place)
    write(store, accepted("j", 1, "k"), JobDone("j", RESULT, 5), JobWithdrawn("j"))
    assert store.job("j").result(60) is None and store.job_of_key("k").result(60) is None
    write(store, accepted("i", 2, "k"))
    assert store.job_of_key("k").result(60) == "i"
    store.close()


def test_it_says_whether_it_found_every_key(place: Place) -> None:
    store = Store(place)
    write(store, accepted("a", 1, "k1"), accepted("b", 2, "k2"), accepted("c", 3, "k3"))
    assert store.found.all_keys
    store.close()
    few = Store(place, remembered=2)
    assert few.found.keys == (("k2", "b"), ("k3", "c")) and not few.found.all_keys
    few.close()


SCHEMA_1 = """
CREATE TABLE meta (name VARCHAR NOT NULL PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE jobs (id VARCHAR NOT NULL PRIMARY KEY, seq BIGINT NOT NULL UNIQUE, spec BLOB NOT NULL,
  needs VARCHAR NOT NULL, submitted_ms BIGINT NOT NULL, state VARCHAR NOT NULL, device VARCHAR NOT NULL,
  instance_id VARCHAR NOT NULL, epoch BIGINT NOT NULL, cancelling VARCHAR);
CREATE INDEX ix_jobs_state ON jobs (state);
CREATE TABLE results (job_id VARCHAR NOT NULL PRIMARY KEY, outcome VARCHAR NOT NULL, result BLOB NOT NULL,
  finished_ms BIGINT NOT NULL);
CREATE TABLE idempotency_keys (key VARCHAR NOT NULL PRIMARY KEY, job_id VARCHAR NOT NULL);
INSERT INTO meta VALUES ('schema', '1'), ('tracker_id', 'old');
"""


def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    spec, result = convert.job_spec_to_bytes(SPEC), convert.job_result_to_bytes(RESULT)
    row = "INSERT INTO jobs VALUES (?, ?, ?, '[]', 100, ?, '', '', 0, NULL)"
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        connection.executescript(SCHEMA_1)
        connection.execute(row, ("w", 1, spec, "queued"))
        connection.execute(row, ("d", 2, spec, "done"))
        connection.execute("INSERT INTO results VALUES ('d', 'ok', ?, 500)", (result,))
    connection.close()
    for _ in range(2):
        store = Store(tmp_path)
        assert store.found.tracker_id == "old"
        assert store.found.records == (JobRecord(JobAccepted("w", 1, SPEC, (), "", 100)),)
        listed = store.jobs(10, ()).result(60).jobs
        assert [(job.id, job.spec.function, job.spec.task.inputs) for job in listed] == [
            ("d", "main", ()),
            ("w", "main", ()),
        ]
        assert listed[0].result is not None and listed[0].result.outputs == ()
        job = store.job("d").result(60)
        assert job is not None and (job.spec, job.result) == (SPEC, RESULT)
        store.close()


SCHEMA_2 = """
CREATE TABLE meta (name VARCHAR NOT NULL PRIMARY KEY, value VARCHAR NOT NULL);
CREATE TABLE jobs (id VARCHAR NOT NULL PRIMARY KEY, seq BIGINT NOT NULL UNIQUE, needs VARCHAR NOT NULL,
  submitted_ms BIGINT NOT NULL, state VARCHAR NOT NULL, device VARCHAR NOT NULL, instance_id VARCHAR NOT NULL,
  epoch BIGINT NOT NULL, cancelling VARCHAR, queued_ms BIGINT, requeues INTEGER NOT NULL, brief BLOB NOT NULL,
  spec BLOB NOT NULL);
CREATE INDEX ix_jobs_state ON jobs (state);
INSERT INTO meta VALUES ('schema', '2'), ('tracker_id', 'old');
"""


def test_a_database_of_the_second_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    spec = convert.job_spec_to_bytes(SPEC)
    row = "INSERT INTO jobs VALUES ('w', 1, '[]', 100, 'queued', '', '', 1, NULL, 300, 1, ?, ?)"
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        connection.executescript(SCHEMA_2)
        connection.execute(row, (spec, spec))
    connection.close()
    for _ in range(2):
        store = Store(tmp_path)
        again = JobRequeued("w", 300, 1)
        assert store.found.records == (JobRecord(JobAccepted("w", 1, SPEC, (), "", 100), None, 1, requeued=again),)
        store.close()


def test_blobs_of_results_are_found_again_and_listed_in_a_database_of_the_third_schema(tmp_path: Path) -> None:
    blobs = TrackerBlobs(tmp_path / "blobs", 100)
    made, other = blobs.put(b"made" * 10), blobs.put(b"other" * 10)
    result = replace(RESULT, outputs=(Tensor("y", "int8", (40,), made), Tensor("z", "int8", (40,), made)))
    store = Store(tmp_path)
    write(store, accepted("j", 1), JobDone("j", result, 5), accepted("i", 2), JobDone("i", RESULT, 5))
    store.close()
    for _ in range(2):
        store = Store(tmp_path)
        store.keep_needed(Needed(blobs, lambda manifest: (manifest.digest,)))
        blobs.redeem([made.digest, other.digest])
        blobs.make_room(60)
        assert blobs.has(made) and not blobs.has(other)
        store.close()
        other = blobs.put(b"other" * 10)
        blobs = TrackerBlobs(tmp_path / "blobs", 100)
        with sqlite3.connect(tmp_path / "tracker.db") as connection:
            connection.executescript(
                "DROP TABLE outputs; DROP INDEX ix_results_oldest; DROP INDEX ix_idempotency_keys_job_id;"
                "UPDATE meta SET value = '3' WHERE name = 'schema';"
            )
        connection.close()


def test_a_database_of_the_fifth_schema_has_the_indices_of_a_new_one(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    Store(place).close()
    engine = database.engine()

    def indices() -> set[str]:
        inspector = sa.inspect(engine)
        found = {str(index["name"]) for table in ("jobs", "results") for index in inspector.get_indexes(table)}
        return {name for name in found if name.startswith("ix_")}

    new = indices()
    with engine.begin() as connection:
        for name in new:
            connection.execute(sa.text(f"DROP INDEX {name}"))
        connection.execute(sa.text("CREATE INDEX ix_jobs_state ON jobs (state)"))
        connection.execute(sa.text("CREATE INDEX ix_results_finished_ms ON results (finished_ms)"))
        connection.execute(sa.text("UPDATE meta SET value = '5' WHERE name = 'schema'"))
    engine.dispose()
    Store(place).close()
    assert indices() == new >= {"ix_jobs_by_state", "ix_jobs_by_user", "ix_results_oldest"}
    engine.dispose()


def as_the_tenth_schema_was(database: Sqlite | Postgres) -> None:
    engine = database.engine()
    with engine.begin() as connection:
        for name in ("ix_jobs_by_artifact", "ix_jobs_by_user_and_device", "ix_jobs_by_time"):
            connection.execute(sa.text(f"DROP INDEX {name}"))
        connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN artifact"))
        connection.execute(sa.text("UPDATE meta SET value = '10' WHERE name = 'schema'"))
    engine.dispose()


def jobs_of(database: Sqlite | Postgres) -> list[dict[str, Any]]:
    """The rows of jobs, whatever columns they have, and the schema's number."""
    engine = database.engine()
    with engine.begin() as connection:
        rows = [dict(row) for row in connection.execute(sa.text("SELECT * FROM jobs ORDER BY seq")).mappings()]
        schema = connection.execute(sa.text("SELECT value FROM meta WHERE name = 'schema'")).scalar_one()
    engine.dispose()
    return [*rows, {"schema": schema}]


def test_jobs_of_the_tenth_schema_are_found_by_their_artifact(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    store = Store(place)
    for number in range(1, 1301):  # more than are filled in at once
        digest = f"{number % 3}" * 64 if number % 100 else ""  # sessions have none
        write_one = accepted(f"j{number}", number), *([JobDone(f"j{number}", RESULT, number)] if number % 7 else [])
        store.append(
            [replace(write_one[0], spec=replace(SPEC, manifest=Blob(digest, 9))), *write_one[1:]], lambda: None
        )
    store.close()
    new = jobs_of(database)
    assert [row["artifact"] for row in new[:3]] == ["1" * 64, "2" * 64, "0" * 64] and new[99]["artifact"] == ""
    as_the_tenth_schema_was(database)
    for _ in range(2):
        store = Store(place)
        wanted = JobFilter(artifact="22")
        found = [job.id for job in store.jobs(9_999, (), wanted=wanted).result(60).jobs]
        assert found == [f"j{number}" for number in range(1300, 0, -1) if number % 3 == 2 and number % 100]
        store.close()
        assert jobs_of(database) == new
    engine = database.engine()
    indices = {index["name"] for index in sa.inspect(engine).get_indexes("jobs")}
    assert indices >= {"ix_jobs_by_artifact", "ix_jobs_by_user_and_device", "ix_jobs_by_time"}
    with engine.begin() as connection:  # as an older kedge that led meanwhile would
        connection.execute(sa.text("UPDATE jobs SET artifact = NULL WHERE seq IN (5, 100)"))
    engine.dispose()
    Store(place).close()
    assert jobs_of(database) == new


def test_a_damaged_job_of_the_tenth_schema_is_told_of_and_no_more(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    store = Store(place)
    jobs = [f"j{number}" for number in range(1, 15)]
    for number, job_id in enumerate(jobs, 1):
        write(store, accepted(job_id, number), JobDone(job_id, RESULT, number))
    store.close()
    engine = database.engine()
    for damaged in ((5,), range(2, 15)):
        as_the_tenth_schema_was(database)
        with engine.begin() as connection:
            damage = sa.text("UPDATE jobs SET brief = :data WHERE seq = :seq")
            connection.execute(damage, [{"data": b"\xff", "seq": seq} for seq in damaged])
        engine.dispose()
        caplog.clear()
        store = Store(place)
        wanted = JobFilter(artifact="00")
        found = [job.id for job in store.jobs(20, (), wanted=wanted).result(60).jobs]
        assert found == [f"j{number}" for number in range(14, 0, -1) if number not in damaged]
        store.close()
        (warning,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
        assert warning.endswith("j5" if len(damaged) == 1 else "j11 and 3 more"), warning
        caplog.clear()
        Store(place).close()
        assert not caplog.records, "it is told once"


KILLED = """
import os, signal, sys
from pathlib import Path
from kedge.rpc import convert
from kedge.rpc.tracker.database import database
from kedge.rpc.tracker.store import Store
read, calls = convert.artifact_of_spec, []
def killed(data):
    calls.append(data)
    if len(calls) == 700:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(data)
convert.artifact_of_spec = killed
Store(database(sys.argv[1] or None, Path(sys.argv[2])))
"""


def test_bringing_the_tenth_schema_up_to_date_survives_its_kill(place: Place, tmp_path: Path) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    store = Store(place)
    write(store, *(accepted(f"j{number}", number) for number in range(1, 1301)))
    store.close()
    new = jobs_of(database)
    as_the_tenth_schema_was(database)
    old = jobs_of(database)
    url = database.name if isinstance(database, Postgres) else ""
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, url, str(tmp_path)], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert jobs_of(database) == old and "artifact" not in old[0]
    Store(place).close()
    assert jobs_of(database) == new


def test_a_database_of_the_ninth_schema_gets_the_index_of_devices(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    Store(place).close()
    engine = database.engine()
    with engine.begin() as connection:
        connection.execute(sa.text("DROP INDEX ix_jobs_by_device"))
        connection.execute(sa.text("UPDATE meta SET value = '9' WHERE name = 'schema'"))
    engine.dispose()
    Store(place).close()
    assert "ix_jobs_by_device" in {index["name"] for index in sa.inspect(engine).get_indexes("jobs")}
    engine.dispose()


def test_devices_are_as_they_came_or_went_last(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    one, moved, two, three = (
        DeviceInfo(name, "x86_64", {"rack": rack})
        for name, rack in (("one", "a"), ("one", "b"), ("two", "a"), ("three", "a"))
    )
    store = Store(place)
    write(store, accepted("d", 1), DeviceSeen(one, 1), DeviceSeen(two, 2))
    write(store, DeviceSeen(moved, 3), DeviceSeen(three, 4), DeviceForgotten("two"))
    store.close()
    again = Store(place)
    assert again.found.devices == (DeviceSeen(moved, 3), DeviceSeen(three, 4))
    again.close()
    engine = database.engine()
    with engine.begin() as connection:  # as the eighth schema was
        connection.execute(sa.text("DROP TABLE devices"))
        connection.execute(sa.text("UPDATE meta SET value = '8' WHERE name = 'schema'"))
    engine.dispose()
    newer = Store(place)
    assert newer.found.devices == () and len(newer.found.records) == 1
    write(newer, DeviceSeen(one, 5))
    newer.close()


def test_a_database_of_the_seventh_schema_knows_how_large_results_are(place: Place) -> None:
    database = Sqlite(place) if isinstance(place, Path) else place
    store = Store(place)
    write(store, accepted("d", 1), JobDone("d", RESULT, 1))
    store.close()
    engine = database.engine()
    size = sa.text("SELECT bytes FROM results")
    with engine.begin() as connection:
        new = connection.execute(size).scalar_one()
        connection.execute(sa.text("DROP INDEX ix_results_oldest"))
        connection.execute(sa.text("ALTER TABLE results DROP COLUMN bytes"))
        connection.execute(sa.text("CREATE INDEX ix_results_by_end ON results (finished_ms, job_id)"))
        connection.execute(sa.text("UPDATE meta SET value = '7' WHERE name = 'schema'"))
    engine.dispose()
    Store(place).close()
    with engine.begin() as connection:
        assert connection.execute(size).scalar_one() == new
    engine.dispose()
    assert new == len(convert.job_spec_to_bytes(SPEC)) + len(convert.job_result_to_bytes(RESULT))


def test_no_list_and_no_fact_reads_more_rows_than_it_needs(tmp_path: Path) -> None:
    database = Watched(tmp_path)
    store = Store(database, keep=Retention(jobs=1, least_s=0), clock=lambda: 1e9)
    database.asked.clear()
    write(store, accepted("d", 1, "k"), accepted("e", 2), accepted("w", 3), JobAssigned("d", "a", "i", 1))
    write(store, JobRequeued("d", 1, 1), JobCancelling("d", "why"), JobDone("d", RESULT, 1), JobDone("e", RESULT, 1))
    write(store, JobWithdrawn("w"), BlobOwned("0" * 64, "user.ann"), BlobForgotten("0" * 64))
    for states in ((), (JobState.QUEUED,), (JobState.DONE, JobState.RUNNING)):
        for user in (None, "ann"):
            for beyond in (None, 9):
                for wanted in (
                    JobFilter(),
                    JobFilter(user="bob", device="a", since_unix_ms=1),
                    JobFilter(artifact=SPEC.manifest.digest),
                    JobFilter(artifact="00", user="ann", since_unix_ms=1),
                ):
                    store.jobs(10, states, user, beyond=beyond, wanted=wanted).result(60)
    store.job("d").result(60)
    store.job_of_key("k").result(60)
    forgotten: queue.SimpleQueue[object] = queue.SimpleQueue()
    store.when_forgotten(lambda jobs, keys: forgotten.put((jobs, keys)))
    assert forgotten.get(timeout=60) == (["d", "e"], ["k"])
    store.close()
    asked = {statement: given for statement, given in database.asked.items() if not statement.startswith("BEGIN")}
    assert len(asked) > 15
    engine = Sqlite(tmp_path).engine()
    with engine.begin() as connection:
        for statement, given in asked.items():
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given).all()
            slow = [row[-1] for row in plan if "SCAN" in row[-1] or "TEMP" in row[-1]]
            # How many results there are is counted in an index, once a minute.
            assert not slow or "count(*)" in statement, (statement, slow)
    engine.dispose()


def test_a_devices_jobs_are_read_from_their_index(tmp_path: Path) -> None:
    Store(tmp_path).close()
    engine = Sqlite(tmp_path).engine()
    with engine.begin() as connection:  # as the ninth schema was
        connection.execute(sa.text("DROP INDEX ix_jobs_by_device"))
        connection.execute(sa.text("UPDATE meta SET value = '9' WHERE name = 'schema'"))
    engine.dispose()
    database = Watched(tmp_path)
    store = Store(database)
    database.asked.clear()
    store.jobs(10, (JobState.DONE,), wanted=JobFilter(device="a")).result(60)
    store.close()
    (plan,) = database.plans()
    assert "USING INDEX ix_jobs_by_device (device=? AND state=?)" in plan and "TEMP" not in plan, plan


def test_lists_of_a_large_database_are_read_from_indices(place: Place) -> None:
    """By time, by artifact and of a user's jobs on a device, for which a few of 20,000 fit."""
    database = Watched(place)
    store = Store(database)

    def artifact(number: int) -> str:
        return f"{number // 10:064x}"[::-1]

    def done(number: int) -> list[Fact]:
        device = number // 10 % 10
        if number % 10 == 3 and device == 7 and number > 600:
            device = 8
        one = accepted(f"j{number}", number)
        spec = replace(SPEC, manifest=Blob(artifact(number), 9))
        one = replace(one, spec=spec, user=f"u{number % 10}", submitted_ms=1000 * number)
        return [one, JobDone(one.job_id, replace(RESULT, device=f"d{device}"), 1000 * number)]

    numbers = range(1, 20_001)
    write(store, *(fact for number in numbers for fact in done(number)))
    if isinstance(place, Postgres):
        engine = place.engine()
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
        engine.dispose()
    expected = [
        (JobFilter(since_unix_ms=19_998_000), [19_998, 19_999, 20_000], "ix_jobs_by_time"),
        (JobFilter(artifact=artifact(37)), list(range(30, 40)), "ix_jobs_by_artifact"),
        (JobFilter(artifact="300"), [n for n in numbers if artifact(n).startswith("300")], "ix_jobs_by_artifact"),
        (JobFilter(user="u3", device="d7"), [73, 173, 273, 373, 473, 573], "ix_jobs_by_user_and_device"),
    ]
    asked = []
    for wanted, fit, index in expected:
        for oldest_first in (False, True):
            database.asked.clear()
            page = store.jobs(50, (JobState.DONE,), oldest_first=oldest_first, wanted=wanted).result(60)
            assert [job.id for job in page.jobs] == [f"j{n}" for n in (fit[:50] if oldest_first else fit[::-1][:50])]
            asked.append((dict(database.asked), index))
    store.close()
    for statements, index in asked:
        database.asked = statements
        plans = database.plans()
        assert any(index in plan for plan in plans), plans
        assert not any("SCAN" in plan or "Seq Scan" in plan for plan in plans), plans


def test_no_page_of_a_list_by_artifact_reads_more_rows_than_it_may(place: Place) -> None:
    """However many artifacts begin so, and where nearly nothing else fits: the store's thread has others to serve."""
    database = Watched(place)
    store = Store(database)
    alike, many = [f"aa{digit}" + "0" * 61 for digit in "0f3"], [f"bb{number:02x}" + "0" * 60 for number in range(40)]
    jobs: list[JobAccepted] = []
    facts: list[Fact] = []
    for number in range(1, 9_001):
        digest = many[number % 40] if number % 3 == 0 else alike[number // 3 % 3]
        spec = replace(SPEC, manifest=Blob(digest, 9))
        one = replace(accepted(f"j{number}", number), spec=spec, user="ann" if number in (7, 10, 8_001) else "bob")
        jobs.append(one)
        facts += [one] if number > 8_990 else [one, JobDone(one.job_id, RESULT, number)]
    write(store, *facts)
    if isinstance(place, Postgres):
        engine = place.engine()
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
        engine.dispose()
    queued, done = (JobState.QUEUED,), (JobState.DONE,)
    cases: list[tuple[tuple[JobState, ...], str | None, JobFilter]] = [
        ((), None, JobFilter(artifact="aa")),
        (done, None, JobFilter(artifact="aa")),
        ((), None, JobFilter(artifact="aaf", since_unix_ms=jobs[8_200].submitted_ms)),
        ((), "ann", JobFilter(artifact="aa")),
        (done, None, JobFilter(artifact="aa", device="nowhere")),
        (done, "ann", JobFilter(artifact=alike[0])),
        ((), None, JobFilter(artifact="bb")),
        (done, "ann", JobFilter(artifact="b")),
        (queued, None, JobFilter(artifact="a")),
        ((), None, JobFilter(artifact="a", ids=("j1", "j3", "j8999"))),
    ]
    for (states, user, wanted), oldest_first in itertools.product(cases, (False, True)):
        fit = [
            job.job_id
            for job in jobs
            if job.spec.manifest.digest.startswith(wanted.artifact)
            and (user is None or job.user == user)
            and job.submitted_ms >= wanted.since_unix_ms
            and (job.seq > 8_990 if states == queued else job.seq <= 8_990 or not states)
            and (not wanted.ids or job.job_id in wanted.ids)
            and not wanted.device
        ]
        found: list[str] = []
        beyond = earliest = None
        for turn in itertools.count():
            database.forget()
            asked = store.jobs(
                200, states, user, oldest_first=oldest_first, beyond=beyond, earliest=earliest, wanted=wanted
            )
            page = asked.result(60)
            found += [job.id for job in page.jobs]
            if turn < 2 or page.last is None:
                work = database.work()
                assert work < (60_000 if isinstance(place, Path) else 4_500), (states, user, wanted, turn, work)
            beyond, earliest = page.last, page.earliest
            if beyond is None:
                break
        assert found == (fit if oldest_first else fit[::-1])
    store.close()


def test_a_list_since_a_time_is_whole_where_clocks_were_set(place: Place) -> None:
    database = Watched(place)
    store = Store(database)
    times = [500, 100, 900, 300, 200, 400, 50, 350]
    for number, when in enumerate(times, 1):
        write(store, replace(accepted(f"j{number}", number), submitted_ms=when))
    for since in (1, 100, 101, 350, 450, 900, 901):
        for oldest_first in (False, True):
            wanted = JobFilter(since_unix_ms=since)
            found, beyond, earliest = [], None, None
            database.each.clear()
            while not found or beyond is not None:
                place_of = {"beyond": beyond, "earliest": earliest}
                page = store.jobs(2, (), oldest_first=oldest_first, **place_of, wanted=wanted).result(60)
                found, beyond, earliest = [*found, *page.jobs], page.last, page.earliest
                if not page.jobs:
                    break
            assert len([1 for statement, _ in database.each if "min(" in statement]) == 1, "it is looked for once"
            ids = [f"j{number}" for number, when in enumerate(times, 1) if when >= since]
            assert [job.id for job in found] == (ids if oldest_first else ids[::-1])
    store.close()


def test_jobs_of_other_artifacts_are_passed_over_unread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(place)
    one, other = (replace(SPEC, manifest=Blob(digit * 64, 9)) for digit in "12")
    # Its function's name is another artifact's digest.
    named = replace(other, function=one.manifest.digest)
    for number, spec in enumerate([one, other, named, other, one], 1):
        write(store, replace(accepted(f"j{number}", number), spec=spec))
    read: list[bytes] = []

    def counted(data: bytes) -> JobSpec:
        read.append(data)
        return job_spec_from_bytes(data)

    job_spec_from_bytes = convert.job_spec_from_bytes
    monkeypatch.setattr(convert, "job_spec_from_bytes", counted)
    page = store.jobs(5, (), wanted=JobFilter(artifact="1" * 64)).result(60)
    assert [job.id for job in page.jobs] == ["j5", "j1"] and page.last is None and len(read) == 2
    first = store.jobs(1, (), wanted=JobFilter(artifact="1111")).result(60)
    assert [job.id for job in first.jobs] == ["j5"] and first.last == 5
    for nothing in ("3" * 64, "2" * 63 + "1", "11g", "ä"):
        assert store.jobs(5, (), wanted=JobFilter(artifact=nothing)).result(60).jobs == []
    both = store.jobs(5, (JobState.QUEUED,), "", wanted=JobFilter(artifact="2")).result(60)
    assert [job.id for job in both.jobs] == ["j4", "j3", "j2"]
    store.close()


def test_a_list_of_several_states_is_the_newest_of_all(place: Place) -> None:
    store = Store(place)
    for number in range(12):
        write(store, replace(accepted(f"j{number}", number), user="ann" if number % 2 else "bob"))
        if number % 3 == 0:
            write(store, JobAssigned(f"j{number}", "a", "i", 1))
        if number % 3 == 1:
            write(store, JobDone(f"j{number}", RESULT, number))
    assert [job.id for job in store.jobs(3, ()).result(60).jobs] == ["j11", "j10", "j9"]
    assert [job.id for job in store.jobs(3, (JobState.DONE, JobState.RUNNING)).result(60).jobs] == ["j10", "j9", "j7"]
    assert [job.id for job in store.jobs(3, (), "ann").result(60).jobs] == ["j11", "j9", "j7"]
    assert [job.id for job in store.jobs(9, (JobState.QUEUED,), "bob").result(60).jobs] == ["j8", "j2"]
    assert [job.id for job in store.jobs(2, (JobState.QUEUED,), oldest_first=True).result(60).jobs] == ["j2", "j5"]
    assert [job.id for job in store.jobs(3, (), "ann", oldest_first=True).result(60).jobs] == ["j1", "j3", "j5"]
    for states, user in itertools.product(((), (JobState.QUEUED,), (JobState.DONE, JobState.RUNNING)), (None, "ann")):
        for oldest_first in (False, True):
            whole = store.jobs(12, states, user, oldest_first=oldest_first).result(60).jobs
            pages, beyond = [], None
            while not pages or beyond is not None:
                page = store.jobs(2, states, user, oldest_first=oldest_first, beyond=beyond).result(60)
                pages.append(page.jobs)
                beyond = page.last
            assert [job for page in pages for job in page] == whole and len(pages) > 1
    store.close()


def test_bringing_it_up_to_date_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    spec = convert.job_spec_to_bytes(SPEC)
    row = "INSERT INTO jobs VALUES (?, ?, ?, '[]', 100, 'queued', '', '', 0, NULL)"
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        connection.executescript(SCHEMA_1)
        connection.executemany(row, [("a", 1, spec), ("b", 2, b"\xff no spec"), ("c", 3, spec)])
    connection.close()
    for _ in range(2):  # the second try meets what the first one found
        with pytest.raises(Exception, match=r"(?i)pars|decod|truncated|wire"):
            Store(tmp_path)
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        assert connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone() == ("1",)
        connection.execute("DELETE FROM jobs WHERE id = 'b'")
    connection.close()
    store = Store(tmp_path)
    assert [record.accepted.job_id for record in store.found.records] == ["a", "c"]
    store.close()


def test_nobody_waits_for_a_closed_store(place: Place) -> None:
    store = Store(place)
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.job("j").result(60)


def test_nobody_waits_for_a_store_that_a_commit_ended(place: Place) -> None:
    """Who reads waits for the commit that gathers what was queued with it, and is told where that never comes."""
    hold, held, failed = threading.Event(), threading.Event(), threading.Event()
    store = Store(place, on_failure=lambda error: failed.set())

    def wait() -> None:
        held.set()
        assert hold.wait(60)

    store.append([accepted("j", 1)], wait)
    assert held.wait(60)
    before = store.job("j")
    store.append([accepted("j", 2)], lambda: None)
    between = store.job("j")
    store.when_forgotten(lambda jobs, keys: None)  # which wakes the store only
    after = store.job("j")
    hold.set()
    assert failed.wait(60)
    for read in (before, between, after):
        with pytest.raises(StoreError, match="is closed"):
            read.result(60)
    store.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    connection.close()
    with pytest.raises(StoreError, match="newer kedge"):
        Store(tmp_path)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tracker.db").write_text("this is not a database, whatever its name says" * 100)
    with pytest.raises(StoreError, match="cannot use"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the data folder"):
        Store(tmp_path / "file" / "data")


def test_a_failure_of_the_store_does_not_go_unnoticed(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    store = Store(place, on_failure=failures.put)
    write(store, accepted("j", 1))
    durable = threading.Event()
    store.append([accepted("j", 2)], durable.set)
    assert "unique" in str(failures.get(timeout=60)).lower()
    assert not durable.is_set() and "failed" in caplog.text
    store.close()
    again = Store(place)
    assert [record.accepted.seq for record in again.found.records] == [1]
    again.close()


FULL = """
import resource, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from wire.test_store import accepted
from kedge.rpc.tracker.store import Store
store = Store(Path(sys.argv[1]))
infinity = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, infinity))
durable = threading.Event()
store.append([accepted(f"j{n}", n) for n in range(500)], durable.set)
behind = store.job("j1")
print(store.troubled.wait(60), bool(store.problem), durable.is_set())
print(behind.result(60), store.job("j1").result(60), store.job_of_key("k").result(60))  # it is full until then
later = threading.Event()
store.append([accepted("later", 500)], later.set)
resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))
print(durable.wait(60), later.wait(60), store.problem, len(store.jobs(1000, ()).result(60).jobs))
store.close()
"""


def test_a_full_disk_keeps_facts_until_there_is_room(tmp_path: Path) -> None:
    """The kernel refuses to let the files grow; readers are answered; later, nothing has been lost."""
    tests = Path(__file__).parents[1]
    script = [sys.executable, "-c", FULL, str(tmp_path), str(tests)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["True True False", "None None None", "True True None 501"], done.stderr
    assert "cannot store jobs" in done.stderr
