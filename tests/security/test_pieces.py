"""Join strings, credentials, tokens, certificates, signatures and the audit log, each for itself."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2, fleet_pb2_grpc
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, connect, plan
from kedge.rpc.client.access import Access
from kedge.rpc.errors import AuthenticationError, ConnectError, PermissionDeniedError, UsageError
from kedge.rpc.security import credentials, signing
from kedge.rpc.security.credentials import Credentials
from kedge.rpc.security.files import SecretFileError, read_private, write_private
from kedge.rpc.security.identity import Identity
from kedge.rpc.security.join import DEVICE, USER, Join, parse_join
from kedge.rpc.status import from_rpc_error
from kedge.rpc.tracker import server
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.ca import Authority, serial_of
from kedge.rpc.tracker.security.devices import Devices
from kedge.rpc.tracker.security.folder import Keys
from kedge.rpc.tracker.security.principal import RULES, Principal, Role, check_rule
from kedge.rpc.tracker.security.storage import FileStorage
from kedge.rpc.tracker.security.tokens import Tokens
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address, HandshakeError, Tls, open_channel
from support.services import rpcs, send
from support.toys import make_artifact

DAY_S = 86_400


class Clock:
    """A clock that tests set."""

    def __init__(self, now_s: float = 1_800_000_000) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "security").mkdir(mode=0o700)
    return tmp_path / "security"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


# ---- Join strings --------------------------------------------------------------------------------------------------


def test_a_join_string_carries_all_and_survives_a_terminal(folder: Path, clock: Clock) -> None:
    ca = Authority(folder, clock()).certificate_pem
    for join in (Join(DEVICE, Address("lab", 9190), "kdg_x", ca), Join(USER, Address("::1", 1), "kdg_" + "y" * 43, ca)):
        text = str(join)
        assert parse_join(text) == join and len(text) < 700
        assert parse_join(f"  {text[:80]}\n{text[80:]} ") == join
        assert join.token not in repr(join)


def test_a_damaged_join_string_is_found(folder: Path, clock: Clock) -> None:
    text = str(Join(DEVICE, Address("lab", 9190), "kdg_x", Authority(folder, clock()).certificate_pem))
    rng = random.Random(1)
    damaged = [text[:end] for end in range(0, len(text), 7)]
    for _ in range(200):
        at = rng.randrange(7, len(text))
        other = rng.choice([c for c in "ABCxyz019-_" if c != text[at]])
        damaged.append(text[:at] + other + text[at + 1 :])
    for wrong in (*damaged, "", "kedge1.", "kedge1.AAAA", "kedge1.!!", "hello"):
        with pytest.raises(UsageError) as caught:
            parse_join(wrong)
        assert "kdg_x" not in str(caught.value)


# ---- Files ---------------------------------------------------------------------------------------------------------


def test_secret_files_are_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    old = os.umask(0)
    try:
        write_private(path, b"one")
    finally:
        os.umask(old)
    write_private(path, b"two")
    assert path.stat().st_mode & 0o777 == 0o600 and read_private(path) == b"two" and len(list(tmp_path.iterdir())) == 1
    path.chmod(0o640)
    with pytest.raises(SecretFileError, match="others may read") as caught:
        read_private(path)
    assert "chmod 600" in str(caught.value.hint)


# ---- Credentials ---------------------------------------------------------------------------------------------------


def test_credentials_are_found_by_address(config: Path, folder: Path, clock: Clock) -> None:
    ca = Authority(folder, clock()).certificate_pem
    lab = Credentials((Address("lab", 9190), Address("10.0.0.1", 9190)), Tls(ca, token="kdg_a"))
    path = credentials.remember(lab)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert credentials.find(Address("10.0.0.1", 9190)) == lab
    credentials.remember(Credentials((Address("127.0.0.1", 19190),), Tls(ca, token="kdg_b")))  # through a tunnel
    assert credentials.find(Address("lab", 9190)).tls == Tls(ca, token="kdg_b")
    # What was joined with counts before what the tracker itself leaves.
    Credentials((Address("lab", 9190),), Tls(ca, token="kdg_own"), own=True).save()
    assert credentials.find(Address("lab", 9190)).tls == Tls(ca, token="kdg_b")


def test_nothing_is_sent_to_an_address_without_credentials(config: Path, tracker: RunningTracker) -> None:
    with pytest.raises(AuthenticationError, match="no credentials for the tracker") as caught:
        connect(tracker.address)
    assert "kedge join" in str(caught.value.hint)
    with pytest.raises(ConnectError, match="no tracker answers"):
        connect("127.0.0.1:1")
    with pytest.raises(ConnectError, match="nothing is sent there in plaintext"):
        open_channel(Address("127.0.0.1.example.com", 9190))


def test_credentials_that_want_plaintext_elsewhere_are_refused(config: Path) -> None:
    Credentials((Address("127.0.0.1", 7),), None).save()
    (path,) = (config / "trackers").iterdir()
    path.write_text(json.dumps({"addresses": ["lab:7"]}))
    with pytest.raises(SecretFileError, match="wants plaintext beyond loopback"):
        credentials.find(Address("lab", 7))


def test_a_tracker_leaves_credentials_while_it_runs(config: Path, tmp_path: Path) -> None:
    with start(port=0, data_dir=tmp_path / "t") as running:
        with connect(f"localhost:{running.port}") as fleet:
            assert fleet.devices() == []
        (path,) = (config / "trackers").iterdir()
        assert path.stat().st_mode & 0o077 == 0
    assert not list((config / "trackers").iterdir())
    with start(port=0, data_dir=tmp_path / "t") as again, connect(again.address) as fleet:
        fleet.hello()


def test_a_service_without_a_folder_of_its_own_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "file"))
    with start(port=0, data_dir=tmp_path / "t") as running:
        assert running.serving.security is not None
        with Fleet(running.address, running.serving.security.admin_tls()) as fleet:
            fleet.hello()
    assert "has no credentials for it" in caplog.text and "KEDGE_CONFIG_DIR" in caplog.text


# ---- What a failed handshake says ----------------------------------------------------------------------------------


def hello(address: Address, tls: Tls | None) -> str:
    """What a client is told whose hello fails."""
    with open_channel(address, tls) as channel, pytest.raises(grpc.RpcError) as caught:
        fleet_pb2_grpc.FleetStub(channel).Hello(fleet_pb2.HelloRequest(), timeout=60)
    error = from_rpc_error(caught.value, address)
    assert isinstance(error, ConnectError) and error.hint
    return str(error)


def test_the_wrong_authority_is_named(tracker: RunningTracker, folder: Path, clock: Clock) -> None:
    assert "is not the one that was joined" in hello(tracker.address, Tls(Authority(folder, clock()).certificate_pem))


@pytest.mark.parametrize(("days", "words"), [(-4_000, "has expired"), (30, "is not valid yet")])
def test_a_clock_that_is_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, words: str) -> None:
    """The tracker's certificate begins or ends at another time than this machine's."""
    moment = time.time() + days * DAY_S

    class Elsewhen(Keys):
        def __init__(self, data_dir: Path, **options: object) -> None:
            super().__init__(data_dir, now_s=lambda: moment)

    monkeypatch.setattr(server, "Keys", Elsewhen)
    with start(port=0, data_dir=tmp_path / "t") as running:
        assert running.serving.security is not None
        said = hello(running.address, running.serving.security.admin_tls())
    assert f"by the clock of this machine the certificate of the tracker at {running.address} {words}" in said
    assert "set the clock" in said


def test_encryption_where_there_is_none_is_named(tmp_path: Path, folder: Path, clock: Clock) -> None:
    with start(port=0, data_dir=tmp_path / "t", insecure_loopback=True) as running:
        assert "does not encrypt" in hello(running.address, Tls(Authority(folder, clock()).certificate_pem))


def test_a_device_explains_its_own_clock() -> None:
    known = Identity("rpi", "lab", 9190, 9191, "", "", "", 1_800_000_000, 1_800_000_000 + 90 * DAY_S)
    known.check_clock(1_800_000_001)
    for now_s in (0, 1_900_000_000):
        with pytest.raises(HandshakeError, match="by the clock here it is") as caught:
            known.check_clock(now_s)
        assert "--join" in str(caught.value.hint)
    assert not known.needs_renewal(1_800_000_000 + 59 * DAY_S) and known.needs_renewal(1_800_000_000 + 61 * DAY_S)


def test_plaintext_is_for_loopback(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "lab", "127.0.0.1.example.com"):
        with pytest.raises(UsageError, match="plaintext is never spoken beyond this machine"):
            start(host, 0, tmp_path / "t", insecure_loopback=True)


@pytest.mark.parametrize("role", Role)
def test_a_refusal_says_what_to_do_next(role: Role) -> None:
    for method, allowed in RULES.items():
        if role not in allowed:
            with pytest.raises(PermissionDeniedError) as refused:
                check_rule(Principal("ann", role), method)
            hint = str(refused.value.hint)
            assert "kedge " in hint and method.rpartition("/")[2] not in f"{refused.value.message} {hint}", method
            if "--role " in hint:
                assert Role(hint.partition("--role ")[2].split()[0]) in allowed, "a token that would do"


# ---- Tokens and devices --------------------------------------------------------------------------------------------


def test_tokens_end(folder: Path, clock: Clock) -> None:
    tokens = Tokens(FileStorage(folder / "tokens.json"), clock)
    _, short = tokens.create("ann", Role.SUBMIT, lifetime_s=60)
    forever, _ = tokens.create("ann", Role.READ, lifetime_s=0)
    enrolling, once = tokens.create("admin", Role.ENROL)
    assert tokens.check(short).user == "ann"
    again = Tokens(FileStorage(folder / "tokens.json"), clock)
    assert again.check(short) == tokens.check(short), "they outlive the tracker"
    clock.now_s += 60
    with pytest.raises(AuthenticationError, match="has expired"):
        again.check(short)
    again.spend(enrolling.id)
    for attempt in (lambda: again.check(once), lambda: again.spend(enrolling.id)):
        with pytest.raises(AuthenticationError, match="is spent"):
            attempt()
    again.revoke(forever.id)
    with pytest.raises(AuthenticationError, match="does not know this token"):
        again.check("kdg_" + "x" * 43)
    assert len(again.all()) == 3
    clock.now_s += 31 * DAY_S
    again.create("bob", Role.READ)
    assert [token.user for token in Tokens(FileStorage(folder / "tokens.json"), clock).all()] == ["bob"]


@pytest.mark.parametrize(
    ("user", "role", "device", "lifetime_s"),
    [
        ("", Role.READ, "", None), ("a/b", Role.READ, "", None), ("ann", Role.AGENT, "", None),
        ("ann", Role.READ, "rpi", None), ("ann", Role.ENROL, "", 0), ("ann", Role.READ, "", -1),
        ("ann", Role.ENROL, "../x", None), ("ann", Role.READ, "", 10**12),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be(
    folder: Path, clock: Clock, user: str, role: Role, device: str, lifetime_s: int | None
) -> None:
    tokens = Tokens(FileStorage(folder / "tokens.json"), clock)
    with pytest.raises(UsageError):
        tokens.create(user, role, device=device, lifetime_s=lifetime_s)
    assert tokens.all() == []


def test_what_cannot_be_stored_does_not_count(folder: Path, clock: Clock) -> None:
    tokens = Tokens(FileStorage(folder / "tokens.json"), clock)
    token, secret = tokens.create("admin", Role.ENROL)
    (folder / "tokens.json").unlink()
    (folder / "tokens.json").mkdir()
    with pytest.raises(SecretFileError):
        tokens.spend(token.id)
    assert not tokens.check(secret).used_s, "nobody was enrolled with it"


def test_a_damaged_file_stops_the_tracker(folder: Path, clock: Clock) -> None:
    authority = Authority(folder, clock())
    for name, load in (
        ("tokens.json", lambda path: Tokens(FileStorage(path), clock)),
        ("devices.json", lambda path: Devices(FileStorage(path), authority, clock)),
    ):
        write_private(folder / name, b'[{"id": 1}]')
        with pytest.raises(SecretFileError, match="is damaged"):
            load(folder / name)
    (folder / "ca.key").unlink()
    with pytest.raises(SecretFileError, match=r"only ca\.pem"):
        Authority(folder, clock())


def test_certificates_are_renewed_and_overlap(folder: Path, clock: Clock) -> None:
    devices = Devices(FileStorage(folder / "devices.json"), Authority(folder, clock()), clock, lifetime_s=10 * DAY_S)
    first = devices.enrol("rpi", replaces=False)
    assert serial_of(first.certificate) == (first.serial, int(clock()) + 10 * DAY_S)
    second = devices.renew("rpi", first.serial)
    devices.check("rpi", first.serial)  # its connections live on
    third = devices.renew("rpi", second.serial)
    with pytest.raises(AuthenticationError, match="another certificate"):
        devices.check("rpi", first.serial)
    again = Devices(FileStorage(folder / "devices.json"), Authority(folder, clock()), clock)
    again.check("rpi", third.serial)
    again.revoke("rpi")
    with pytest.raises(AuthenticationError, match="was revoked"):
        again.renew("rpi", third.serial)
    fourth = again.enrol("rpi", replaces=False)  # a revoked name is free
    again.check("rpi", fourth.serial)
    with pytest.raises(AuthenticationError, match="another certificate"):
        again.check("rpi", third.serial)


def test_the_trackers_certificate_is_made_anew_in_time(folder: Path, clock: Clock) -> None:
    first = Authority(folder, clock()).tracker(clock())
    assert Authority(folder, clock()).tracker(clock()) == first
    clock.now_s += 6 * 365 * DAY_S
    second = Authority(folder, clock()).tracker(clock())
    assert second.serial != first.serial and second.not_after_s > first.not_after_s


# ---- Signatures ----------------------------------------------------------------------------------------------------


def test_signatures_cover_the_manifest(tmp_path: Path) -> None:
    key = signing.own_key(tmp_path / "c", make=True)
    assert key is not None and signing.own_key(tmp_path / "c") == key and signing.own_key(tmp_path / "none") is None
    assert (tmp_path / "c" / "signing.key").stat().st_mode & 0o077 == 0
    public = signing.public_key(key)
    signature = signing.sign(key, b"manifest")
    signing.verify(b"manifest", signature, frozenset({public, bytes(32)}))
    bad = type(signature)
    cases = [
        (b"manifesT", signature, {public}, "not that of its manifest"),
        (b"manifest", bad(public, bytes(64)), {public}, "not that of its manifest"),
        (b"manifest", bad(public, b""), {public}, "not that of its manifest"),
        (b"manifest", bad(b"", signature.signature), {b""}, "not that of its manifest"),
        (b"manifest", signature, {bytes(32)}, "does not know"),
        (b"manifest", None, {public}, "is not signed"),
        (b"manifest", None, set(), "is not signed"),
    ]
    for manifest, given, signers, words in cases:
        with pytest.raises(signing.SignatureError, match=words):
            signing.verify(manifest, given, frozenset(signers))


def test_signing_that_is_not_there_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = signing.own_key(tmp_path, make=True)
    assert key is not None
    signature = signing.sign(key, b"manifest")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(signing.SigningUnavailableError, match="cryptography"):
        signing.verify(b"manifest", signature, frozenset({signature.public_key}))
    with pytest.raises(signing.SigningUnavailableError):
        signing.check_available()


def test_signers_are_parsed() -> None:
    assert signing.parse_signers(["AB" * 32]) == {b"\xab" * 32}
    for wrong in ("", "ab", "g" * 64, "ab" * 33):
        with pytest.raises(UsageError):
            signing.parse_signers([wrong])


def test_clients_sign_what_they_send(artifact: Artifact, tmp_path: Path) -> None:
    key = signing.own_key(tmp_path, make=True)
    packed = plan.pack(artifact)
    x = np.zeros((1, 4), np.float32)
    spec = plan.run_request(packed, {"x": x}, plan.Terms("main", "")).spec
    assert plan.signed(spec, packed, None).signature is None
    assert key is not None
    signed = plan.signed(spec, packed, key)
    signing.verify(packed.json, signed.signature, frozenset({signing.public_key(key)}))
    other = plan.pack(make_artifact(weight_bytes=100))
    with pytest.raises(signing.SignatureError):
        signing.verify(other.json, signed.signature, frozenset({signing.public_key(key)}))


# ---- Audit ---------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_is_one_object_a_line(tmp_path: Path, clock: Clock) -> None:
    audit = Audit(tmp_path / "audit.jsonl", clock)
    audit.write("token created", by='eve\n{"event": "forged"}', peer="x" * 5_000)
    (line,) = lines(tmp_path / "audit.jsonl")
    assert line["event"] == "token created" and line["by"] == 'eve\n{"event": "forged"}'
    assert line["time"] == "2027-01-15T08:00:00.000Z" and len(str(line["peer"])) == 300
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_the_audit_log_is_bounded_and_strangers_cannot_flush_it(tmp_path: Path, clock: Clock) -> None:
    audit = Audit(tmp_path / "audit.jsonl", clock, max_bytes=2_000, refusals=5)
    audit.write("device enrolled", device="first")
    for _ in range(1_000):
        audit.refused("call refused", peer="stranger")
    assert len(lines(tmp_path / "audit.jsonl")) == 6
    clock.now_s += 61
    audit.refused("call refused", peer="stranger")
    (told,) = [line for line in lines(tmp_path / "audit.jsonl") if line["event"] == "refusals not written"]
    assert told["count"] == 995
    for number in range(500):
        audit.write("job submitted", job=number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and all(path.stat().st_size <= 2_000 for path in files)
    assert lines(tmp_path / "audit.jsonl")[-1]["job"] == 499


def test_after_a_rotation_that_failed_nothing_goes_to_another_file(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = Audit(tmp_path / "audit.jsonl", clock, max_bytes=200)
    audit.write("token created", by="x" * 100)
    real = Path.replace

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "replace", full)
    audit.write("lost", by="x" * 100)
    with (tmp_path / "another").open("wb") as another:  # takes the number that the log's file had
        audit.write("one too many", by="x" * 100)
        monkeypatch.setattr(Path, "replace", real)
        audit.write("token revoked", by="ann")
        assert another.tell() == 0 and (tmp_path / "another").read_bytes() == b""
    assert [line["event"] for line in lines(tmp_path / "audit.jsonl")] == ["token revoked"]
    assert [line["event"] for line in lines(tmp_path / "audit.jsonl.1")] == ["token created", "one too many"]


def test_what_one_user_does_is_counted_beyond_a_bound(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedge.rpc.tracker.security.audit._ACTS", 5)
    audit = Audit(tmp_path / "audit.jsonl", clock)
    for number in range(20):
        audit.write("job submitted", job=number, by="eve", role="submit")
        audit.write("maintenance", by="root", role="admin")
    audit.write("job submitted", job=20, by="ann", role="submit")
    written = Counter(line.get("by") for line in lines(tmp_path / "audit.jsonl"))
    assert written == {"eve": 5, "root": 20, "ann": 1}
    clock.now_s += 61
    audit.write("job submitted", job=21, by="eve", role="submit")
    *_, told, newest = lines(tmp_path / "audit.jsonl")
    assert (told["event"], told["by"], told["count"]) == ("acts not written", "eve", 15)
    assert newest["job"] == 21


def test_many_threads_write_whole_lines(tmp_path: Path, clock: Clock) -> None:
    audit = Audit(tmp_path / "audit.jsonl", clock, max_bytes=1 << 20)
    threads = [threading.Thread(target=lambda: [audit.write("x", n=n) for n in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(tmp_path / "audit.jsonl")) == 400


def test_a_trackers_audit_tells_who_did_what(
    tracker: RunningTracker, access: Access, enrolled: Callable[[str], Identity]
) -> None:
    token, join = access.create_token("read", "carl")
    submit = next(rpc for rpc in rpcs() if rpc.path.endswith("/CancelJob"))
    with open_channel(tracker.address, Tls(join.ca, token=join.token)) as channel:
        send(channel, submit)
    enrolled("seen-1")
    access.revoke_token(token.id)
    said = lines(tracker.data_dir / "security" / "audit.jsonl")
    made = next(line for line in said if line["event"] == "token created" and line["token_id"] == token.id)
    assert made["user"] == "carl" and made["by"] == "admin" and str(made["peer"]).startswith("ipv4:127.0.0.1:")
    refused = next(line for line in said if line["event"] == "call refused" and line.get("by") == "carl")
    assert refused["method"] == "/kedge.v1.Fleet/CancelJob" and refused["token"] == token.id
    assert any(line["event"] == "device enrolled" and line["device"] == "seen-1" for line in said)
    assert any(line["event"] == "token revoked" and line["token_id"] == token.id for line in said)
    assert join.token not in json.dumps(said)
