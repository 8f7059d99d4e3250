"""A tracker that runs: the data folder, the services and the port, started and stopped in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from kedge.rpc.errors import ConnectError
from kedge.rpc.protocol import software
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.security.join import Join
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.cluster import Cluster, check_database
from kedge.rpc.tracker.database import Postgres
from kedge.rpc.tracker.election import Member
from kedge.rpc.tracker.health import HEALTH, REFLECTION, HealthService
from kedge.rpc.tracker.leading import Holdings, Leadership, Premises
from kedge.rpc.tracker.listeners import Switch
from kedge.rpc.tracker.metrics import Metrics, exported
from kedge.rpc.tracker.observer import SILENT
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.devices import LIFETIME_S
from kedge.rpc.tracker.security.folder import Keys, Limits, Security
from kedge.rpc.tracker.security.joining import join_fleet
from kedge.rpc.tracker.security.owners import FileOwners
from kedge.rpc.tracker.shell import Clock
from kedge.rpc.tracker.state import Settings
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import DEFAULT_PORT, MAX_RELAYED_STREAMS, MAX_STREAMS, Address, parse_host, server_options

log = logging.getLogger("kedge.tracker")
LOOPBACK = "127.0.0.1"
_ANY = ("0.0.0.0", "::")
_PLAIN = ("Fleet", "Blobs", "Agents", "Sessions")
_FOR_CLIENTS = ("Fleet", "Blobs", "Sessions", "Enrolment", "Access")
_FOR_AGENTS = ("Agents", "Blobs", "Sessions", "Enrolment")
#: Calls that are under way when the tracker stops may go on for so long.
_GRACE_S = 0.5
_BLOB_THREADS = 8
_SERVICES = tuple(f"kedge.v1.{name}" for name in ("Fleet", "Blobs", "Agents", "Sessions", "Enrolment", "Access"))


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
        ConnectError: the address cannot be listened on, or is to be reached from elsewhere in plaintext.
        AddressError: `advertise` is no host.
        StoreError, BlobError, SecretFileError: the data folder or the database cannot be used.
    """
    advertised = parse_host(advertise or _known_as(host)) if database is not None else host
    ports = _checked_ports(
        host, port, agents_port, peers_port, plaintext=insecure_loopback, shared=database is not None
    )
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not stopped.done():
            stopped.set_exception(StoreError(f"the tracker's store in {data_dir} failed: {error!r}"))

    def on_failure(error: BaseException) -> None:
        loop.call_soon_threadsafe(fail, error)

    health = HealthService(_SERVICES)

    def on_trouble(troubled: bool) -> None:
        loop.call_soon_threadsafe(health.set_serving, not troubled)

    counting = Metrics() if metrics is not None else None
    shared = None if database is None else Postgres(database)
    keys = None
    if not insecure_loopback:
        if join is not None:
            join_fleet(data_dir, join)
        keys = Keys(data_dir)
    if shared is not None:
        await loop.run_in_executor(None, check_database, shared, keys)
    # One clock for when jobs ended and for how long ago that was: the machine's may be set meanwhile.
    clock = Clock()
    store = None
    if shared is None:
        store = Store(
            data_dir,
            on_failure=on_failure,
            on_trouble=on_trouble,
            observer=counting or SILENT,
            keep=keep,
            clock=lambda: clock() / 1000,
        )
    try:
        audit = keys.audit if keys is not None else Audit(data_dir / "audit.jsonl")
        owners = FileOwners(data_dir / "owners")
        blobs = TrackerBlobs(data_dir / "blobs", blob_quota, on_evict=owners.forget if store is not None else _unheard)
        with ThreadPoolExecutor(_BLOB_THREADS, thread_name_prefix="kedge-blobs") as threads:
            premises = Premises(data_dir, blobs, audit, threads, limits, settings, clock, counting)
            house: _Alone | _Shared
            if store is not None:
                house = _Alone(premises, store, keys, owners, device_lifetime_s)
            else:
                assert shared is not None
                cluster = Cluster(premises, shared, keys, health, keep, device_lifetime_s, fail)
                house = _Shared(cluster, advertised)
            exporter = ExitStack()
            servers = _Servers(host, health, counting)
            try:
                bound = servers.open(house, keys, ports)
                await servers.start()
                if isinstance(house, _Shared):
                    await house.start(bound.clients, bound.peers)
                scraped = None
                if counting is not None and metrics is not None:
                    if isinstance(house, _Alone):
                        counting.serve_state(house.leadership.shell, data_dir)
                    scraped = exporter.enter_context(exported(counting, metrics))
                here, for_agents = Address(host, bound.clients), Address(host, bound.agents)
                serving = Serving(here, for_agents, stopped, house.security, keys, scraped)
                audit.write("tracker started", address=str(serving.address), plaintext=keys is None)
                try:
                    with _left_to_its_owner(_own_credentials(serving)):
                        yield serving
                finally:
                    audit.write("tracker stopped")
            finally:
                health.stop()
                await house.stop()
                await servers.stop()
                await loop.run_in_executor(None, exporter.close)
                audit.close()
    finally:
        if store is not None:
            # The store's thread may still call into this loop: it must not stand still meanwhile.
            await loop.run_in_executor(None, store.close)


