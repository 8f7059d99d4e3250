"""What the converter of an operator sees of an ONNX node, and the table of converters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx import custom
from kedge.compiler.frontend.onnx.symbolic import Dims, Quotient, Ratio, parts
from kedge.compiler.graph.builder import agreeing, call, make_call
from kedge.compiler.graph.dims import format_dim, plain
from kedge.compiler.graph.ir import Constant, Item, Param, Value
from kedge.compiler.ops.custom import find
from kedge.compiler.tir.expr import Dim, Expr

if TYPE_CHECKING:
    from kedge.compiler.frontend.onnx.importer import Importer

Array: TypeAlias = np.ndarray[Any, Any]
#: What a name of the ONNX graph stands for: a graph value, or folded shape arithmetic.
Entry: TypeAlias = Value | Dims
Converter: TypeAlias = "Callable[[Node], Entry | tuple[Entry | None, ...] | None]"

_CONVERTERS: dict[tuple[str, str], Converter] = {}


def converter(*ops: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Declare the function that imports these operators."""

    def declare(function: Converter) -> Converter:
        for op in ops:
            if (domain, op) in _CONVERTERS:
                raise ValueError(f"two converters for {op}")
            _CONVERTERS[domain, op] = function
        return function

    return declare


def find_converter(domain: str, op: str) -> Converter | None:
    """The converter of an operator, where kedge has one or somebody registered it."""
    found = _CONVERTERS.get(("" if domain == "ai.onnx" else domain, op))
    operator = find(domain, op) if found is None else None
    return found if operator is None else functools.partial(custom.convert, operator=operator)


def converted_ops() -> tuple[str, ...]:
    """The operators of the default domain that have a converter, sorted."""
    return tuple(sorted(op for domain, op in _CONVERTERS if domain == ""))


