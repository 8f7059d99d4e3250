"""What administrators ask of a tracker: tokens, and the devices that are enrolled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import grpc

from kedge.protos.v1 import enrolment_pb2 as pb
from kedge.protos.v1 import enrolment_pb2_grpc
from kedge.rpc.errors import UsageError
from kedge.rpc.security.join import DEVICE, TRACKER, USER, Join
from kedge.rpc.status import from_rpc_error
from kedge.rpc.transport import Address, Tls, open_channel

_CALL_S = 20.0
ROLES = ("admin", "submit", "read", "enrol", "tracker")
#: Whoever joins with a token that is no user's.
_JOINS = {"enrol": DEVICE, "tracker": TRACKER}


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token without its secret; times are Unix seconds, 0 means never (`expires_s`) or not (the others)."""

    id: str
    user: str
    role: str
    device: str
    created_s: int
    expires_s: int
    revoked_s: int
    used_s: int

    def state(self, now_s: float) -> str:
        """Whether it is good, in a word."""
        if self.revoked_s:
            return "revoked"
        if self.used_s:
            return "spent"
        return "expired" if self.expires_s and now_s >= self.expires_s else "good"


@dataclass(frozen=True, slots=True)
class EnrolledInfo:
    """A device that was enrolled; `not_after_s` is when its certificate expires unless it is renewed."""

    device: str
    enrolled_s: int
    not_after_s: int
    revoked_s: int


class Access:
    """Tokens and devices of the tracker at `address`, for its administrators; a context manager that disconnects.

    Every method raises ConnectError, AuthenticationError, or PermissionDeniedError for whoever is no administrator.
    """

    def __init__(self, address: Address, tls: Tls | None) -> None:
        if tls is None:
            raise UsageError(
                f"the tracker at {address} lets everybody in (--insecure-loopback): it has no tokens and enrols nobody",
                hint="start it without --insecure-loopback; an agent joins this one with --insecure-loopback",
            )
        self._address = address
        self._ca = tls.ca
        self._channel = open_channel(address, tls)
        self._stub: Any = cast(Any, enrolment_pb2_grpc.AccessStub)(self._channel)

    def __enter__(self) -> Access:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._channel.close()

    def create_token(
        self, role: str, user: str = "", *, device: str = "", lifetime_s: int = 0
    ) -> tuple[TokenInfo, Join]:
        """A new token, and the string to join with; `lifetime_s` 0 means as long as is usual for the role.

        Raises:
            UsageError: a role, user, device or time that no token can have.
        """
        if role not in ROLES:
            raise UsageError(f"{role!r} is no role", hint=f"one of {', '.join(ROLES)}")
        request = pb.CreateTokenRequest(user=user, role=f"ROLE_{role.upper()}", device=device, lifetime_s=lifetime_s)
        answer = self._call(self._stub.CreateToken, request)
        return _token(answer.token), Join(_JOINS.get(role, USER), self._address, answer.secret, self._ca)

    def enrol_token(self, device: str) -> tuple[Join, int]:
        """What lets this device in, taking the place of one of the same name, and the port that serves agents."""
        request = pb.CreateTokenRequest(role=pb.ROLE_ENROL, device=device)
        answer = self._call(self._stub.CreateToken, request)
        return Join(DEVICE, self._address, answer.secret, self._ca), answer.agents_port

    def tokens(self) -> list[TokenInfo]:
        """Every token, oldest first."""
        return [_token(each) for each in self._call(self._stub.ListTokens, pb.ListTokensRequest()).tokens]

    def revoke_token(self, token_id: str) -> TokenInfo:
        """Refuse a token from now on; raises UnknownTokenError."""
        return _token(self._call(self._stub.RevokeToken, pb.RevokeTokenRequest(id=token_id)))

    def enrolled(self) -> list[EnrolledInfo]:
        """Every device that was enrolled, by name."""
        return [_enrolled(each) for each in self._call(self._stub.ListEnrolled, pb.ListEnrolledRequest()).devices]

    def revoke_device(self, device: str) -> EnrolledInfo:
        """Refuse a device from now on, and end its connection; raises UnknownTokenError."""
        return _enrolled(self._call(self._stub.RevokeDevice, pb.RevokeDeviceRequest(device=device)))

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=_CALL_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._address) from error


def _token(each: pb.Token) -> TokenInfo:
    role = pb.Role.Name(each.role).removeprefix("ROLE_").lower()
    times = (each.created_unix_s, each.expires_unix_s, each.revoked_unix_s, each.used_unix_s)
    return TokenInfo(each.id, each.user, role, each.device, *times)


def _enrolled(each: pb.Enrolled) -> EnrolledInfo:
    return EnrolledInfo(each.device, each.enrolled_unix_s, each.not_after_unix_s, each.revoked_unix_s)
