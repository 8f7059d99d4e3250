"""The services by which devices get certificates, and administrators rule over tokens and devices."""

# ruff: noqa: N802 - the .proto files name the methods.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from kedge.protos.v1 import enrolment_pb2 as pb
from kedge.rpc.errors import AuthenticationError, KedgeError, PermissionDeniedError, UsageError
from kedge.rpc.names import check_name
from kedge.rpc.tracker.handlers import typed_errors
from kedge.rpc.tracker.security.ca import Issued
from kedge.rpc.tracker.security.devices import REVOKED_HINT, Enrolled
from kedge.rpc.tracker.security.folder import Security
from kedge.rpc.tracker.security.interceptor import agents_port_of, who
from kedge.rpc.tracker.security.principal import Role, agent_owner, caller, owner_of
from kedge.rpc.tracker.security.tokens import ONE_TIME, Token

Context = grpc.aio.ServicerContext[Any, Any]

_ROLES = {
    Role.ADMIN: pb.ROLE_ADMIN,
    Role.SUBMIT: pb.ROLE_SUBMIT,
    Role.READ: pb.ROLE_READ,
    Role.ENROL: pb.ROLE_ENROL,
    Role.TRACKER: pb.ROLE_TRACKER,
}
_FROM_PB = {number: role for role, number in _ROLES.items()}


#: Ends what an owner has under way, by one token or (empty) by any.
End = Callable[[str, str, KedgeError], None]


class EnrolmentService:
    """Certificates for devices."""

    def __init__(self, security: Security, end: End) -> None:
        self._security = security
        self._end = end

    @typed_errors
    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.Identity:
        """A first certificate, for a one-time token."""
        security, principal = self._security, caller()
        name, by = request.device, who(principal, context)

        def enrol() -> Issued:
            check_name(name)
            token = security.tokens.get(principal.token_id)
            if token.device and token.device != name:
                raise PermissionDeniedError(
                    f"this token enrols {token.device!r}, not {name!r}",
                    hint=f"start the agent with --name {token.device}",
                )
            security.devices.check_free(name, replaces=bool(token.device))
            security.tokens.spend(token.id)
            issued = security.devices.enrol(name, replaces=bool(token.device))
            security.audit.write("device enrolled", device=name, serial=issued.serial, **by)
            return issued

        def end(_: Issued) -> None:
            # Another board may have had the name until now: its certificate is worth nothing any more.
            error = AuthenticationError(f"another device was enrolled as {name!r}", hint=REVOKED_HINT)
            self._end(agent_owner(name), "", error)

        try:
            issued = await security.change(enrol, end)
        except KedgeError as error:
            security.audit.refused("enrolment refused", device=name, reason=error.message, **by)
            raise
        return self._identity(name, issued, context)

    @typed_errors
    async def Renew(self, _request: pb.RenewRequest, context: Context) -> pb.Identity:
        """The next certificate, for the one before."""
        security, principal = self._security, caller()
        issued = await security.change(lambda: security.devices.renew(principal.name, principal.token_id))
        security.audit.write("certificate renewed", serial=issued.serial, **who(principal, context))
        return self._identity(principal.name, issued, context)

    @typed_errors
    async def JoinTracker(self, _request: pb.JoinTrackerRequest, context: Context) -> pb.TrackerIdentity:
        """What makes another tracker one of this fleet, for a one-time token."""
        security, principal = self._security, caller()
        _check_shared(security)
        await security.change(lambda: security.tokens.spend(principal.token_id))
        security.audit.write("tracker joined", **who(principal, context))
        return pb.TrackerIdentity(
            ca_pem=security.authority.certificate_pem,
            ca_private_key_pem=security.authority.key_pem,
            admin_token=security.admin_secret,
        )

    def _identity(self, name: str, issued: Issued, context: Context) -> pb.Identity:
        return pb.Identity(
            device=name,
            certificate_pem=issued.certificate,
            private_key_pem=issued.key,
            ca_pem=self._security.authority.certificate_pem,
            not_before_unix_s=issued.not_before_s,
            not_after_unix_s=issued.not_after_s,
            agents_port=agents_port_of(context, self._security.agents_port),
        )


