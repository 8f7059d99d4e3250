"""How the jobs that are stored are read: one with its result, and lists of them in brief, in pages.

While a page is read nothing is stored, so no list reads many more rows than it shows: indices have its jobs in order,
and where none does, a page is what fits of so many jobs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from kedge.rpc import convert
from kedge.rpc.tracker import schema as t
from kedge.rpc.types import DeviceFault, Job, JobFilter, JobState

#: The states of jobs that are not done, as they are stored.
LIVE = (JobState.QUEUED, JobState.ASSIGNED)
#: What digests are written with.
_HEX = frozenset("0123456789abcdef")
#: How many artifacts that begin alike are read from the index of artifacts, each by itself.
_ALIKE = 10
#: How many jobs a page looks at where no index has those that fit in order.
_LOOKED_AT = 1_000

_FULL_JOB = (
    sa.select(t.jobs, t.results.c.result, t.results.c.finished_ms)
    .outerjoin(t.results, t.results.c.job_id == t.jobs.c.id)
)  # fmt: skip
_BRIEF_JOBS = (
    sa.select(t.jobs.c.id, t.jobs.c.brief.label("spec"), t.jobs.c.state, t.jobs.c.device, t.jobs.c.submitted_ms)
    .add_columns(t.jobs.c.seq, t.jobs.c.user, t.jobs.c.faults)
    .add_columns(t.results.c.brief.label("result"), t.results.c.finished_ms)
    .outerjoin(t.results, t.results.c.job_id == t.jobs.c.id)
)

_Condition = sa.ColumnElement[bool]


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list of jobs; `last` is where the next part goes on, None where there is none.

    `earliest`, which the next part is given too, is the number of the first job that was submitted since the time that
    was asked for: it is looked for once a list.
    """

    jobs: list[Job]
    last: int | None
    earliest: int | None = None


def load_job(connection: sa.Connection, job_id: str) -> Job | None:
    """A stored job with its result; None where there is none."""
    row = connection.execute(_FULL_JOB.where(t.jobs.c.id == job_id)).one_or_none()
    return None if row is None else _job(row)


def list_jobs(
    connection: sa.Connection,
    limit: int,
    states: Sequence[JobState],
    user: str | None,
    *,
    oldest_first: bool,
    beyond: int | None,
    earliest: int | None,
    wanted: JobFilter,
) -> Page:
    """A page of a list, as `kedge.rpc.tracker.store.Store.jobs` says."""
    if not _HEX.issuperset(wanted.artifact):
        return Page([], None)
    seq = t.jobs.c.seq
    rest: list[_Condition] = []
    place: list[_Condition] = []
    if wanted.since_unix_ms:
        rest.append(t.jobs.c.submitted_ms >= wanted.since_unix_ms)
        if earliest is None:
            # All before the first one of that time are passed over. A sum, since databases take the least of a column
            # that has an index for the first row there that fits, and go through all before it.
            earliest = connection.execute(sa.select(sa.func.min(seq + 0)).where(*rest)).scalar_one()
        if earliest is None:
            return Page([], None)
        place.append(seq >= earliest)
    if beyond is not None:
        place.append(seq > beyond if oldest_first else seq < beyond)
    names = [(t.jobs.c.user, user), (t.jobs.c.user, wanted.user or None), (t.jobs.c.device, wanted.device or None)]
    whose = [(column, name) for column, name in names if name is not None]
    # The database does not know who has started: that is asked of the living.
    asked = states or (*LIVE, JobState.DONE)
    stored: set[JobState] = {JobState.ASSIGNED if state is JobState.RUNNING else state for state in asked}
    part = _Part(connection, limit, oldest_first, stored, whose, place)
    if wanted.artifact and not wanted.ids:
        rows, last = _of_artifact(part, wanted.artifact, rest)
    else:
        if wanted.ids:  # the few are looked up
            named = t.jobs.c.id.in_(wanted.ids)
            each = [[named, *place, *rest, *part.asides(), *_begins(wanted.artifact)]]
        else:
            each = [[*one, *rest] for one in part.by_state()]
        rows = part.first(_BRIEF_JOBS, each, limit)
        last = rows[-1].seq if len(rows) == limit else None
    return Page([_job(row) for row in rows], last, earliest)


