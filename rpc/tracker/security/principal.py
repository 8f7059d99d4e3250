"""Who makes a call, and what each call needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from grpc_health.v1 import health_pb2

from kedge.rpc.errors import AuthenticationError, PermissionDeniedError, UsageError
from kedge.rpc.outcome import Word

_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Role(Word):
    """What a token or a certificate lets its holder be."""

    ADMIN = "admin"
    SUBMIT = "submit"
    READ = "read"
    ENROL = "enrol"
    TRACKER = "tracker"
    AGENT = "agent"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who makes a call: a user by name and role, or a device by the name in its certificate.

    `token_id` is that of the token, or the certificate's serial number; `expires_s` (Unix seconds, 0: never) its end.
    `trusted` is whoever reaches a tracker that was started with --insecure-loopback: everybody on that machine.
    """

    name: str
    role: Role
    token_id: str = ""
    trusted: bool = False
    expires_s: int = 0

    @property
    def owner(self) -> str:
        """The name under which blobs are owned: users and devices of one name are not the same."""
        return agent_owner(self.name) if self.role is Role.AGENT else owner_of(self.name)

    @property
    def tag(self) -> str:
        """Keeps interrupted uploads of different owners apart; "" where everybody is one."""
        return "" if self.trusted else hashlib.sha256(self.owner.encode()).hexdigest()[:16]

    @property
    def sees_all(self) -> bool:
        """Everybody's jobs and blobs are open to administrators, and to the fleet's other trackers."""
        return self.role in (Role.ADMIN, Role.PEER)

    def may_see(self, user: str) -> bool:
        """Whether what belongs to this user is open to the principal."""
        return self.sees_all or (self.role is not Role.AGENT and self.name == user)


def agent_owner(device: str) -> str:
    """The name under which a device owns blobs."""
    return f"agent.{device}"


def owner_of(user: str) -> str:
    """The name under which a user owns blobs."""
    return f"user.{user}"


#: Of a tracker without authentication.
LOCAL = Principal("local", Role.ADMIN, trusted=True)

_USERS = frozenset({Role.ADMIN, Role.SUBMIT, Role.READ})
_SUBMITTERS = frozenset({Role.ADMIN, Role.SUBMIT})
_ADMINS = frozenset({Role.ADMIN})
_AGENTS = frozenset({Role.AGENT})
#: Another tracker of the fleet, by its certificate, on its own behalf.
_PEERS = frozenset({Role.PEER})
#: Whoever has a token or a certificate.
_ANYBODY = frozenset(Role)

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]

#: Every call of every service. One that is not here is refused to everybody (and a test says that it is missing).
RULES: dict[str, frozenset[Role]] = {
    "/kedge.v1.Fleet/Hello": _USERS,
    "/kedge.v1.Fleet/Status": _USERS,
    "/kedge.v1.Fleet/ListDevices": _USERS,
    "/kedge.v1.Fleet/SubmitJob": _SUBMITTERS,
    "/kedge.v1.Fleet/RunJob": _SUBMITTERS,
    "/kedge.v1.Fleet/RunJobs": _SUBMITTERS,
    "/kedge.v1.Fleet/WatchJob": _USERS,
    "/kedge.v1.Fleet/GetJob": _USERS,
    "/kedge.v1.Fleet/ListJobs": _USERS,
    "/kedge.v1.Fleet/CancelJob": _SUBMITTERS,
    "/kedge.v1.Fleet/SetMaintenance": _ADMINS,
    "/kedge.v1.Fleet/Reserve": _SUBMITTERS,
    "/kedge.v1.Fleet/EndReservation": _SUBMITTERS,
    "/kedge.v1.Fleet/KeepNoise": _SUBMITTERS,
    "/kedge.v1.Blobs/FindMissing": _SUBMITTERS | _AGENTS | _PEERS,
    "/kedge.v1.Blobs/QueryUpload": _SUBMITTERS | _AGENTS | _PEERS,
    "/kedge.v1.Blobs/Upload": _SUBMITTERS | _AGENTS | _PEERS,
    "/kedge.v1.Blobs/Download": _USERS | _AGENTS | _PEERS,
    "/kedge.v1.Agents/Connect": _AGENTS,
    "/kedge.v1.Sessions/Attach": _SUBMITTERS,
    "/kedge.v1.Sessions/Serve": _AGENTS,
    "/kedge.v1.Enrolment/Enrol": frozenset({Role.ENROL}),
    "/kedge.v1.Enrolment/Renew": _AGENTS,
    "/kedge.v1.Enrolment/JoinTracker": frozenset({Role.TRACKER}),
    "/kedge.v1.Access/CreateToken": _ADMINS,
    "/kedge.v1.Access/ListTokens": _ADMINS,
    "/kedge.v1.Access/RevokeToken": _ADMINS,
    "/kedge.v1.Access/ListEnrolled": _ADMINS,
    "/kedge.v1.Access/RevokeDevice": _ADMINS,
    # Newer versions of gRPC's package have more calls than older ones.
    **{f"/{_HEALTH.full_name}/{name}": _ANYBODY for name in _HEALTH.methods_by_name},
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ANYBODY,
}

