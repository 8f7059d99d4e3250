"""Ed25519 signatures of artifacts: over the manifest, which carries the digest of every byte.

A signature says that the holder of a key vouches for the code and the weights; it says nothing of a job's inputs.
`cryptography` is needed to sign and to verify. Where it is missing, a signature that has to be verified is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, FrozenSet, Iterable, Optional

from kedge.rpc.errors import ArtifactError, KedgeError, UsageError
from kedge.rpc.security.files import make_private_folder, read_private, write_private
from kedge.rpc.types import Signature

#: What is signed begins with this, so that the key's signatures mean nothing elsewhere.
_CONTEXT = b"kedge artifact manifest v1\0"
_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = "signing.key"


class SigningUnavailableError(KedgeError):
    """`cryptography` is not installed, and nothing can be signed or verified without it."""


class SignatureError(ArtifactError):
    """An artifact that nobody signed whom this device knows."""


def own_key(folder: Path, *, make: bool = False) -> Optional[bytes]:
    """The private key (32 bytes) kept in `folder`; with `make` it is made where there is none, else None."""
    try:
        return bytes.fromhex(read_private(folder / _FILE).decode().strip())
    except FileNotFoundError:
        if not make:
            return None
    except ValueError as error:
        raise UsageError(
            f"{folder / _FILE} is no signing key", hint="remove it, and 'kedge join' makes another"
        ) from error
    key: bytes = _ed25519().Ed25519PrivateKey.generate().private_bytes_raw()
    make_private_folder(folder)
    write_private(folder / _FILE, f"{key.hex()}\n".encode())
    return key


def public_key(key: bytes) -> bytes:
    """The public key (32 bytes) of a private one."""
    found: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
    return found


def sign(key: bytes, manifest: bytes) -> Signature:
    """Vouch for the artifact whose manifest has these bytes."""
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(key)
    return Signature(private.public_key().public_bytes_raw(), private.sign(_CONTEXT + manifest))


def verify(manifest: bytes, signature: Optional[Signature], signers: FrozenSet[bytes]) -> None:
    """Raise SignatureError unless one of `signers` (public keys) signed these bytes."""
    if signature is None:
        raise SignatureError(
            "the artifact is not signed, and this device runs only what known signers sign", hint=_HINT
        )
    if signature.public_key not in signers:
        raise SignatureError(
            f"the artifact is signed by {signature.public_key.hex()[:80]}, whom this device does not know", hint=_HINT
        )
    module = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        module.Ed25519PublicKey.from_public_bytes(signature.public_key).verify(signature.signature, _CONTEXT + manifest)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("the artifact's signature is not that of its manifest", hint=_HINT) from error


def parse_signers(texts: Iterable[str]) -> FrozenSet[bytes]:
    """Public keys in hexadecimal, as `kedge signer` prints them; raises UsageError."""
    keys = set()
    for text in texts:
        if not _KEY.fullmatch(text.strip().lower()):
            raise UsageError(
                f"{text[:80]!r} is no signer's public key", hint="64 hexadecimal digits: 'kedge signer' prints yours"
            )
        keys.add(bytes.fromhex(text.strip()))
    return frozenset(keys)


def check_available() -> None:
    """Raise SigningUnavailableError where signatures cannot be verified."""
    _ed25519()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SigningUnavailableError(
            "signatures need the Python package 'cryptography', which is not installed here",
            hint="python3 -m pip install cryptography",
        ) from error
    return ed25519


_HINT = "submit it as a known signer, or start the agent with that signer's key too: --require-signer"
