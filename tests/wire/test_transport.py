from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from kedge.rpc.errors import ConnectError
from kedge.rpc.protocol import ProtocolError, accepts, check_peer, local_protocol
from kedge.rpc.transport import Address, AddressError, _NamedChannel, parse_address, parse_host
from kedge.rpc.types import Protocol


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("lab:9000", Address("lab", 9000), "lab:9000"),
        ("lab", Address("lab", 9190), "lab:9190"),
        (" 10.0.0.7:80 ", Address("10.0.0.7", 80), "10.0.0.7:80"),
        ("[::1]:9190", Address("::1", 9190), "[::1]:9190"),
        ("[fe80::1]", Address("fe80::1", 9190), "[fe80::1]:9190"),
    ],
)
def test_addresses(text: str, address: Address, shown: str) -> None:
    assert parse_address(text) == address and str(address) == shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no host"),
        (":9190", "no host"),
        ("http://lab:9190", "scheme"),
        ("lab:", "port ''"),
        ("lab:http", "port 'http'"),
        ("lab:0", "from 1 to 65535"),
        ("lab:65536", "from 1 to 65535"),
        ("::1:9190", "brackets"),
        ("my lab:9190", "not a host name"),
        ("[::1]9190", "brackets"),
    ],
)
def test_bad_addresses_say_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ConnectError, match=r"is not a tracker's address") as caught:
        parse_address(text)
    assert why in caught.value.message and "HOST:PORT" in str(caught.value.hint)


def test_a_host_has_no_port() -> None:
    assert [parse_host(text) for text in ("lab", "10.0.0.7", "::1")] == ["lab", "10.0.0.7", "::1"]
    for text in ("", "lab:9190", "a:9190", "a,b", "my lab", "[::1]", "fe80::1%eth0", "http://lab"):
        with pytest.raises(AddressError, match="neither a host name nor"):
            parse_host(text)


def test_loopback() -> None:
    assert all(Address(host, 1).is_loopback for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"))
    assert not any(Address(host, 1).is_loopback for host in ("0.0.0.0", "lab", "10.0.0.1", "::"))


def said(_: Any, context: grpc.ServicerContext) -> bytes:
    """What a call's metadata says."""
    found = dict(context.invocation_metadata())
    return f"{found.get('authorization')} {found.get('other')}".encode()


@pytest.mark.parametrize(
    ("ask", "other"),
    [
        (lambda channel: channel.unary_unary("/t/Unary")(b""), None),
        (lambda channel: channel.unary_unary("/t/Unary")(b"", timeout=60, metadata=(("other", "kept"),)), "kept"),
        (lambda channel: channel.unary_unary("/t/Unary").with_call(b"")[0], None),
        (lambda channel: channel.unary_unary("/t/Unary").future(b"", timeout=60).result(), None),
        (lambda channel: next(channel.unary_stream("/t/Down")(b"")), None),
        (lambda channel: channel.stream_unary("/t/Up")(iter([b""])), None),
        (lambda channel: channel.stream_unary("/t/Up").future(iter([b""])).result(), None),
        (lambda channel: next(channel.stream_stream("/t/Both")(iter([b""]))), None),
    ],
    ids=["unary", "metadata", "with_call", "future", "down", "up", "up-future", "both"],
)
def test_every_kind_of_call_carries_the_token(ask: Callable[[Any], bytes], other: str | None) -> None:
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(said),
        "Down": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([said(request, context)])),
        "Up": grpc.stream_unary_rpc_method_handler(said),
        "Both": grpc.stream_stream_rpc_method_handler(lambda request, context: iter([said(request, context)])),
    }
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with _NamedChannel(grpc.insecure_channel(f"127.0.0.1:{port}"), "secret") as channel:
            assert ask(channel) == f"Bearer secret {other}".encode()
    finally:
        server.stop(None)


def test_versions_may_differ_by_one() -> None:
    ours = local_protocol().version
    assert [accepts(v) for v in (ours - 1, ours, ours + 1, ours + 2)] == [ours > 1, True, True, False]
    check_peer(Protocol(ours + 1), "the tracker")
    with pytest.raises(ProtocolError, match=f"the tracker speaks protocol {ours + 2}") as caught:
        check_peer(Protocol(ours + 2, (), "kedge 9"), "the tracker")
    assert "update kedge here" in str(caught.value)
