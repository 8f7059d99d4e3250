"""Running a module operator by operator with the numpy references: the oracle for everything after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.errors import VerifyError
from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.dims import concrete, evaluate_shape, format_type
from kedge.compiler.graph.ir import (
    Attrs,
    Call,
    Constant,
    Function,
    Fused,
    Input,
    Item,
    Module,
    Param,
    TensorType,
    Value,
)  # fmt: skip
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Var
from kedge.rpc.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]
Symbols: TypeAlias = Mapping[Var, int]


def run(module: Module, inputs: Mapping[str, Any], function: str = "main") -> dict[str, Array]:
    """The outputs of a function by name. `inputs` holds its inputs, and the data of parameters that are not bound.

    Raises:
        InputError: an input is missing, unknown, or has another dtype or shape than declared.
    """
    if function not in module.functions:
        raise InputError(f"the module has no function {function!r}", hint=f"it has: {', '.join(module.functions)}")
    main = module.functions[function]
    params = {value.name: value.type for value in main.values() if isinstance(value, Param)}
    declared = {value.name: value.type for value in main.inputs}
    declared |= {name: type_ for name, type_ in params.items() if name not in module.params}
    arrays, symbols = check_inputs(declared, inputs)
    values: dict[str, Array] = {**module.params, **arrays}
    results = _evaluate(main, [values[value.name] for value in main.inputs], values, symbols)
    return dict(zip(main.output_names, results, strict=True))


def check_inputs(
    declared: Mapping[str, TensorType], given: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[Var, int]]:
    """The inputs as arrays, and what their shapes say the symbolic dims are; raises `InputError` where they misfit."""
    unknown = [name for name in given if name not in declared]
    missing = [name for name in declared if name not in given]
    if unknown or missing:
        problems = [
            f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise InputError(f"inputs: {'; '.join(problems)}", hint=f"the inputs are: {', '.join(declared)}")
    arrays: dict[str, Array] = {}
    symbols: dict[Var, int] = {}
    for name, type_ in declared.items():
        arrays[name] = array = np.asarray(given[name])
        if array.ndim == type_.rank:
            for dim, size in zip(type_.shape, array.shape, strict=True):
                if isinstance(dim, Var):
                    symbols.setdefault(dim, size)
    for name, type_ in declared.items():
        array = arrays[name]
        fits = array.ndim == type_.rank and evaluate_shape(type_.shape, symbols) == array.shape
        if not fits or str(array.dtype) != type_.dtype:
            raise InputError(
                f"input {name!r} is {format_type(type_)}, not {array.dtype}[{', '.join(map(str, array.shape))}]",
                hint="convert the array with numpy's astype or reshape",
            )
    for var, size in symbols.items():
        if size < (var.lower or 0) or (var.upper is not None and size > var.upper):
            most = "" if var.upper is None else f" and at most {var.upper}"
            raise InputError(f"dim {var.name} is {size}; it must be at least {var.lower or 0}{most}")
    return arrays, symbols


def apply(op: str, arrays: list[Array], attrs: Attrs, symbols: Symbols) -> tuple[Array, ...]:
    """The results of one operator's reference."""
    evaluated = {name: concrete(value, symbols) for name, value in attrs.items()}
    return registry.get(op).reference(arrays, evaluated)


def evaluate_body(body: Function, inputs: list[Array], symbols: Symbols) -> list[Array]:
    """The outputs of a group's body."""
    return _evaluate(body, inputs, {}, symbols)


def _evaluate(function: Function, inputs: list[Array], params: Mapping[str, Array], symbols: Symbols) -> list[Array]:
    done: dict[int, tuple[Array, ...]] = {
        id(value): (array,) for value, array in zip(function.inputs, inputs, strict=True)
    }

    def of(value: Value) -> Array:
        return done[id(value.source)][value.index] if isinstance(value, Item) else done[id(value)][0]

    for value in function.values():
        match value:
            case Input() | Item():
                continue
            case Param(name=name):
                done[id(value)] = (frozen(params[name]),)  # sums must not depend on how a weight lies in memory
            case Constant(data=data):
                done[id(value)] = (data,)
            case Call(op=op, inputs=operands, attrs=attrs):
                results = apply(op, [of(operand) for operand in operands], attrs, symbols)
                done[id(value)] = _checked(value, results, symbols)
            case Fused(body=body, inputs=operands):
                done[id(value)] = tuple(_evaluate(body, [of(operand) for operand in operands], params, symbols))
    return [of(value) for value in function.outputs]


def _checked(value: Call, results: tuple[Array, ...], symbols: Symbols) -> tuple[Array, ...]:
    for result, type_ in zip(results, value.types, strict=True):
        if str(result.dtype) != type_.dtype or result.shape != evaluate_shape(type_.shape, symbols):
            raise VerifyError(
                f"{value.op}: the reference gave {result.dtype}{list(result.shape)}, its type is {format_type(type_)}"
            )
    return results
