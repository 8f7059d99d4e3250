"""How kedge opens gRPC channels and servers: addresses, options, and what went wrong in words."""

from __future__ import annotations

import ipaddress
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple, Union

import grpc

from kedge.rpc.errors import AuthenticationError, ConnectError

#: Where clients are served; agents are at the next one.
DEFAULT_PORT = 9190
#: In a tracker's certificate: its CA vouches for one tracker only, so it needs no other name, whatever its address.
TRACKER_NAME = "tracker.kedge"
#: A chunk of a blob; a protocol constant.
CHUNK_BYTES = 1 << 20
#: A frame of a session: large tensors come in chunks, small ones and samples within a message.
MAX_SESSION_FRAME_BYTES = 5 << 20
#: Above what one message carries: inline tensors are limited by `kedge.rpc.types.plan_inline`.
MAX_MESSAGE_BYTES = 16 << 20
#: Of a job's spec, with its inline inputs, and of its result: what the tracker says of a job holds both.
MAX_SPEC_BYTES = 9 << 19
MAX_RESULT_BYTES = 11 << 20
#: Of a job's submission, and of its result, on a stream of jobs: what is larger goes by itself, and holds up no other.
MAX_STREAMED_BYTES = 64 << 10
#: Jobs under way on one stream: together they are no larger than one that comes by itself. Both are protocol constants.
MAX_STREAM_JOBS = 64
#: Calls that are under way at a time, of one user or device: one more is refused.
MAX_CALLS = 4_000
#: The same on one connection: there more would wait, without a word.
MAX_STREAMS = MAX_CALLS + 96
#: And on one of another tracker, which brings the calls of many: one user's must not keep the others' out.
MAX_RELAYED_STREAMS = 1 << 20


class AddressError(ConnectError):
    """What is to be a tracker's address is none; nothing was tried."""

    exit_status = 2


Options = Tuple[Tuple[str, Union[int, str]], ...]

