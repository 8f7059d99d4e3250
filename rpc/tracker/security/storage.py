"""Where what security needs is kept: each thing whole, in a private file, or in a database that trackers share."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from kedge.rpc.security.files import read_private, write_private
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.epoch import Epoch
from kedge.rpc.tracker.schema import documents


class Storage(Protocol):
    """One thing that is read once and written whole."""

    @property
    def name(self) -> str:
        """For messages."""

    def read(self) -> bytes:
        """What was written last; raises FileNotFoundError where nothing was, SecretFileError, StoreError."""

    def write(self, content: bytes) -> None:
        """Durable when this returns; raises SecretFileError, StoreError."""


class FileStorage:
    """A file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def name(self) -> str:
        """The file."""
        return str(self._path)

    def read(self) -> bytes:
        """As `read_private`."""
        return read_private(self._path)

    def write(self, content: bytes) -> None:
        """As `write_private`."""
        write_private(self._path, content)


class DatabaseStorage:
    """A row of the table `documents`, written by the tracker that leads in `epoch` and by no other."""

    def __init__(self, database: Postgres, epoch: Epoch, key: str) -> None:
        self._database = database
        self._engine = database.engine()
        self._epoch = epoch
        self._key = key

    @property
    def name(self) -> str:
        """The database and the row."""
        return f"{self._key} in {self._database.name}"

    def read(self) -> bytes:
        """The row; raises FileNotFoundError, StoreError."""
        query = sa.select(documents.c.content).where(documents.c.name == self._key)
        try:
            with self._engine.begin() as connection:
                found: bytes | None = connection.execute(query).scalar_one_or_none()
        except SQLAlchemyError as error:
            raise self._database.explain(error) from error
        if found is None:
            raise FileNotFoundError(self.name)
        return bytes(found)

    def write(self, content: bytes) -> None:
        """The row; raises FencedError where another tracker leads, StoreError."""
        try:
            with self._engine.begin() as connection:
                self._epoch.check(connection)
                connection.execute(sa.delete(documents).where(documents.c.name == self._key))
                connection.execute(sa.insert(documents), {"name": self._key, "content": content})
        except SQLAlchemyError as error:
            raise self._database.explain(error) from error
