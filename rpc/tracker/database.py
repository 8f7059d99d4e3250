"""Where the tracker's tables are: an SQLite file of its own by default, a PostgreSQL database by URL."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from kedge.rpc.errors import KedgeError, UsageError
from kedge.rpc.tracker.schema import StoreAwayError, StoreError

#: What SQLAlchemy is told: psycopg 3, which it calls psycopg.
_DRIVER = "postgresql+psycopg"
_SCHEMES = ("postgresql", "postgres", _DRIVER)
_CONNECT_S = 5
#: A session of a tracker that stands still in mid-transaction is ended by the server after so long: its locks must not
#: outlast it.
_IDLE_IN_TRANSACTION_MS = 4_000
_STATEMENT_MS = 15_000
#: A server that stands still itself keeps to no such limit: what it leaves unanswered for so long, it never answers.
#: The second is that of the election's session, whose statements wait for little (`_IDLE_IN_TRANSACTION_MS`).
_UNANSWERED_S = 20.0
_LOCK_UNANSWERED_S = 8.0
#: Options of a URL that may be shown; others may hold secrets.
_SHOWN = ("host", "port", "dbname", "user")
#: What was sent and is not acknowledged for so long means that the connection is gone.
_UNACKNOWLEDGED_MS = 5_000
#: What a server says that ends a session: an administrator or a crash did, or the session was idle for too long.
_ENDED = ("57P01", "57P02", "57P03", "57P05", "25P03")
#: How long a tracker tries to reach its database again before it gives up leading.
_PATIENCE_S = 5.0


class Database(Protocol):
    """A database as the store uses it. `name` is for messages, and holds no password."""

    @property
    def name(self) -> str:
        """How people call it."""

    @property
    def patience_s(self) -> float | None:
        """How long commits that fail are tried again; None: as long as the tracker runs."""

    def engine(self) -> sa.Engine:
        """Connections to it, one at a time."""

    def explain(self, error: Exception) -> KedgeError:
        """What went wrong, and what helps."""


class Sqlite:
    """The file `tracker.db` in `folder`, which is made when it does not exist; it is opened exclusively.

    Raises:
        StoreError: the folder cannot be made.
    """

    patience_s: float | None = None

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tracker.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the data folder {folder}: {error.strerror}", hint="name another with --data-dir"
            ) from error

    @property
    def name(self) -> str:
        """The file."""
        return str(self._path)

    def engine(self) -> sa.Engine:
        """One connection, with every commit on the disk."""
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(self._path)), connect_args={"timeout": 0.5}, poolclass=sa.StaticPool
        )

        @sa.event.listens_for(engine, "connect")
        def prepare(connection: Any, _record: Any) -> None:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()
            # sqlite3 would begin by itself, but not before statements that change tables: those would stay half done.
            connection.isolation_level = None

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            connection.connection.cursor().execute("BEGIN")  # as SQLAlchemy would, for a tenth of the time

        return engine

    def explain(self, error: Exception) -> KedgeError:
        """What went wrong, and what helps."""
        if isinstance(error, KedgeError):
            return error
        text = _text(error)
        if "locked" in text:
            return StoreError(
                f"another tracker uses the data folder {self._path.parent}",
                hint="stop it, or name another folder with --data-dir",
            )
        if "full" in text:
            return StoreError(f"no space is left for {self._path} ({text})", hint="free space on that disk")
        return StoreError(f"cannot use {self._path}: {text}", hint="name another folder with --data-dir")


class Postgres:
    """The database at `postgresql://user@host:port/name`; libpq's environment and password file count as well.

    Raises:
        UsageError: the URL is none of a PostgreSQL database.
        StoreError: its driver is not installed.
    """

    patience_s: float | None = _PATIENCE_S

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
        except ArgumentError as error:
            raise UsageError("--database: this is no URL of a database", hint=_EXAMPLE) from error
        if parsed.drivername not in _SCHEMES:
            raise UsageError(f"--database: databases of the kind {parsed.drivername!r} are not known", hint=_EXAMPLE)
        if importlib.util.find_spec("psycopg") is None:
            raise StoreError(
                "PostgreSQL needs the Python package 'psycopg', which is not installed here",
                hint="python3 -m pip install 'kedge[postgres]'",
            )
        self._url = parsed.set(drivername=_DRIVER)

    @property
    def name(self) -> str:
        """The URL, without passwords: of its options those alone that say where the database is."""
        shown = {key: value for key, value in self._url.query.items() if key in _SHOWN}
        return self._url.set(drivername="postgresql", query=shown).render_as_string(hide_password=True)

    def engine(self) -> sa.Engine:
        """Every commit is on the disk, whatever the server is set to otherwise; sessions that hang are ended."""
        return self._engine({"idle_in_transaction_session_timeout": _IDLE_IN_TRANSACTION_MS}, _UNANSWERED_S)

    def patient_engine(self) -> sa.Engine:
        """For what takes as long as there are rows: nobody ends it, neither the server nor this end."""
        unlimited = {"idle_in_transaction_session_timeout": 0, "statement_timeout": 0}
        return self._engine(unlimited, math.inf)

    def lock_engine(self, idle_ms: int) -> sa.Engine:
        """For a session that the server ends when nothing was asked in it for `idle_ms`; every statement commits."""
        return self._engine({"idle_session_timeout": idle_ms}, _LOCK_UNANSWERED_S, isolation_level="AUTOCOMMIT")

    def _engine(self, settings: dict[str, int], unanswered_s: float, **options: Any) -> sa.Engine:
        from kedge.rpc.tracker.patience import impatient  # psycopg is there only where it is asked for

        kind = impatient(unanswered_s)
        common: dict[str, int | str] = {"statement_timeout": _STATEMENT_MS, "synchronous_commit": "on"}
        arguments = {
            "connect_timeout": _CONNECT_S,
            "tcp_user_timeout": _UNACKNOWLEDGED_MS,
            "keepalives_idle": 2,
            "keepalives_interval": 1,
            "keepalives_count": 3,
            "application_name": "kedge tracker",
            "options": " ".join(f"-c {name}={value}" for name, value in {**common, **settings}.items()),
        }
        engine = sa.create_engine(self._url, connect_args=arguments, poolclass=sa.NullPool, **options)

        @sa.event.listens_for(engine, "do_connect")
        def connect(_dialect: Any, _record: Any, places: Any, parameters: Any) -> Any:
            return kind.connect(*places, **parameters)

        @sa.event.listens_for(engine, "handle_error")
        def recognize(context: sa.engine.ExceptionContext) -> None:
            state = getattr(context.original_exception, "sqlstate", None) or ""
            if state in _ENDED or state.startswith("08"):
                context.is_disconnect = True

        return engine

    def explain(self, error: Exception) -> KedgeError:
        """What went wrong, and what helps."""
        if isinstance(error, KedgeError):
            return error
        text = " ".join(_text(error).split())
        if isinstance(error, OperationalError) or (isinstance(error, DBAPIError) and error.connection_invalidated):
            return StoreAwayError(
                f"cannot use {self.name}: {text}", hint="see whether the PostgreSQL server runs there"
            )
        return StoreError(f"cannot use {self.name}: {text}", hint="its user must own the database's tables")


def database(url: str | None, folder: Path) -> Sqlite | Postgres:
    """What `--database` names; without it, the file in the data folder."""
    return Postgres(url) if url else Sqlite(folder)


def _text(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error)


_EXAMPLE = "for example postgresql://kedge@db.lab/kedge"
