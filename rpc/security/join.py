"""The join string: all that a device or a user needs to reach a tracker and to know that it is the right one.

    kedge1.<base64url of: kind, port, host, token, the CA's certificate (DER), 4 bytes of SHA-256>

The certificate travels inside, so nothing has to be trusted on first use; the check at the end finds a string that was
not copied whole. Whoever has the string has the token in it: treat it as a password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from dataclasses import dataclass

from kedge.rpc.errors import UsageError
from kedge.rpc.transport import Address

DEVICE = "device"
USER = "user"
TRACKER = "tracker"
_KINDS = (DEVICE, USER, TRACKER)
_PREFIX = "kedge1."
_CHECK_BYTES = 4
_HEAD = struct.Struct(">BHBB")
_PEM_HEAD, _PEM_TAIL = "-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n"


@dataclass(frozen=True)
class Join:
    """`kind` says who is to use it: DEVICE (an agent, once), USER (a client) or TRACKER (one more tracker, once).

    `ca` is the CA's certificate in PEM.
    """

    kind: str
    address: Address
    token: str
    ca: bytes

    def __str__(self) -> str:
        host, token = self.address.host.encode(), self.token.encode()
        head = _HEAD.pack(_KINDS.index(self.kind), self.address.port, len(host), len(token))
        body = head + host + token + pem_to_der(self.ca)
        check = hashlib.sha256(body).digest()[:_CHECK_BYTES]
        return _PREFIX + base64.urlsafe_b64encode(body + check).decode().rstrip("=")

    def __repr__(self) -> str:
        return f"<Join {self.kind} {self.address}>"


def parse_join(text: str) -> Join:
    """Read a join string; raises UsageError saying what is wrong with it, without repeating it."""
    stripped = "".join(text.split())
    if not stripped.startswith(_PREFIX):
        raise UsageError(f"a join string begins with {_PREFIX!r}", hint="copy all that the tracker printed, in quotes")
    damaged = UsageError("the join string was not copied whole", hint="copy all that the tracker printed, in quotes")
    encoded = stripped[len(_PREFIX) :]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", encoded):
        raise damaged
    try:
        data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error as error:
        raise damaged from error
    body, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if len(body) <= _HEAD.size or hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
        raise damaged
    kind, port, host_bytes, token_bytes = _HEAD.unpack_from(body)
    ends = _HEAD.size + host_bytes + token_bytes
    if kind >= len(_KINDS) or ends >= len(body):
        raise UsageError("the join string is of a newer kedge", hint="update kedge here")
    host = body[_HEAD.size : _HEAD.size + host_bytes].decode(errors="replace")
    token = body[_HEAD.size + host_bytes : ends].decode(errors="replace")
    return Join(_KINDS[kind], Address(host, port), token, der_to_pem(body[ends:]))


def pem_to_der(pem: bytes) -> bytes:
    """The bytes of one certificate."""
    lines = pem.decode("ascii").split(_PEM_HEAD, 1)[1].split("-----END", 1)[0]
    return base64.b64decode(lines)


def der_to_pem(der: bytes) -> bytes:
    """One certificate as text."""
    text = base64.b64encode(der).decode()
    lines = "".join(f"{text[start : start + 64]}\n" for start in range(0, len(text), 64))
    return (_PEM_HEAD + lines + _PEM_TAIL).encode()
