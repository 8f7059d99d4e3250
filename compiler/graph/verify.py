"""What must hold of every module, before and after every pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kedge.compiler.errors import ShapeError, VerifyError
from kedge.compiler.graph.builder import check_arity
from kedge.compiler.graph.dims import attribute_symbols, format_type, same_type
from kedge.compiler.graph.ir import (
    Call,
    Constant,
    ExternalCall,
    Function,
    Fused,
    Input,
    Item,
    Module,
    Param,
    TensorType,
    Value,
)  # fmt: skip
from kedge.compiler.graph.printer import print_function
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Var


def verify(module: Module) -> Module:
    """The module itself, if it is well formed.

    Raises:
        VerifyError: the first invariant that does not hold, with the printed function: names are unique, every value
            is reached from declared inputs, types are what inference gives, parameters have one type and their data
            fits it, every symbolic dim is a whole dim of some input, fused groups match what they are applied to.
    """
    params: dict[str, TensorType] = {}
    for name, function in module.functions.items():
        if name != function.name:
            raise VerifyError(f"function {function.name!r} is listed under the name {name!r}")
        _Verifier(function, params).check()
    for name, data in module.params.items():
        _check_data(name, data, params)
    return module


def _check_data(name: str, data: np.ndarray[Any, Any], params: Mapping[str, TensorType]) -> None:
    bound = TensorType(tuple(data.shape), str(data.dtype))
    if name in params and not same_type(params[name], bound):
        raise VerifyError(f"parameter {name!r} is {format_type(params[name])} but bound to {format_type(bound)}")


class _Verifier:
    def __init__(self, function: Function, params: dict[str, TensorType], *, inner: bool = False) -> None:
        self._function = function
        self._params = params
        self._inner = inner

    def check(self) -> None:
        function = self._function
        self._require(len(function.outputs) == len(function.output_names), "outputs and their names differ in number")
        self._require(len(function.outputs) > 0, "there is no output")
        self._require(len(set(function.output_names)) == len(function.output_names), "two outputs have one name")
        names = [value.name for value in function.inputs]
        self._require(len(set(names)) == len(names), "two inputs have one name")
        for value in function.values():
            self._value(value)
        if not self._inner:
            self._symbols()

    def _require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise VerifyError(f"{self._function.name}: {reason}\n{print_function(self._function)}")

    def _value(self, value: Value) -> None:
        match value:
            case Input(name=name):
                known = any(value is own for own in self._function.inputs)
                self._require(known, f"{name!r} is used but no input of the function")
            case Param(name=name, type=type_):
                self._require(not self._inner, f"parameter {name!r} is used inside of a fused group")
                known_type = self._params.setdefault(name, type_)
                self._require(same_type(known_type, type_), f"parameter {name!r} has two types")
                taken = any(own.name == name for own in self._function.inputs)
                self._require(not taken, f"{name!r} names a parameter and an input")
            case Constant():
                pass
            case Item(source=source, index=index):
                self._require(0 <= index < len(source.types), f"result {index} of {len(source.types)}")
            case Call():
                self._call(value)
            case Fused():
                self._fused(value)
            case _:
                self._require(False, f"not a graph value: {value!r}")

    def _call(self, call: Call) -> None:
        definition = registry.get(call.op)
        self._require(set(call.attrs) == set(definition.attrs), f"{call.op} has attributes {sorted(call.attrs)}")
        try:
            check_arity(definition, len(call.inputs))
            types = definition.infer([operand.type for operand in call.inputs], call.attrs)
        except ShapeError as error:
            raise VerifyError(
                f"{self._function.name}: {call.op}: {error.message}\n{print_function(self._function)}"
            ) from error
        self._require(
            len(types) == len(call.types) and all(map(same_type, types, call.types)),
            f"{call.op} has type {_types(call.types)} but gives {_types(types)}",
        )

    def _fused(self, fused: Fused) -> None:
        body = fused.body
        self._require(not self._inner, "a fused group inside of a fused group")
        self._require(
            len(body.inputs) == len(fused.inputs)
            and all(same_type(own.type, given.type) for own, given in zip(body.inputs, fused.inputs, strict=True)),
            f"group {body.name} is applied to inputs of other types",
        )
        self._require(
            len(body.outputs) == len(fused.types)
            and all(same_type(own.type, type_) for own, type_ in zip(body.outputs, fused.types, strict=True)),
            f"group {body.name} gives results of other types",
        )
        _Verifier(body, self._params, inner=True).check()
        if isinstance(fused, ExternalCall):
            self._external(fused)

    def _external(self, call: ExternalCall) -> None:
        name = call.body.name
        self._require(name.isidentifier() and name.isascii(), f"external {name!r} is no name of a C function")
        self._require(len(call.types) == 1, f"external {name} has several results")
        for attribute, value in call.attrs.items():
            numbers = value if isinstance(value, tuple) else (value,)
            plain = all(type(each) is type(numbers[0]) and type(each) in (int, float) for each in numbers)
            self._require(bool(numbers) and plain, f"external {name}: attribute {attribute!r} is no number")
            narrow = all(isinstance(each, float) or -(2**63) <= each < 2**63 for each in numbers)
            self._require(narrow, f"external {name}: attribute {attribute!r} has more than 64 bits")
        negative = isinstance(call.workspace, int) and call.workspace < 0
        self._require(not negative, f"external {name}: its workspace is negative")

    def _symbols(self) -> None:
        declared = set(self._function.symbols)
        for value in self._function.values():
            used: list[Var] = list(attribute_symbols(value.type.shape))
            if isinstance(value, Call):
                used += [var for attribute in value.attrs.values() for var in attribute_symbols(attribute)]
            if isinstance(value, ExternalCall):
                used += attribute_symbols(value.workspace)
            for var in used:
                self._require(var in declared, f"symbol {var.name} is not a whole dim of any input")


def _types(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(format_type, types))
