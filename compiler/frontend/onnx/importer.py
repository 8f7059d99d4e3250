"""From an ONNX graph to a kedge function: nodes in order, each turned into graph operators by its converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from kedge.compiler.errors import FrontendError, ShapeError
from kedge.compiler.frontend.onnx.coverage import OperatorUse, decomposes, unsupported_error
from kedge.compiler.frontend.onnx.fold import fold
from kedge.compiler.frontend.onnx.functions import body_of
from kedge.compiler.frontend.onnx.inputs import ShapeSpec, Symbols, declare_inputs
from kedge.compiler.frontend.onnx.model import Model, check, dtype_name, tensor_data
from kedge.compiler.frontend.onnx.node import Array, Entry, Node, Scope, as_data, find_converter
from kedge.compiler.frontend.onnx.symbolic import Dims
from kedge.compiler.graph.builder import Builder, call
from kedge.compiler.graph.ir import Call, Constant, Item, Module, Param, TensorType, Value

#: Integer weights up to this size are read as shape arithmetic where an operator wants to know their values.
_SMALL = 4096


class PoisonedError(Exception):
    """An operand comes from a node that was refused, which is on record: skip its users, and go on."""


@dataclass(slots=True)
class Importer:
    """The state of one import: parameters and their data, symbols by name, and what turned out to be unsupported."""

    model: Model
    builder: Builder = field(default_factory=lambda: Builder("main"))
    params: dict[str, Array] = field(default_factory=dict)
    symbols: Symbols = field(default_factory=Symbols)
    unsupported: list[OperatorUse] = field(default_factory=list)
    errors: list[FrontendError] = field(default_factory=list)

    def run(self, shapes: Mapping[str, ShapeSpec]) -> Module:
        """The model as a module with one function, "main".

        Raises:
            UnsupportedOperatorError: naming every operator of the model that cannot be imported. It goes before any
                other error of a node.
        """
        graph = self.model.proto.graph
        scope = Scope({}, self.model.opset)
        for name, type_ in declare_inputs(self.model, shapes, self.symbols).items():
            scope.entries[name] = self.builder.input(name, type_)
        check(self.model)
        self._declare_initializers(graph, scope)
        self.run_nodes(graph.node, scope)
        if self.unsupported:
            raise unsupported_error(self.model.source, self.unsupported)
        if self.errors:
            raise self.errors[0]
        outputs: dict[str, Value] = {}
        for info in graph.output:
            value = self._output(scope, info.name)
            computed = isinstance(value, (Call, Item)) and all(value is not other for other in outputs.values())
            # Every output has a buffer of its own that something has to write.
            outputs[info.name] = value if computed else call("identity", value, origin=(info.name,))
        main = self.builder.finish(outputs)
        used = {value.name for value in main.values() if isinstance(value, Param)}
        return Module({main.name: main}, {name: data for name, data in self.params.items() if name in used})

    def run_nodes(self, nodes: Sequence[onnx.NodeProto], scope: Scope) -> None:
        """Import nodes in order; their results become names in `scope`."""
        for proto in nodes:
            try:
                results = self._run_node(proto, scope)
            except PoisonedError:
                continue
            except FrontendError as error:
                self.errors.append(error)
                continue
            for name, entry in zip(proto.output, results, strict=False):
                if name and entry is not None:
                    scope.entries[name] = entry

    def run_body(self, graph: onnx.GraphProto, outer: Scope) -> tuple[Entry | None, ...]:
        """The results of a body of control flow, which sees the names around it."""
        scope = Scope(dict(outer.entries), outer.opset, outer.caller)
        self._declare_initializers(graph, scope)
        self.run_nodes(graph.node, scope)
        return self._results(scope, [info.name for info in graph.output])

    def lookup(self, scope: Scope, name: str, node: Node) -> Entry | None:
        """What `name` stands for; None for an optional input that is left out."""
        if not name:
            return None
        if name not in scope.entries:
            if self.unsupported or self.errors:
                raise PoisonedError
            raise node.error(f"reads {name!r}, which nothing before it computes", hint="the model is corrupt")
        return scope.entries[name]

    def content(self, entry: Entry | None) -> Array | None:
        """The elements of `entry` where they are known: those of constants, folded shapes and small integer weights."""
        if isinstance(entry, Dims):
            return entry.items
        if isinstance(entry, Constant):
            return entry.data
        if isinstance(entry, Param):
            data = self.params[entry.name]
            if data.dtype.kind in "iub" and data.size <= _SMALL:
                return data
        return None

    def _run_node(self, proto: onnx.NodeProto, scope: Scope) -> Sequence[Entry | None]:
        node = Node(self, proto, scope, _attributes(proto))
        try:
            for name in proto.input:
                self.lookup(scope, name, node)
        except PoisonedError:
            if find_converter(proto.domain, proto.op_type) is None and not decomposes(proto, node.opset):
                self._refuse(node)
            raise
        folded = fold(node)
        if folded is not None:
            return folded
        convert = find_converter(proto.domain, proto.op_type)
        if convert is not None:
            try:
                results = convert(node)
            except ShapeError as error:
                # The node is named already; the graph operator that refuses may be one of several that stand for it.
                _, named, reason = error.message.partition(f" (node {node.label}): ")
                raise node.error(reason if named else error.message, hint=error.hint) from error
            except (ValueError, IndexError, ArithmeticError) as error:
                # A malformed node may fail in as many ways as Python has; whichever it is, the user looks for the node.
                raise node.error(f"its inputs and attributes do not fit together: {error}") from error
            return results if isinstance(results, tuple) else (results,)
        return self._run_function(node)

    def _run_function(self, node: Node) -> Sequence[Entry | None]:
        """An operator that ONNX defines by simpler ones: import those."""
        proto = node.proto
        body = body_of(proto, node.opset, [node.type_proto(index) for index in range(len(proto.input))])
        if body is None:
            self._refuse(node)
            raise PoisonedError
        entries = {
            formal: self.lookup(node.scope, proto.input[index], node) if index < len(proto.input) else None
            for index, formal in enumerate(body.inputs)
        }
        scope = Scope(entries, body.opset, caller=node.scope.caller or proto)
        self.run_nodes(body.nodes, scope)
        wanted = [name if asked else "" for name, asked in zip(body.outputs, proto.output, strict=False)]
        return self._results(scope, wanted)

    def _refuse(self, node: Node) -> None:
        """Put the operator on the list; inside of a function body that is the function itself."""
        blamed = node.scope.caller or node.proto
        opset = self.model.opsets.get(blamed.domain, self.model.opset)
        self.unsupported.append(OperatorUse(blamed.domain, blamed.op_type, opset, (node.label,), False))

    def _results(self, scope: Scope, names: Sequence[str]) -> tuple[Entry | None, ...]:
        """What `names` stand for; None for a result that nobody asks for, whose name is empty."""
        missing = [name for name in names if name and name not in scope.entries]
        if missing and (self.unsupported or self.errors):
            raise PoisonedError
        if missing:
            raise FrontendError(f"{self.model.source}: nothing computes {missing[0]!r}", hint="the model is corrupt")
        return tuple(scope.entries[name] if name else None for name in names)

    def _declare_initializers(self, graph: onnx.GraphProto, scope: Scope) -> None:
        if graph.sparse_initializer:
            raise FrontendError(
                f"{self.model.source}: initializer {graph.sparse_initializer[0].values.name!r} is sparse",
                hint="export the model with dense weights",
            )
        for tensor in graph.initializer:
            dtype_name(self.model, tensor.data_type, f"initializer {tensor.name!r}")
            data = tensor_data(self.model, tensor)
            name, count = tensor.name, 1
            while name in self.params:  # a body of control flow may use a name again
                count += 1
                name = f"{tensor.name}_{count}"
            self.params[name] = data
            type_ = TensorType(tuple(data.shape), str(data.dtype))
            scope.entries[tensor.name] = self.builder.param(name, type_)

    def _output(self, scope: Scope, name: str) -> Value:
        entry = self._results(scope, [name])[0]
        assert entry is not None  # outputs have names
        return as_data(entry, name) if isinstance(entry, Dims) else entry


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        attributes[attribute.name] = value
    return attributes