@dataclass(frozen=True, slots=True)
class _Ports:
    """Where a tracker serves clients, agents and other trackers; 0: any free port, or none."""

    clients: int
    agents: int
    peers: int


def _checked_ports(
    host: str, port: int, agents_port: int | None, peers_port: int | None, *, plaintext: bool, shared: bool
) -> _Ports:
    """What is free to listen on; raises ConnectError."""
    if plaintext and not Address(host, port).is_loopback:
        raise ConnectError(
            f"--insecure-loopback with the address {host}: plaintext is never spoken beyond this machine",
            hint="listen on 127.0.0.1, or leave --insecure-loopback out",
        )
    if agents_port is None:
        agents_port = port + 1 if port else 0
    if peers_port is None:
        peers_port = port + 3 if port else 0
    for needed, number in ((True, port), (not plaintext, agents_port), (shared, peers_port)):
        if needed:
            _check_free(host, number)
    return _Ports(port, agents_port, peers_port)


def _unheard(_digest: str) -> None:
    """Whose blobs are whose is the business of the tracker that leads."""


class _Alone:
    """A tracker whose state is its own: it leads as long as it runs."""

    def __init__(
        self, premises: Premises, store: Store, keys: Keys | None, owners: FileOwners, device_lifetime_s: int
    ) -> None:
        self.security = None if keys is None else Security(keys, device_lifetime_s=device_lifetime_s)
        self.leadership = Leadership(premises, store, self.security, owners, Holdings(premises, store, owners))
        if self.security is None:
            self.clients = self.agents = Switch(self.leadership.everybody())
        else:
            self.clients, self.agents = Switch(self.leadership.clients()), Switch(self.leadership.agents())

    async def stop(self) -> None:
        """Decide nothing any more."""
        self.leadership.close()


class _Shared:
    """One of several trackers on a database."""

    def __init__(self, cluster: Cluster, advertised: str) -> None:
        self.cluster = cluster
        self.clients, self.agents = cluster.clients, cluster.agents
        self._advertised = advertised

    @property
    def security(self) -> Security | None:
        """Of the tracker that leads."""
        return self.cluster.security

    async def start(self, port: int, peers_port: int) -> None:
        """Take part; returns once somebody leads, or nobody did for a while."""
        name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        here, for_peers = (Address(self._advertised, number) for number in (port, peers_port))
        await self.cluster.start(Member(name, here, for_peers, software()))

    async def stop(self) -> None:
        """Leave the others to themselves."""
        await self.cluster.stop()


def _known_as(host: str) -> str:
    """The host by which other machines reach this one."""
    return machine_addresses()[-1] if host in _ANY else host