@dataclass(slots=True)
class Scope:
    """The names that a graph, a body of control flow or a function body can see, and its opset version."""

    entries: dict[str, Entry | None]
    opset: int
    caller: onnx.NodeProto | None = None  # the model's own node, where this is the body of an ONNX function


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One ONNX node as its converter sees it: typed access to attributes and inputs, and a way to emit operators."""

    importer: Importer
    proto: onnx.NodeProto
    scope: Scope
    attributes: Mapping[str, Any]

    @property
    def label(self) -> str:
        """How messages call the node: its name, or that of its first output."""
        return label_of(self.scope.caller or self.proto)

    @property
    def opset(self) -> int:
        """The version of the default domain that the node is written against."""
        return self.scope.opset

    def error(self, message: str, hint: str | None = None) -> FrontendError:
        """An error that names the node."""
        op = (self.scope.caller or self.proto).op_type
        where = f"{self.importer.model.source}: node {self.label!r} ({op})"
        return FrontendError(f"{where}: {message}", hint=hint)

    def attr(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default` where the node does not have it."""
        return self.attributes.get(name, default)

    def has(self, index: int) -> bool:
        """Whether input `index` is given: optional inputs may be left out or have an empty name."""
        return index < len(self.proto.input) and self.entry(index) is not None

    def wants(self, index: int) -> bool:
        """Whether output `index` is asked for."""
        return index < len(self.proto.output) and self.proto.output[index] != ""

    def value(self, index: int) -> Value:
        """Input `index` as a graph value."""
        entry = self.entry(index)
        if entry is None:
            raise self.error(f"input {index} is missing")
        return as_data(entry, self.label) if isinstance(entry, Dims) else entry

    def values(self) -> tuple[Value, ...]:
        """All inputs."""
        return tuple(self.value(index) for index in range(len(self.proto.input)))

    def content(self, index: int) -> Array | None:
        """What input `index` holds, where that is known while compiling: numbers, or an object array of dims."""
        return None if not self.has(index) else self.importer.content(self.entry(index))

    def literal(self, index: int) -> Array | None:
        """Input `index` where it is a constant or an initializer of any size, else None."""
        entry = self.entry(index)
        if isinstance(entry, Param):
            return self.importer.params[entry.name]
        return entry.data if isinstance(entry, Constant) else None

    def const(self, index: int, what: str) -> Array:
        """Input `index`, which must be known while compiling; `what` names it in the message."""
        data = self.literal(index)
        if data is None:
            raise self.error(
                f"its {what} (input {index}, {self.proto.input[index]!r}) is computed while running",
                hint=f"kedge needs {what} as a constant or initializer; where it follows from the dims of the model's "
                "inputs, fix those: shapes={...} or --shape NAME=1,3,224,224; onnxsim may fold others",
            )
        return data

    def items(self, index: int, what: str) -> tuple[Any, ...]:
        """The elements of input `index`, which must be known: numbers, dims, and in floats fractions of dims."""
        content = self.content(index)
        if content is None:
            content = self.const(index, what)
        items = tuple(content.reshape(-1).astype(object))
        for item in items:
            if isinstance(item, Quotient):
                raise self.error(
                    f"its {what} (input {index}) is rounded: {format_dim(item.above)} / {format_dim(item.below)}",
                    hint="fix the dims with shapes={...} or --shape NAME=1,3,224,224",
                )
        return items

    def dims(self, index: int, what: str) -> tuple[Dim, ...]:
        """Input `index` as dims: known integers, or symbolic ones that come from the shapes of tensors."""
        items = self.items(index, what)
        for item in items:
            if isinstance(item, Ratio):
                raise self.error(
                    f"its {what} (input {index}) is a fraction: {format_dim(item.above)} / {item.below}",
                    hint="round it with Floor or Ceil, or fix the dims with shapes={...}",
                )
        return tuple(plain(item) for item in items)

    def ints(self, index: int, what: str) -> tuple[int, ...]:
        """Input `index` as integers that are all known."""
        dims = self.dims(index, what)
        if any(isinstance(dim, Expr) for dim in dims):
            raise self.error(f"its {what} (input {index}) depends on a free dim of the model's inputs")
        return tuple(int(dim) for dim in dims if isinstance(dim, int))

    def dtype(self, index: int) -> str:
        """The element type of input `index`."""
        entry = self.entry(index)
        if entry is None:
            raise self.error(f"input {index} is missing")
        return entry.dtype if isinstance(entry, Dims) else entry.type.dtype

    def shape(self, index: int) -> tuple[Dim, ...]:
        """The shape of input `index`."""
        entry = self.entry(index)
        if entry is None:
            raise self.error(f"input {index} is missing")
        return tuple(entry.items.shape) if isinstance(entry, Dims) else entry.type.shape

    def emit(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        """A graph operator with one result that stands for (a part of) this node."""
        return call(op, *inputs, origin=(self.label,), **attrs)

    def emit_all(self, op: str, *inputs: Value, **attrs: Any) -> tuple[Value, ...]:
        """A graph operator with several results."""
        source = make_call(op, agreeing(op, inputs, attrs, (self.label,)), attrs, origin=(self.label,))
        return tuple(Item(source, index) for index in range(len(source.types)))

    def type_proto(self, index: int) -> onnx.TypeProto:
        """The type of input `index` as ONNX writes it; an empty one where it is left out."""
        entry = self.entry(index)
        if entry is None:
            return onnx.TypeProto()
        dtype, shape = (
            (entry.dtype, entry.items.shape) if isinstance(entry, Dims) else (entry.type.dtype, entry.type.shape)
        )
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        dims = [dim if isinstance(dim, int) else None for dim in shape]
        return onnx.helper.make_tensor_type_proto(elem_type, dims)

    def constant(self, data: Any, dtype: str) -> Constant:
        """A literal array of `dtype`."""
        return Constant(np.asarray(data, dtype=np.dtype(dtype)))

    def entry(self, index: int) -> Entry | None:
        """What input `index` stands for; None where it is left out."""
        if index >= len(self.proto.input):
            return None
        return self.importer.lookup(self.scope, self.proto.input[index], self)


def as_data(dims: Dims, label: str) -> Value:
    """What was worked out from shapes as the tensor that it is for the model."""
    items = list(dims.items.reshape(-1))
    # Known floats are added as they are: their denominators may be no floats.
    floats = [item if isinstance(item, float) else 0.0 for item in items]
    fractions = [_fraction(item) for item in items]
    result = _tensor_of([above for above, _ in fractions], dims, label)
    divisors = [below for _, below in fractions]
    if any(isinstance(below, Expr) for below in divisors):
        result = call("div", result, _tensor_of(divisors, dims, label), origin=(label,))
    elif any(below != 1 for below in divisors):
        known_divisors = np.array(divisors, dims.dtype).reshape(dims.items.shape)
        result = call("div", result, Constant(known_divisors), origin=(label,))
    if any(floats):
        known = np.array(floats, dims.dtype).reshape(dims.items.shape)
        result = call("add", result, Constant(known), origin=(label,))
    return result


def _fraction(item: Any) -> tuple[Dim, Dim]:
    """An element as numerator and denominator; 0 for a known float."""
    if isinstance(item, Quotient):
        return item.above, item.below
    return (0, 1) if isinstance(item, float) else parts(item)


def _tensor_of(values: Sequence[Dim], like: Dims, label: str) -> Value:
    """Dims as a tensor with the shape and the dtype of `like`."""
    value = call("dims", origin=(label,), values=tuple(values))
    shaped = value if like.items.ndim == 1 else call("reshape", value, origin=(label,), shape=like.items.shape)
    return shaped if like.dtype == "int64" else call("cast", shaped, origin=(label,), dtype=like.dtype)


def label_of(proto: onnx.NodeProto) -> str:
    """A node's name, or where it has none that of its first output."""
    return str(proto.name or next((name for name in proto.output if name), proto.op_type))
