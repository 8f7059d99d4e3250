"""Where a tracker listens: its ports, looked at before they are used, and the servers on them."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kedge.rpc.errors import ConnectError, UsageError
from kedge.rpc.tracker.health import HEALTH, REFLECTION, HealthService
from kedge.rpc.tracker.listeners import Switch
from kedge.rpc.tracker.metrics import Metrics, cannot_serve
from kedge.rpc.tracker.relayed import CERTIFICATE_KEY
from kedge.rpc.tracker.security.folder import Keys
from kedge.rpc.transport import MAX_RELAYED_STREAMS, MAX_STREAMS, Address, server_options

ANY_ADDRESS = ("0.0.0.0", "::")
_PLAIN = ("Fleet", "Blobs", "Agents", "Sessions")
_FOR_CLIENTS = ("Fleet", "Blobs", "Sessions", "Enrolment", "Access")
_FOR_AGENTS = ("Agents", "Blobs", "Sessions", "Enrolment")
SERVICES = tuple(f"kedge.v1.{name}" for name in ("Fleet", "Blobs", "Agents", "Sessions", "Enrolment", "Access"))
#: Calls that are under way when the tracker stops may go on for so long.
_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a tracker serves clients, agents and other trackers; 0: any free port, or none."""

    clients: int
    agents: int
    peers: int


def checked_ports(
    host: str,
    port: int,
    agents_port: int | None,
    peers_port: int | None,
    metrics: Address | None = None,
    *,
    plaintext: bool,
    shared: bool,
) -> Ports:
    """What is free to listen on, as is best known before anything is made on disk.

    Raises ConnectError, also where metrics cannot be served, and UsageError for plaintext beyond this machine.
    """
    if plaintext and not Address(host, port).is_loopback:
        raise UsageError(
            f"--insecure-loopback with the address {host}: plaintext is never spoken beyond this machine",
            hint="listen on 127.0.0.1, or leave --insecure-loopback out",
        )
    if agents_port is None:
        agents_port = port + 1 if port else 0
    if peers_port is None:
        peers_port = port + 3 if port else 0
    served = {"clients": port}
    if not plaintext:
        served["agents"] = agents_port
    if shared:
        served["other trackers"] = peers_port
    for number in served.values():
        _check_free(host, number)
    if metrics is not None:
        _check_metrics(metrics, host, served)
    return Ports(port, agents_port, peers_port)


def _check_metrics(address: Address, host: str, served: Mapping[str, int]) -> None:
    """Raise ConnectError unless metrics can be served there, beside what the tracker serves at a host's ports."""
    try:
        everywhere = {host, address.host} & set(ANY_ADDRESS)
        for whom, number in served.items():
            if (
                address.port
                and address.port == number
                and (everywhere or _place(address) == _place(Address(host, number)))
            ):
                raise cannot_serve(address, f"{whom} are served at that port")
        _probe(address)
    except OSError as error:
        raise cannot_serve(address, error.strerror or str(error)) from error


def machine_addresses() -> list[str]:
    """How others may call this machine: its name, and its addresses as far as name and routes tell."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found += [str(place[0]) for *_, place in socket.getaddrinfo(found[0], None, type=socket.SOCK_STREAM)]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it asks which address a route outside begins at
        found.append(str(probe.getsockname()[0]))
    return [host for host in dict.fromkeys(found) if "%" not in host]


def known_as(host: str) -> str:
    """The host by which other machines reach this one."""
    return machine_addresses()[-1] if host in ANY_ADDRESS else host


def _check_free(host: str, port: int) -> None:
    """Raise ConnectError with the reason when nobody can listen there: gRPC itself does not tell it."""
    address = Address(host, port)
    try:
        _probe(address)
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


def _place(address: Address) -> tuple[int, int, int, Any]:
    """Where that is for a socket: family, type, protocol and address; raises OSError."""
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, proto, _, place = found[0]
    return family, kind, proto, place


def _probe(address: Address) -> None:
    """Listen there and leave; raises OSError."""
    family, kind, proto, place = _place(address)
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(place)
        probe.listen(1)


class Endpoints(Protocol):
    """What is behind the ports of one tracker."""

    @property
    def clients(self) -> Switch:
        """For users, and devices that enrol; in plaintext for everybody."""

    @property
    def agents(self) -> Switch:
        """For agents."""

    @property
    def peers(self) -> Switch | None:
        """For other trackers; None where there are none."""


class Servers:
    """The listeners of one tracker."""

    def __init__(self, host: str, health: HealthService, counting: Metrics | None) -> None:
        self._host = host
        self._health = health
        self._before: list[grpc.aio.ServerInterceptor] = [counting.calls] if counting is not None else []
        self._servers: list[grpc.aio.Server] = []

    def open(self, endpoints: Endpoints, keys: Keys | None, ports: Ports) -> Ports:
        """The listeners of a tracker, in plaintext where it has no keys; returns which ports they have."""
        if keys is None:
            clients = agents = self._add(endpoints.clients, ports.clients, None, _listing(*_PLAIN))
        else:
            clients = self._add(endpoints.clients, ports.clients, _server_tls(keys), _listing(*_FOR_CLIENTS))
            agents = self._add(endpoints.agents, ports.agents, _server_tls(keys, mutual=True), _listing(*_FOR_AGENTS))
            keys.agents_port = agents
        peers = 0
        if endpoints.peers is not None:
            tls = None if keys is None else _server_tls(keys, mutual=True)
            relayed = _listing(*_PLAIN) if keys is None else _RelayedListing()
            peers = self._add(endpoints.peers, ports.peers, tls, relayed, MAX_RELAYED_STREAMS)
        return Ports(clients, agents, peers)

    def _add(
        self,
        switch: Switch,
        port: int,
        tls: grpc.ServerCredentials | None,
        listing: Any,
        most_streams: int | None = None,
    ) -> int:
        """Serve what the switch says on a port, tell what `listing` says of it; returns which port it is."""
        place = str(Address(self._host, port))
        options = server_options(MAX_STREAMS if most_streams is None else most_streams)
        server = grpc.aio.server(options=options, interceptors=[*self._before, switch])
        self._health.add_to(server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(listing, server)
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


def _listing(*services: str) -> Any:
    """Tells that a listener has these services."""
    return reflection.aio.ReflectionServicer([*(f"kedge.v1.{name}" for name in services), HEALTH, REFLECTION])


class _RelayedListing:
    """Tells whoever comes by another tracker which services are at the listener there that the call came to."""

    def __init__(self) -> None:
        self._clients, self._agents = _listing(*_FOR_CLIENTS), _listing(*_FOR_AGENTS)

    async def ServerReflectionInfo(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802 - its name
        """As gRPC's own; that tracker says whose certificate it saw, which only its listener for agents asks for."""
        of_agent = any(key == CERTIFICATE_KEY for key, _ in context.invocation_metadata() or ())
        listing = self._agents if of_agent else self._clients
        async for answer in listing.ServerReflectionInfo(requests, context):
            yield answer


def _server_tls(keys: Keys, *, mutual: bool = False) -> grpc.ServerCredentials:
    own = keys.certificate
    ca = keys.authority.certificate_pem if mutual else None
    return grpc.ssl_server_credentials([(own.key, own.certificate)], ca, require_client_auth=mutual)