_COMMON: Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without closing its connection is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: Options = (
    *_COMMON,
    # Each channel has its own connection: a test or a tool may talk to several trackers on one address in turn.
    ("grpc.use_local_subchannel_pool", 1),
    # Trackers live in one's own network; a proxy set for the web would swallow the connection.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: the time that one attempt has, until the peer's first frame. A refused one ends at once.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def server_options(most_streams: int) -> Options:
    """Of a server that takes so many calls at a time of one connection."""
    return (
        *_COMMON,
        # Two trackers on one port would share its connections between them; the second must be told instead.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_concurrent_streams", most_streams),
        ("grpc.max_metadata_size", 16 << 10),
    )


@dataclass(frozen=True)
class Address:
    """Where a tracker listens; `others` are more trackers of the same fleet, for when that one is gone."""

    host: str
    port: int
    others: Tuple[Address, ...] = ()

    def __str__(self) -> str:
        first = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return ",".join([first, *map(str, self.others)])

    @property
    def each(self) -> Tuple[Address, ...]:
        """One address for each tracker."""
        return (Address(self.host, self.port), *self.others)

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can reach it."""
        return all(address._is_loopback for address in self.each)

    @property
    def _is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", self.host) is not None


def parse_address(text: str) -> Address:
    """`HOST`, `HOST:PORT` or `[IPV6]:PORT`; raises AddressError saying what is wrong."""

    def refuse(why: str) -> AddressError:
        return AddressError(f"{text!r} is not a tracker's address: {why}", hint="write HOST:PORT, for example lab:9190")

    stripped = text.strip()
    if "://" in stripped:
        raise refuse("it has a scheme")
    match = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::(.*))?", stripped)
    if match:
        host, port = match.group(1), match.group(2)
    elif stripped.count(":") > 1:
        raise refuse("an IPv6 address goes in brackets")
    else:
        host, colon, rest = stripped.partition(":")
        port = rest if colon else None
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", host):
            raise refuse("there is no host in it" if not host else f"{host!r} is not a host name")
    if port is None:
        return Address(host, DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise refuse(f"the port {port!r} is not a number from 1 to 65535")
    return Address(host, int(port))


def parse_host(text: str) -> str:
    """A host by itself: a name, or an IP address without brackets; raises AddressError saying what is wrong."""
    if re.fullmatch(r"[A-Za-z0-9_.-]+", text):
        return text
    if ":" in text and re.fullmatch(r"[0-9A-Fa-f:.]+", text):
        with suppress(ValueError):
            return str(ipaddress.IPv6Address(text))
    raise AddressError(
        f"{text!r} is neither a host name nor an IP address", hint="write it without a port, for example lab"
    )


def parse_trackers(text: str) -> Address:
    """The trackers of one fleet, as in `a:9190,b:9190`, or one; raises AddressError."""
    first, *others = (parse_address(part) for part in text.split(","))
    return Address(first.host, first.port, tuple(others))


def _target(address: Address) -> str:
    """What gRPC connects to. Of several it takes the first that answers, and after a loss the first that does then.

    Several names are looked up here and now; those that nobody knows are left out, unless that is all of them.
    """
    if not address.others:
        return str(address)
    found: List[Tuple[str, int]] = []
    unknown = ""
    for each in address.each:
        try:
            known = socket.getaddrinfo(each.host, each.port, type=socket.SOCK_STREAM)
        except OSError as error:
            unknown = f"the host {each.host!r} is not known here ({error.strerror})"
            continue
        found += [(str(place[0]), each.port) for *_, place in known if "%" not in str(place[0])]
    if not found:
        raise ConnectError(unknown, hint="check its name, or use its IP address")
    places = list(dict.fromkeys(found))
    if all(":" not in host for host, _ in places):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in places)
    return "ipv6:" + ",".join(f"[{host if ':' in host else '::ffff:' + host}]:{port}" for host, port in places)


@dataclass(frozen=True)
class Tls:
    """How a connection is encrypted and who we are on it: `ca` vouches for the tracker, all certificates are PEM.

    A client has a `token`, an agent a `certificate` with its `key`.
    """

    ca: bytes
    token: str = ""
    certificate: bytes = b""
    key: bytes = b""

    def __repr__(self) -> str:
        return f"<Tls {'agent' if self.certificate else 'client'}>"

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key or None, self.certificate or None)


_TLS_OPTIONS: Options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", TRACKER_NAME))


class _NamedCalls:
    """Calls of one method that carry metadata of our own."""

    def __init__(self, calls: Any, metadata: Tuple[Tuple[str, str], ...]) -> None:
        self._calls = calls
        self._metadata = metadata

    def __call__(self, request: Any, timeout: Optional[float] = None, metadata: Any = (), **options: Any) -> Any:
        return self._calls(request, timeout=timeout, metadata=(*(metadata or ()), *self._metadata), **options)

    def with_call(self, request: Any, timeout: Optional[float] = None, metadata: Any = (), **options: Any) -> Any:
        return self._calls.with_call(request, timeout, (*(metadata or ()), *self._metadata), **options)

    def future(self, request: Any, timeout: Optional[float] = None, metadata: Any = (), **options: Any) -> Any:
        return self._calls.future(request, timeout, (*(metadata or ()), *self._metadata), **options)


class _Named:
    """An encrypted channel whose every call carries the token.

    gRPC's own call credentials do the same, but ask for it in another thread at each call, which then waits 0.2 ms.
    """

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, method: str, *codecs: Any, **options: Any) -> Any:
        return _NamedCalls(self._channel.unary_unary(method, *codecs, **options), self._metadata)

    def unary_stream(self, method: str, *codecs: Any, **options: Any) -> Any:
        return _NamedCalls(self._channel.unary_stream(method, *codecs, **options), self._metadata)

    def stream_unary(self, method: str, *codecs: Any, **options: Any) -> Any:
        return _NamedCalls(self._channel.stream_unary(method, *codecs, **options), self._metadata)

    def stream_stream(self, method: str, *codecs: Any, **options: Any) -> Any:
        return _NamedCalls(self._channel.stream_stream(method, *codecs, **options), self._metadata)

    def close(self) -> Any:
        return self._channel.close()


class _NamedChannel(_Named, grpc.Channel):
    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channel.unsubscribe(callback)

    def __enter__(self) -> _NamedChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_channel(address: Address, tls: Optional[Tls] = None) -> grpc.Channel:
    """A lazily connecting channel to a tracker, without `tls` in plaintext; ConnectError for that beyond loopback."""
    if tls is None:
        _check_plaintext(address)
        return grpc.insecure_channel(_target(address), options=CHANNEL_OPTIONS)
    channel = grpc.secure_channel(_target(address), tls._credentials(), options=_TLS_OPTIONS)
    return _NamedChannel(channel, tls.token) if tls.token else channel


def open_aio_channel(address: Address, tls: Optional[Tls] = None) -> Any:
    """The same for asyncio."""
    if tls is None:
        _check_plaintext(address)
        return grpc.aio.insecure_channel(_target(address), options=CHANNEL_OPTIONS)
    channel = grpc.aio.secure_channel(_target(address), tls._credentials(), options=_TLS_OPTIONS)
    return _Named(channel, tls.token) if tls.token else channel


def _check_plaintext(address: Address) -> None:
    if not address.is_loopback:
        raise ConnectError(f"{address} is not on loopback: nothing is sent there in plaintext", hint="join the tracker")


def handshake_error(address: Optional[Address], details: str) -> Optional[ConnectError]:
    """What a failed TLS handshake means, from gRPC's words for it; None where it did not fail.

    A HandshakeError is one that fails again; any other may have been the fault of what lies between.
    """
    if "Tls handshake failed" not in details and "Ssl handshake failed" not in details:
        return None
    who = "the tracker" if address is None else f"the tracker at {address}"
    if "WRONG_VERSION_NUMBER" in details:
        return HandshakeError(
            f"{who} does not encrypt, and the credentials here are for one that does",
            hint="is another program at that address, or was the tracker started with --insecure-loopback?",
        )
    if "not yet valid" in details or "has expired" in details:
        what = "is not valid yet" if "not yet valid" in details else "has expired"
        return HandshakeError(
            f"by the clock of this machine the certificate of {who} {what}",
            hint="set the clock here if it is wrong: timedatectl set-ntp true; otherwise restart the tracker",
        )
    if "CERTIFICATE_VERIFY_FAILED" in details or "certificate signature failure" in details:
        return HandshakeError(
            f"{who} is not the one that was joined: another authority made its certificate",
            hint="if it was set up anew, join it again: kedge join '…' for a user, --join '…' for an agent",
        )
    return ConnectError(f"no encrypted connection to {who}: {details[-200:]}", hint="its log may say more")


class HandshakeError(ConnectError):
    """Somebody answers, but not as the tracker that is known here would; trying again does not help."""

    exit_status = AuthenticationError.exit_status


def unreachable(address: Address, why: str = "") -> ConnectError:
    """The error for a tracker that does not answer."""
    return ConnectError(
        f"no tracker answers at {address}" + (f" ({why})" if why else ""),
        hint="start one with 'kedge tracker start', or name the right one with --tracker HOST:PORT or KEDGE_TRACKER",
    )
