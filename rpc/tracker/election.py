"""Which of several trackers on one PostgreSQL database leads.

Whoever holds an advisory lock does. It is held by a session of its own, in which something is asked every half second;
the server ends a session in which nothing was asked for some seconds, and with it the lock of a tracker that stands
still (SIGSTOP, a frozen machine, a network that swallows everything). So the next one leads within a few seconds, under
the next epoch (`kedge.rpc.tracker.epoch`), and what an earlier leader still tries to write is refused. As long as the
server waits, a leader knows that nobody else leads, and answers; no longer.

Times are those of the database's clock; only how long that is, is told by the tracker's steady one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from kedge.rpc.tracker import schema as t
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.epoch import Epoch, take_lead
from kedge.rpc.transport import Address, AddressError, parse_address

log = logging.getLogger("kedge.tracker")

#: PostgreSQL's advisory locks are numbers, of each database its own.
_LEADING = 0x6B656467650002
_LOOK_S = 0.5
#: The server ends the session, and with it the lock, of a tracker that was silent for so long.
_SILENCE_MS = 3_000
#: So long after it last asked no other tracker can lead, unless the server itself ended the session.
_SURE_S = _SILENCE_MS / 1000
#: Who gave the lead up does not try to have it again for so long.
_REST_S = 3.0
#: Not seen for so long, a tracker counts as gone; after the second time it is forgotten.
GONE_MS = 10_000
_FORGOTTEN_MS = 86_400_000

_NOW = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()) * 1000, sa.BigInteger)


@dataclass(frozen=True, slots=True)
class Member:
    """A tracker: where it serves clients, and other trackers. `name` tells it apart, also from an earlier run."""

    name: str
    address: Address
    peers_address: Address
    software: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A member as the others see it."""

    member: Member
    started_ms: int
    seen_ms: int
    gone: bool


@dataclass(frozen=True, slots=True)
class View:
    """All trackers, and who leads in which epoch (0: nobody ever did)."""

    epoch: int
    leader: str
    members: tuple[Seen, ...]


def try_leading(connection: sa.Connection) -> bool:
    """Whether no tracker leads; none does then before this transaction has ended."""
    return bool(connection.execute(sa.select(sa.func.pg_try_advisory_xact_lock(_LEADING))).scalar_one())


class Election:
    """One tracker's part in it, in a thread of its own. The callbacks are called from there.

    `on_lead` hears that this tracker leads from now on, `on_lost` that it does not any more, and why; `on_view` how
    things are, twice a second while the database answers. `on_failure` hears of an error after which it takes no part.
    """

    def __init__(
        self,
        database: Postgres,
        member: Member,
        on_lead: Callable[[Epoch], None],
        on_lost: Callable[[str], None],
        on_view: Callable[[View], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._database = database
        self._member = member
        self._on_lead = on_lead
        self._on_lost = on_lost
        self._on_view = on_view
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._giving_up = threading.Event()
        #: Why the database cannot be asked; None when all is well.
        self.problem: str | None = None
        self._leading: Epoch | None = None
        #: By the steady clock: so long no other tracker can lead while this one does.
        self._sure_until = 0.0
        #: Trackers whose addresses are none.
        self._unreachable: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="kedge-election", daemon=True)

    def start(self) -> None:
        """Take part."""
        self._thread.start()

    def surely_leads(self) -> bool:
        """Whether this tracker leads and no other one can by now, also where this process stood still just before."""
        return self._leading is not None and time.monotonic() < self._sure_until

    def give_up(self) -> None:
        """Lead no more, and let another one do so."""
        self._giving_up.set()

    def stop(self) -> None:
        """Take part no more; the lock is free when this returns."""
        self._stopping.set()
        self._giving_up.set()
        self._thread.join()

    def _run(self) -> None:
        engine = self._database.lock_engine(_SILENCE_MS)
        while not self._stopping.is_set():
            try:
                with engine.connect() as connection:
                    self._take_part(connection)
            except SQLAlchemyError as error:
                self._tell_problem(error)
                self._stopping.wait(_LOOK_S)
            except Exception as error:
                log.critical("the election failed", exc_info=error)
                self._on_failure(error)
                return
            finally:
                self._lose(self.problem or "it stops")

    def _take_part(self, connection: sa.Connection) -> None:
        """Until this tracker stops, gives up, or the session ends (DBAPIError)."""
        started_ms = connection.execute(sa.select(_NOW)).scalar_one()
        while not self._giving_up.is_set():
            asked = time.monotonic()
            if self._leading is None and self._lock(connection):
                now_ms = connection.execute(sa.select(_NOW)).scalar_one()
                self._leading = take_lead(connection, self._member.name, now_ms)
                log.info("this tracker leads, in epoch %d", self._leading.number)
                self._on_lead(self._leading)
            view = self._look(connection, started_ms)
            self._sure_until = asked + _SURE_S
            self.problem = None
            self._on_view(view)
            self._giving_up.wait(_LOOK_S)
        if self._stopping.is_set():
            connection.execute(sa.delete(t.trackers).where(t.trackers.c.name == self._member.name))
            return
        self._giving_up.clear()
        self._lose("it gave the lead up")
        connection.execute(sa.select(sa.func.pg_advisory_unlock_all()))
        self._stopping.wait(_REST_S - _LOOK_S)

    def _lock(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(_LEADING))).scalar_one())

    def _look(self, connection: sa.Connection, started_ms: int) -> View:
        """Be seen, and see the others."""
        now_ms = connection.execute(sa.select(_NOW)).scalar_one()
        mine = t.trackers.c.name == self._member.name
        if connection.execute(sa.update(t.trackers).where(mine).values(seen_ms=now_ms)).rowcount == 0:
            mine_now = {
                "name": self._member.name,
                "address": str(self._member.address),
                "peers_address": str(self._member.peers_address),
                "software": self._member.software,
                "started_ms": started_ms,
                "seen_ms": now_ms,
            }
            connection.execute(sa.insert(t.trackers), mine_now)
        if self._leading is not None:
            connection.execute(sa.delete(t.trackers).where(t.trackers.c.seen_ms < now_ms - _FORGOTTEN_MS))
        members = []
        for row in connection.execute(sa.select(t.trackers).order_by(t.trackers.c.started_ms, t.trackers.c.name)):
            try:
                member = Member(row.name, parse_address(row.address), parse_address(row.peers_address), row.software)
            except AddressError as error:
                self._pass_over(row.name, error)
                continue
            members.append(Seen(member, row.started_ms, row.seen_ms, row.seen_ms < now_ms - GONE_MS))
        leads = connection.execute(sa.select(t.leadership)).one()
        return View(leads.epoch, leads.tracker, tuple(members))

    def _pass_over(self, name: str, error: AddressError) -> None:
        """Somebody else's mistake must not stop this tracker; it is told once."""
        if name not in self._unreachable:
            self._unreachable.add(name)
            log.error("nobody can reach the tracker %s: %s", name, error)

    def _lose(self, why: str) -> None:
        if self._leading is not None:
            log.warning("this tracker leads no more, since its epoch %d: %s", self._leading.number, why)
            self._leading = None
            self._on_lost(why)

    def _tell_problem(self, error: SQLAlchemyError) -> None:
        text = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        why = " ".join(text.split())
        if self.problem is None:
            log.error("cannot ask %s: %s; trying again", self._database.name, why)
        self.problem = why