class AccessService:
    """Tokens and devices, for administrators. `forget` is told of devices that are revoked."""

    def __init__(self, security: Security, end: End, forget: Callable[[str], None]) -> None:
        self._security = security
        self._end = end
        self._forget = forget

    @typed_errors
    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        """A token, whose secret is told this once."""
        role = _FROM_PB.get(request.role)
        if role is None:
            raise UsageError("a token needs a role", hint="--role admin, submit, read, enrol or tracker")
        if role is Role.TRACKER:
            _check_shared(self._security)
        user = request.user or (caller().name if role in ONE_TIME else "")
        lifetime = request.lifetime_s or None
        tokens = self._security.tokens
        token, secret = await self._security.change(
            lambda: tokens.create(user, role, device=request.device, lifetime_s=lifetime)
        )
        said = {"token_id": token.id, "user": token.user, "token_role": role.value, "device": token.device}
        self._security.audit.write("token created", expires_s=token.expires_s, **said, **who(caller(), context))
        port = agents_port_of(context, self._security.agents_port)
        return pb.CreateTokenResponse(token=_token(token), secret=secret, agents_port=port)

    @typed_errors
    async def ListTokens(self, _request: pb.ListTokensRequest, _context: Context) -> pb.ListTokensResponse:
        """Every token, without its secret."""
        return pb.ListTokensResponse(
            tokens=[_token(token) for token in await self._security.change(self._security.tokens.all)]
        )

    @typed_errors
    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.Token:
        """A token is refused from now on, and what it has under way ends."""
        by = who(caller(), context)

        def end(token: Token) -> None:
            self._end(owner_of(token.user), token.id, AuthenticationError(f"the token {token.id} was revoked"))
            self._security.audit.write("token revoked", token_id=token.id, user=token.user, **by)

        return _token(await self._security.change(lambda: self._security.tokens.revoke(request.id), end))

    @typed_errors
    async def ListEnrolled(self, _request: pb.ListEnrolledRequest, _context: Context) -> pb.ListEnrolledResponse:
        """Every device that was enrolled."""
        return pb.ListEnrolledResponse(
            devices=[_enrolled(device) for device in await self._security.change(self._security.devices.all)]
        )

    @typed_errors
    async def RevokeDevice(self, request: pb.RevokeDeviceRequest, context: Context) -> pb.Enrolled:
        """A device is refused from now on, and its connection ends."""
        by = who(caller(), context)

        def end(device: Enrolled) -> None:
            self._security.audit.write("device revoked", device=device.name, **by)
            error = AuthenticationError(f"the device {device.name!r} was revoked", hint=REVOKED_HINT)
            self._end(agent_owner(device.name), "", error)
            self._forget(device.name)

        return _enrolled(await self._security.change(lambda: self._security.devices.revoke(request.device), end))


def _check_shared(security: Security) -> None:
    if not security.shared:
        raise UsageError(
            "this tracker keeps its state in a file of its own, which no other tracker can share",
            hint="start it with --database postgresql://… first (docs/several_trackers.md)",
        )


def _token(token: Token) -> pb.Token:
    return pb.Token(
        id=token.id,
        user=token.user,
        role=_ROLES[token.role],
        device=token.device,
        created_unix_s=token.created_s,
        expires_unix_s=token.expires_s,
        revoked_unix_s=token.revoked_s,
        used_unix_s=token.used_s,
    )


def _enrolled(device: Enrolled) -> pb.Enrolled:
    return pb.Enrolled(
        device=device.name,
        enrolled_unix_s=device.enrolled_s,
        not_after_unix_s=device.not_after_s,
        revoked_unix_s=device.revoked_s,
    )
