"""Operators that ONNX itself defines by simpler ones (HardSwish, Gelu, LayerNormalization, …): their bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx.defs import OpSchema


@dataclass(frozen=True, slots=True)
class Body:
    """A function body with the attributes of its call filled in."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]
    opset: int


def body_of(proto: onnx.NodeProto, opset: int, types: Sequence[onnx.TypeProto]) -> Body | None:
    """The definition of a node's operator in simpler operators, or None where ONNX has none for this node.

    Args:
        proto: the node that calls the operator.
        opset: the version of the default domain that it is written against.
        types: the type of each input, an empty one where an optional input is left out.
    """
    schema = schema_of(proto.op_type, opset) if proto.domain in ("", "ai.onnx") else None
    if schema is None:
        return None
    serialized = b""
    if schema.has_function:
        version = _newest(schema.function_opset_versions, opset)
        if version is not None:
            serialized = schema.get_function_with_opset_version(version)
    elif schema.has_context_dependent_function:
        version = _newest(schema.context_dependent_function_opset_versions, opset)
        if version is not None:
            serialized = schema.get_context_dependent_function_with_opset_version(
                version, proto.SerializeToString(), [type_.SerializeToString() for type_ in types]
            )
    if not serialized:
        return None
    function = onnx.FunctionProto.FromString(serialized)
    version = next((entry.version for entry in function.opset_import if entry.domain == ""), opset)
    nodes = tuple(_filled(inner, proto, function, schema) for inner in function.node)
    return Body(tuple(function.input), tuple(function.output), nodes, version)


def schema_of(op: str, opset: int) -> OpSchema | None:
    """ONNX's declaration of an operator of the default domain."""
    try:
        return onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None


def _newest(versions: Sequence[int], opset: int) -> int | None:
    return max((version for version in versions if version <= opset), default=None)


def _filled(
    inner: onnx.NodeProto, call: onnx.NodeProto, function: onnx.FunctionProto, schema: OpSchema
) -> onnx.NodeProto:
    """`inner` with its references to attributes of the function replaced by those of the call, or the defaults."""
    given = {attribute.name: attribute for attribute in function.attribute_proto}
    given |= {name: entry.default_value for name, entry in schema.attributes.items() if entry.default_value.name}
    given |= {attribute.name: attribute for attribute in call.attribute}
    filled = onnx.NodeProto()
    filled.CopyFrom(inner)
    del filled.attribute[:]
    for attribute in inner.attribute:
        if not attribute.ref_attr_name:
            filled.attribute.append(attribute)
        elif attribute.ref_attr_name in given:
            value = onnx.AttributeProto()
            value.CopyFrom(given[attribute.ref_attr_name])
            value.name = attribute.name
            filled.attribute.append(value)
    return filled