@dataclass(frozen=True, slots=True)
class _Part:
    """What lists have in common: so many jobs in this order and from here, their states, users and devices."""

    connection: sa.Connection
    limit: int
    oldest_first: bool
    states: set[JobState]
    whose: list[tuple[sa.Column[str], str]]
    place: list[_Condition]

    def by_state(self) -> list[list[_Condition]]:
        """Each state by itself: an index has its jobs in order, so that of many no more are read than may be shown."""
        # Written out: an index is of what is done alone.
        states = [t.jobs.c.state == sa.literal(state.value, literal_execute=True) for state in self.states]
        return [[state, *(column == name for column, name in self.whose), *self.place] for state in states]

    def asides(self) -> list[_Condition]:
        """The states, users and devices, by which nothing is looked up."""
        states = _aside(t.jobs.c.state).in_([state.value for state in self.states])
        return [states, *(_aside(column) == name for column, name in self.whose)]

    def first(self, query: sa.Select[Any], each: Sequence[Sequence[_Condition]], limit: int) -> list[Any]:
        """The first that fit any of these, which an index has in order."""
        seq = t.jobs.c.seq
        query = query.order_by(seq.asc() if self.oldest_first else seq.desc()).limit(limit)
        rows = [row for fits in each for row in self.connection.execute(query.where(*fits))]
        return sorted(rows, key=attrgetter("seq"), reverse=not self.oldest_first)[:limit]


def _of_artifact(part: _Part, beginning: str, rest: list[_Condition]) -> tuple[list[Any], int | None]:
    """The jobs of artifacts whose digests begin so, and where to go on.

    Indices say which jobs come next, of an artifact's or, where too many artifacts begin so, of all. The rows of so
    many are looked at, and what fits of these is the page.
    """
    each, looked_at, fits = part.by_state(), _LOOKED_AT, [*rest, *part.asides()]
    # Jobs that are not done are few: nobody goes through an artifact's for them.
    digests = _digests(part.connection, beginning) if JobState.DONE in part.states else None
    if digests is None:
        fits += _begins(beginning)
    else:
        each = [[t.jobs.c.artifact == digest, *part.place] for digest in digests]
        if not part.whose:  # nearly all of them fit
            looked_at = part.limit
    seqs = [row.seq for row in part.first(sa.select(t.jobs.c.seq), each, looked_at)]
    rows = part.first(_BRIEF_JOBS, [[t.jobs.c.seq.in_(seqs), *fits]] if seqs else [], part.limit)
    if len(rows) == part.limit:
        return rows, rows[-1].seq
    return rows, seqs[-1] if len(seqs) == looked_at else None


def _digests(connection: sa.Connection, beginning: str) -> list[str] | None:
    """The digests of stored jobs' artifacts that begin so; None where they are many.

    Each is looked for behind the one before it: the index has one entry for every job, and most are passed over.
    """
    artifact, found = t.jobs.c.artifact, list[str]()
    after = artifact >= beginning
    while len(found) <= _ALIKE:
        query = sa.select(artifact).where(after, artifact < _end(beginning)).order_by(artifact).limit(1)
        digest = connection.execute(query).scalar_one_or_none()
        if digest is None:
            return found
        found.append(digest)
        after = artifact > digest
    return None


def _end(beginning: str) -> str:
    """Comes after all digests that begin so: letters are in the order of their codes, and none is after "f"."""
    return beginning + "g"


def _begins(beginning: str) -> list[_Condition]:
    """That an artifact's digest does, nothing where any will do; nothing is looked up by this."""
    artifact = _aside(t.jobs.c.artifact)
    return [artifact >= beginning, artifact < _end(beginning)] if beginning else []


def _aside(column: sa.Column[str]) -> sa.ColumnElement[str]:
    """A column as a database looks for it in no index: SQLite would take the worse of two, not knowing how many fit."""
    return column.concat("")


def _job(row: Any) -> Job:
    return Job(
        id=row.id,
        spec=convert.job_spec_from_bytes(row.spec),
        state=JobState(row.state),
        device=row.device,
        result=convert.job_result_from_bytes(row.result) if row.result is not None else None,
        submitted_unix_ms=row.submitted_ms,
        finished_unix_ms=row.finished_ms or 0,
        user=row.user,
        faults=faults_from_text(row.faults),
    )


def faults_to_text(faults: Sequence[DeviceFault]) -> str:
    """The devices that failed with a job, as they are stored."""
    return json.dumps([[fault.device, fault.reason] for fault in faults])


def faults_from_text(text: str) -> tuple[DeviceFault, ...]:
    """The devices that failed with a job."""
    return tuple(DeviceFault(*item) for item in json.loads(text))
