"""Converters of constants, and of control flow that is decided while compiling."""

from __future__ import annotations

import numpy as np
import onnx

from kedge.compiler.frontend.onnx.model import dtype_name, tensor_data
from kedge.compiler.frontend.onnx.node import Entry, Node, converter
from kedge.compiler.graph.ir import Constant, Value

_CONSTANTS = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}


@converter("Constant")
def _constant(node: Node) -> Value:
    tensor = node.attr("value")
    if tensor is not None:
        return _from_tensor(node, tensor)
    for name, dtype in _CONSTANTS.items():
        value = node.attr(name)
        if value is not None:
            return node.constant(value, dtype)
    kind = next(iter(node.attributes), "no value")
    raise node.error(f"it holds {kind}", hint="kedge reads dense numeric constants")


def _from_tensor(node: Node, tensor: onnx.TensorProto) -> Constant:
    dtype_name(node.importer.model, tensor.data_type, f"the constant {node.label!r}")
    data = np.array(tensor_data(node.importer.model, tensor))
    data.flags.writeable = False
    return Constant(data, node.proto.output[0])


@converter("ConstantOfShape")
def _constant_of_shape(node: Node) -> Value:
    tensor = node.attr("value")
    value = node.constant(0, "float32") if tensor is None else _from_tensor(node, tensor)
    scalar = Constant(value.data.reshape(()))
    return node.emit("broadcast_to", scalar, shape=node.dims(0, "shape"))


@converter("Identity")
def _identity(node: Node) -> Entry | None:
    return node.entry(0)


@converter("If")
def _if(node: Node) -> tuple[Entry | None, ...]:
    """A condition that is known while compiling picks its branch."""
    condition = node.const(0, "condition")
    branch = node.attr("then_branch" if bool(condition.reshape(())) else "else_branch")
    return node.importer.run_body(branch, node.scope)
