"""A tracker's state moves from its own SQLite file into a PostgreSQL database, which several trackers may share.

All of it or nothing: everything is written in one transaction of the database, while the file is held as a running
tracker holds it. Before that transaction ends the file is marked as moved, so that there is no moment at which trackers
could go on from both. Where the end fails, the database is asked what came of it; where it does not answer, or the move
was killed between the two, the same move is done again, or found to be done.

Blobs, keys and the audit log stay in the data folder, where the tracker that is started with both has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kedge.rpc.security.files import read_private
from kedge.rpc.tracker import schema as t
from kedge.rpc.tracker.cluster import check_database
from kedge.rpc.tracker.database import Postgres, Sqlite
from kedge.rpc.tracker.election import try_leading
from kedge.rpc.tracker.occupied import occupied
from kedge.rpc.tracker.schema import MOVED, StoreError, prepare
from kedge.rpc.tracker.security.folder import Keys
from kedge.rpc.tracker.security.owners import FileOwners

#: Hears of each table's name, how many rows are done, and of how many.
Progress = Callable[[str, int, int], None]

#: What is the trackers' own, or is in files where there is no database.
_NOT_COPIED = (t.meta, t.leadership, t.trackers, t.owners, t.documents)
_DOCUMENTS = ("tokens.json", "devices.json")
#: Rows in one statement.
_ROWS = 500


def move(data_dir: Path, url: str, progress: Progress = lambda table, done, total: None) -> dict[str, int]:
    """Move the state of the tracker in `data_dir`, which must not run, to the database at `url`, which must be empty.

    Returns how many rows each table got; none where an earlier move had got as far as that.

    Raises:
        UsageError: the URL is none of a PostgreSQL database.
        StoreError: there is no state in the folder, its tracker runs, or it was moved elsewhere; the database cannot be
            used, or others' state is in it. Nothing has moved then, except where the database was lost while it was
            told to keep what it got, and does not say whether it did: the file stays marked as moved, and the same
            move, done again, ends it.
    """
    if not (data_dir / "tracker.db").exists():
        raise StoreError(f"there is no tracker's state in {data_dir}", hint="name its data folder with --data-dir")
    source, target = Sqlite(data_dir), Postgres(url)
    with occupied(data_dir), _held(source, target.name) as (file, tracker_id):
        keys = Keys(data_dir) if (data_dir / "security" / "ca.pem").exists() else None
        check_database(target, keys)
        moved = None
        try:
            with target.patient_engine().connect() as database, database.begin():
                moved = _move(file, database, data_dir, tracker_id, target.name, progress)
        except SQLAlchemyError as error:
            if moved is None or not _kept(file, target, tracker_id):
                raise target.explain(error) from error
    if keys is not None:
        keys.audit.write("state moved", database=target.name)
        keys.audit.close()
    return moved


@contextmanager
def _held(source: Sqlite, target: str) -> Iterator[tuple[sa.Connection, str]]:
    """The file, up to date and closed to trackers, and its tracker's id."""
    engine = source.engine()
    try:
        try:
            file = engine.connect()
            with file.begin():
                tracker_id = prepare(file, source.name, moving_to=target)
        except SQLAlchemyError as error:
            raise source.explain(error) from error
        with file:
            yield file, tracker_id
    finally:
        engine.dispose()


def _kept(file: sa.Connection, target: Postgres, tracker_id: str) -> bool:
    """Whether the database kept a move whose end failed; where it did not, the file is no longer marked as moved.

    Raises StoreError where the database does not answer.
    """
    try:
        with target.engine().connect() as database, database.begin():
            # The row that the move has changed: this waits for its transaction, should the server still be at it.
            row = sa.select(t.meta.c.value).where(t.meta.c.name == "tracker_id").with_for_update()
            kept: bool = database.execute(row).scalar_one() == tracker_id
    except SQLAlchemyError as error:
        explained = target.explain(error)
        explained.hint = "it may have moved: until the same command ends well, no tracker starts on the file"
        raise explained from error
    if not kept:
        with file.begin():
            file.execute(sa.delete(t.meta).where(t.meta.c.name == MOVED))
    return kept


def _move(
    file: sa.Connection, database: sa.Connection, data_dir: Path, tracker_id: str, name: str, progress: Progress
) -> dict[str, int]:
    """All that comes before the transaction's end, at the last the mark."""
    moved: dict[str, int] = {}
    if database.execute(sa.select(t.meta.c.value).where(t.meta.c.name == "tracker_id")).scalar_one() != tracker_id:
        if not try_leading(database):
            raise StoreError(f"a tracker runs on {name}", hint="stop it, and name an empty database")
        for table, total, rows in _contents(file, data_dir):
            if database.execute(sa.select(sa.exists(_used(table)))).scalar_one():
                raise StoreError(f"{name} is in use: it has {table.name}", hint="name an empty database")
            moved[table.name] = _copy(database, table, total, rows, progress)
        database.execute(sa.update(t.meta).where(t.meta.c.name == "tracker_id").values(value=tracker_id))
    # A commit whose answer is lost may have happened: that this is left is for the next try to tell.
    with file.begin():
        file.execute(sa.delete(t.meta).where(t.meta.c.name == MOVED))
        file.execute(sa.insert(t.meta), {"name": MOVED, "value": name})
    return moved


def _contents(file: sa.Connection, data_dir: Path) -> Iterator[tuple[sa.Table, int, Iterable[Mapping[str, Any]]]]:
    """Each table, how many rows it gets, and these."""
    for table in t.metadata.sorted_tables:
        if table not in _NOT_COPIED:
            with file.begin():
                total = file.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                rows = file.execute(sa.select(table).execution_options(yield_per=_ROWS))
                yield table, total, (dict(row) for row in rows.mappings())
    owners = [{"owner": owner, "digest": digest} for owner, digest in FileOwners(data_dir / "owners")]
    yield t.owners, len(owners), owners
    paths = [path for name in _DOCUMENTS if (path := data_dir / "security" / name).exists()]
    documents = [{"name": path.name, "content": read_private(path)} for path in paths]
    yield t.documents, len(documents), documents


def _used(table: sa.Table) -> sa.Select[Any]:
    """What is there of a table that trackers have used."""
    rows = sa.select(sa.literal(1)).select_from(table)
    return rows.where(t.documents.c.name.in_(_DOCUMENTS)) if table is t.documents else rows


def _copy(
    database: sa.Connection, table: sa.Table, total: int, rows: Iterable[Mapping[str, Any]], progress: Progress
) -> int:
    done, left = 0, iter(rows)
    while some := list(islice(left, _ROWS)):
        database.execute(sa.insert(table), some)
        done += len(some)
        progress(table.name, done, total)
    return done
