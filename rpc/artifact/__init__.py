"""The .kdg artifact: manifest, members, digests. Standard library only."""

from kedge.rpc.artifact.manifest import Blob, Function, Manifest, Member, Port, Symbol, Variant
from kedge.rpc.artifact.package import Artifact, make_member, select_variant, sha256

__all__ = [
    "Artifact",
    "Blob",
    "Function",
    "Manifest",
    "Member",
    "Port",
    "Symbol",
    "Variant",
    "make_member",
    "select_variant",
    "sha256",
]
