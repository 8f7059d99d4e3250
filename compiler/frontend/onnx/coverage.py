"""Which operators a model uses and whether kedge has them: known before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx

from kedge.compiler.errors import UnsupportedOperatorError
from kedge.compiler.frontend.onnx.functions import body_of
from kedge.compiler.frontend.onnx.model import Model, all_nodes, dtype_name, element_type_label
from kedge.compiler.frontend.onnx.node import find_converter, label_of

_SHOWN_NODES = 8


@dataclass(frozen=True, slots=True)
class OperatorUse:
    """One operator of a model: its domain ("" is ONNX's own), version, and the nodes that use it."""

    domain: str
    op: str
    opset: int
    nodes: tuple[str, ...]
    supported: bool

    @property
    def title(self) -> str:
        """The operator with its domain, as in `com.microsoft.FusedConv`."""
        return f"{self.domain or 'ai.onnx'}.{self.op}"


@dataclass(frozen=True, slots=True)
class Coverage:
    """What `kedge inspect` says of an ONNX file. Sizes are in bytes; shapes name their symbolic dims."""

    source: str
    producer: str
    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]  # name, dtype, shape
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    parameters: int  # elements
    parameter_bytes: int
    operators: tuple[OperatorUse, ...]

    @property
    def unsupported(self) -> tuple[OperatorUse, ...]:
        """The operators that kedge does not know."""
        return tuple(use for use in self.operators if not use.supported)

    @property
    def supported(self) -> bool:
        """Whether every operator of the model is known."""
        return not self.unsupported

    def __str__(self) -> str:
        opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in self.opsets)
        ports = [("input", *port) for port in self.inputs] + [("output", *port) for port in self.outputs]
        width = max((len(use.title) for use in self.operators), default=0)
        lines = [
            f"{self.source}: ONNX IR {self.ir_version}, opset {opsets}, from {self.producer or 'an unknown producer'}",
            *(f"{kind:<8}{name}: {dtype}[{', '.join(map(str, shape))}]" for kind, name, dtype, shape in ports),
            f"weights {self.parameters:,} elements, {self.parameter_bytes:,} bytes",
            *(f"  {use.title:<{width}}  {len(use.nodes):>5}  {_verdict(use)}" for use in self.operators),
            "every operator is supported" if self.supported else f"{len(self.unsupported)} operators are not supported",
        ]
        return "\n".join(lines)


def _verdict(use: OperatorUse) -> str:
    return "yes" if use.supported else f"NO  ({_shown(use.nodes)})"


def survey(model: Model) -> Coverage:
    """What `model` is made of. Reads no weights, and needs no shapes.

    An operator counts as supported if kedge has a converter for it, if it is registered by `te.register_onnx`, if ONNX
    defines it by operators that kedge has, or if it only works on constants, so that importing folds it away.
    """
    graph = model.proto.graph
    bound = {tensor.name for tensor in graph.initializer}
    sizes = [_elements(tensor) for tensor in graph.initializer]
    return Coverage(
        source=model.source,
        producer=" ".join(filter(None, (model.proto.producer_name, model.proto.producer_version))),
        ir_version=model.proto.ir_version,
        opsets=tuple(sorted(model.opsets.items())),
        inputs=tuple(_port(info) for info in graph.input if info.name not in bound),
        outputs=tuple(_port(info) for info in graph.output),
        parameters=sum(sizes),
        parameter_bytes=sum(
            size * _item_bytes(model, tensor) for size, tensor in zip(sizes, graph.initializer, strict=True)
        ),
        operators=merge(_uses(model)),
    )


def _uses(model: Model) -> Iterable[OperatorUse]:
    known = {tensor.name for tensor in model.proto.graph.initializer}
    for node in all_nodes(model):
        domain = "" if node.domain == "ai.onnx" else node.domain
        constant = bool(node.input) and all(name in known or not name for name in node.input)
        if node.op_type == "Constant" or constant:
            known.update(node.output)
        own = domain == ""
        supported = find_converter(domain, node.op_type) is not None or (
            own and (constant or decomposes(node, model.opset))
        )
        yield OperatorUse(domain, node.op_type, model.opsets.get(domain, model.opset), (label_of(node),), supported)


def decomposes(node: onnx.NodeProto, opset: int) -> bool:
    """Whether ONNX defines the operator by others that all have converters."""
    image = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None] * 4)
    body = body_of(node, opset, [image if name else onnx.TypeProto() for name in node.input])
    return body is not None and all(
        find_converter(inner.domain, inner.op_type) is not None or decomposes(inner, body.opset) for inner in body.nodes
    )


def _port(info: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        return info.name, kind or "unknown", ()
    tensor = info.type.tensor_type
    dtype = element_type_label(tensor.elem_type).lower()
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return info.name, {"float": "float32", "double": "float64"}.get(dtype, dtype), dims


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def _item_bytes(model: Model, tensor: onnx.TensorProto) -> int:
    return np.dtype(dtype_name(model, tensor.data_type, f"initializer {tensor.name!r}")).itemsize


def merge(uses: Iterable[OperatorUse]) -> tuple[OperatorUse, ...]:
    """One entry for each operator, sorted by domain and name, with all its nodes."""
    found: dict[tuple[str, str, int, bool], list[str]] = {}
    for use in uses:
        found.setdefault((use.domain, use.op, use.opset, use.supported), []).extend(use.nodes)
    return tuple(
        OperatorUse(domain, op, opset, tuple(dict.fromkeys(nodes)), supported)
        for (domain, op, opset, supported), nodes in sorted(found.items())
    )


def unsupported_error(source: str, uses: Iterable[OperatorUse]) -> UnsupportedOperatorError:
    """The error that names every operator in `uses` with its nodes."""
    merged = merge(uses)
    listing = "".join(f"\n  {use.title} (opset {use.opset}): {_shown(use.nodes)}" for use in merged)
    count = f"{len(merged)} operator{'s' if len(merged) > 1 else ''}"
    own = any(use.domain for use in merged)
    return UnsupportedOperatorError(
        f"{source} uses {count} that kedge does not support:{listing}",
        hint=f"kedge inspect {source} lists all operators of the model; replace these where you export it"
        + (", or define those of other domains with kedge.te.register_onnx" if own else ""),
    )


def _shown(nodes: tuple[str, ...]) -> str:
    """All node names where they are few, else the first ones and how many more."""
    shown = ", ".join(nodes[:_SHOWN_NODES])
    return shown if len(nodes) <= _SHOWN_NODES else f"{shown} and {len(nodes) - _SHOWN_NODES} more"
