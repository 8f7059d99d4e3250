"""Giving parameters their data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from kedge.compiler.graph.dims import format_type
from kedge.compiler.graph.ir import Module, Param, TensorType
from kedge.rpc.errors import InputError


def parameters(module: Module) -> dict[str, TensorType]:
    """The parameters that the functions use, by name in order of first use."""
    found: dict[str, TensorType] = {}
    for function in module.functions.values():
        for value in function.values():
            if isinstance(value, Param):
                found.setdefault(value.name, value.type)
    return found


def bind(module: Module, params: Mapping[str, np.ndarray[Any, Any]]) -> Module:
    """A module with the data of more parameters, kept read-only.

    Raises:
        InputError: a name that no function uses, or data of another dtype or shape than the parameter's.
    """
    known = parameters(module)
    bound = dict(module.params)
    for name, data in params.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the parameters are: {', '.join(known) or 'none'}"
            raise InputError(f"the module has no parameter {name!r}", hint=hint)
        type_, array = known[name], np.asarray(data)
        if str(array.dtype) != type_.dtype or tuple(array.shape) != type_.shape:
            raise InputError(
                f"parameter {name!r} is {format_type(type_)}, not {array.dtype}[{', '.join(map(str, array.shape))}]",
                hint="convert the array with numpy's astype or reshape",
            )
        bound[name] = frozen(array)
    return replace(module, params=MappingProxyType(bound)) if params else module


def read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A read-only view of `array`, with the strides that it has."""
    view = array.view()
    view.flags.writeable = False
    return view


def frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A C-contiguous read-only view of `array`, or a copy where there is no such view."""
    return read_only(np.ascontiguousarray(array).reshape(array.shape))