class _Servers:
    """The listeners of one tracker."""

    def __init__(self, host: str, health: HealthService, counting: Metrics | None) -> None:
        self._host = host
        self._health = health
        self._before: list[grpc.aio.ServerInterceptor] = [counting.calls] if counting is not None else []
        self._servers: list[grpc.aio.Server] = []

    def open(self, house: _Alone | _Shared, keys: Keys | None, ports: _Ports) -> _Ports:
        """The listeners of a tracker, in plaintext where it has no keys; returns which ports they have."""
        if keys is None:
            clients = agents = self.add(house.clients, ports.clients, None, _PLAIN)
        else:
            clients = self.add(house.clients, ports.clients, _server_tls(keys), _FOR_CLIENTS)
            agents = self.add(house.agents, ports.agents, _server_tls(keys, mutual=True), _FOR_AGENTS)
            keys.agents_port = agents
        peers = 0
        if isinstance(house, _Shared):
            tls = None if keys is None else _server_tls(keys, mutual=True)
            peers = self.add(house.cluster.peers, ports.peers, tls, _PLAIN, MAX_RELAYED_STREAMS)
        return _Ports(clients, agents, peers)

    def add(
        self,
        switch: Switch,
        port: int,
        tls: grpc.ServerCredentials | None,
        services: tuple[str, ...],
        most_streams: int | None = None,
    ) -> int:
        """Serve what the switch says on a port, and tell that it has these services; returns which port it is."""
        place = str(Address(self._host, port))
        options = server_options(MAX_STREAMS if most_streams is None else most_streams)
        server = grpc.aio.server(options=options, interceptors=[*self._before, switch])
        self._health.add_to(server)
        enable_server_reflection([*(f"kedge.v1.{name}" for name in services), HEALTH, REFLECTION], server)
        try:
            bound = server.add_insecure_port(place) if tls is None else server.add_secure_port(place, tls)
        except RuntimeError as error:
            raise ConnectError(f"cannot listen on {place}: {error}") from error
        self._servers.append(server)
        return bound

    async def start(self) -> None:
        """Serve."""
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Let what is under way go on for a moment, then end it."""
        await asyncio.gather(*(server.stop(_GRACE_S) for server in self._servers))


def _server_tls(keys: Keys, *, mutual: bool = False) -> grpc.ServerCredentials:
    own = keys.certificate
    ca = keys.authority.certificate_pem if mutual else None
    return grpc.ssl_server_credentials([(own.key, own.certificate)], ca, require_client_auth=mutual)


def _own_credentials(serving: Serving) -> Credentials:
    """What the user that starts a tracker needs to talk to it, under every address that this machine has for it."""
    port = serving.address.port
    hosts = [serving.address.host]
    if serving.keys is None or serving.address.host in ("127.0.0.1", "::1", *_ANY):
        hosts += ["127.0.0.1", "localhost", "::1"]
    if serving.address.host in _ANY:
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


def machine_addresses() -> list[str]:
    """How others may call this machine: its name, and its addresses as far as name and routes tell."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found += [str(place[0]) for *_, place in socket.getaddrinfo(found[0], None, type=socket.SOCK_STREAM)]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it asks which address a route outside begins at
        found.append(str(probe.getsockname()[0]))
    return [host for host in dict.fromkeys(found) if "%" not in host]


def _check_free(host: str, port: int) -> None:
    """Raise ConnectError with the reason when nobody can listen there: gRPC itself does not tell it."""
    address = Address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, place = found[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except socket.gaierror as error:
        raise ConnectError(
            f"cannot listen on {address}: {error.strerror}", hint="name an address of this machine"
        ) from error
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "another program uses the port, maybe another tracker: stop it, or choose --port",
            errno.EADDRNOTAVAIL: "name an address of this machine with --host, or 0.0.0.0 for all of them",
            errno.EACCES: "choose a port above 1023 with --port",
        }
        why, hint = error.strerror, remedies.get(error.errno or 0)
        raise ConnectError(f"cannot listen on {address}: {why}", hint=hint) from error


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
