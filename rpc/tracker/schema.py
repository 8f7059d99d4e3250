"""The tables of the tracker's database, and how those of an older kedge become them."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from google.protobuf.message import DecodeError

from kedge.rpc import convert
from kedge.rpc.errors import KedgeError
from kedge.rpc.status import TrackerAwayError
from kedge.rpc.tracker.brief import brief_result, brief_spec
from kedge.rpc.tracker.needed import outputs_of

log = logging.getLogger("kedge.tracker")
SCHEMA_VERSION = 11
#: PostgreSQL's advisory locks are numbers; this one is held while tables are made.
_PREPARING = 0x6B656467650001
#: Jobs whose artifact is filled in at once.
_FILLED = 500
#: Damaged jobs that are named.
_NAMED = 10
#: In `meta`: where the state was moved to (see `kedge.rpc.tracker.moving`).
MOVED = "moved_to"


class Text(sa.TypeDecorator[str]):
    """Text in any language. PostgreSQL stores no NUL character: a sign for what is unreadable takes its place."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """As it is stored."""
        return value if value is None else value.replace("\0", "\ufffd")


#: Hex digits, which are looked for by how they begin: in the order of their codes. In some languages "aa" is after "z";
#: SQLite knows none.
_Digest = Text().with_variant(Text(collation="C"), "postgresql")
_DONE = sa.text("state = 'done'")
metadata = sa.MetaData()
meta = sa.Table(
    "meta",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("value", Text, nullable=False),
)
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
    sa.Column("needs", Text, nullable=False),
    sa.Column("submitted_ms", sa.BigInteger, nullable=False),
    sa.Column("state", Text, nullable=False),
    sa.Column("device", Text, nullable=False, default=""),
    sa.Column("instance_id", Text, nullable=False, default=""),
    sa.Column("epoch", sa.BigInteger, nullable=False, default=0),
    sa.Column("cancelling", Text),
    # Since when it waits again, and how often a device gave it up.
    sa.Column("queued_ms", sa.BigInteger),
    sa.Column("requeues", sa.Integer, nullable=False, default=0),
    # Devices that failed with it, as JSON.
    sa.Column("faults", Text, nullable=False, server_default="[]"),
    sa.Column("user", Text, nullable=False, server_default=""),
    # The digest of the artifact, nothing where a job has none; NULL where a kedge of before schema 11 wrote it.
    sa.Column("artifact", _Digest),
    # What lists show comes before the whole: SQLite reads a row from its beginning.
    sa.Column("brief", sa.LargeBinary, nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    # Lists, everybody's, a user's, a device's and an artifact's, are read from these: in order, and no row more than is
    # shown.
    sa.Index("ix_jobs_by_state", "state", "seq"),
    sa.Index("ix_jobs_by_user", "user", "state", "seq"),
    sa.Index("ix_jobs_by_device", "device", "state", "seq"),
    # These two are of what does not change any more, nearly: each change of a job writes what has the changed column.
    sa.Index("ix_jobs_by_user_and_device", "user", "device", "seq", sqlite_where=_DONE, postgresql_where=_DONE),
    sa.Index("ix_jobs_by_artifact", "artifact", "seq"),
    # Which job is the first of a time and later: clocks are set back, so that later jobs may have earlier times.
    sa.Index("ix_jobs_by_time", "submitted_ms", "seq"),
)
results = sa.Table(
    "results",
    metadata,
    sa.Column("job_id", Text, primary_key=True),
    sa.Column("outcome", Text, nullable=False),
    sa.Column("finished_ms", sa.BigInteger, nullable=False),
    sa.Column("brief", sa.LargeBinary, nullable=False),
    sa.Column("result", sa.LargeBinary, nullable=False),
    # Of the result and its job's spec, which go together.
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    # Retention asks for the oldest, how many there are, and how large all of them: nothing but this is read for that.
    sa.Index("ix_results_oldest", "finished_ms", "job_id", "bytes"),
)
keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("key", Text, primary_key=True),
    sa.Column("job_id", Text, nullable=False, index=True),
)
# The blobs that a result names: they stay as long as it does, if there is room.
outputs = sa.Table(
    "outputs",
    metadata,
    sa.Column("job_id", Text, primary_key=True),
    sa.Column("digest", Text, primary_key=True),
)
serviced = sa.Table(
    "serviced",
    metadata,
    sa.Column("device", Text, primary_key=True),
    sa.Column("reason", Text, nullable=False),
    sa.Column("user", Text, nullable=False),
    sa.Column("since_ms", sa.BigInteger, nullable=False),
)
reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("device", Text, nullable=False),
    sa.Column("user", Text, nullable=False),
    sa.Column("from_unix_ms", sa.BigInteger, nullable=False),
    sa.Column("until_unix_ms", sa.BigInteger, nullable=False),
    sa.Column("reason", Text, nullable=False),
)
#: Devices as they were when they last came or went. New in schema 9.
devices = sa.Table(
    "devices",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("info", sa.LargeBinary, nullable=False),
    sa.Column("seen_ms", sa.BigInteger, nullable=False),
)
#: How far times of equal code were apart on a device, by comparison (`kedge.rpc.noise`). New in schema 7.
noise = sa.Table(
    "noise",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("device", Text, nullable=False),
    sa.Column("user", Text, nullable=False),
    sa.Column("relative", sa.Double, nullable=False),
    sa.Column("num_threads", sa.Integer, nullable=False),
    sa.Column("on", Text, nullable=False),
    sa.Column("target", Text, nullable=False),
    sa.Column("software", Text, nullable=False),
    sa.Column("governor", Text, nullable=False),
    sa.Column("measured_unix_ms", sa.BigInteger, nullable=False),
)
#: Which tracker leads (one row), as `kedge.rpc.tracker.epoch` says; only where several share a database.
leadership = sa.Table(
    "leadership",
    metadata,
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("transactions", sa.BigInteger, nullable=False),
    sa.Column("tracker", Text, nullable=False),
    sa.Column("since_ms", sa.BigInteger, nullable=False),
)
#: The trackers that share the database, each with the addresses at which others reach it.
trackers = sa.Table(
    "trackers",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("address", Text, nullable=False),
    sa.Column("peers_address", Text, nullable=False),
    sa.Column("software", Text, nullable=False),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("seen_ms", sa.BigInteger, nullable=False),
)
#: What a tracker without others keeps in files of its data folder: tokens, enrolled devices.
documents = sa.Table(
    "documents",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)
#: Whose blobs are whose.
owners = sa.Table(
    "owners",
    metadata,
    sa.Column("digest", Text, primary_key=True),
    sa.Column("owner", Text, primary_key=True),
)


class StoreError(KedgeError):
    """The tracker's database cannot be used."""


