"""Who may make which call, for every call that the .proto files know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.security import identity
from kedge.rpc.security.identity import Identity
from kedge.rpc.tracker.security.ca import Authority
from kedge.rpc.tracker.security.principal import RULES, Role
from kedge.rpc.tracker.security.tokens import Tokens
from kedge.rpc.tracker.server import RunningTracker
from kedge.rpc.transport import TRACKER_NAME, Address, HandshakeError, Tls, open_channel
from support.services import Rpc, rpcs, send

RPCS = rpcs()
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
#: Where each service is served.
EVERYWHERE = ("Blobs", "Sessions", "Enrolment", "Health", "ServerReflection")
AT_CLIENTS = ("Fleet", "Access", *EVERYWHERE)
AT_AGENTS = ("Agents", *EVERYWHERE)
TOKEN_ROLES = ("admin", "submit", "read", "enrol")


def service(rpc: Rpc) -> str:
    return rpc.path.split("/")[1].rpartition(".")[2]


def test_every_call_has_a_rule_and_every_rule_a_call() -> None:
    assert {rpc.path for rpc in RPCS} == set(RULES)
    assert {service(rpc) for rpc in RPCS} == {*AT_CLIENTS, *AT_AGENTS}
    assert len(RPCS) > 15


@pytest.fixture(scope="module")
def strangers(tracker: RunningTracker, access: Access) -> Iterator[dict[str, grpc.Channel]]:
    """Channels to the clients' port with every kind of bad token, and with none."""
    assert tracker.serving.security is not None
    tokens, ca = tracker.serving.security.tokens, tracker.serving.security.authority.certificate_pem
    short, expired = tokens.create("ann", Role.ADMIN, lifetime_s=1)
    digest = next(digest for digest, token in tokens._by_hash.items() if token.id == short.id)
    tokens._by_hash[digest] = type(short)(short.id, "ann", Role.ADMIN, "", 1, 2)
    info, revoked = access.create_token("admin", "ann")
    access.revoke_token(info.id)
    secrets = {"none": "", "garbage": "kdg_garbage", "expired": expired, "revoked": revoked.token}
    channels = {name: open_channel(tracker.address, Tls(ca, token=secret)) for name, secret in secrets.items()}
    yield channels
    for channel in channels.values():
        channel.close()


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_strangers_get_nothing_from_the_clients_port(strangers: dict[str, grpc.Channel], rpc: Rpc) -> None:
    for who, channel in strangers.items():
        status, said = send(channel, rpc)
        assert status == ("UNAUTHENTICATED" if service(rpc) in AT_CLIENTS else "UNIMPLEMENTED"), (who, said)
        assert "kdg_" not in said


@pytest.fixture(scope="module")
def by_role(tracker: RunningTracker, access: Access) -> Iterator[dict[str, grpc.Channel]]:
    channels = {}
    for role in TOKEN_ROLES:
        _, join = access.create_token(role, "ann")
        channels[role] = open_channel(tracker.address, Tls(join.ca, token=join.token))
    yield channels
    for channel in channels.values():
        channel.close()


@pytest.mark.parametrize("role", TOKEN_ROLES)
@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_tokens_do_what_their_role_says(by_role: dict[str, grpc.Channel], rpc: Rpc, role: str) -> None:
    status, said = send(by_role[role], rpc)
    if service(rpc) not in AT_CLIENTS:
        assert status == "UNIMPLEMENTED"
    elif Role(role) in RULES[rpc.path]:
        assert status not in REFUSED, said
    else:
        assert status == "PERMISSION_DENIED" and "may not" in said and "that takes the role" in said
        assert rpc.path.rpartition("/")[2] not in said, "a user knows nothing of the protocol's calls"


@pytest.fixture(scope="module")
def device(access: Access) -> Identity:
    return identity.enrol(access.enrol_token("rpi4-1")[0], "rpi4-1")


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_agents_do_what_agents_do(device: Identity, rpc: Rpc) -> None:
    with open_channel(device.address, device.tls) as channel:
        status, said = send(channel, rpc)
    if service(rpc) not in AT_AGENTS:
        assert status == "UNIMPLEMENTED"
    elif Role.AGENT in RULES[rpc.path]:
        assert status not in REFUSED or "only while it holds a job" in said, said
    else:
        assert status == "PERMISSION_DENIED"


