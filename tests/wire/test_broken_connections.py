"""Connections that break in the middle of what they carry, over TLS: the transfer goes on where it was."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kedge.rpc import blob_client
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import blob_of
from kedge.rpc.client import Fleet
from kedge.rpc.client.plan import RECONNECT_S
from kedge.rpc.errors import ConnectError
from kedge.rpc.security import credentials
from kedge.rpc.status import Metadata, TrackerAwayError, from_rpc_error, is_away, to_status
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address, HandshakeError, open_channel
from support.proxy import Action, Proxy, Trap

BYTES = 4 << 20
CORRUPTED = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: BAD_DECRYPT"
FOREIGN = "Tls handshake failed (TSI_PROTOCOL_FAILURE): CERTIFICATE_VERIFY_FAILED"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTracker]:
    with start(port=0, data_dir=tmp_path_factory.mktemp("tracker")) as running:
        yield running


@pytest.mark.parametrize("action", ["cut", "abort", "flip"])
def test_a_transfer_survives(tracker: RunningTracker, action: Action) -> None:
    data = secrets.token_bytes(BYTES)
    blob = blob_of(data)
    tls = credentials.find(tracker.address).tls
    with Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy:
        address = Address("127.0.0.1", proxy.port)
        with open_channel(address, tls) as channel:
            client = BlobClient(channel, address)
            up = proxy.set(Trap(action, "up", BYTES // 2))
            client.upload(blob, data)
            down = proxy.set(Trap(action, "down", BYTES // 3))
            assert client.read(blob) == data
            assert up.sprung.is_set() and down.sprung.is_set()


@pytest.mark.parametrize("attempts", [8, 1 << 30])
def test_a_client_waits_for_its_tracker_as_long_with_blobs_as_otherwise(
    tracker: RunningTracker, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    slept: list[float] = []
    tls = credentials.find(tracker.address).tls
    with socket.socket() as nobody, Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy:
        nobody.bind(("127.0.0.1", 0))

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) >= attempts:
                proxy.to = ("127.0.0.1", tracker.port)
                time.sleep(0.2)  # gRPC has pauses of its own between two attempts to connect

        clock = SimpleNamespace(sleep=sleep, monotonic=lambda: sum(slept))
        with Fleet(Address("127.0.0.1", proxy.port), tls) as fleet:
            fleet.hello()
            monkeypatch.setattr(blob_client, "time", clock)
            proxy.to = nobody.getsockname()
            proxy.cut_all(reset=True)
            if attempts == 8:
                fleet.upload(secrets.token_bytes(100))
                return
            with pytest.raises(ConnectError):
                fleet.upload(secrets.token_bytes(100))
    assert RECONNECT_S - 2 < sum(slept) <= RECONNECT_S


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        self._code = code
        self._details = details
        self._metadata = metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Metadata:
        return self._metadata


@pytest.mark.parametrize(
    ("code", "details", "away"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", True),
        (grpc.StatusCode.UNKNOWN, "Stream removed (Unwrap failed (TSI_DATA_CORRUPTED))", True),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", True),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: a bug", False),
        (grpc.StatusCode.UNAVAILABLE, CORRUPTED, True),
        (grpc.StatusCode.UNAVAILABLE, FOREIGN, False),
    ],
)
def test_what_may_be_tried_again(code: grpc.StatusCode, details: str, away: bool) -> None:
    error = Failed(code, details)
    assert is_away(error) is away
    meant = from_rpc_error(error, Address("127.0.0.1", 1))
    assert (isinstance(meant, ConnectError) and not isinstance(meant, HandshakeError)) is away


def test_a_tracker_that_cannot_decide_now_is_one_that_is_away() -> None:
    """Whoever waits for a lost tracker waits for one that leads no more, too: agents with the results of their jobs."""
    error = Failed(*to_status(TrackerAwayError("it leads no more")))
    assert is_away(error) and isinstance(from_rpc_error(error), ConnectError)


def _to_bytes(message: Any) -> bytes:
    return bytes(message.SerializeToString())


class _Silent(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """The first call of each method goes to a server that takes calls and never answers them."""

    def __init__(self, mute: grpc.Channel) -> None:
        self._mute = mute
        self.unanswered: list[str] = []

    def _first(self, details: grpc.ClientCallDetails) -> bool:
        if details.method in self.unanswered:
            return False
        self.unanswered.append(details.method)
        return True

    def intercept_unary_unary(self, proceed, details, request):
        if self._first(details):
            return self._mute.unary_unary(details.method, _to_bytes)(request, timeout=details.timeout)
        return proceed(details, request)

    def intercept_stream_unary(self, proceed, details, requests):
        if self._first(details):
            return self._mute.stream_unary(details.method, _to_bytes)(requests, timeout=details.timeout)
        return proceed(details, requests)

    def intercept_unary_stream(self, proceed, details, request):
        if self._first(details):
            return self._mute.unary_stream(details.method, _to_bytes)(request, timeout=details.timeout)
        return proceed(details, request)


def test_a_tracker_that_never_answers_is_asked_again(tracker: RunningTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that stood still and leads no more: its connection stands."""
    monkeypatch.setattr(blob_client, "_ANSWER_S", 0.3)
    monkeypatch.setattr(blob_client, "_LEAST_BYTES_S", BYTES)
    data = secrets.token_bytes(BYTES)
    tls = credentials.find(tracker.address).tls
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()  # the kernel takes connections, and nobody reads them
        with (
            grpc.insecure_channel(f"127.0.0.1:{mute.getsockname()[1]}") as nowhere,
            open_channel(tracker.address, tls) as real,
        ):
            silent = _Silent(nowhere)
            client = BlobClient(grpc.intercept_channel(real, silent), tracker.address, RECONNECT_S)
            client.upload_missing([(blob_of(data), data)])
            assert client.read(blob_of(data)) == data
    assert [method.rpartition("/")[2] for method in silent.unanswered] == [
        "FindMissing", "QueryUpload", "Upload", "Download",
    ]  # fmt: skip
