"""A tracker's state moves into a PostgreSQL database: all of it, once, and never so that two trackers have it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from wire.test_store import RESULT, accepted, write

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.security import identity
from kedge.rpc.tracker import moving
from kedge.rpc.tracker.database import Database, Postgres, Sqlite
from kedge.rpc.tracker.facts import JobAssigned, JobDone, JobRequeued, Reserved, Serviced
from kedge.rpc.tracker.moving import move
from kedge.rpc.tracker.schema import StoreError, metadata
from kedge.rpc.tracker.server import start
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import Tls
from kedge.rpc.types import Blob, DeviceFault, JobState, Reservation, Tensor
from support.fake_agent import FakeAgent, echo
from support.postgres import PostgresServer
from support.toys import QUICK, device_info

#: Too large to travel inline.
BIG = np.arange(1_200_000, dtype=np.float32).reshape(-1, 4)
_OWN = ("leadership", "trackers", "meta")


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_database()


def fill(folder: Path, jobs: int = 40) -> None:
    """A state in which every table of a tracker alone has something."""
    store = Store(folder)
    made = replace(RESULT, outputs=(Tensor("y", "int8", (40,), Blob("1" * 64, 40)),))
    for number in range(jobs):
        job_id = f"j{number}"
        write(store, accepted(job_id, number, f"key{number}"), JobAssigned(job_id, "a", "i", 1))
        if number % 3 == 0:
            write(store, JobDone(job_id, made, number))
        elif number % 3 == 1:
            write(store, JobRequeued(job_id, 700, 1, (DeviceFault("a", "why"),)))
    write(store, Serviced("a", "a new disk", "root", 50), Reserved(Reservation("r", "b", "ann", 60, 70, "a demo")))
    store.close()


def rows(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """All that is stored, but what is the database's own."""
    engine = database.engine()
    with engine.begin() as connection:
        found = {
            table.name: sorted(tuple(row) for row in connection.execute(sa.select(table)))
            for table in metadata.sorted_tables
            if table.name not in _OWN
        }
    engine.dispose()
    return found


def test_every_row_moves_and_the_file_is_left_alone_from_then_on(tmp_path: Path, url: str) -> None:
    fill(tmp_path)
    (tmp_path / "owners" / "user.ann" / "ab").mkdir(parents=True)
    (tmp_path / "owners" / "user.ann" / "ab" / ("ab" * 32)).touch()
    before = rows(Sqlite(tmp_path))
    seen: list[tuple[str, int, int]] = []
    counts = move(tmp_path, url, lambda *step: seen.append(step))
    after = rows(Postgres(url))
    assert after.pop("owners") == [("ab" * 32, "user.ann")] and before.pop("owners") == []
    assert after.pop("documents") == [("ca.pem", b"")] and before.pop("documents") == []
    assert after == before
    assert counts["jobs"] == 40 and all(counts[name] == len(found) for name, found in before.items())
    assert ("jobs", 40, 40) in seen
    with pytest.raises(StoreError, match=r"was moved to postgresql://") as refused:
        Store(tmp_path)
    assert refused.value.hint is not None and "--database" in refused.value.hint
    assert move(tmp_path, url) == {}, "what has moved is found to have moved"
    assert rows(Postgres(url))["jobs"] == before["jobs"]
    with pytest.raises(StoreError, match="was moved to"):
        move(tmp_path, url.replace("kedge_", "no_such_"))


def test_a_fleet_goes_on_where_it_was(tmp_path: Path, url: str, artifact: Artifact) -> None:
    folder = tmp_path / "data"
    with (
        start(port=0, data_dir=folder, settings=QUICK) as tracker,
        Access(tracker.address, tracker.serving.security.admin_tls()) as access,  # type: ignore[union-attr]
    ):
        with pytest.raises(StoreError, match="another tracker uses the data folder"):
            move(folder, url)
        join = access.create_token("submit", "ann")[1]
        ann_tls = Tls(join.ca, token=join.token)
        known = identity.enrol(access.enrol_token("bench-1")[0], "bench-1")
        with Fleet(tracker.address, ann_tls) as ann:
            with FakeAgent(known.address, device_info(), work=echo, tls=known.tls):
                done = ann.run(artifact, {"x": BIG})
                done.wait(timeout=60)
            waiting = ann.run(artifact, {"x": BIG + 1})
    assert move(folder, url)["documents"] == 2
    with (
        start(port=0, data_dir=folder, settings=QUICK, database=url) as tracker,
        Fleet(tracker.address, ann_tls) as ann,
        FakeAgent(tracker.serving.agents_address, device_info(), work=echo, tls=known.tls),
    ):
        np.testing.assert_array_equal(ann.job(waiting.id).wait(timeout=60)["x_out"], BIG + 1)
        np.testing.assert_array_equal(ann.job(done.id).wait(timeout=60)["x_out"], BIG)
        assert {job.id for job in ann.jobs()} == {done.id, waiting.id}
        assert ann.job(done.id).status().state is JobState.DONE