class StoreAwayError(TrackerAwayError, StoreError):
    """It cannot be used now, or by this tracker: it comes back, or another tracker leads."""


def is_current(connection: sa.Connection) -> bool:
    """Whether the tables are there as this kedge knows them: then `prepare` has next to nothing to do."""
    if not sa.inspect(connection).has_table(meta.name):
        return False
    found = connection.execute(sa.select(meta.c.value).where(meta.c.name == "schema")).scalar_one_or_none()
    return found == str(SCHEMA_VERSION)


def prepare(connection: sa.Connection, place: str, *, moving_to: str | None = None) -> str:
    """Make the tables as this kedge knows them, or bring them up to date; returns the tracker's id.

    Raises StoreError where a newer kedge has written `place`, or its state was moved, and not to `moving_to`.
    """
    if connection.dialect.name == "postgresql":
        # Two trackers that start at once would both make the tables.
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _PREPARING})
    metadata.create_all(connection)
    if connection.execute(sa.select(leadership)).one_or_none() is None:
        nobody = {"row": 1, "epoch": 0, "transactions": 0, "tracker": "", "since_ms": 0}
        connection.execute(sa.insert(leadership), nobody)
    known: dict[str, str] = {row.name: row.value for row in connection.execute(sa.select(meta))}
    if not known:
        known = {"schema": str(SCHEMA_VERSION), "tracker_id": secrets.token_hex(8)}
        connection.execute(sa.insert(meta), [{"name": name, "value": value} for name, value in known.items()])
    if int(known["schema"]) > SCHEMA_VERSION:
        raise StoreError(
            f"{place} was written by a newer kedge (schema {known['schema']}, this one knows {SCHEMA_VERSION})",
            hint="use that kedge, or another --data-dir or --database",
        )
    if known.get(MOVED, moving_to) != moving_to:
        raise StoreError(
            f"the state in {place} was moved to {known[MOVED]}, or a move there was broken off",
            hint="start the tracker with that --database; a move that did not end well is ended by the same command, "
            "kedge tracker move-database with this --data-dir and that --database",
        )
    found = int(known["schema"])
    if found < 2:
        _to_schema_2(connection)
    elif found < 3:
        _to_schema_3(connection)
    if found < 4:
        _to_schema_4(connection)
    if found < 6:
        _to_schema_6(connection)
    if found < 8:
        _to_schema_8(connection)
    if found < 11:
        _to_schema_11(connection)
    else:
        # An older kedge that led trackers of one database while this one brought it up to date may have written these.
        _fill_artifacts(connection)
    connection.execute(sa.update(meta).where(meta.c.name == "schema").values(value=str(SCHEMA_VERSION)))
    return known["tracker_id"]


