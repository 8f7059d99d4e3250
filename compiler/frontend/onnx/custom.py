"""Nodes of operators that users registered with `te.register_onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx

from kedge.compiler.errors import FrontendError
from kedge.compiler.graph.builder import make_call
from kedge.compiler.graph.ir import Value
from kedge.compiler.ops.custom import OnnxOperator, with_gaps

if TYPE_CHECKING:
    from kedge.compiler.frontend.onnx.node import Node

_KINDS = onnx.AttributeProto
_ALLOWED = frozenset({_KINDS.INT, _KINDS.FLOAT, _KINDS.STRING, _KINDS.INTS, _KINDS.FLOATS, _KINDS.STRINGS})


def convert(node: Node, operator: OnnxOperator) -> tuple[Value, ...]:
    """The results of a node, as many as it names.

    Raises:
        FrontendError: an attribute that is no number or text, or fewer results than the node wants.
        ShapeError: the operator's function refuses the inputs or attributes.
    """
    try:
        attributes = attributes_of(node.proto)
    except FrontendError as error:
        raise node.error(error.message, hint=error.hint) from None
    count = len(node.proto.input)
    while count and not node.has(count - 1):
        count -= 1
    absent = tuple(index for index in range(count) if not node.has(index))
    inputs = [node.value(index) for index in range(count) if index not in absent]
    types, kinds = operator.infer(with_gaps([value.type for value in inputs], absent), attributes)
    wanted = [index for index in range(len(node.proto.output)) if node.wants(index)]
    if wanted and wanted[-1] >= len(types):
        raise node.error(f"wants {wanted[-1] + 1} results, but its function gives {len(types)}")
    attrs: dict[str, Any] = {"attributes": tuple(attributes.items())}
    if absent:
        attrs["absent"] = absent
    return tuple(
        make_call(operator.graph_op(kind), inputs, {**attrs, "result": index}, (node.label,))
        for index, kind in enumerate(kinds)
    )


def attributes_of(proto: onnx.NodeProto) -> Mapping[str, Any]:
    """The attributes of a node in plain types; sequences become tuples.

    Raises:
        FrontendError: an attribute holds a tensor, a graph, or another structure.
    """
    found: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.type not in _ALLOWED:
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type).lower()
            raise FrontendError(f"its attribute {attribute.name!r} is a {kind}", hint="make it an input of the node")
        found[attribute.name] = _plain(onnx.helper.get_attribute_value(attribute))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, (int, float, str)) else tuple(map(_plain, value))
