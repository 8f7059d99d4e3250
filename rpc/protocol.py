"""Which protocol this kedge speaks, and which peers it accepts."""

from __future__ import annotations

from importlib import metadata

from kedge.rpc.errors import ConnectError
from kedge.rpc.types import Protocol

#: Raised when a message changes its meaning; new optional fields do not raise it.
VERSION = 1

#: What a peer may rely on beyond the version.
CAPABILITIES = ("bench", "blobs", "run", "sessions")


class ProtocolError(ConnectError):
    """The peer speaks another protocol version, or sent a message that means nothing."""


def local_protocol() -> Protocol:
    """What this end speaks."""
    return Protocol(VERSION, CAPABILITIES, software())


def software() -> str:
    """This program's name and, where it was installed as a package, its version."""
    try:
        return f"kedge {metadata.version('kedge')}"
    except metadata.PackageNotFoundError:
        return "kedge"


def accepts(peer_version: int) -> bool:
    """True for this version, the one before it and the one after it."""
    return peer_version >= 1 and abs(peer_version - VERSION) <= 1


def check_peer(peer: Protocol, who: str) -> None:
    """Raise ProtocolError unless `peer` can be talked to; `who` names it ("the tracker at host:9190")."""
    if accepts(peer.version):
        return
    older = peer.version < VERSION
    raise ProtocolError(
        f"{who} speaks protocol {peer.version} ({peer.software or 'unnamed software'}); here it is {VERSION}",
        hint=f"update {who if older else 'kedge here'}: versions may differ by one",
    )