def _to_schema_2(connection: sa.Connection) -> None:
    """The tables made anew: lists had to read whole jobs, and what a requeue changed was not stored."""
    connection.execute(sa.text("DROP INDEX ix_jobs_state"))
    for name in ("jobs", "results"):
        connection.execute(sa.text(f"ALTER TABLE {name} RENAME TO old_{name}"))
    metadata.create_all(connection)
    for key, old, new in (("id", "old_jobs", jobs), ("job_id", "old_results", results)):
        whole = sa.text(f"SELECT * FROM {old} WHERE {key} = :key")
        for one in connection.execute(sa.text(f"SELECT {key} FROM {old}")).scalars().all():
            row = dict(connection.execute(whole, {"key": one}).mappings().one())
            connection.execute(sa.insert(new), {**row, "brief": _brief(row)})
        connection.execute(sa.text(f"DROP TABLE {old}"))


def _to_schema_3(connection: sa.Connection) -> None:
    """Jobs have a user, and remember the devices that failed with them."""
    for column, default in (("faults", "[]"), ("user", "")):
        connection.execute(sa.text(f"ALTER TABLE jobs ADD COLUMN \"{column}\" VARCHAR NOT NULL DEFAULT '{default}'"))


def _to_schema_4(connection: sa.Connection) -> None:
    """The blobs of results are listed, and keys have an index by their jobs."""
    _make_indices(connection, keys)
    for job_id in connection.execute(sa.select(results.c.job_id)).scalars().all():
        whole = connection.execute(sa.select(results.c.result).where(results.c.job_id == job_id)).scalar_one()
        blobs = outputs_of(convert.job_result_from_bytes(whole))
        if blobs:
            connection.execute(sa.insert(outputs), [{"job_id": job_id, "digest": blob.digest} for blob in blobs])


def _to_schema_6(connection: sa.Connection) -> None:
    """What lists and retention look for has indices that give it in order: the last step makes those of jobs."""
    for name in ("ix_jobs_state", "ix_results_finished_ms"):
        connection.execute(sa.text(f"DROP INDEX IF EXISTS {name}"))


def _to_schema_8(connection: sa.Connection) -> None:
    """It is known how large results are."""
    connection.execute(sa.text("DROP INDEX IF EXISTS ix_results_by_end"))
    if "bytes" not in {column["name"] for column in sa.inspect(connection).get_columns(results.name)}:
        connection.execute(sa.text("ALTER TABLE results ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0"))
    size = sa.func.length(results.c.result) + size_of_spec(results.c.job_id)
    connection.execute(sa.update(results).values(bytes=sa.func.coalesce(size, 0)))
    _make_indices(connection, results)


def _to_schema_11(connection: sa.Connection) -> None:
    """Jobs know their artifact; all lists of them have indices."""
    if "artifact" not in {column["name"] for column in sa.inspect(connection).get_columns(jobs.name)}:
        kind = jobs.c.artifact.type.compile(connection.dialect)
        connection.execute(sa.text(f"ALTER TABLE jobs ADD COLUMN artifact {kind}"))
    _fill_artifacts(connection)
    _make_indices(connection, jobs)


def _fill_artifacts(connection: sa.Connection) -> None:
    """Give jobs that do not know their artifact what their specs say of it: nothing, where these cannot be read."""
    unknown = sa.select(jobs.c.id).where(jobs.c.artifact.is_(None)).order_by(jobs.c.seq)
    ids = connection.execute(unknown).scalars().all()
    fill = sa.update(jobs).where(jobs.c.id == sa.bindparam("of")).values(artifact=sa.bindparam("digest"))
    damaged: list[str] = []
    for at in range(0, len(ids), _FILLED):
        briefs = sa.select(jobs.c.id, jobs.c.brief).where(jobs.c.id.in_(ids[at : at + _FILLED])).order_by(jobs.c.seq)
        filled = []
        for row in connection.execute(briefs):
            try:
                digest = convert.artifact_of_spec(row.brief)
            except DecodeError:
                digest = ""
                damaged.append(row.id)
            filled.append({"of": row.id, "digest": digest})
        connection.execute(fill, filled)
    if damaged:
        named = ", ".join(damaged[:_NAMED]) + (f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else "")
        log.warning("what is stored of these jobs is damaged; no list by artifact shows them: %s", named)


def _make_indices(connection: sa.Connection, table: sa.Table) -> None:
    """Those of a table that are not there yet."""
    for index in table.indexes:
        index.create(connection, checkfirst=True)


def size_of_spec(job_id: Any) -> sa.ScalarSelect[Any]:
    """How many bytes the spec of a job takes."""
    return sa.select(sa.func.length(jobs.c.spec)).where(jobs.c.id == job_id).scalar_subquery()


def _brief(row: Mapping[str, Any]) -> bytes:
    """What lists show of a stored job or result."""
    if "spec" in row:
        return convert.job_spec_to_bytes(brief_spec(convert.job_spec_from_bytes(row["spec"])))
    return convert.job_result_to_bytes(brief_result(convert.job_result_from_bytes(row["result"])))
