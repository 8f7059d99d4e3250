"""A tracker's database that tells what its store asked of it, and what that took."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from kedge.rpc.tracker.database import Postgres, Sqlite


class Watched:
    """A database that remembers what it was asked."""

    def __init__(self, place: Path | Postgres) -> None:
        self._database = Sqlite(place) if isinstance(place, Path) else place
        self.name, self.patience_s, self.explain = (
            self._database.name,
            self._database.patience_s,
            self._database.explain,
        )
        self.asked: dict[str, Any] = {}
        #: Each time, with what it was given.
        self.each: list[tuple[str, Any]] = []
        #: Of SQLite's instructions.
        self.hundreds = 0

    def engine(self) -> sa.Engine:
        engine = self._database.engine()

        @sa.event.listens_for(engine, "connect")
        def count(connection: Any, _record: Any) -> None:
            if isinstance(connection, sqlite3.Connection):
                connection.set_progress_handler(self._one_hundred, 100)

        @sa.event.listens_for(engine, "before_cursor_execute")
        def remember(*call: Any) -> None:
            _connection, _cursor, statement, parameters, _context, many = call
            self.asked[statement] = parameters[0] if many else parameters
            self.each.append((statement, self.asked[statement]))

        return engine

    def forget(self) -> None:
        """What comes counts from here."""
        self.asked.clear()
        self.each.clear()
        self.hundreds = 0

    def _one_hundred(self) -> None:
        self.hundreds += 1

    def plans(self) -> list[str]:
        """How it does what it was asked to read, one line each: it is not asked to sort, unless it says so."""
        engine = self._database.engine()
        found = []
        with engine.begin() as connection:
            explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN (COSTS OFF)"
            for statement, given in self.asked.items():
                if statement.startswith("SELECT"):
                    plan = connection.exec_driver_sql(f"{explain} {statement}", given).all()
                    found.append(" | ".join(" ".join(str(row[-1]).split()) for row in plan))
        engine.dispose()
        return found

    def work(self) -> int:
        """What it took to read all of it: the instructions of SQLite, the rows that PostgreSQL goes through."""
        if isinstance(self._database, Sqlite):
            return 100 * self.hundreds
        engine, rows = self._database.engine(), 0
        explain = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF)"
        with engine.begin() as connection:
            for statement, given in self.each:
                if statement.startswith("SELECT"):
                    for (line,) in connection.exec_driver_sql(f"{explain} {statement}", given).all():
                        if found := re.search(r"Scan .*rows=(\d+) loops=(\d+)", line):
                            rows += int(found[1]) * int(found[2])
                        elif found := re.search(r"Rows Removed by .*: (\d+)", line):
                            rows += int(found[1])
        engine.dispose()
        return rows