#: From what lets one do least on.
_BY_TOKEN = (Role.READ, Role.SUBMIT, Role.ADMIN)

#: What a user calls the calls that not everybody may make: a refusal names nothing of the protocol.
_DOES: dict[str, str] = {
    "/kedge.v1.Fleet/Hello": "connect as a user",
    "/kedge.v1.Fleet/Status": "see the trackers' status",
    "/kedge.v1.Fleet/ListDevices": "list devices",
    "/kedge.v1.Fleet/SubmitJob": "submit jobs",
    "/kedge.v1.Fleet/RunJob": "submit jobs",
    "/kedge.v1.Fleet/RunJobs": "submit jobs",
    "/kedge.v1.Fleet/WatchJob": "follow jobs",
    "/kedge.v1.Fleet/GetJob": "see jobs",
    "/kedge.v1.Fleet/ListJobs": "list jobs",
    "/kedge.v1.Fleet/CancelJob": "cancel jobs",
    "/kedge.v1.Fleet/SetMaintenance": "take devices out of service, or back into it",
    "/kedge.v1.Fleet/Reserve": "reserve devices",
    "/kedge.v1.Fleet/EndReservation": "end reservations",
    "/kedge.v1.Fleet/KeepNoise": "record how much a device's times vary",
    "/kedge.v1.Blobs/FindMissing": "upload artifacts or inputs",
    "/kedge.v1.Blobs/QueryUpload": "upload artifacts or inputs",
    "/kedge.v1.Blobs/Upload": "upload artifacts or inputs",
    "/kedge.v1.Blobs/Download": "download results",
    "/kedge.v1.Agents/Connect": "serve jobs as a device's agent",
    "/kedge.v1.Sessions/Attach": "open sessions",
    "/kedge.v1.Sessions/Serve": "serve sessions as a device's agent",
    "/kedge.v1.Enrolment/Enrol": "enrol a device",
    "/kedge.v1.Enrolment/Renew": "renew a device's certificate",
    "/kedge.v1.Enrolment/JoinTracker": "have a tracker join this one",
    "/kedge.v1.Access/CreateToken": "create tokens",
    "/kedge.v1.Access/ListTokens": "list tokens",
    "/kedge.v1.Access/RevokeToken": "revoke tokens",
    "/kedge.v1.Access/ListEnrolled": "list enrolled devices",
    "/kedge.v1.Access/RevokeDevice": "revoke devices",
}

_current: ContextVar[Principal] = ContextVar("principal")


def enter(principal: Principal) -> None:
    """The call that is handled here is the principal's."""
    _current.set(principal)


def caller() -> Principal:
    """Who makes the call that is handled here; raises AuthenticationError where nobody was admitted."""
    try:
        return _current.get()
    except LookupError:
        raise AuthenticationError("this call was not admitted by anybody") from None


def check_rule(principal: Principal, method: str) -> None:
    """Raise PermissionDeniedError unless the principal may make this call."""
    allowed = RULES.get(method)
    if allowed is None:
        raise PermissionDeniedError(f"nobody may call {method[:120]!r}")
    if principal.trusted or principal.role in allowed:
        return
    can_have = [role for role in _BY_TOKEN if role in allowed] if principal.role in _USERS else []
    wanted = can_have or [role for role in (*_BY_TOKEN, *Role) if role in allowed]
    who = f"{'device' if principal.role is Role.AGENT else 'user'} {principal.name!r} with the role {principal.role}"
    raise PermissionDeniedError(
        f"{who} may not {_DOES[method]}: that takes the role {' or '.join(dict.fromkeys(wanted))}",
        hint=_remedy(allowed, principal, can_have),
    )


def _remedy(allowed: frozenset[Role], principal: Principal, can_have: Sequence[Role]) -> str:
    """What gives somebody one of these roles; `can_have` are those that the principal's token can have, least first."""
    if can_have:
        return (
            "ask an administrator for a token: "
            f"kedge tracker token create --role {can_have[0]} --user {principal.name}; "
            "then 'kedge join' with what that prints"
        )
    if Role.ENROL in allowed:
        return "a device joins with a string of its own: kedge tracker token create --role enrol --device NAME"
    if Role.TRACKER in allowed:
        return "a tracker joins with a string of its own: kedge tracker token create --role tracker"
    if allowed & _USERS:
        return "use it from a machine where a user has joined with a token: kedge tracker token create"
    return "agents and other trackers do it by themselves: kedge agent start, kedge tracker start"


def check_user(name: str) -> str:
    """The name of a user as it is; raises UsageError where no user may be called so."""
    if not _USER.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} cannot be a user's name", hint="letters, digits, dots, dashes and underscores: --user ann"
        )
    return name
