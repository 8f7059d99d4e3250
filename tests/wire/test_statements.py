"""What SQLAlchemy makes once writes what SQLAlchemy would write each time, in the words of either database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kedge.rpc.tracker.database import Postgres, Sqlite
from kedge.rpc.tracker.schema import Text
from kedge.rpc.tracker.statements import Statements
from support.postgres import PostgresServer

TABLES = sa.MetaData()
THINGS = sa.Table(
    "things",
    TABLES,
    sa.Column("id", Text, primary_key=True),
    sa.Column("size", sa.BigInteger),
    sa.Column("text", Text),
    sa.Column("raw", sa.LargeBinary),
)
INSERT = sa.insert(THINGS)
COUNTED = sa.insert(THINGS).values(size=sa.bindparam("more", type_=sa.BigInteger) + 40)
UPDATE = sa.update(THINGS).where(THINGS.c.id == sa.bindparam("of"))


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> sa.Engine:
    if request.param == "sqlite":
        return Sqlite(tmp_path).engine()
    server: PostgresServer = request.getfixturevalue("postgres")
    return Postgres(server.new_database()).engine()


def rows(names: str, base: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": name, **base} for name in names]


WRITES: list[tuple[sa.Insert | sa.Update, list[dict[str, Any]]]] = [
    (INSERT, rows("a", {"text": "a\0b", "raw": b"\0\1", "size": 1 << 40})),
    (INSERT, rows("bcd", {"text": None, "raw": None, "size": None})),
    (INSERT, rows("ef", {"text": "%s ? :x %(y)s", "size": -1})),
    (COUNTED, rows("gh", {"text": "t", "more": 2})),
    (UPDATE, [{"of": "a", "text": "new\0"}, {"of": "nobody", "text": "x"}]),
    (UPDATE, [{"of": "b", "size": 5, "raw": b""}]),
    (UPDATE, [{"of": "c", "raw": b"\xff", "size": 6}, {"of": "d", "raw": b"", "size": 7}]),
    (INSERT, [{"id": "ij"}]),
    (INSERT, [{"id": "k\0"}, {"id": "lm"}]),
    (UPDATE.values(size=sa.literal_column("9")), [{"of": "ij"}]),
]


def test_what_is_written_is_the_same(engine: sa.Engine) -> None:
    statements, found = Statements(), []
    for made in (True, False):
        with engine.begin() as connection:
            TABLES.drop_all(connection)
            TABLES.create_all(connection)
            for meant, given in WRITES:
                if made:
                    statements.run(connection, meant, given)
                else:
                    connection.execute(meant, given)
            found.append(connection.execute(sa.select(THINGS).order_by(THINGS.c.id)).all())
    engine.dispose()
    assert found[0] == found[1] and len(found[0]) == 11
    assert {row.id: row.size for row in found[0] if row.id in "abg"} == {"a": 1 << 40, "b": 5, "g": 42}


def test_what_is_refused_is_refused_as_ever(engine: sa.Engine) -> None:
    statements = Statements()
    with engine.begin() as connection:
        TABLES.create_all(connection)
    for _ in range(2):
        with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
            statements.run(connection, INSERT, rows("aa", {"size": 1}))
    with engine.begin() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(THINGS)).scalar_one() == 0
    engine.dispose()


def test_what_rows_have_no_value_for_is_refused_when_the_statement_is_made(engine: sa.Engine) -> None:
    tables = sa.MetaData()
    made = sa.Table(
        "made",
        tables,
        sa.Column("id", Text, primary_key=True),
        sa.Column("size", sa.Integer, nullable=True, default=7, onupdate=8),
        sa.Column("text", Text, server_default="by the database"),
    )
    changed = sa.update(made).where(made.c.id == sa.bindparam("of"))
    statements = Statements()
    with engine.begin() as connection:
        tables.create_all(connection)
        for meant, row, missing in (
            (sa.insert(made), {"id": "a"}, "size"),
            (changed, {"of": "a", "text": "t"}, "size"),
            (changed, {"size": 1}, "of"),
        ):
            with pytest.raises(TypeError, match=f"rows of {', '.join(row)} lack {missing}: give each row a value"):
                statements.run(connection, meant, [row])
        statements.run(connection, sa.insert(made), [{"id": "a", "size": None}])
        statements.run(connection, changed, [{"of": "a", "size": 3}])
        assert connection.execute(sa.select(made)).one() == ("a", 3, "by the database")
    engine.dispose()
