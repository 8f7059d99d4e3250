"""Tokens: 256 random bits that are told once and kept as their SHA-256, each with a user, a role and an end.

What is random and long needs no slow hash: nobody can try 2^256 of them. Looking one up by its hash leaks no time.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from kedge.rpc.errors import AuthenticationError, LimitError, UsageError
from kedge.rpc.names import check_name
from kedge.rpc.security.files import SecretFileError
from kedge.rpc.status import UnknownTokenError
from kedge.rpc.tracker.security.principal import Role, check_user
from kedge.rpc.tracker.security.storage import Storage

PREFIX = "kdg_"
_DAY_S = 86_400
#: How long a token lasts unless said otherwise.
LIFETIMES_S = {
    Role.ADMIN: 365 * _DAY_S,
    Role.SUBMIT: 90 * _DAY_S,
    Role.READ: 90 * _DAY_S,
    Role.ENROL: 3_600,
    Role.TRACKER: 3_600,
}
#: Roles whose tokens are spent when they are used.
ONE_TIME = (Role.ENROL, Role.TRACKER)
_MAX_LIFETIME_S = 3_660 * _DAY_S
#: What is over is listed for so long, and then forgotten.
_REMEMBERED_S = 30 * _DAY_S
_MAX_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token. Times are Unix seconds; 0 means never (`expires_s`) or not (the others)."""

    id: str
    user: str
    role: Role
    device: str
    created_s: int
    expires_s: int
    revoked_s: int = 0
    used_s: int = 0

    def end_s(self) -> int:
        """When it ended or will end; 0: never."""
        ends = [moment for moment in (self.expires_s, self.revoked_s, self.used_s) if moment]
        return min(ends, default=0)


class Tokens:
    """The tokens that `storage` keeps, written whole at every change."""

    def __init__(self, storage: Storage, now_s: Callable[[], float]) -> None:
        self._storage = storage
        self._now_s = now_s
        self._by_hash: dict[str, Token] = {}
        try:
            for item in json.loads(storage.read()):
                digest = item.pop("hash")
                self._by_hash[digest] = Token(**{**item, "role": Role(item["role"])})
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SecretFileError(f"{storage.name} is damaged: {error!r}", hint="restore it from a backup") from error

    def create(self, user: str, role: Role, *, device: str = "", lifetime_s: int | None = None) -> tuple[Token, str]:
        """A new token and its secret; `lifetime_s` None means as long as is usual for the role, 0 for ever.

        Raises:
            UsageError: a user, role, device or time that no token can have.
        """
        if role not in LIFETIMES_S:
            raise UsageError(f"{role}s have certificates, no tokens", hint="--role enrol enrols a device")
        if device:
            check_name(device)
            if role is not Role.ENROL:
                raise UsageError("only a token that enrols is for a device", hint="add --role enrol")
        lifetime = LIFETIMES_S[role] if lifetime_s is None else lifetime_s
        if not 0 <= lifetime <= _MAX_LIFETIME_S or (role in ONE_TIME and not lifetime):
            raise UsageError(f"no token lasts {lifetime} s", hint="at most ten years, e.g. --expires 30d")
        self._forget()
        if len(self._by_hash) >= _MAX_TOKENS:
            raise LimitError(f"there are {_MAX_TOKENS} tokens already", hint="revoke some; they go 30 days later")
        now = int(self._now_s())
        secret = PREFIX + secrets.token_urlsafe(32)
        token = Token(secrets.token_hex(5), check_user(user), role, device, now, now + lifetime if lifetime else 0)
        self._by_hash[_hash(secret)] = token
        try:
            self._save()
        except BaseException:
            del self._by_hash[_hash(secret)]
            raise
        return token, secret

    def check(self, secret: str) -> Token:
        """The token that this is; raises AuthenticationError saying why it is none, any more."""
        token = self._by_hash.get(_hash(secret))
        if token is None:
            raise AuthenticationError("the tracker does not know this token", hint=_HINT)
        if token.revoked_s:
            raise AuthenticationError(f"the token {token.id} of {token.user!r} was revoked", hint=_another(token))
        if token.used_s:
            raise _spent(token)
        if token.expires_s and self._now_s() >= token.expires_s:
            raise AuthenticationError(
                f"the token {token.id} of {token.user!r} has expired (by the tracker's clock)", hint=_another(token)
            )
        return token

    def get(self, token_id: str) -> Token:
        """What is known of a token; raises UnknownTokenError."""
        return self._find(token_id)[1]

    def spend(self, token_id: str) -> Token:
        """Use a one-time token; raises AuthenticationError where somebody was faster."""
        digest, token = self._find(token_id)
        if token.used_s:
            raise _spent(token)
        return self._put(digest, replace(token, used_s=int(self._now_s())))

    def revoke(self, token_id: str) -> Token:
        """Refuse a token from now on; raises UnknownTokenError."""
        digest, token = self._find(token_id)
        return token if token.revoked_s else self._put(digest, replace(token, revoked_s=int(self._now_s())))

    def all(self) -> list[Token]:
        """Every token that is remembered, oldest first."""
        return sorted(self._by_hash.values(), key=lambda token: (token.created_s, token.id))

    def _find(self, token_id: str) -> tuple[str, Token]:
        for digest, token in list(self._by_hash.items()):
            if token.id == token_id:
                return digest, token
        raise UnknownTokenError(f"there is no token {token_id[:40]!r}", hint="'kedge tracker token list' shows them")

    def _put(self, digest: str, token: Token) -> Token:
        before = self._by_hash[digest]
        self._by_hash[digest] = token
        try:
            self._save()
        except BaseException:
            self._by_hash[digest] = before
            raise
        return token

    def _forget(self) -> None:
        oldest = self._now_s() - _REMEMBERED_S
        over = [digest for digest, token in self._by_hash.items() if token.end_s() and token.end_s() < oldest]
        for digest in over:
            del self._by_hash[digest]

    def _save(self) -> None:
        items: list[dict[str, Any]] = [
            {"hash": digest, **asdict(token), "role": token.role.value} for digest, token in list(self._by_hash.items())
        ]
        self._storage.write(json.dumps(items, indent=1).encode())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


_HINT = "an administrator makes another: kedge tracker token create; here: kedge join '…' (an agent: --join '…')"
#: What takes the join string of a role; all others are users'.
_JOINED_BY = {Role.ENROL: "kedge agent start --join '…'", Role.TRACKER: "kedge tracker start --database URL --join '…'"}


def _another(token: Token) -> str:
    """How whoever has a token that is over comes by one that is good."""
    make, use = f"kedge tracker token create --role {token.role.value}", _JOINED_BY.get(token.role, "kedge join '…'")
    return f"an administrator makes another: {make}; here: {use}"


def _spent(token: Token) -> AuthenticationError:
    return AuthenticationError(f"the token {token.id} was for one enrolment, and is spent", hint=_another(token))