@pytest.mark.parametrize("rpc", [rpc for rpc in RPCS if service(rpc) in AT_AGENTS], ids=str)
def test_strangers_get_nothing_from_the_agents_port(
    device: Identity, access: Access, tracker: RunningTracker, rpc: Rpc, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert tracker.serving.security is not None
    security = tracker.serving.security
    other = Authority(tmp_path_factory.mktemp("other"), security.now_s()).device("rpi4-1", security.now_s(), 1e6)
    never = security.authority.device("never-enrolled", security.now_s(), 1e6)
    expired = security.authority.device("rpi4-1", security.now_s() - 1e6, 1e5)
    own = security.keys.certificate
    ca = security.authority.certificate_pem
    bad = {
        "no certificate": Tls(ca),
        "an administrator's token": security.admin_tls(),
        "another authority": Tls(ca, certificate=other.certificate, key=other.key),
        "the tracker's own": Tls(ca, certificate=own.certificate, key=own.key),
        "expired": Tls(ca, certificate=expired.certificate, key=expired.key),
    }
    for who, tls in bad.items():
        with open_channel(device.address, tls) as channel:
            assert send(channel, rpc)[0] == "UNAVAILABLE", who  # no handshake
    with open_channel(device.address, Tls(ca, certificate=never.certificate, key=never.key)) as channel:
        assert send(channel, rpc)[0] == "UNAUTHENTICATED"


def test_a_revoked_device_is_refused_everywhere(enrolled: Callable[[str], Identity], access: Access) -> None:
    gone = enrolled("gone-1")
    access.revoke_device("gone-1")
    with open_channel(gone.address, gone.tls) as channel:
        answers = {send(channel, rpc) for rpc in RPCS if service(rpc) in AT_AGENTS}
    assert {status for status, _ in answers} == {"UNAUTHENTICATED"} and all("revoked" in said for _, said in answers)


def test_a_token_on_the_agents_port_and_a_certificate_on_the_clients(device: Identity, tracker: RunningTracker) -> None:
    hello = next(rpc for rpc in RPCS if rpc.path.endswith("Fleet/Hello"))
    with open_channel(tracker.address, device.tls) as channel:
        assert send(channel, hello)[0] == "UNAUTHENTICATED"


def test_no_agent_can_take_the_trackers_place(device: Identity, tracker: RunningTracker) -> None:
    """Its certificate comes from the same authority, and is for dialling only."""
    assert tracker.serving.security is not None
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        pair = (device.key.encode(), device.certificate.encode())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        server.start()
        with (
            Fleet(Address("127.0.0.1", port), tracker.serving.security.admin_tls()) as fleet,
            pytest.raises(HandshakeError, match="is not the one that was joined"),
        ):
            fleet.hello()
        server.stop(0).wait()
    assert TRACKER_NAME not in device.certificate


def test_what_fails_inside_is_logged_and_not_told(
    tracker: RunningTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tracker.serving.security is not None

    def broken(*_: object) -> None:
        raise RuntimeError("the inside of the tracker")

    monkeypatch.setattr(Tokens, "all", broken)
    listing = next(rpc for rpc in RPCS if rpc.path.endswith("Access/ListTokens"))
    with open_channel(tracker.address, tracker.serving.security.admin_tls()) as channel:
        status, said = send(channel, listing)
    assert status == "INTERNAL" and "inside" not in said and "its log says how" in said
    assert "the inside of the tracker" in caplog.text


def test_a_caller_that_is_gone_is_no_failure_of_the_tracker(
    tracker: RunningTracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tracker.serving.security is not None

    def gone(*_: object) -> None:
        raise grpc.aio.InternalError("what gRPC says where nobody is there to be answered")

    monkeypatch.setattr(Tokens, "all", gone)
    listing = next(rpc for rpc in RPCS if rpc.path.endswith("Access/ListTokens"))
    with open_channel(tracker.address, tracker.serving.security.admin_tls()) as channel:
        send(channel, listing)
    assert not [record for record in caplog.records if record.name == "kedge.tracker" and record.levelname == "ERROR"]


def test_a_call_without_a_rule_is_refused_to_everybody(
    tracker: RunningTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracker.serving.security is not None
    hello = next(rpc for rpc in RPCS if rpc.path.endswith("Fleet/Hello"))
    monkeypatch.delitem(RULES, hello.path)
    with open_channel(tracker.address, tracker.serving.security.admin_tls()) as channel:
        status, said = send(channel, hello)
    assert status == "PERMISSION_DENIED" and "nobody may call" in said
