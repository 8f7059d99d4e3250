"""Putting compiled code and weights together as an `Artifact`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedge.compiler.codegen.entry import ABI_VERSION
from kedge.compiler.lower.program import Entry, Port
from kedge.compiler.package.weights import Weights
from kedge.compiler.target.model import Target
from kedge.compiler.target.parse import AnyTarget
from kedge.compiler.tir.expr import Dim
from kedge.compiler.tir.printer import print_expr
from kedge.rpc.artifact import Artifact, Bytes, Function, Manifest, Symbol, Variant, VariantDevice, make_member
from kedge.rpc.artifact import Port as ManifestPort


@dataclass(frozen=True, slots=True)
class CompiledVariant:
    """The code for one target: a shared object, its weights, and the entries it exports, in ABI order.

    `features` are what its kernels ask of a GPU beyond its generation: "fp16", "fp64", an OpenCL extension.
    """

    target: AnyTarget
    lib: bytes
    weights: Weights
    entries: tuple[Entry, ...]
    features: tuple[str, ...] = ()


def package(name: str, compiler: str, variants: Sequence[CompiledVariant], info: Mapping[str, Any]) -> Artifact:
    """The artifact of compiled variants of one model; equal weights are stored once."""
    members: dict[str, Bytes] = {}
    cuts: dict[str, tuple[int, ...]] = {}
    described: list[Variant] = []
    for number, variant in enumerate(variants):
        lib = "lib.so" if len(variants) == 1 else f"lib.{number}.so"
        members[lib] = variant.lib
        weights = _weights_member(variant.weights, members, cuts)
        offset = variant.weights.data_offset if weights is not None else 0
        target, host = variant.target, variant.target.host
        described.append(
            Variant(
                str(target), host.arch.name, host.triple, host.required_features, lib, weights, offset, _device(variant)
            )
        )
    functions = tuple(_function(entry) for entry in variants[0].entries)
    listed = tuple(make_member(member, data, cuts.get(member, ())) for member, data in members.items())
    manifest = Manifest(name, ABI_VERSION, compiler, functions, tuple(described), listed, dict(info))
    return Artifact(manifest, members)


def _device(variant: CompiledVariant) -> VariantDevice | None:
    """What the variant's kernels need of a GPU; None for those of a CPU."""
    target = variant.target
    if isinstance(target, Target):
        return None
    features = tuple(sorted(variant.features))
    return VariantDevice(target.kind, target.arch_name, target.max_threads, target.shared_bytes, features)


def _weights_member(weights: Weights, members: dict[str, Bytes], cuts: dict[str, tuple[int, ...]]) -> str | None:
    """The name of the member that holds `weights`, added unless another variant has the same."""
    if not weights.places:
        return None
    for name in cuts:
        if members[name] == weights.data:
            return name
    name = "weights.safetensors" if not cuts else f"weights.{len(cuts)}.safetensors"
    members[name] = weights.data
    cuts[name] = weights.cuts
    return name


def _function(entry: Entry) -> Function:
    symbols = tuple(Symbol(var.name, least, var.upper) for var, least in entry.least().items())
    return Function(
        entry.name, tuple(map(_port, entry.inputs)), tuple(map(_port, entry.outputs)), symbols
    )  # fmt: skip


def _port(port: Port) -> ManifestPort:
    return ManifestPort(port.name, port.type.dtype, tuple(_dim(dim) for dim in port.type.shape))


def _dim(dim: Dim) -> int | str:
    return dim if isinstance(dim, int) else print_expr(dim)