def test_a_database_in_use_is_refused_and_the_file_stays(tmp_path: Path, url: str) -> None:
    fill(tmp_path / "one", 4)
    fill(tmp_path / "two", 4)
    move(tmp_path / "one", url)
    before = rows(Postgres(url))
    with pytest.raises(StoreError, match="is in use: it has"):
        move(tmp_path / "two", url)
    assert rows(Postgres(url)) == before
    Store(tmp_path / "two").close()
    with (
        start(port=0, data_dir=tmp_path / "three", settings=QUICK, database=url, insecure_loopback=True),
        pytest.raises(StoreError, match="a tracker runs on"),
    ):
        move(tmp_path / "two", url)
    Store(tmp_path / "two").close()
    with pytest.raises(StoreError, match="no tracker's state"):
        move(tmp_path / "four", url)
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("committed", [False, True])
def test_a_commit_whose_answer_was_lost_is_told_by_the_next_move(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    whole = moving._move
    fill(tmp_path, 10)
    if committed:

        def lost(file: sa.Connection, database: sa.Connection, *rest: Any) -> object:
            whole(file, database, *rest)
            database.commit()
            raise OSError("the answer was lost")
    else:

        def lost(file: sa.Connection, database: sa.Connection, *rest: Any) -> object:
            whole(file, database, *rest)
            raise OSError("the answer was lost")

    with monkeypatch.context() as patched:
        patched.setattr(moving, "_move", lost)
        with pytest.raises(OSError, match="lost"):
            move(tmp_path, url)
    with pytest.raises(StoreError, match="was moved to"):
        Store(tmp_path)
    assert bool(move(tmp_path, url)) is not committed
    assert len(rows(Postgres(url))["jobs"]) == 10


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("answers", [False, True])
def test_a_database_that_is_lost_at_the_commit_is_asked_what_it_has(
    tmp_path: Path, postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch, answers: bool, kept: bool
) -> None:
    whole = moving._move
    fill(tmp_path, 4)

    def admin(statement: str) -> None:
        with Postgres(postgres.url("postgres")).engine().connect() as other:
            other.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text(statement))

    def cut_off(file: sa.Connection, database: sa.Connection, *rest: Any) -> dict[str, int]:
        moved = whole(file, database, *rest)
        if kept:  # the answer alone is lost
            assert database.connection.dbapi_connection is not None
            database.connection.dbapi_connection.commit()
        pid = database.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        if not answers:
            admin(f'ALTER DATABASE "{url.rpartition("/")[2]}" ALLOW_CONNECTIONS false')
        admin(f"SELECT pg_terminate_backend({pid})")
        return moved

    with monkeypatch.context() as patched:
        patched.setattr(moving, "_move", cut_off)
        if answers and kept:
            assert move(tmp_path, url)["jobs"] == 4
        else:
            with pytest.raises(StoreError) as caught:
                move(tmp_path, url)
            assert ("until the same command ends well" in str(caught.value.hint)) is not answers
    if answers and not kept:
        Store(tmp_path).close()  # as if nothing had been
    else:
        with pytest.raises(StoreError, match=r"was moved to .* or a move there was broken off") as refused:
            Store(tmp_path)
        assert "move-database" in str(refused.value.hint)
    if not answers:
        admin(f'ALTER DATABASE "{url.rpartition("/")[2]}" ALLOW_CONNECTIONS true')
    assert bool(move(tmp_path, url)) is not kept
    assert len(rows(Postgres(url))["jobs"]) == 4


@pytest.mark.parametrize("at", ["jobs", "owners", "documents"])
def test_a_move_that_is_killed_is_done_again(tmp_path: Path, url: str, at: str) -> None:
    fill(tmp_path, 5)
    with sqlite3.connect(tmp_path / "tracker.db") as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(jobs)") if row[1] not in ("id", "seq")]
        copied = ", ".join(f'"{column}"' for column in columns)
        numbers = "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)"
        connection.execute(
            f"INSERT INTO jobs (id, seq, {copied}) {numbers} SELECT 'more' || i, i, {copied} FROM jobs, n WHERE seq = 0"
        )
    connection.close()
    (tmp_path / "owners" / "user.ann" / "ab").mkdir(parents=True)
    (tmp_path / "owners" / "user.ann" / "ab" / ("ab" * 32)).touch()
    (tmp_path / "security").mkdir()
    (tmp_path / "security" / "tokens.json").touch(mode=0o600)
    killed = tmp_path / "killed.py"
    killed.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from kedge.rpc.tracker.moving import move\n"
        "def progress(table, done, total):\n"
        "    if table == sys.argv[3] and (done > 1000 or total < 1000):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "move(Path(sys.argv[1]), sys.argv[2], progress)\n"
    )
    ended = subprocess.run([sys.executable, "-P", str(killed), str(tmp_path), url, at], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert rows(Postgres(url))["jobs"] == []
    Store(tmp_path).close()
    assert move(tmp_path, url)["jobs"] == 3906
    assert len(rows(Postgres(url))["jobs"]) == 3906
