"""A tracker that runs: the data folder, the services and the port, started and stopped in order."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from kedge.rpc.protocol import software
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.security.join import Join
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.cluster import Cluster, check_database
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.election import Member
from kedge.rpc.tracker.health import HealthService
from kedge.rpc.tracker.leadership import Leadership, Resources, RetainedBlobs
from kedge.rpc.tracker.listeners import Switch
from kedge.rpc.tracker.metrics import Metrics, exported
from kedge.rpc.tracker.observer import SILENT
from kedge.rpc.tracker.occupied import occupied
from kedge.rpc.tracker.ports import (
    ANY_ADDRESS,
    SERVICES,
    Ports,
    Servers,
    checked_ports,
    known_as,
    machine_addresses,
)
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.devices import LIFETIME_S
from kedge.rpc.tracker.security.folder import Keys, Limits, Security
from kedge.rpc.tracker.security.joining import join_fleet
from kedge.rpc.tracker.security.owners import FileOwners
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.shell import Clock
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import DEFAULT_PORT, Address, parse_host

log = logging.getLogger("kedge.tracker")
T = TypeVar("T")
LOOPBACK = "127.0.0.1"
_BLOB_THREADS = 8


@dataclass(frozen=True, slots=True)
class Serving:
    """A tracker that listens. `keys` is None for one that speaks plaintext on loopback; `security` also for one of
    several that did not lead when it started.

    `stopped` is for whoever stops it: a reason to stop in order. If the store fails it carries the error, and the
    tracker has to be stopped.
    """

    address: Address
    agents_address: Address
    stopped: asyncio.Future[str]
    security: Security | None
    keys: Keys | None = None
    #: Where Prometheus finds metrics.
    metrics: Address | None = None


@asynccontextmanager
async def serve(
    host: str,
    port: int,
    data_dir: Path,
    settings: Settings | None = None,
    *,
    agents_port: int | None = None,
    insecure_loopback: bool = False,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    blob_quota: int | None = None,
    keep: Retention = Retention(),  # noqa: B008 - frozen
    device_lifetime_s: int = LIFETIME_S,
    metrics: Address | None = None,
    database: str | None = None,
    peers_port: int | None = None,
    advertise: str | None = None,
    join: Join | None = None,
) -> AsyncIterator[Serving]:
    """A tracker in this event loop while the context lasts.

    Clients and devices that enrol are served on `port`, agents on `agents_port` (None: the next one; 0: any). With
    `insecure_loopback` everybody on this machine is served on `port`, in plaintext and without being asked who they
    are. While it lasts, the user that started it has credentials in the configuration folder. Prometheus may scrape
    `metrics` (None: nothing is counted). `blob_quota` is in bytes; None means a share of the disk. Jobs that
    are done are kept as `keep` says.

    With a `database` (the URL of a PostgreSQL database; None: a file in the data folder) this may be one of several
    trackers: one leads, the others relay. It is served to them on `peers_port` (None: `port` + 3; 0: any) of the host
    `advertise` (None: `host`, or what this machine is called). The second one and every later one begins with what
    `join` is for; where that was done before, it is not needed, and not used.

    Raises:
        ConnectError: an address cannot be listened on.
        UsageError: plaintext is to be reached from elsewhere.
        AddressError: `advertise` is no host.
        StoreError, BlobError, SecretFileError: the data folder or the database cannot be used.
    """
    shared = None if database is None else Postgres(database)
    advertised = host if shared is None else parse_host(advertise or known_as(host))
    ports = checked_ports(
        host, port, agents_port, peers_port, metrics, plaintext=insecure_loopback, shared=shared is not None
    )
    failure, health = _Failure(data_dir), HealthService(SERVICES)
    counting = Metrics() if metrics is not None else None
    # One clock for when jobs ended and for how long ago that was: the machine's may be set meanwhile.
    clock = Clock()
    async with AsyncExitStack() as open_things:
        open_things.enter_context(occupied(data_dir))
        keys = None if insecure_loopback else _keys(data_dir, join)
        if shared is not None:
            await in_thread(check_database, shared, keys)
        store = None
        if shared is None:
            store = Store(
                data_dir,
                on_failure=failure.report,
                on_trouble=lambda troubled: failure.in_loop(health.set_serving, not troubled),
                observer=counting or SILENT,
                keep=keep,
                clock=lambda: clock() / 1000,
            )
            # Its thread may still call into this loop: that must not stand still meanwhile.
            open_things.push_async_callback(in_thread, store.close)
        resources = open_things.enter_context(_resources(data_dir, blob_quota, keys, limits, settings, clock, counting))
        endpoints: _SingleTracker | _ClusterMember
        if store is not None:
            endpoints = _SingleTracker(resources, store, keys, device_lifetime_s)
        else:
            assert shared is not None
            cluster = Cluster(resources, shared, keys, health, keep, device_lifetime_s, failure.set)
            endpoints = _ClusterMember(cluster, advertised)
        scraped = None
        if counting is not None and metrics is not None:
            scraped = await _export(counting, metrics, open_things)
        servers = Servers(host, health, counting)
        for ended in (servers.stop, endpoints.stop):
            open_things.push_async_callback(ended)
        open_things.callback(health.stop)
        bound = servers.open(endpoints, keys, ports)
        await servers.start()
        await endpoints.start(bound)
        here, for_agents = Address(host, bound.clients), Address(host, bound.agents)
        serving = Serving(here, for_agents, failure.stopped, endpoints.security, keys, scraped)
        with _on_record(resources.audit, serving), _left_to_its_owner(_own_credentials(serving)):
            yield serving


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """What may take a while, without holding the loop up."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


