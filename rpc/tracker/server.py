"""A tracker that runs: the data folder, the services and the port, started and stopped in order."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import grpc
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from kedge.protos.v1 import agent_pb2_grpc, blobs_pb2_grpc, enrolment_pb2_grpc, fleet_pb2_grpc, sessions_pb2_grpc
from kedge.rpc.blobs import BlobQuotaError
from kedge.rpc.errors import ConnectError, KedgeError
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.health import HEALTH, REFLECTION, HealthService
from kedge.rpc.tracker.metrics import Metrics, exported
from kedge.rpc.tracker.needed import Needed
from kedge.rpc.tracker.observer import SILENT
from kedge.rpc.tracker.retention import Retention
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.devices import LIFETIME_S
from kedge.rpc.tracker.security.folder import Limits, Security
from kedge.rpc.tracker.security.interceptor import Authenticate, Gate, by_certificate, by_token, trust
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.services import AccessService, EnrolmentService
from kedge.rpc.tracker.service import AgentsService, BlobsService, FleetService
from kedge.rpc.tracker.sessions import Grants, SessionsService
from kedge.rpc.tracker.shell import Clock, Shell
from kedge.rpc.tracker.state import Settings
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import DEFAULT_PORT, SERVER_OPTIONS, Address

log = logging.getLogger("kedge.tracker")
LOOPBACK = "127.0.0.1"
#: Calls that are under way when the tracker stops may go on for so long.
_GRACE_S = 0.5
_BLOB_THREADS = 8
_SERVICES = tuple(f"kedge.v1.{name}" for name in ("Fleet", "Blobs", "Agents", "Sessions", "Enrolment", "Access"))


@dataclass(frozen=True, slots=True)
class Serving:
    """A tracker that listens. `security` is None for one that speaks plaintext on loopback.

    `stopped` is for whoever stops it: a reason to stop in order. If the store fails it carries the error, and the
    tracker has to be stopped.
    """

    address: Address
    agents_address: Address
    stopped: asyncio.Future[str]
    security: Security | None
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
) -> AsyncIterator[Serving]:
    """A tracker in this event loop while the context lasts.

    Clients and devices that enrol are served on `port`, agents on `agents_port` (None: the next one; 0: any). With
    `insecure_loopback` everybody on this machine is served on `port`, in plaintext and without being asked who they
    are. While it lasts, the user that started it has credentials in the configuration folder. Prometheus may scrape
    `metrics` (None: nothing is counted). `blob_quota` is in bytes; None means a share of the disk. Jobs that
    are done are kept as `keep` says.

    Raises:
        ConnectError: the address cannot be listened on, or is to be reached from elsewhere in plaintext.
        StoreError, BlobError, SecretFileError: the data folder cannot be used.
    """
    address = Address(host, port)
    if insecure_loopback and not address.is_loopback:
        raise ConnectError(
            f"--insecure-loopback with the address {host}: plaintext is never spoken beyond this machine",
            hint="listen on 127.0.0.1, or leave --insecure-loopback out",
        )
    if agents_port is None:
        agents_port = port + 1 if port else 0
    _check_free(host, port)
    if not insecure_loopback:
        _check_free(host, agents_port)
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
    observer = counting or SILENT
    # One clock for when jobs ended and for how long ago that was: the machine's may be set meanwhile.
    clock = Clock()
    store = Store(
        data_dir,
        on_failure=on_failure,
        on_trouble=on_trouble,
        observer=observer,
        keep=keep,
        clock=lambda: clock() / 1000,
    )
    try:
        security = None if insecure_loopback else Security(data_dir, device_lifetime_s=device_lifetime_s)
        audit = security.audit if security is not None else Audit(data_dir / "audit.jsonl")
        owners = Owners(data_dir / "owners")
        blobs = TrackerBlobs(data_dir / "blobs", blob_quota, on_evict=owners.forget)
        catalog = Catalog(blobs, owners)
        store.keep_needed(Needed(blobs, catalog.members_of))
        _fit(blobs)
        shell = Shell(store, settings, clock, observer)
        with ThreadPoolExecutor(_BLOB_THREADS, thread_name_prefix="kedge-blobs") as threads:
            services = _Services(shell, blobs, catalog, owners, audit, threads, limits, health, counting)
            exporter = ExitStack()
            servers = _Servers(host)
            try:
                if security is None:
                    bound = agents_bound = servers.add(services.everybody(), port, None)
                else:
                    agents, agents_gate = services.agents(security)
                    clients = services.clients(security, agents_gate)
                    bound = servers.add(clients, port, _server_tls(security))
                    agents_bound = servers.add(agents, agents_port, _server_tls(security, mutual=True))
                    security.agents_port = agents_bound
                await servers.start()
                scraped = None
                if counting is not None and metrics is not None:
                    counting.serve_state(shell, data_dir)
                    scraped = exporter.enter_context(exported(counting, metrics))
                serving = Serving(Address(host, bound), Address(host, agents_bound), stopped, security, scraped)
                audit.write("tracker started", address=str(serving.address), plaintext=security is None)
                try:
                    with _left_to_its_owner(_own_credentials(serving)):
                        yield serving
                finally:
                    audit.write("tracker stopped")
            finally:
                health.stop()
                shell.close()
                await servers.stop()
                await loop.run_in_executor(None, exporter.close)
                audit.close()
    finally:
        # The store's thread may still call into this loop: it must not stand still meanwhile.
        await loop.run_in_executor(None, store.close)


def _fit(blobs: TrackerBlobs) -> None:
    """Drop what a quota leaves no room for; what is needed stays, and new uploads are refused."""
    try:
        blobs.make_room()
    except BlobQuotaError as error:
        log.warning("%s", error)
    log.info("blobs take %d of %d bytes", blobs.taken_bytes(), blobs.quota_bytes())


class _Services:
    """Which services are offered to whom."""

    def __init__(
        self,
        shell: Shell,
        blobs: TrackerBlobs,
        catalog: Catalog,
        owners: Owners,
        audit: Audit,
        threads: ThreadPoolExecutor,
        limits: Limits,
        health: HealthService,
        counting: Metrics | None,
    ) -> None:
        self._health = health
        self._before: list[grpc.aio.ServerInterceptor] = [counting.calls] if counting is not None else []
        self._audit = audit
        self._limits = limits
        self._fleet = FleetService(shell, catalog, audit, blobs.root)
        self._agents = AgentsService(shell, owners, audit)
        grants = Grants(blobs)
        self._sessions = SessionsService(shell, catalog, grants, audit)
        self._blobs = BlobsService(
            shell, blobs, catalog, owners, grants, threads, limits.max_blob_bytes, counting or SILENT
        )

    def everybody(self) -> grpc.aio.Server:
        """Of a tracker that speaks plaintext."""
        server, _ = self._server(trust, ("Fleet", "Blobs", "Agents", "Sessions"))
        cast(Any, fleet_pb2_grpc).add_FleetServicer_to_server(self._fleet, server)
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(self._blobs, server)
        cast(Any, agent_pb2_grpc).add_AgentsServicer_to_server(self._agents, server)
        cast(Any, sessions_pb2_grpc).add_SessionsServicer_to_server(self._sessions, server)
        return server

    def clients(self, security: Security, agents: Gate) -> grpc.aio.Server:
        """Whoever has a token."""
        server, gate = self._server(
            by_token(security.tokens), ("Fleet", "Blobs", "Sessions", "Enrolment", "Access"), security.now_s
        )

        def end(owner: str, token_id: str, error: KedgeError) -> None:
            for each in (gate, agents):
                each.end(owner, token_id, error)

        access = AccessService(security, end)
        cast(Any, fleet_pb2_grpc).add_FleetServicer_to_server(self._fleet, server)
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(self._blobs, server)
        cast(Any, sessions_pb2_grpc).add_SessionsServicer_to_server(self._sessions, server)
        cast(Any, enrolment_pb2_grpc).add_EnrolmentServicer_to_server(EnrolmentService(security), server)
        cast(Any, enrolment_pb2_grpc).add_AccessServicer_to_server(access, server)
        return server

    def agents(self, security: Security) -> tuple[grpc.aio.Server, Gate]:
        """Whoever has a certificate."""
        authenticate = by_certificate(security.devices, security.now_s)
        server, gate = self._server(authenticate, ("Agents", "Blobs", "Sessions", "Enrolment"), security.now_s)
        cast(Any, agent_pb2_grpc).add_AgentsServicer_to_server(self._agents, server)
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(self._blobs, server)
        cast(Any, sessions_pb2_grpc).add_SessionsServicer_to_server(self._sessions, server)
        cast(Any, enrolment_pb2_grpc).add_EnrolmentServicer_to_server(EnrolmentService(security), server)
        return server, gate

    def _server(
        self, authenticate: Authenticate, services: tuple[str, ...], now_s: Callable[[], float] = time.time
    ) -> tuple[grpc.aio.Server, Gate]:
        """One that lets in whom `authenticate` knows, and tells which services of kedge.v1 it will have."""
        gate = Gate(authenticate, self._audit, self._limits.max_calls, now_s)
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[*self._before, gate])
        self._health.add_to(server)
        enable_server_reflection([*(f"kedge.v1.{name}" for name in services), HEALTH, REFLECTION], server)
        return server, gate


class _Servers:
    """The listeners of one tracker."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._servers: list[grpc.aio.Server] = []

    def add(self, server: grpc.aio.Server, port: int, tls: grpc.ServerCredentials | None) -> int:
        """Listen on a port; returns which it is."""
        place = str(Address(self._host, port))
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


def _server_tls(security: Security, *, mutual: bool = False) -> grpc.ServerCredentials:
    own = security.certificate
    ca = security.authority.certificate_pem if mutual else None
    return grpc.ssl_server_credentials([(own.key, own.certificate)], ca, require_client_auth=mutual)


def _own_credentials(serving: Serving) -> Credentials:
    """What the user that starts a tracker needs to talk to it, under every address that this machine has for it."""
    port = serving.address.port
    hosts = [serving.address.host]
    if serving.security is None or serving.address.host in ("127.0.0.1", "::1", "0.0.0.0", "::"):
        hosts += ["127.0.0.1", "localhost", "::1"]
    if serving.address.host in ("0.0.0.0", "::"):
        hosts += machine_addresses()
    addresses = tuple(dict.fromkeys(Address(host, port) for host in hosts))
    return Credentials(addresses, None if serving.security is None else serving.security.admin_tls(), own=True)


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
