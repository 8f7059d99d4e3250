"""Who a device is to its tracker: a certificate and its key, in a file of the agent's data folder, mode 0600.

    DATA/identity/NAME@CA.json      CA: the beginning of its certificate's SHA-256

One for each name and tracker: a deployment that tries another and fails finds the agent's own where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, List, Optional

import grpc

from kedge.protos.v1 import enrolment_pb2, enrolment_pb2_grpc
from kedge.rpc.errors import AuthenticationError, ConnectError, KedgeError
from kedge.rpc.security.files import SecretFileError, make_private_folder, read_private, write_private
from kedge.rpc.security.join import DEVICE, Join
from kedge.rpc.status import from_rpc_error
from kedge.rpc.transport import Address, HandshakeError, Tls, open_channel

_FOLDER = "identity"
_NAMED = 12
#: A certificate is renewed when less than this share of its time is left.
_RENEW_SHARE = 1 / 3
_CALL_S = 20.0
#: As large as an identity, so that a full disk shows.
_TRIAL_BYTES = 8 << 10


@dataclass(frozen=True)
class Identity:
    """A device's name, certificate and key; the tracker is at `host`, agents are served on `agents_port` there."""

    device: str
    host: str
    port: int
    agents_port: int
    ca: str
    certificate: str
    key: str
    not_before_s: int
    not_after_s: int
    #: The beginning of the SHA-256 of the token that it was enrolled with: an agent may be started with it again.
    joined: str = ""

    def __repr__(self) -> str:
        return f"<Identity {self.device} of {self.host}:{self.agents_port}>"

    @property
    def tracker(self) -> Address:
        """Where it was joined."""
        return Address(self.host, self.port)

    @property
    def address(self) -> Address:
        """Where the tracker serves agents."""
        return Address(self.host, self.agents_port)

    def addresses(self, trackers: Address) -> Address:
        """Where several trackers serve agents: as far from their clients' ports as the one that was joined does."""
        first, *others = (Address(each.host, each.port + self.agents_port - self.port) for each in trackers.each)
        return Address(first.host, first.port, tuple(others))

    @property
    def tls(self) -> Tls:
        """How to talk to it."""
        return Tls(self.ca.encode(), certificate=self.certificate.encode(), key=self.key.encode())

    def is_from(self, join: Join) -> bool:
        """Whether this is what the join string gave."""
        return self.joined == _mark(join)

    def needs_renewal(self, now_s: float) -> bool:
        """Whether the certificate expires before long."""
        return now_s >= self.not_after_s - (self.not_after_s - self.not_before_s) * _RENEW_SHARE

    def check_clock(self, now_s: float) -> None:
        """Raise HandshakeError where the certificate is not valid by the clock of this machine."""
        if self.not_before_s <= now_s <= self.not_after_s:
            return
        begins, ends, now = (_day(moment) for moment in (self.not_before_s, self.not_after_s, now_s))
        raise HandshakeError(
            f"the certificate of {self.device} is valid from {begins} to {ends}, and by the clock here it is {now}",
            hint="set the clock if it is wrong ('timedatectl set-ntp true'); otherwise enrol the device again: --join",
        )

    def save(self, data_dir: Path) -> None:
        """Write the file; raises SecretFileError."""
        folder = _make_folder(data_dir)
        authority = hashlib.sha256(self.ca.encode()).hexdigest()[:_NAMED]
        write_private(folder / f"{self.device}@{authority}.json", json.dumps(asdict(self), indent=1).encode())


def check_writable(data_dir: Path) -> None:
    """Raise SecretFileError where no identity could be saved: the token that buys it would be spent for nothing."""
    trial = _make_folder(data_dir) / f"trial-{os.getpid()}"
    write_private(trial, b"x" * _TRIAL_BYTES)
    trial.unlink()


def load(data_dir: Path, device: str, tracker: Optional[Address] = None) -> Optional[Identity]:
    """What a device of this name is known by: to the tracker at that address, if it is, or to the last it has joined.

    None where it has joined none under this name; raises SecretFileError.
    """
    known = [(path.stat().st_mtime_ns, _read(path)) for path in (data_dir / _FOLDER).glob(f"{device}@*.json")]
    here = [item for item in known if tracker is not None and item[1].tracker in tracker.each]
    return max(here or known, key=lambda item: item[0], default=(0, None))[1]


def names(data_dir: Path) -> List[str]:
    """Under which names a device has joined trackers."""
    return sorted({path.name.rpartition("@")[0] for path in (data_dir / _FOLDER).glob("*@*.json")})


def _make_folder(data_dir: Path) -> Path:
    folder = data_dir / _FOLDER
    make_private_folder(data_dir)
    make_private_folder(folder)
    return folder


def _read(path: Path) -> Identity:
    try:
        return Identity(**json.loads(read_private(path)))
    except (ValueError, TypeError) as error:
        raise SecretFileError(f"{path} is damaged", hint=f"remove it, and enrol the device again: {path}") from error


def enrol(join: Join, device: str) -> Identity:
    """Become `device`, spending the token in the join string.

    Raises:
        AuthenticationError, PermissionDeniedError: the token is of another kind, spent, expired or revoked.
        NameTakenError: the name is another device's.
        ConnectError: the tracker does not answer, or is not the one that made the join string.
    """
    if join.kind != DEVICE:
        raise AuthenticationError(
            "this join string is a user's: no device enrols with it",
            hint="make one with 'kedge tracker token create --role enrol'; a user runs: kedge join '…'",
        )

    def call(channel: grpc.Channel) -> Any:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        return stub.Enrol(enrolment_pb2.EnrolRequest(device=device), timeout=_CALL_S)

    found = _ask(call, join.address, Tls(join.ca, token=join.token), join.address)
    return replace(found, joined=_mark(join))


def renew(identity: Identity, address: Optional[Address] = None) -> Identity:
    """A new certificate for the same device, from the tracker that serves agents at `address`; raises as `enrol`."""

    def call(channel: grpc.Channel) -> Any:
        stub = enrolment_pb2_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]
        return stub.Renew(enrolment_pb2.RenewRequest(), timeout=_CALL_S)

    return replace(_ask(call, address or identity.address, identity.tls, identity.tracker), joined=identity.joined)


def _ask(call: Callable[[grpc.Channel], Any], address: Address, tls: Tls, tracker: Address) -> Identity:
    with open_channel(address, tls) as channel:
        try:
            pb = call(channel)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address) from error
    return Identity(
        device=pb.device,
        host=tracker.host,
        port=tracker.port,
        agents_port=pb.agents_port,
        ca=pb.ca_pem.decode(),
        certificate=pb.certificate_pem.decode(),
        key=pb.private_key_pem.decode(),
        not_before_s=pb.not_before_unix_s,
        not_after_s=pb.not_after_unix_s,
    )


def explained(error: KedgeError, identity: Optional[Identity]) -> KedgeError:
    """`error`, or what is behind it: whom a tracker refuses in the handshake is not told why."""
    if identity is None or not isinstance(error, ConnectError):
        return error
    try:
        identity.check_clock(time.time())
    except HandshakeError as reason:
        return reason
    if "Socket closed" in error.message:
        why = f"the tracker at {identity.address} closed the connection: it may not know this device's certificate"
        return ConnectError(why, hint="if its log says so, enrol the device again: --join")
    return error


def _mark(join: Join) -> str:
    return hashlib.sha256(join.token.encode()).hexdigest()[:16]


def _day(moment_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment_s))
