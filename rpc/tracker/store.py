"""What outlives the tracker: jobs, results, idempotency keys, in SQLite or PostgreSQL through SQLAlchemy Core.

One thread owns the connection. Facts are queued to it and committed in groups: whatever has gathered while the last
commit was under way goes into the next, so that no fact waits for a timer and many share one fsync. Reading goes
through the same queue and therefore sees everything that was queued before, and perhaps what came after; while the
disk takes nothing, it sees what is stored.

An SQLite file is opened exclusively: a second tracker on the same folder is refused. Of several trackers on one
PostgreSQL database one leads, and only what it writes in its own epoch is stored (see `kedge.rpc.tracker.epoch`).
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from kedge.rpc import convert
from kedge.rpc.artifact import Need
from kedge.rpc.artifact.manifest import device_from_json
from kedge.rpc.errors import KedgeError
from kedge.rpc.tracker import schema as t
from kedge.rpc.tracker.brief import brief_result, brief_spec
from kedge.rpc.tracker.database import Database, Sqlite
from kedge.rpc.tracker.epoch import Epoch, FencedError
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
    JobFact,
    JobRecord,
    JobRequeued,
    JobWithdrawn,
    Needs,
    NoiseKept,
    ReservationEnded,
    Reserved,
    Serviced,
    ServiceEnded,
    Stored,
)
from kedge.rpc.tracker.listing import LIVE, Page, faults_from_text, faults_to_text, list_jobs, load_job
from kedge.rpc.tracker.needed import Needed, outputs_of
from kedge.rpc.tracker.observer import SILENT, Observer
from kedge.rpc.tracker.retention import PIECE, Retention, delete_jobs, forget_some, gone_of
from kedge.rpc.tracker.schema import StoreAwayError, StoreError, prepare
from kedge.rpc.tracker.statements import Statements
from kedge.rpc.types import Job, JobFilter, JobState, NoiseSample, Reservation

log = logging.getLogger("kedge.tracker")
T = TypeVar("T")

#: Pause before a commit that failed (a full disk) is tried again.
_RETRY_S = 1.0
#: The same where the database is another process, which may only have ended a session.
_RECONNECT_S = 0.2
#: Between two pieces of what is forgotten.
_PIECE_PAUSE_S = 0.05


@dataclass(slots=True)
class _Append:
    facts: Sequence[Fact]
    done: Callable[[], None]
    refused: Callable[[StoreError], None] | None = None
    #: Why one of the facts can never be written.
    problem: Exception | None = None


@dataclass(slots=True)
class _Read:
    query: Callable[[sa.Connection], Any]
    future: Future[Any]


@dataclass(slots=True)
class _Idle:
    """Nothing to do."""


#: None ends the thread.
_Item = _Append | _Read | _Idle | None


class Store:
    """The tables in `where`, a database or the folder of an SQLite file; they are made when they do not exist.

    With an `epoch` nothing is written once another tracker leads: the store fails with FencedError instead. A database
    on another machine that does not answer fails it too, after some seconds.

    `on_failure` is called from the store's thread if that ends unexpectedly: nothing is stored any more, and whoever
    uses the store has to stop too. `on_trouble` is told from there when commits begin to fail, and when one succeeds
    again.

    Jobs that are done are forgotten by the rules of `keep` (None: never), by `clock` in Unix seconds.

    Raises:
        StoreError: the database cannot be used, belongs to a running tracker, or was written by a newer kedge.
    """

    def __init__(
        self,
        where: Path | Database,
        *,
        epoch: Epoch | None = None,
        remembered: int = 100_000,
        on_failure: Callable[[BaseException], None] = lambda error: None,
        on_trouble: Callable[[bool], None] = lambda troubled: None,
        observer: Observer = SILENT,
        keep: Retention | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = Sqlite(where) if isinstance(where, Path) else where
        self._engine = self._database.engine()
        self._statements = Statements()
        self._epoch = epoch
        self._on_failure = on_failure
        self._on_trouble = on_trouble
        self._observer = observer
        self._needed: Needed | None = None
        self._keep = keep
        self._clock = clock
        #: By the steady clock; None before somebody listens.
        self._sweep_due: float | None = None
        self._on_forgotten: Callable[[Sequence[str], Sequence[str]], None] = lambda jobs, keys: None
        #: Jobs, and their keys, that are forgotten if the last commit of that was one.
        self._in_doubt: tuple[list[str], list[str]] = ([], [])
        self._work: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        #: Why the last commit failed, while it is tried again; None when all is well.
        self.problem: str | None = None
        #: Set as long as there is a problem.
        self.troubled = threading.Event()
        opened: Future[Stored] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened, remembered), name="kedge-store", daemon=True)
        self._thread.start()
        self.found = opened.result()

    def keep_needed(self, needed: Needed) -> None:
        """From now on, and before anything is appended: `needed` holds the blobs of all jobs that are stored."""
        needed.restore((record.accepted for record in self.found.records), self._read(_outputs).result())
        self._needed = needed

    def when_forgotten(self, told: Callable[[Sequence[str], Sequence[str]], None]) -> None:
        """Begin to forget; from the store's thread, `told` hears of the jobs, and idempotency keys, that are gone."""
        self._on_forgotten = told
        self._sweep_due = time.monotonic()
        self._work.put(_Idle())

    def append(
        self,
        facts: Sequence[Fact],
        done: Callable[[], None],
        refused: Callable[[StoreError], None] | None = None,
    ) -> None:
        """Store facts; `done` is called from the store's thread once they are durable. Keeps the order of calls.

        Instead `refused` is told of a fact that the database will never take; the others are durable. Without it such a
        fact is a failure of the store.
        """
        if self._needed is not None and any(isinstance(fact, JobFact) for fact in facts):
            self._needed.expected(facts)
        self._work.put(_Append(facts, done, refused))

    def owners(self) -> Future[list[tuple[str, str]]]:
        """Whose blobs are whose: digest and owner."""
        return self._read(lambda connection: [(row.digest, row.owner) for row in connection.execute(_OWNERS)])

    def job(self, job_id: str) -> Future[Job | None]:
        """A stored job with its result."""
        return self._read(lambda connection: load_job(connection, job_id))

    def jobs(
        self,
        limit: int,
        states: Sequence[JobState],
        user: str | None = None,
        *,
        oldest_first: bool = False,
        beyond: int | None = None,
        earliest: int | None = None,
        wanted: JobFilter = JobFilter(),  # noqa: B008 - frozen
    ) -> Future[Page]:
        """The newest jobs (of one user), newest first, or the oldest, as stored and in brief (see
        `kedge.rpc.tracker.brief`); those `beyond` the last one of an earlier page, whose `earliest` goes with it.

        While a page is read nothing is stored: its `limit` is for how long others wait. Where no index has what is
        `wanted` in order, a page ends after so many jobs that were looked at, too: it may have fewer than `limit`, or
        none, and there are others all the same.
        """
        order: dict[str, Any] = {"oldest_first": oldest_first, "beyond": beyond, "earliest": earliest}
        return self._read(lambda connection: list_jobs(connection, limit, states, user, **order, wanted=wanted))

    def job_of_key(self, key: str) -> Future[str | None]:
        """The job that was ever submitted under this idempotency key."""
        query = sa.select(t.keys.c.job_id).where(t.keys.c.key == key)
        return self._read(lambda connection: connection.execute(query).scalar_one_or_none())

    @property
    def passes(self) -> bool:
        """Whether a problem ends by itself before long: the database comes back, or another tracker leads."""
        return self._database.patience_s is not None

    def close(self) -> None:
        """Store what was queued and close the database."""
        self._stopping.set()
        self._work.put(None)
        self._thread.join()

    def _read(self, query: Callable[[sa.Connection], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put(_Read(query, future))
        if self._ended.is_set():
            self._refuse_reads()
        return future

    # ---- The thread ------------------------------------------------------------------------------------------------

    def _run(self, opened: Future[Stored], remembered: int) -> None:
        try:
            with self._engine.connect() as connection:
                try:
                    found = _open(connection, self._database.name, remembered)
                except (SQLAlchemyError, KedgeError) as error:
                    opened.set_exception(self._database.explain(error))
                    return
                opened.set_result(found)
                self._serve(connection)
        except FencedError as error:
            log.warning("the store %s is another tracker's: %s", self._database.name, error)
            self._on_failure(error)
        except Exception as error:
            if opened.done():
                # That another tracker leads by now is no failure: whoever uses the store is told, and follows. A
                # database that is away is known already, and whoever used it says what follows.
                if not isinstance(error, (FencedError, StoreAwayError)):
                    log.critical("the store %s failed", self._database.name, exc_info=error)
                self._on_failure(error)
            else:
                opened.set_exception(self._database.explain(error))
        finally:
            self._engine.dispose()
            self._ended.set()
            self._refuse_reads()

    def _refuse_reads(self) -> None:
        """Tell readers that nobody will answer them."""
        while True:
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, _Read) and item.future.set_running_or_notify_cancel():
                closed = StoreAwayError if self.passes else StoreError
                item.future.set_exception(closed(f"the store in {self._database.name} is closed"))

    def _serve(self, connection: sa.Connection) -> None:
        reads: list[_Read] = []
        try:
            while self._serve_some(connection, reads):
                pass
        finally:
            for read in reads:  # a commit, or what follows from it, ended the store: they are refused with the rest
                self._work.put(read)

    def _serve_some(self, connection: sa.Connection, reads: list[_Read]) -> bool:
        """What is queued now; False where that was all. `reads` holds the ones that are not answered yet."""
        item = self._next()
        group: list[_Append] = []
        # A reader may see more than was queued before it; a commit is worth more, the more it holds.
        while isinstance(item, (_Append, _Read)):
            if isinstance(item, _Append):
                group.append(item)
            else:
                reads.append(item)
            item = self._poll()
        if group and not self._commit(connection, group, reads):
            return False
        for append in group:
            if self._needed is not None:
                self._needed.stored(append.facts)
            if append.problem is None or append.refused is None:
                append.done()
            else:
                append.refused(StoreError(f"the tracker cannot store this: {' '.join(str(append.problem).split())}"))
        while reads:
            self._answer(connection, reads.pop(0))
        if item is None:
            return False
        if self._keep is not None and self._sweep_due is not None and time.monotonic() >= self._sweep_due:
            self._sweep(connection, self._keep)
        return True

    def _next(self) -> _Item:
        """The next piece of work, or _Idle when it is time to forget something."""
        if self._keep is None or self._sweep_due is None:
            return self._work.get()
        try:
            return self._work.get(timeout=max(0.0, self._sweep_due - time.monotonic()))
        except queue.Empty:
            return _Idle()

    def _sweep(self, connection: sa.Connection, keep: Retention) -> None:
        """Forget a small number of old jobs; others follow soon, after what was queued meanwhile."""
        gone: list[str] = []
        keys: list[str] = []
        try:
            with connection.begin():
                if self._epoch is not None:
                    self._epoch.enter(connection)
                before, their_keys = gone_of(connection, *self._in_doubt)
                gone, keys = forget_some(connection, keep, round(self._clock() * 1000))
        except DBAPIError as error:
            if not _may_pass(error):
                raise
            # The answer to a commit may have been lost: the next time tells what it did.
            self._in_doubt = ([*self._in_doubt[0], *gone], [*self._in_doubt[1], *keys])
            log.warning("cannot forget old jobs in %s now: %s", self._database.name, error.orig)
            self._sweep_due = time.monotonic() + keep.every_s
            return
        self._sweep_due = time.monotonic() + (_PIECE_PAUSE_S if len(gone) == PIECE else keep.every_s)
        self._in_doubt = ([], [])
        if gone or before:
            if self._needed is not None:
                self._needed.forgotten([*before, *gone])
            self._on_forgotten([*before, *gone], [*their_keys, *keys])

    def _poll(self) -> _Item:
        """The next piece of work, or _Idle where there is none yet."""
        try:
            return self._work.get_nowait()
        except queue.Empty:
            return _Idle()

    def _commit(self, connection: sa.Connection, group: list[_Append], reads: list[_Read]) -> bool:
        """Make a group durable, however often it takes; False when the tracker stops before that.

        What comes in between two attempts joins the group. `reads`, which came with it, wait for the first attempt
        only: if that fails, they see what is stored.
        """
        since, tried, transaction = time.monotonic(), 0, 0
        stored = 0  # of the group: known to be committed although the answer was lost
        write = _write_all
        while True:
            began = time.perf_counter()
            try:
                with connection.begin():
                    if self._epoch is not None:
                        if tried > stored and self._epoch.committed(connection, transaction):
                            stored = tried
                        transaction = self._epoch.enter(connection)
                    tried = len(group)
                    write(connection, group[stored:], self._statements)
            except _REFUSALS as error:
                if not isinstance(error, DBAPIError) or not _may_pass(error):
                    if write is _write_each:
                        raise
                    write = _write_each  # one of these facts, and that is no reason to lose the others
                    continue
                self._tell_trouble(error)
                while reads:
                    self._answer(connection, reads.pop(0))
                patience_s = self._database.patience_s
                if patience_s is not None and time.monotonic() >= since + patience_s:
                    raise self._database.explain(error) from error
                self._pause(connection, group)
                if self._stopping.is_set():
                    return False
            else:
                self.problem = None
                if self.troubled.is_set():
                    self.troubled.clear()
                    self._on_trouble(False)
                facts = sum(len(append.facts) for append in group)
                self._observer.committed(facts, time.perf_counter() - began)
                return True

    def _tell_trouble(self, error: DBAPIError) -> None:
        self.problem = " ".join(str(error.orig).split())
        self._observer.commit_failed()
        if not self.troubled.is_set():
            self.troubled.set()
            self._on_trouble(True)
        log.error("cannot store jobs in %s: %s; trying again", self._database.name, self.problem)

    def _pause(self, connection: sa.Connection, group: list[_Append]) -> None:
        """Wait for the next attempt to store `group`, which later facts join; readers do not wait with it."""
        due = time.monotonic() + (_RETRY_S if self._database.patience_s is None else _RECONNECT_S)
        while not self._stopping.is_set() and (left := due - time.monotonic()) > 0:
            try:
                item = self._work.get(timeout=left)
            except queue.Empty:
                return
            if isinstance(item, _Read):
                self._answer(connection, item)
            elif isinstance(item, _Append):
                group.append(item)

    def _answer(self, connection: sa.Connection, item: _Read) -> None:
        """Run a query, unless nobody waits for it any more; whatever it raises is the reader's."""
        if not item.future.set_running_or_notify_cancel():
            return
        try:
            try:
                found = _ask(connection, item.query)
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                found = _ask(connection, item.query)  # over a new connection
        except SQLAlchemyError as error:
            item.future.set_exception(self._database.explain(error))
        except Exception as error:  # noqa: BLE001 - one row that cannot be read must not end the store
            item.future.set_exception(error)
        else:
            item.future.set_result(found)


# ---- Opening -------------------------------------------------------------------------------------------------------


def _open(connection: sa.Connection, place: str, remembered: int) -> Stored:
    with connection.begin():
        tracker_id = prepare(connection, place)
        live = sa.select(t.jobs, t.keys.c.key).outerjoin(t.keys, t.keys.c.job_id == t.jobs.c.id)
        live = live.where(t.jobs.c.state.in_([state.value for state in LIVE])).order_by(t.jobs.c.seq)
        records = [_record(row) for row in connection.execute(live)]
        newest = sa.select(t.jobs.c.id, t.jobs.c.epoch, t.jobs.c.state, t.keys.c.key)
        newest = (
            newest.outerjoin(t.keys, t.keys.c.job_id == t.jobs.c.id).order_by(t.jobs.c.seq.desc()).limit(remembered)
        )
        rows = connection.execute(newest).all()[::-1]
        last_seq = connection.execute(sa.select(sa.func.max(t.jobs.c.seq))).scalar() or 0
        serviced = tuple(Serviced(*row) for row in connection.execute(sa.select(t.serviced)))
        reservations = tuple(Reservation(*row) for row in connection.execute(sa.select(t.reservations)))
        noise = tuple(NoiseSample(*row) for row in connection.execute(sa.select(t.noise)))
        rows_of_devices = connection.execute(sa.select(t.devices).order_by(t.devices.c.seen_ms)).all()
        devices = tuple(DeviceSeen(convert.device_info_from_bytes(row.info), row.seen_ms) for row in rows_of_devices)
    ended = tuple((row.id, row.epoch) for row in rows if row.state == JobState.DONE.value)
    keys = tuple((row.key, row.id) for row in rows if row.key)
    all_keys = len(rows) < remembered
    return Stored(tracker_id, tuple(records), ended, keys, last_seq, all_keys, serviced, reservations, noise, devices)


def _ask(connection: sa.Connection, query: Callable[[sa.Connection], T]) -> T:
    with connection.begin():
        return query(connection)


#: What is raised where a database, or its driver, does not take a value.
_REFUSALS = (DBAPIError, OverflowError, ValueError)


def _write_all(connection: sa.Connection, group: Sequence[_Append], statements: Statements) -> None:
    rows = _Rows(statements)
    for append in group:
        for fact in append.facts:
            _write(connection, fact, rows)
    rows.write(connection)


def _write_each(connection: sa.Connection, group: Sequence[_Append], statements: Statements) -> None:
    """The same where one may never be written: all but that, if there is somebody to be told of it."""
    for append in group:
        append.problem = None
        for fact in append.facts:
            try:
                with connection.begin_nested():
                    rows = _Rows(statements)
                    _write(connection, fact, rows)
                    rows.write(connection)
            except _REFUSALS as error:
                if append.refused is None or (isinstance(error, DBAPIError) and _may_pass(error)):
                    raise
                append.problem = error


def _may_pass(error: DBAPIError) -> bool:
    """Whether the same may succeed later: the disk is full, the connection was lost, the server ended the session."""
    beyond_a_limit = str(getattr(error.orig, "sqlstate", None) or "").startswith("54")
    return error.connection_invalidated or (isinstance(error, OperationalError) and not beyond_a_limit)


# ---- Rows ----------------------------------------------------------------------------------------------------------


# Made once: what SQLAlchemy does per statement is more than what SQLite does.
_INSERT_JOB = sa.insert(t.jobs)
_INSERT_KEY = sa.insert(t.keys)
_INSERT_RESULT = sa.insert(t.results).values(
    bytes=sa.bindparam("size", type_=sa.BigInteger) + sa.func.coalesce(t.size_of_spec(sa.bindparam("of_job")), 0)
)
_INSERT_OUTPUT = sa.insert(t.outputs)
_OWNERS = sa.select(t.owners)
_INSERT_OWNER = sa.insert(t.owners)
_FORGET_BLOB = sa.delete(t.owners).where(t.owners.c.digest == sa.bindparam("of"))
_INSERT_DEVICE = sa.insert(t.devices)
_FORGET_DEVICE = sa.delete(t.devices).where(t.devices.c.name == sa.bindparam("of"))
_FORGET_OWNER = _FORGET_BLOB.where(t.owners.c.owner == sa.bindparam("whom"))
_NEW_JOB = {
    "state": JobState.QUEUED.value,
    "device": "",
    "instance_id": "",
    "epoch": 0,
    "cancelling": None,
    "queued_ms": None,
    "requeues": 0,
    "faults": "[]",
}
_UPDATE_JOB = sa.update(t.jobs).where(t.jobs.c.id == sa.bindparam("job"))


class _Rows:
    """What one commit says of jobs: few statements for many, and one row where it says several things of a job."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._clear()

    def _clear(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}
        self._keys: list[dict[str, str]] = []
        self._changed: dict[str, dict[str, Any]] = {}
        self._results: list[dict[str, Any]] = []
        self._outputs: list[dict[str, str]] = []

    def accept(self, fact: JobAccepted) -> None:
        """A new job."""
        self._jobs[fact.job_id] = {
            "id": fact.job_id,
            "seq": fact.seq,
            "spec": convert.job_spec_to_bytes(fact.spec),
            "brief": convert.job_spec_to_bytes(brief_spec(fact.spec)),
            "needs": _needs_to_text(fact.needs),
            "submitted_ms": fact.submitted_ms,
            "user": fact.user,
            "artifact": fact.spec.manifest.digest,
            **_NEW_JOB,
        }
        if fact.key:
            self._keys.append({"key": fact.key, "job_id": fact.job_id})

    def end(self, fact: JobDone) -> None:
        """What came of a job."""
        result = convert.job_result_to_bytes(fact.result)
        row = {
            "job_id": fact.job_id,
            "outcome": fact.result.outcome.kind.value,
            "result": result,
            "size": len(result),
            "of_job": fact.job_id,
            "brief": convert.job_result_to_bytes(brief_result(fact.result)),
            "finished_ms": fact.finished_ms,
        }
        self._results.append(row)
        self._outputs += [{"job_id": fact.job_id, "digest": blob.digest} for blob in outputs_of(fact.result)]
        self.change(fact)

    def change(self, fact: JobAssigned | JobRequeued | JobCancelling | JobDone) -> None:
        """A job, new or not, is another now."""
        row = self._jobs.get(fact.job_id)
        if row is None:
            row = self._changed.setdefault(fact.job_id, {"job": fact.job_id})
        row.update(_changes(fact))

    def write(self, connection: sa.Connection) -> None:
        """Write all of it; there is nothing any more."""
        changed: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in self._changed.values():
            changed[tuple(row)].append(row)
        writes: list[tuple[sa.Insert | sa.Update, Sequence[dict[str, Any]]]]
        writes = [(_INSERT_JOB, [*self._jobs.values()]), (_INSERT_KEY, self._keys)]
        writes += [(_UPDATE_JOB, alike) for alike in changed.values()]
        writes += [(_INSERT_RESULT, self._results), (_INSERT_OUTPUT, self._outputs)]  # which ask how large jobs are
        for statement, rows in writes:
            if rows:
                self._statements.run(connection, statement, rows)
        self._clear()


def _write(connection: sa.Connection, fact: Fact, rows: _Rows) -> None:
    if isinstance(fact, BlobOwned):
        connection.execute(_FORGET_OWNER, {"of": fact.digest, "whom": fact.owner})
        connection.execute(_INSERT_OWNER, asdict(fact))
    elif isinstance(fact, BlobForgotten):
        connection.execute(_FORGET_BLOB, {"of": fact.digest})
    elif isinstance(fact, (Serviced, ServiceEnded, Reserved, ReservationEnded)):
        _write_device(connection, fact)
    elif isinstance(fact, NoiseKept):
        connection.execute(sa.delete(t.noise).where(t.noise.c.id.in_(fact.forgotten)))
        connection.execute(sa.insert(t.noise), asdict(fact.sample))
    elif isinstance(fact, (DeviceSeen, DeviceForgotten)):
        _write_seen(connection, fact)
    else:
        _write_job(connection, fact, rows)


def _write_device(connection: sa.Connection, fact: Serviced | ServiceEnded | Reserved | ReservationEnded) -> None:
    if isinstance(fact, (Serviced, ServiceEnded)):
        connection.execute(sa.delete(t.serviced).where(t.serviced.c.device == fact.device))
    if isinstance(fact, Serviced):
        connection.execute(sa.insert(t.serviced), asdict(fact))
    elif isinstance(fact, Reserved):
        connection.execute(sa.insert(t.reservations), asdict(fact.reservation))
    elif isinstance(fact, ReservationEnded):
        connection.execute(sa.delete(t.reservations).where(t.reservations.c.id == fact.reservation_id))


def _write_seen(connection: sa.Connection, fact: DeviceSeen | DeviceForgotten) -> None:
    name = fact.info.name if isinstance(fact, DeviceSeen) else fact.device
    connection.execute(_FORGET_DEVICE, {"of": name})
    if isinstance(fact, DeviceSeen):
        row = {"name": name, "info": convert.device_info_to_bytes(fact.info), "seen_ms": fact.seen_ms}
        connection.execute(_INSERT_DEVICE, row)


def _write_job(connection: sa.Connection, fact: JobFact, rows: _Rows) -> None:
    if isinstance(fact, JobAccepted):
        rows.accept(fact)
    elif isinstance(fact, JobDone):
        rows.end(fact)
    elif isinstance(fact, JobWithdrawn):
        rows.write(connection)
        delete_jobs(connection, [fact.job_id])
    else:
        rows.change(fact)


def _outputs(connection: sa.Connection) -> list[tuple[str, str]]:
    """The blobs of all results that are kept: job and digest."""
    return [(row.job_id, row.digest) for row in connection.execute(sa.select(t.outputs))]


def _changes(fact: JobAssigned | JobRequeued | JobCancelling | JobDone) -> dict[str, Any]:
    """The columns of a job that a fact changes."""
    if isinstance(fact, JobAssigned):
        place = {"device": fact.device, "instance_id": fact.instance_id, "epoch": fact.epoch}
        return {"state": JobState.ASSIGNED.value, **place}
    if isinstance(fact, JobRequeued):
        waits = {"queued_ms": fact.queued_ms, "requeues": fact.requeues, "faults": faults_to_text(fact.faults)}
        return {"state": JobState.QUEUED.value, "device": "", "instance_id": "", **waits}
    if isinstance(fact, JobCancelling):
        return {"cancelling": fact.reason}
    return {"state": JobState.DONE.value, "device": fact.result.device, "faults": faults_to_text(fact.faults)}


def _record(row: Any) -> JobRecord:
    spec = convert.job_spec_from_bytes(row.spec)
    needs = _needs_from_text(row.needs)
    accepted = JobAccepted(row.id, row.seq, spec, needs, row.key or "", row.submitted_ms, row.user)
    assigned = None
    if row.state == JobState.ASSIGNED.value:
        assigned = JobAssigned(row.id, row.device, row.instance_id, row.epoch)
    requeued = None
    if row.queued_ms is not None:
        requeued = JobRequeued(row.id, row.queued_ms, row.requeues, faults_from_text(row.faults))
    return JobRecord(accepted, assigned, row.epoch, row.cancelling, requeued)


def _needs_to_text(needs: Needs) -> str:
    return json.dumps([[need.arch, sorted(need.features), *_gpu_to_json(need)] for need in needs])


def _gpu_to_json(need: Need) -> list[Any]:
    """Nothing for a CPU: so needs were written before there were GPUs."""
    return [] if need.device is None else [asdict(need.device), need.index]


def _needs_from_text(text: str) -> Needs:
    return tuple(_need_from_json(*item) for item in json.loads(text))


def _need_from_json(arch: str, features: list[str], device: dict[str, Any] | None = None, index: int = -1) -> Need:
    return Need(arch, frozenset(features), None if device is None else device_from_json(device), index)
