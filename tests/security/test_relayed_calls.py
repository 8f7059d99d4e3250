"""Calls that come by a tracker that follows: the leader decides as if they had come to it, and believes nobody else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.errors import AuthenticationError, UsageError
from kedge.rpc.security import identity
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.security.identity import Identity
from kedge.rpc.tracker import ports
from kedge.rpc.tracker.relayed import CERTIFICATE_KEY, PEER_KEY
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.security.principal import RULES, Role
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address, Tls, open_channel
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.ports import free_ports
from support.postgres import PostgresServer
from support.services import Rpc, rpcs, send
from support.toys import QUICK, device_info

RPCS = rpcs()
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


@dataclass
class Pair:
    leader: RunningTracker
    follower: RunningTracker
    peers: Address
    following_peers: Address
    database: str

    def tls(self, token: str = "") -> Tls:
        keys = self.leader.serving.keys
        assert keys is not None
        return Tls(keys.authority.certificate_pem, token=token) if token else keys.admin_tls()

    def peer_tls(self) -> Tls:
        keys = self.follower.serving.keys
        assert keys is not None
        own = keys.authority.peer(keys.now_s())
        return Tls(keys.authority.certificate_pem, certificate=own.certificate, key=own.key)


@pytest.fixture(scope="module")
def pair(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from make_pair(postgres, tmp_path_factory.mktemp("pair"))


def make_pair(postgres: PostgresServer, folder: Path) -> Iterator[Pair]:
    url = postgres.new_database()
    peers, other = free_ports(), free_ports()
    with start(port=0, data_dir=folder / "a", settings=QUICK, database=url, peers_port=peers) as leader:
        assert leader.serving.keys is not None
        with Access(leader.address, leader.serving.keys.admin_tls()) as access:
            join = access.create_token("tracker")[1]
        with start(
            port=0, data_dir=folder / "b", settings=QUICK, database=url, join=join, peers_port=other
        ) as follower:
            yield Pair(leader, follower, Address("127.0.0.1", peers), Address("127.0.0.1", other), url)


@pytest.fixture(scope="module")
def access(pair: Pair) -> Iterator[Access]:
    with Access(pair.follower.address, pair.tls()) as access:
        yield access


@pytest.fixture(scope="module")
def device(access: Access) -> Identity:
    return identity.enrol(access.enrol_token("rpi4-1")[0], "rpi4-1")


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_strangers_get_nothing_by_a_follower(pair: Pair, rpc: Rpc, device: Identity) -> None:
    with open_channel(pair.follower.address, pair.tls("kdg_nobody")) as channel:
        assert send(channel, rpc)[0] == "UNAUTHENTICATED"
        # What a tracker would say of a caller is not believed when somebody else says it.
        forged = ((CERTIFICATE_KEY, device.certificate.encode()), (PEER_KEY, "ipv4:127.0.0.1:1"))
        assert send(channel, rpc, metadata=forged)[0] == "UNAUTHENTICATED"
    with open_channel(pair.leader.address, pair.tls("kdg_nobody")) as channel:
        assert send(channel, rpc, metadata=forged)[0] in ("UNAUTHENTICATED", "UNIMPLEMENTED")


@pytest.mark.parametrize("role", ["admin", "submit", "read", "enrol", "tracker"])
@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_tokens_do_by_a_follower_what_their_role_says(pair: Pair, access: Access, rpc: Rpc, role: str) -> None:
    _, join = access.create_token(role, "ann")
    with open_channel(pair.follower.address, pair.tls(join.token)) as channel:
        status, said = send(channel, rpc)
    if Role(role) in RULES[rpc.path]:
        assert status not in REFUSED, said
    else:
        assert status == "PERMISSION_DENIED" and "that takes the role" in said, said


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_devices_do_by_a_follower_what_agents_do(pair: Pair, device: Identity, rpc: Rpc) -> None:
    with open_channel(pair.follower.serving.agents_address, device.tls) as channel:
        status, said = send(channel, rpc)
    if Role.AGENT in RULES[rpc.path]:
        assert status not in REFUSED or "only while it holds a job" in said, said
    else:
        assert status == "PERMISSION_DENIED"


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_only_trackers_reach_the_trackers_port(pair: Pair, device: Identity, rpc: Rpc) -> None:
    with open_channel(pair.peers, pair.tls()) as channel:
        assert send(channel, rpc)[0] == "UNAVAILABLE", "without a certificate there is no connection"
    with open_channel(pair.peers, device.tls) as channel:
        status, said = send(channel, rpc)
        assert status == "UNAUTHENTICATED" and "only the fleet's other trackers" in said
    with open_channel(pair.peers, pair.peer_tls()) as channel:
        status, said = send(channel, rpc)
        assert (status in REFUSED) is (Role.PEER not in RULES[rpc.path]), said


def test_a_follower_serves_trackers_nothing_but_blobs(pair: Pair) -> None:
    with Fleet(pair.leader.address, pair.tls()) as fleet:
        wait_for(lambda: len(fleet.status().trackers) == 2, "both to be seen")
    with open_channel(pair.following_peers, pair.peer_tls()) as channel:
        for rpc in RPCS:
            status, said = send(channel, rpc)
            if rpc.path.startswith(("/kedge.v1.Blobs/", "/grpc.")):
                assert status not in REFUSED, said
            else:
                assert status in ("UNIMPLEMENTED", "PERMISSION_DENIED"), (str(rpc), status, said)


def test_reflection_by_a_follower_lists_what_its_own_listener_serves(pair: Pair, device: Identity) -> None:
    def listed(address: Address, tls: Tls) -> set[str]:
        with open_channel(address, tls) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    for leading, following, tls in (
        (pair.leader.address, pair.follower.address, pair.tls()),
        (pair.leader.serving.agents_address, pair.follower.serving.agents_address, device.tls),
    ):
        assert listed(following, tls) == listed(leading, tls)
    assert "kedge.v1.Access" in listed(pair.follower.address, pair.tls())


def test_a_path_that_no_tracker_serves_is_not_relayed(pair: Pair) -> None:
    with open_channel(pair.follower.address, pair.tls()) as channel:
        call = channel.unary_unary("/kedge.v1.Fleet/NoSuchCall")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_was_revoked_ends_at_a_follower_too(pair: Pair, access: Access) -> None:
    token, join = access.create_token("read", "ann")
    with open_channel(pair.follower.address, pair.tls(join.token)) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        threading.Timer(0.1, access.revoke_token, (token.id,)).start()
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_device_enrols_renews_and_works_by_a_follower(pair: Pair, access: Access) -> None:
    known = identity.enrol(access.enrol_token("bench-1")[0], "bench-1")
    assert known.agents_port == pair.follower.serving.agents_address.port, "it comes back to where it enrolled"
    newer = identity.renew(known)
    with (
        FakeAgent(newer.address, device_info(), work=echo, tls=newer.tls),
        Fleet(pair.leader.address, pair.tls()) as fleet,
    ):
        assert [each.info.name for each in fleet.devices()] == [device_info().name]


def test_a_tracker_has_to_be_let_in_by_one_of_the_fleet(pair: Pair, access: Access, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another certificate authority") as caught:
        start(port=0, data_dir=tmp_path / "stranger", settings=QUICK, database=pair.database)
    assert "--role tracker" in str(caught.value)
    with pytest.raises(UsageError, match="is for a user"):
        start(port=0, data_dir=tmp_path / "a", database=pair.database, join=access.create_token("submit", "ann")[1])
    join = access.create_token("tracker")[1]
    third = {"port": 0, "data_dir": tmp_path / "third", "settings": QUICK, "database": pair.database, "join": join}
    for _ in range(2):  # the spent string does no harm where it was used
        with start(**third) as running, Fleet(running.address, pair.tls()) as fleet:
            wait_for(lambda: len(fleet.status().trackers) == 3, "all three to be seen")
        wait_for(lambda: _members(pair) == 2, "it to be gone")
    with pytest.raises(AuthenticationError, match="is spent"):
        start(**{**third, "data_dir": tmp_path / "late"})
    with pytest.raises(SecretFileError, match="of another fleet"):
        start(**{**third, "data_dir": tmp_path / "stranger"})


def _members(pair: Pair) -> int:
    with Fleet(pair.leader.address, pair.tls()) as fleet:
        return len(fleet.status().trackers)


def test_a_tracker_of_its_own_lets_no_other_join(tracker: RunningTracker) -> None:
    assert tracker.serving.keys is not None
    with (
        Access(tracker.address, tracker.serving.keys.admin_tls()) as alone,
        pytest.raises(UsageError, match="no other tracker can share"),
    ):
        alone.create_token("tracker")


def test_a_database_that_lets_an_administrator_wait_lets_nobody_else_wait(pair: Pair, postgres: PostgresServer) -> None:
    import psycopg

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with (
        ThreadPoolExecutor() as threads,
        psycopg.connect(pair.database) as other,
        Fleet(pair.leader.address, pair.tls()) as fleet,
        Access(pair.leader.address, pair.tls()) as access,
    ):
        other.execute("SELECT * FROM leadership FOR UPDATE")
        creating = threads.submit(access.create_token, "read", "ann")
        wait_for(lambda: postgres.execute(waiting, pair.database.rpartition("/")[2]) == [(1,)], "it to wait")
        assert fleet.status().user == "admin" and not creating.done()
        other.rollback()
        token = creating.result(60)[0]
        assert token.id in {known.id for known in access.tokens()}


def test_many_calls_by_one_follower_keep_no_others_out(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections to the follower have together more calls than one to the leader's other ports could."""
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(ports, "MAX_STREAMS", 8)
    for pair in make_pair(postgres, tmp_path):
        first, second = (open_channel(pair.follower.address, pair.tls()) for _ in range(2))
        with first, second:
            asked = health_pb2.HealthCheckRequest()
            stubs = [health_pb2_grpc.HealthStub(channel) for channel in (first, second)]
            watches = [stub.Watch(asked, timeout=60) for stub in stubs for _ in range(6)]
            for watch in watches:
                assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            with Fleet(pair.follower.address, pair.tls()) as fleet:
                assert fleet.status().user == "admin"
