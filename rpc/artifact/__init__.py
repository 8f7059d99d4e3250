"""The .kdg artifact: manifest, members, digests. Standard library only."""

from kedge.rpc.artifact.manifest import Blob, Function, Manifest, Member, Port, Symbol, Variant, VariantDevice
from kedge.rpc.artifact.package import Artifact, Bytes, make_member, sha256
from kedge.rpc.artifact.place import Found, Need, Placement, look_at, needs_of, place

__all__ = [
    "Artifact",
    "Blob",
    "Bytes",
    "Found",
    "Function",
    "Manifest",
    "Member",
    "Need",
    "Placement",
    "Port",
    "Symbol",
    "Variant",
    "VariantDevice",
    "look_at",
    "make_member",
    "needs_of",
    "place",
    "sha256",
]
