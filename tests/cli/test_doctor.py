"""`kedge doctor` on the way to a device: every hop that can be broken is broken here, and named with its remedy."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kedge import fleet_diagnosis
from kedge.diagnosis import Finding
from kedge.fleet_diagnosis import hops
from kedge.rpc import messages as m
from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.protocol import local_protocol
from kedge.rpc.security import credentials, identity
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.tracker.security.ca import Authority
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address, Tls
from kedge.rpc.types import DeviceState, DeviceStatus, Health
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.toys import QUICK, device_info


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[RunningTracker]:
    with start(port=0, data_dir=tmp_path / "tracker", settings=QUICK) as running:
        yield running


def findings(address: Address | str, selector: str | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in hops(str(address), selector)}


def admin(tracker: RunningTracker) -> Tls:
    assert tracker.serving.security is not None
    return tracker.serving.security.admin_tls()


def test_a_fleet_that_is_sound(tracker: RunningTracker) -> None:
    with Access(tracker.address, admin(tracker)) as access:
        known = identity.enrol(access.enrol_token("bench-1")[0], "bench-1")
    with FakeAgent(known.address, device_info(), work=echo, tls=known.tls):
        found = findings(tracker.address)
    checks = ("network", "credentials", "TLS", "tracker", "versions", "account", "clock", "tracker's store")
    assert [found[check].status for check in checks] == ["ok"] * len(checks), found
    assert "TLSv1.3" in found["TLS"].found and "'admin' with the role admin" in found["account"].found
    assert found["device bench-1"].found.startswith("idle, x86_64")
    assert "GiB free" in found["tracker's disk"].found


def test_the_trial_job_runs_where_a_device_is_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def try_there(fleet: Fleet, name: str, target: str) -> Iterator[Finding]:
        tried.append(name)
        yield Finding("a job on the device", "ok", target)

    monkeypatch.setattr(fleet_diagnosis, "_run_there", try_there)
    with (
        start(port=0, data_dir=tmp_path / "plain", settings=QUICK, insecure_loopback=True) as plain,
        FakeAgent(plain.address, device_info("bench-1"), work=echo),
        FakeAgent(plain.address, device_info("bench-2"), work=echo),
        Fleet(plain.address, None) as fleet,
    ):
        fleet.set_maintenance("bench-1", True, "a new fan")
        assert findings(plain.address, "arch=x86_64")["a job on the device"].status == "ok" and tried == ["bench-2"]
        found = findings(plain.address, "bench-1")["a job on the device"]
        assert found.status == "note" and "bench-1: maintenance" in found.found and tried == ["bench-2"]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = findings(f"127.0.0.1:{free.getsockname()[1]}")
    (finding,) = found.values()
    assert (finding.check, finding.status) == ("tracker", "broken") and "kedge tracker start" in finding.remedy


def test_nobody_has_joined(tracker: RunningTracker) -> None:
    shutil.rmtree(credentials.config_dir())
    found = findings(tracker.address)
    assert found["network"].status == "ok" and list(found)[-1] == "credentials"
    assert found["credentials"].status == "broken" and "kedge join" in found["credentials"].remedy
    credentials.config_dir().mkdir()


def test_another_tracker_has_taken_the_place(tracker: RunningTracker, tmp_path: Path) -> None:
    other = Authority(_made(tmp_path / "other"), time.time())
    Credentials((tracker.address,), Tls(other.certificate_pem, token="kdg_x")).save()
    found = findings(tracker.address)
    assert list(found)[-1] == "TLS" and found["TLS"].status == "broken"
    assert "is not the one that was joined" in found["TLS"].found and "kedge join" in found["TLS"].remedy


@contextmanager
def _speaks_tls(authority: Authority, now_s: float, folder: Path) -> Iterator[Address]:
    """Somebody with a certificate of this time, for one handshake."""
    own = authority.tracker(now_s)
    (folder / "both.pem").write_bytes(own.certificate + own.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")

    def serve() -> None:
        for _ in range(2):  # the first connection only asks whether somebody listens
            with listener.accept()[0] as plain:
                try:
                    context.wrap_socket(plain, server_side=True).close()
                except OSError:
                    continue  # the other end did not like the certificate, or said nothing

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        thread.join(60)


def test_the_clock_here_is_off(tmp_path: Path) -> None:
    """By the clock here the certificate will be valid in three years."""
    later = time.time() + 3 * 365 * 86_400
    authority = Authority(_made(tmp_path / "later"), later)
    with _speaks_tls(authority, later, tmp_path) as address:
        Credentials((address,), Tls(authority.certificate_pem, token="kdg_x")).save()
        found = findings(address)
    assert found["TLS"].status == "broken" and "is not valid yet" in found["TLS"].found
    assert "timedatectl" in found["TLS"].remedy


def test_a_token_that_was_revoked(tracker: RunningTracker) -> None:
    with Access(tracker.address, admin(tracker)) as access:
        token, join = access.create_token("submit", "ann")
        access.revoke_token(token.id)
    Credentials((tracker.address,), Tls(join.ca, token=join.token)).save()
    found = findings(tracker.address)
    assert found["TLS"].status == "ok" and "tracker" not in found
    assert found["credentials"].status == "broken" and "was revoked" in found["credentials"].found


def test_a_role_that_only_reads_and_a_token_that_ends_soon(tracker: RunningTracker) -> None:
    with Access(tracker.address, admin(tracker)) as access:
        _, reads = access.create_token("read", "ann")
        _, soon = access.create_token("submit", "bob", lifetime_s=3600)
    Credentials((tracker.address,), Tls(reads.ca, token=reads.token)).save()
    assert findings(tracker.address)["account"].status == "note"
    account = findings(tracker.address, "bench-1")["account"]
    assert account.status == "broken" and "--role submit --user ann" in account.remedy
    Credentials((tracker.address,), Tls(soon.ca, token=soon.token)).save()
    assert findings(tracker.address)["account"].found.endswith("which is soon")


def test_plaintext_and_no_device(tmp_path: Path) -> None:
    with start(port=0, data_dir=tmp_path / "plain", settings=QUICK, insecure_loopback=True) as tracker:
        found = findings(tracker.address)
        assert (found["credentials"].status, found["TLS"].status) == ("note", "note")
        assert found["devices"].status == "broken" and "--role enrol" in found["devices"].remedy
        with FakeAgent(tracker.address, device_info()):
            devices = findings(tracker.address, "arch=sparc")["devices"]
    assert devices.status == "broken" and "bench-1" in devices.remedy


def test_a_device_that_left_and_one_of_another_version(tmp_path: Path) -> None:
    spoken = replace(local_protocol(), software="kedge 0.0.1")
    with start(port=0, data_dir=tmp_path / "plain", settings=QUICK, insecure_loopback=True) as tracker:
        agent = FakeAgent(tracker.address, device_info("old-1"))
        agent.connect(hello=m.Hello(spoken, device_info("old-1"), "instance", health=m.Health()))
        there = findings(tracker.address)["device old-1"]
        agent.drop()
        wait_for(lambda: "devices" in findings(tracker.address), "the agent to be gone")
        with FakeAgent(tracker.address, device_info("new-1")):
            left = findings(tracker.address)["devices that left"]
    assert there.status == "note" and "kedge 0.0.1" in there.found and "update" in there.remedy
    assert left.status == "note" and left.found.startswith("old-1 (since ")


@pytest.mark.parametrize(
    ("state", "health", "status", "word"),
    [
        (DeviceState.QUARANTINED, Health(), "broken", "kedge resume d"),
        (DeviceState.MAINTENANCE, Health(), "note", "kedge resume d"),
        (DeviceState.IDLE, Health(problems=("no space is left",)), "broken", "on the device itself"),
        (DeviceState.BUSY, Health(throttled=("heat",)), "note", "cool it"),
        (DeviceState.BUSY, Health(), "ok", ""),
    ],
)
def test_what_ails_a_device(state: DeviceState, health: Health, status: str, word: str) -> None:
    ours = local_protocol()
    finding = fleet_diagnosis._device(DeviceStatus(device_info("d"), state, detail="why", health=health), ours, ours)
    assert finding.status == status and word in finding.remedy


@pytest.mark.parametrize(("skew", "status"), [(0.2, "ok"), (-60.0, "note"), (4_000.0, "broken")])
def test_clocks_that_differ(skew: float, status: str) -> None:
    finding = fleet_diagnosis._clock(skew)
    assert finding.status == status
    assert all((word in finding.remedy) == (status != "ok") for word in ("timedatectl", "restart the tracker"))


@pytest.mark.parametrize(("free", "status"), [(100 << 30, "ok"), (1 << 30, "note"), (1 << 20, "broken")])
def test_disks(free: int, status: str) -> None:
    assert fleet_diagnosis._disk("tracker's disk", free, "free space").status == status


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder
