"""Making typed calls and functions: the way every front end and pass adds to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from kedge.compiler.errors import CompileError, ShapeError
from kedge.compiler.graph.agree import agreed
from kedge.compiler.graph.dims import attribute_symbols, format_type, plain, plain_shape, same_shape, same_type
from kedge.compiler.graph.ir import Call, Constant, Function, Input, Item, Param, TensorType, Value
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Dim, Expr


def make_call(op: str, inputs: Sequence[Value], attrs: Mapping[str, Any], origin: tuple[str, ...] = ()) -> Call:
    """The call of `op`, typed by the operator's shape inference; attributes left out take their defaults.

    Raises:
        ShapeError: inputs or attributes do not fit the operator; the message names it, its origin, and what it got.
        CompileError: the operator is unknown.
    """
    definition = registry.get(op)
    types = tuple(value.type for value in inputs)
    try:
        complete = complete_attrs(definition, attrs)
        check_arity(definition, len(inputs))
        results = definition.infer(types, complete)
    except ShapeError as error:
        where = f" (node {', '.join(origin)})" if origin else ""
        given = ", ".join(map(format_type, types))
        said = ", ".join(f"{name}={value!r}" for name, value in attrs.items() if not tuple(attribute_symbols(value)))
        details = f"{op}({given})" + (f" with {said}" if said else "")
        raise ShapeError(f"{op}{where}: {error.message}; got {details}", hint=error.hint) from None
    return Call(op, tuple(inputs), complete, results, tuple(origin))


def call(op: str, *inputs: Value, origin: Sequence[str] = (), **attrs: Any) -> Value:
    """The result of an operator with one result.

    Operands whose dims must be equal, and are not known to be, are expected to have them (see `graph.agree`).
    """
    return make_call(op, agreeing(op, inputs, attrs, origin), attrs, tuple(origin))


def agreeing(op: str, inputs: Sequence[Value], attrs: Mapping[str, Any], origin: Sequence[str]) -> list[Value]:
    """The operands of `op`, those that must have other dims than they are known to have with these."""
    return [
        value if shape is None else make_call("expect_shape", (value,), {"shape": shape}, tuple(origin))
        for value, shape in zip(inputs, agreed(op, inputs, attrs), strict=True)
    ]


def reshaped(value: Value, shape: Sequence[Dim], origin: Sequence[str] = ()) -> Value:
    """`value` in another shape; the same object where that is its shape already."""
    if same_shape(value.type.shape, shape):
        return value
    return call("reshape", value, shape=tuple(shape), origin=origin)


def complete_attrs(definition: registry.OpDef, attrs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`attrs` in plain immutable types and with defaults; raises `ShapeError` on an unknown or missing one."""
    unknown = sorted(set(attrs) - set(definition.attrs))
    if unknown:
        known = ", ".join(definition.attrs) or "none"
        raise ShapeError(f"unknown attribute {', '.join(unknown)}", hint=f"{definition.name} takes: {known}")
    result = {name: freeze(attrs.get(name, default)) for name, default in definition.attrs.items()}
    missing = [name for name, value in result.items() if value is registry.REQUIRED]
    if missing:
        raise ShapeError(f"attribute {', '.join(missing)} is missing")
    return MappingProxyType(result)


def freeze(value: Any) -> Any:
    """An attribute's value as an immutable plain type: lists and arrays become tuples, numpy scalars Python's."""
    if isinstance(value, np.ndarray):
        return freeze(value.tolist())
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Expr):
        return plain(value)
    return value.item() if isinstance(value, np.generic) else value


def check_arity(definition: registry.OpDef, count: int) -> None:
    """Raise `ShapeError` unless the operator takes `count` inputs."""
    least, most = definition.arity
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise ShapeError(f"takes {wanted} inputs, not {count}")


class Builder:
    """Collects the inputs and parameters of one function; calls are plain values and need no builder to live.

    b = Builder("main")
    x = b.input("x", TensorType((n, 784), "float32"))
    y = b.call("relu", b.call("matmul", x, b.param("w", TensorType((784, 10), "float32"))), origin=("relu1",))
    function = b.finish({"y": y})
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: dict[str, Input] = {}
        self._params: dict[str, Param] = {}

    def input(self, name: str, type: TensorType) -> Input:  # noqa: A002
        """Declare the next input of the function."""
        if name in self._inputs or name in self._params:
            raise CompileError(f"{self.name}: input {name!r} is declared twice")
        self._inputs[name] = value = Input(name, _plain(type))
        return value

    def param(self, name: str, type: TensorType) -> Param:  # noqa: A002
        """The parameter of that name; the same again for the same type."""
        if name in self._inputs:
            raise CompileError(f"{self.name}: parameter {name!r} has the name of an input")
        known = self._params.get(name)
        if known is None:
            known = self._params[name] = Param(name, _plain(type))
        elif not same_type(known.type, type):
            raise ShapeError(
                f"{self.name}: parameter {name!r} is {format_type(known.type)} and also {format_type(type)}"
            )
        return known

    def constant(self, data: Any, dtype: str | None = None, name: str = "") -> Constant:
        """A literal array."""
        array = np.array(data, dtype=dtype)
        array.flags.writeable = False
        return Constant(array, name)

    def call(self, op: str, *inputs: Value, origin: Sequence[str] = (), **attrs: Any) -> Any:
        """Apply an operator: a `Value`, or a tuple of them where the operator has several results.

        Raises:
            ShapeError: see `make_call`.
        """
        result = make_call(op, inputs, attrs, tuple(origin))
        if registry.get(op).single:
            return result
        return tuple(Item(result, index) for index in range(len(result.types)))

    def finish(self, outputs: Mapping[str, Value]) -> Function:
        """The function that computes the named outputs."""
        if not outputs:
            raise CompileError(f"{self.name}: a function needs at least one output")
        return Function(self.name, tuple(self._inputs.values()), tuple(outputs.values()), tuple(outputs))


def _plain(type_: TensorType) -> TensorType:
    shape: tuple[Dim, ...] = plain_shape(type_.shape)
    if any(not isinstance(dim, Expr) and dim < 0 for dim in shape):
        raise ShapeError(f"a dim of {format_type(type_)} is negative")
    return TensorType(shape, str(np.dtype(type_.dtype)), type_.space)
