"""Connections that break in the middle of what they carry, over TLS: the transfer goes on where it was."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import grpc
import pytest

from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import blob_of
from kedge.rpc.errors import ConnectError
from kedge.rpc.security import credentials
from kedge.rpc.status import from_rpc_error, is_away
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


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


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
