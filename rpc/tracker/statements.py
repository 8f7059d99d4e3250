"""Statements as a database's driver takes them: SQLAlchemy makes each once, and is not asked again for every commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import sqlalchemy as sa


class Statement:
    """One that writes rows of these columns and parameters, in the words of one kind of database.

    Raises:
        TypeError: it has a column, or a parameter, that rows of these have no value for and it has none of its own for.
            SQLAlchemy would ask Python for a column's default at each row.
    """

    def __init__(self, dialect: sa.Dialect, meant: sa.Insert | sa.Update, names: Sequence[str]) -> None:
        compiled: Any = meant.compile(dialect=dialect, column_keys=list(names))
        missing = [column.key for column in (*compiled.insert_prefetch, *compiled.update_prefetch)]
        missing += [name for name, bind in compiled.binds.items() if bind.required and name not in names]
        if missing:
            raise TypeError(f"rows of {', '.join(names)} lack {', '.join(missing)}: give each row a value")
        self._text: str = compiled.string
        #: Whether the driver takes values by their places, or by name.
        self._by_place = compiled.positiontup is not None
        self._names: list[str] = list(compiled.positiontup if self._by_place else compiled.params)
        self._taken = _taker(self._names)
        stored = (compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect) for name in self._names)
        #: By place: how a value is stored, of those that are not as they are.
        self._stored: list[tuple[int, Callable[[Any], Any]]] = [(at, how) for at, how in enumerate(stored) if how]
        #: What the statement says of itself.
        self._fixed = {name: compiled.params[name] for name in self._names if name not in names}

    def run(self, connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, at least one; raises as SQLAlchemy does."""
        given: list[Any] = []
        for row in rows:
            values = list(self._taken({**self._fixed, **row} if self._fixed else row))
            for at, how in self._stored:
                values[at] = how(values[at])
            given.append(tuple(values) if self._by_place else dict(zip(self._names, values, strict=True)))
        connection.exec_driver_sql(self._text, given if len(given) > 1 else given[0])


def _taker(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Iterable[Any]]:
    """What takes values of these names from a row; an itemgetter, which is fastest, gives one value of one name."""
    return itemgetter(*names) if len(names) > 1 else lambda row: [row[name] for name in names]


class Statements:
    """Those for one database, each made when it is needed first."""

    def __init__(self) -> None:
        self._made: dict[tuple[sa.Insert | sa.Update, tuple[str, ...]], Statement] = {}

    def run(self, connection: sa.Connection, meant: sa.Insert | sa.Update, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows that have the same columns, at least one; raises as SQLAlchemy does."""
        names = tuple(rows[0])
        made = self._made.get((meant, names))
        if made is None:
            made = self._made[meant, names] = Statement(connection.dialect, meant, names)
        made.run(connection, rows)
