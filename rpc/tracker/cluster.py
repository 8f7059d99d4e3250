"""One of several trackers on a PostgreSQL database, as long as it runs: leading, following, and the changes between.

Everything happens in the event loop, one change after the other: what the election and the store find out comes into
one queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa

from kedge.protos.v1 import blobs_pb2_grpc
from kedge.rpc.errors import KedgeError
from kedge.rpc.status import TrackerAwayError
from kedge.rpc.tracker.blobs_service import BlobsService
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.election import Election, Member, View
from kedge.rpc.tracker.epoch import Epoch
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.health import HealthService
from kedge.rpc.tracker.leadership import Leadership, Resources, RetainedBlobs
from kedge.rpc.tracker.listeners import Details, Find, Serve, Switch, Table
from kedge.rpc.tracker.relay import Relay
from kedge.rpc.tracker.replication import PeerReplication
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreError, documents, is_current, prepare
from kedge.rpc.tracker.security.folder import Keys, Security
from kedge.rpc.tracker.security.interceptor import Gate, by_peer, trust
from kedge.rpc.tracker.security.owners import FileOwners, Owners, StoredOwners
from kedge.rpc.tracker.security.storage import DatabaseStorage
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import Tls
from kedge.rpc.types import SessionTask, TrackerMember

log = logging.getLogger("kedge.tracker")

_CA = "ca.pem"
#: The first PostgreSQL that ends idle sessions.
_OLDEST = 140_000
#: Who leads for so long has been brought up to date: what is not here then was dropped.
_STRAYS_S = 600.0
#: A tracker that starts waits so long for somebody to lead.
_SETTLED_S = 15.0


@dataclass(frozen=True, slots=True)
class Led:
    """This tracker leads from now on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Lost:
    """It leads no more."""

    why: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The store of an epoch does not go on."""

    epoch: int
    error: BaseException


def check_database(database: Postgres, keys: Keys | None) -> None:
    """The server is new enough, and all trackers of one database have one CA; the first one says which.

    Raises:
        StoreError: the database cannot be used, or its trackers have another CA.
    """
    ours = b"" if keys is None else keys.authority.certificate_pem
    try:
        with database.engine().begin() as connection:
            up_to_date = is_current(connection)
        with (database.engine() if up_to_date else database.patient_engine()).begin() as connection:
            if not up_to_date:
                log.info("making the tables in %s, or bringing them up to date", database.name)
            prepare(connection, database.name)
            version = connection.execute(sa.text("SHOW server_version_num")).scalar_one()
            if int(version) < _OLDEST:
                raise StoreError(
                    f"the server of {database.name} is too old ({version})", hint="PostgreSQL 14 or newer is needed"
                )
            row = sa.select(documents.c.content).where(documents.c.name == _CA)
            found = connection.execute(row).scalar_one_or_none()
            if found is None:
                connection.execute(sa.insert(documents), {"name": _CA, "content": ours})
    except sa.exc.SQLAlchemyError as error:
        raise database.explain(error) from error
    if found is not None and bytes(found) != ours:
        raise StoreError(
            f"the trackers of {database.name} have another certificate authority than this one",
            hint="let it join them, with an empty --data-dir: --join '…', with what"
            " 'kedge tracker token create --role tracker' prints there",
        )


class Cluster:
    """This tracker among the others. `keys` is None where plaintext is spoken on loopback.

    `on_failure` hears, in the loop, of an error after which the tracker has to stop.
    """

    def __init__(
        self,
        resources: Resources,
        database: Postgres,
        keys: Keys | None,
        health: HealthService,
        keep: Retention,
        device_lifetime_s: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._on_failure = on_failure
        self._resources = resources
        self._database = database
        self._keys = keys
        self._health = health
        self._keep = keep
        self._device_lifetime_s = device_lifetime_s
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Led | Lost | Failed | View] = asyncio.Queue()
        tls = None if keys is None else _own_tls(keys)
        self._relay = Relay(tls, lambda: 0 if keys is None else keys.agents_port)
        self._replication = PeerReplication(resources.blobs, tls)
        self._election: Election | None = None
        self._member: Member | None = None
        self._running: asyncio.Task[None] | None = None
        self._offering: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._closing: list[asyncio.Future[None]] = []
        self._store: Store | None = None
        self._leadership: Leadership | None = None
        #: While it leads, until that has happened: cancelled when it leads no more.
        self._straying: asyncio.TimerHandle | None = None
        self.security: Security | None = None
        self.clients = Switch(self._relay.serve)
        self.agents = Switch(self._relay.serve)
        self.peers = Switch(self._following_peers())

    async def start(self, member: Member) -> None:
        """Take part under this name, and return once somebody leads, or nobody did for a while."""
        self._member = member
        self._election = Election(
            self._database,
            member,
            lambda epoch: self._tell(Led(epoch)),
            lambda why: self._tell(Lost(why)),
            self._tell,
            lambda error: self._in_loop(lambda: self._on_failure(error)),
        )
        self._health.set_serving(False)
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._ended)
        self._election.start()
        settled = asyncio.create_task(self._settled.wait())
        await asyncio.wait([settled, self._running], timeout=_SETTLED_S, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if self._running.done():
            self._running.result()

    async def stop(self) -> None:
        """Leave the others to themselves."""
        if self._election is not None:
            # The thread tells this loop things while it ends.
            await self._loop.run_in_executor(None, self._election.stop)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._step_down(TrackerAwayError("the tracker stops"))
        await self._relay.point(None)
        if self._closing:
            await asyncio.wait(self._closing)
        await self._loop.run_in_executor(None, self._replication.close)

    def _tell(self, event: Led | Lost | Failed | View) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _ended(self, running: asyncio.Task[None]) -> None:
        error = None if running.cancelled() else running.exception()
        if error is not None:
            log.critical("this tracker cannot go on among the others", exc_info=error)
            self._on_failure(error)

    async def _run(self) -> None:
        while True:
            event = await self._events.get()
            if isinstance(event, Led):
                await self._lead(event.epoch)
            elif isinstance(event, Lost):
                await self._step_down(TrackerAwayError(f"this tracker leads no more: {event.why}"))
            elif isinstance(event, Failed):
                if self._leadership is not None and self._replication.epoch == event.epoch:
                    log.error("the store failed: %s", event.error)
                    await self._step_down(TrackerAwayError("this tracker leads no more: its store failed"))
                    self._give_up()
            else:
                await self._look(event)

    async def _lead(self, epoch: Epoch) -> None:
        await self._relay.point(None)
        try:
            led = await self._take_over(epoch)
        except (KedgeError, sa.exc.SQLAlchemyError) as error:
            log.error("this tracker cannot lead: %s", error)
            self._give_up()
            return
        security = self.security
        if self._resources.metrics is not None:
            self._resources.metrics.serve_state(led.shell, self._resources.data_dir)
            self._resources.metrics.leads(epoch.number)
        if security is None:
            self.clients.serve = self._if_sure(led.everybody(), self._relay.serve)
        else:
            self.clients.serve = self._if_sure(led.clients(), self._relay.serve)
            self.agents.serve = self._if_sure(led.agents(), self._relay.serve)
        self.peers.serve = self._if_sure(led.peers(), self._following_peers())
        self._resources.audit.write("tracker leads", epoch=epoch.number)
        self._health.set_serving(True)
        self._settled.set()

    def _if_sure(self, leading: Serve, following: Serve) -> Serve:
        """Calls that a leader answers, and not one that was replaced while it stood still: it would say of what came
        meanwhile that it is not there."""

        async def serve(native: Find, details: Details) -> Any:
            sure = self._election is not None and self._election.surely_leads()
            return await (leading if sure else following)(native, details)

        return serve

    async def _take_over(self, epoch: Epoch) -> Leadership:
        """Whatever waits for the database does so in a thread: this tracker goes on to relay, and to be seen."""
        store, security = await self._loop.run_in_executor(None, self._open, epoch)
        try:
            owners: Owners = FileOwners(self._resources.data_dir / "owners")
            if security is not None:
                owners = await self._loop.run_in_executor(None, StoredOwners, store)
            # What jobs need of an artifact is read from its manifest.
            specs = [record.accepted.spec for record in store.found.records]
            await self._replication.fetch([spec.manifest for spec in specs if not isinstance(spec.task, SessionTask)])
            retained = await self._loop.run_in_executor(None, RetainedBlobs, self._resources, store, owners)
        except BaseException:
            self._close(store)
            raise
        self._store, self.security = store, security
        self._replication.lead(epoch.number)
        self._resources.blobs.when_evicted(owners.forget)
        self._leadership = Leadership(self._resources, store, security, owners, retained, self._replication)
        self._straying = self._loop.call_later(_STRAYS_S, self._loop.run_in_executor, None, retained.forget_strays)
        return self._leadership

    def _open(self, epoch: Epoch) -> tuple[Store, Security | None]:
        """In a thread: what is stored is read."""
        store = Store(
            self._database,
            epoch=epoch,
            on_failure=lambda error: self._tell(Failed(epoch.number, error)),
            on_trouble=lambda troubled: self._in_loop(lambda: self._health.set_serving(not troubled)),
            observer=self._resources.observer,
            keep=self._keep,
            clock=lambda: self._resources.clock() / 1000,
        )
        if self._keys is None:
            return store, None
        try:
            security = Security(
                self._keys,
                lambda name: DatabaseStorage(self._database, epoch, name),
                device_lifetime_s=self._device_lifetime_s,
            )
        except BaseException:
            store.close()
            raise
        return store, security

    async def _step_down(self, why: KedgeError) -> None:
        led, self._leadership = self._leadership, None
        store, self._store = self._store, None
        self.clients.serve = self.agents.serve = self._relay.serve
        self.peers.serve = self._following_peers()
        if led is None or store is None:
            return
        self._health.set_serving(False)
        if self._straying is not None:
            self._straying.cancel()
        led.close(why)
        if self._resources.metrics is not None:
            self._resources.metrics.follows()
        self._resources.audit.write("tracker leads no more", epoch=self._replication.epoch, reason=why.message)
        self._resources.blobs.when_evicted(lambda digest: None)
        self._close(store)

    def _close(self, store: Store) -> None:
        """It may take seconds to notice that its database is gone; what it still tries to write is refused."""
        self._closing = [closing for closing in self._closing if not closing.done()]
        self._closing.append(self._loop.run_in_executor(None, store.close))

    def _give_up(self) -> None:
        assert self._election is not None
        self._election.give_up()

    async def _look(self, view: View) -> None:
        """Follow who leads, or keep the others up to date."""
        assert self._member is not None
        alive = {seen.member.name: seen.member for seen in view.members if not seen.gone}
        others = {name: member for name, member in alive.items() if name != self._member.name}
        self._replication.update({name: member.peers_address for name, member in others.items()})
        self._replication.members = tuple(
            TrackerMember(
                name=seen.member.name,
                address=str(seen.member.address),
                software=seen.member.software,
                leads=seen.member.name == view.leader and not seen.gone,
                started_unix_ms=seen.started_ms,
                seen_unix_ms=seen.seen_ms,
                gone=seen.gone,
            )
            for seen in view.members
        )
        if self._resources.metrics is not None:
            self._resources.metrics.sees(view.epoch, len(alive))
        if self._leadership is not None:
            if self._offering is None or self._offering.done():
                self._offering = asyncio.create_task(self._replication.offer(self._leadership.needed.digests))
            return
        leader = others.get(view.leader)
        await self._relay.point(None if leader is None else leader.peers_address)
        self._health.set_serving(leader is not None)
        if leader is not None:
            self._settled.set()

    def _following_peers(self) -> Serve:
        """To the tracker that leads: copies of blobs."""
        resources, table = self._resources, Table()
        owners = FileOwners(resources.data_dir / "owners")
        blobs = BlobsService(
            lambda device: {},
            resources.blobs,
            Catalog(resources.blobs, owners),
            owners,
            Grants(resources.blobs),
            resources.threads,
            resources.limits.max_blob_bytes,
            resources.observer,
        )
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(blobs, table)
        authenticate = trust if self._keys is None else by_peer(None, None, self._keys.now_s)
        return table.behind(Gate(authenticate, resources.audit, resources.limits.max_calls))

    def _in_loop(self, act: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(act)


def _own_tls(keys: Keys) -> Tls:
    own = keys.authority.peer(keys.now_s())
    return Tls(keys.authority.certificate_pem, certificate=own.certificate, key=own.key)