class _Failure:
    """Tells whoever has to stop the tracker that its store failed. Made in the loop, set from any thread."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[str] = self._loop.create_future()

    def report(self, error: BaseException) -> None:
        """The store failed."""
        self.in_loop(self.set, error)

    def set(self, error: BaseException) -> None:
        """The same, in the loop."""
        if not self.stopped.done():
            self.stopped.set_exception(StoreError(f"the tracker's store in {self._data_dir} failed: {error!r}"))

    def in_loop(self, act: Callable[..., None], *arguments: Any) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(act, *arguments)


def _keys(data_dir: Path, join: Join | None) -> Keys:
    """Those of the folder, made or fetched where it has none."""
    if join is not None:
        join_fleet(data_dir, join)
    return Keys(data_dir)


@contextmanager
def _resources(
    data_dir: Path,
    blob_quota: int | None,
    keys: Keys | None,
    limits: Limits,
    settings: Settings | None,
    clock: Clock,
    counting: Metrics | None,
) -> Iterator[Resources]:
    blobs = TrackerBlobs(data_dir / "blobs", blob_quota)
    audit = keys.audit if keys is not None else Audit(data_dir / "audit.jsonl")
    try:
        with ThreadPoolExecutor(_BLOB_THREADS, thread_name_prefix="kedge-blobs") as threads:
            yield Resources(data_dir, blobs, audit, threads, limits, settings, clock, counting)
    finally:
        audit.close()


async def _export(counting: Metrics, metrics: Address, open_things: AsyncExitStack) -> Address:
    """Where Prometheus finds metrics; who asks for them may ask this loop, which must not wait for them to end."""
    exporter = ExitStack()
    open_things.push_async_callback(in_thread, exporter.close)
    return exporter.enter_context(exported(counting, metrics))


@contextmanager
def _on_record(audit: Audit, serving: Serving) -> Iterator[None]:
    audit.write("tracker started", address=str(serving.address), plaintext=serving.keys is None)
    try:
        yield
    finally:
        audit.write("tracker stopped")


class _SingleTracker:
    """A tracker whose state is its own: it leads as long as it runs."""

    peers = None

    def __init__(self, resources: Resources, store: Store, keys: Keys | None, device_lifetime_s: int) -> None:
        owners = FileOwners(resources.data_dir / "owners")
        resources.blobs.when_evicted(owners.forget)
        self._resources = resources
        self.security = None if keys is None else Security(keys, device_lifetime_s=device_lifetime_s)
        self.leadership = Leadership(resources, store, self.security, owners, RetainedBlobs(resources, store, owners))
        if self.security is None:
            self.clients = self.agents = Switch(self.leadership.everybody())
        else:
            self.clients, self.agents = Switch(self.leadership.clients()), Switch(self.leadership.agents())

    async def start(self, _bound: Ports) -> None:
        """It leads already; from now on its state is counted."""
        if self._resources.metrics is not None:
            self._resources.metrics.serve_state(self.leadership.shell, self._resources.data_dir)

    async def stop(self) -> None:
        """Decide nothing any more."""
        self.leadership.close()


class _ClusterMember:
    """One of several trackers on a database."""

    def __init__(self, cluster: Cluster, advertised: str) -> None:
        self._cluster = cluster
        self.clients, self.agents, self.peers = cluster.clients, cluster.agents, cluster.peers
        self._advertised = advertised

    @property
    def security(self) -> Security | None:
        """Of the tracker that leads."""
        return self._cluster.security

    async def start(self, bound: Ports) -> None:
        """Take part; returns once somebody leads, or nobody did for a while."""
        name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        here, for_peers = (Address(self._advertised, number) for number in (bound.clients, bound.peers))
        await self._cluster.start(Member(name, here, for_peers, software()))

    async def stop(self) -> None:
        """Leave the others to themselves."""
        await self._cluster.stop()


def _own_credentials(serving: Serving) -> Credentials:
    """What the user that starts a tracker needs to talk to it, under every address that this machine has for it."""
    port = serving.address.port
    hosts = [serving.address.host]
    if serving.keys is None or serving.address.host in ("127.0.0.1", "::1", *ANY_ADDRESS):
        hosts += ["127.0.0.1", "localhost", "::1"]
    if serving.address.host in ANY_ADDRESS:
        hosts += machine_addresses()
    addresses = tuple(dict.fromkeys(Address(host, port) for host in hosts))
    return Credentials(addresses, None if serving.keys is None else serving.keys.admin_tls(), own=True)


@contextmanager
def _left_to_its_owner(known: Credentials) -> Iterator[None]:
    """The credentials of the user that started the tracker, who may be a service without a folder of its own."""
    try:
        known.save()
    except SecretFileError as error:
        log.warning(
            "the user that runs this tracker has no credentials for it: %s\n"
            "  KEDGE_CONFIG_DIR names a folder for them, which its administrator's commands then use, too",
            error,
        )
        yield
        return
    try:
        yield
    finally:
        known.remove()


@dataclass(slots=True)
class RunningTracker:
    """A tracker in a thread of its own; a context manager that stops it."""

    serving: Serving
    data_dir: Path
    _loop: asyncio.AbstractEventLoop
    _thread: threading.Thread

    @property
    def address(self) -> Address:
        """Where clients are served."""
        return self.serving.address

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.address.port

    def stop(self) -> None:
        """Stop it in order; jobs and results stay in the data folder. May be called again."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # its loop ended just now
                self._loop.call_soon_threadsafe(stop, self.serving.stopped, "asked to")
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start(
    host: str = LOOPBACK,
    port: int = DEFAULT_PORT,
    data_dir: Path | str = "kedge-tracker",
    settings: Settings | None = None,
    **options: Any,
) -> RunningTracker:
    """Start a tracker in a thread and return once it listens. Port 0 takes any free one; `options` are those of serve.

    Raises:
        ConnectError: the address cannot be listened on.
        StoreError, BlobError, SecretFileError: the data folder cannot be used, or another tracker uses it.
    """
    ready: Future[tuple[Serving, asyncio.AbstractEventLoop]] = Future()
    folder = Path(data_dir)

    async def main() -> None:
        async with serve(host, port, folder, settings, **options) as serving:
            ready.set_result((serving, asyncio.get_running_loop()))
            await serving.stopped

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=body, name="kedge-tracker", daemon=True)
    thread.start()
    serving, loop = ready.result()
    return RunningTracker(serving, folder, loop, thread)


def stop(stopped: asyncio.Future[str], reason: str) -> None:
    """Tell whoever waits for it to stop the tracker; only the first reason counts."""
    if not stopped.done():
        stopped.set_result(reason)
