"""A module as text that the parser reads back.

    module {
      param fc.weight: float32[64, 10] = data(2560 bytes, sha256 0f3c2a1b9d8e7f60)

      func main(x: float32[n, 64]) -> (y: float32[n, 10]) where n >= 1 {
        %0 = matmul(%x, @fc.weight) : float32[n, 10] from "fc"
        %1 = softmax(%0) : float32[n, 10]
        return %1
      }
    }

A `fused` group prints its body in braces after its inputs, and so does an `external` call, whose body is what the C
function of that name must compute:

        %0 = external my_dense(x = %x, w = @fc.weight) {alpha: 0.5} workspace(n * 256) : float32[n, 10] from "fc" {
          %0 = matmul(%x, %w) : float32[n, 10] from "fc"
          return %0
        }

Attributes at their defaults are left out. Arrays of more than 16 elements stand as size and digest: the parser takes
their data from elsewhere, or leaves such a parameter unbound.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kedge.compiler.graph.dims import attribute_symbols, format_dim, format_type
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
    postorder,
)  # fmt: skip
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Expr, Var
from kedge.compiler.tir.visitor import substitute_expr

INLINE_ELEMENTS = 16
_PLAIN = re.compile(r"[A-Za-z_][\w.]*\Z")


def print_module(module: Module) -> str:
    """A module as text, without a newline at its end."""
    return "\n".join(_module_lines(module, canonical=False))


def print_function(function: Function) -> str:
    """A function as text, without a newline at its end."""
    return "\n".join(_Printer(function, canonical=False).function())


def canonical(module: Module) -> str:
    """A text that two modules share exactly if they are the same but for origins and the names of symbols."""
    return "\n".join(_module_lines(module, canonical=True))


def digest(array: np.ndarray[Any, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an array's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _module_lines(module: Module, *, canonical: bool) -> Iterator[str]:
    yield "module {"
    types: dict[str, TensorType] = {}
    for function in module.functions.values():
        for value in function.values():
            if isinstance(value, Param):
                types.setdefault(value.name, value.type)
    for name, array in module.params.items():
        types.setdefault(name, TensorType(tuple(array.shape), str(array.dtype)))
    for name in sorted(types) if canonical else types:
        data = f" = {_data(module.params[name])}" if name in module.params else ""
        yield f"  param {_name(name)}: {format_type(types[name])}{data}"
    for function in module.functions.values():
        yield ""
        yield from ("  " + line for line in _Printer(function, canonical=canonical).function())
    yield "}"


def _name(name: str) -> str:
    return name if _PLAIN.match(name) else json.dumps(name, ensure_ascii=False)


def _number(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return str(value)


def _data(array: np.ndarray[Any, Any]) -> str:
    if array.size > INLINE_ELEMENTS:
        return f"data({array.nbytes} bytes, sha256 {digest(array)})"
    return f"[{', '.join(map(_number, array.reshape(-1).tolist()))}]"


class _Printer:
    """Prints one function; numbers its values and tells its symbols of one name apart."""

    def __init__(self, function: Function, *, canonical: bool, symbols: dict[Var, Expr] | None = None) -> None:
        self._function = function
        self._canonical = canonical
        self._symbols: dict[Var, Expr] = self._name_symbols() if symbols is None else symbols
        self._names: dict[int, str] = {id(value): f"%{_name(value.name)}" for value in function.inputs}

    def function(self) -> Iterator[str]:
        function = self._function
        inputs = ", ".join(f"{_name(value.name)}: {self._type(value.type)}" for value in function.inputs)
        # Broken functions are printed too, in the verifier's refusals.
        outputs = ", ".join(
            f"{_name(name)}: {self._output_type(value)}"
            for name, value in zip(function.output_names, function.outputs, strict=False)
        )
        bounds = ", ".join(_bounds(var) for var in self._symbols.values() if isinstance(var, Var))
        where = f" where {bounds}" if bounds else ""
        yield f"func {_name(function.name)}({inputs}) -> ({outputs}){where} {{"
        yield from self.body()
        yield "}"

    def body(self) -> Iterator[str]:
        count = 0
        for value in postorder(self._function.outputs):
            if isinstance(value, (Input, Param, Item)):
                continue
            self._names[id(value)] = f"%{count}"
            count += 1
            yield from ("  " + line for line in self._statement(value))
        yield f"  return {', '.join(map(self._ref, self._function.outputs))}"

    def _statement(self, value: Value) -> Iterator[str]:
        name = self._names[id(value)]
        if isinstance(value, Constant):
            yield f"{name} = const {format_type(value.type)} {_data(value.data)}"
        elif isinstance(value, Call):
            inputs = ", ".join(map(self._ref, value.inputs))
            yield f"{name} = {value.op}({inputs}){self._attrs(value)} : {self._types(value.types)}{self._origin(value)}"
        elif isinstance(value, Fused):
            inner = _Printer(value.body, canonical=self._canonical, symbols=self._symbols)
            inputs = ", ".join(
                f"{_name(own.name)} = {self._ref(given)}"
                for own, given in zip(value.body.inputs, value.inputs, strict=True)
            )
            kind = "external" if isinstance(value, ExternalCall) else "fused"
            call = f"{kind} {_name(value.body.name)}({inputs}){self._external(value)}"
            yield f"{name} = {call} : {self._types(value.types)}{self._origin(value)} {{"
            yield from inner.body()
            yield "}"
        else:
            raise TypeError(f"not a graph value: {value!r}")

    def _ref(self, value: Value) -> str:
        if isinstance(value, Param):
            return f"@{_name(value.name)}"
        if isinstance(value, Item):
            return f"{self._names[id(value.source)]}#{value.index}"
        if id(value) not in self._names and isinstance(value, Input):
            return f"%{_name(value.name)}"  # not an input of this function: the verifier says so
        return self._names[id(value)]

    def _origin(self, value: Call | Fused) -> str:
        if self._canonical or not value.origin:
            return ""
        return " from " + ", ".join(json.dumps(name, ensure_ascii=False) for name in value.origin)

    def _attrs(self, value: Call) -> str:
        defaults: Mapping[str, Any] = registry.get(value.op).attrs
        shown = [
            f"{name}: {self._value(given)}"
            for name, given in value.attrs.items()
            if not _same(given, defaults.get(name))
        ]
        return f" {{{', '.join(shown)}}}" if shown else ""

    def _external(self, value: Fused) -> str:
        if not isinstance(value, ExternalCall):
            return ""
        attrs = ", ".join(f"{_name(name)}: {self._value(given)}" for name, given in value.attrs.items())
        workspace = "" if value.workspace == 0 else f" workspace({self._value(value.workspace)})"
        return (f" {{{attrs}}}" if attrs else "") + workspace

    def _value(self, value: Any) -> str:
        if isinstance(value, tuple):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, Expr):
            return format_dim(substitute_expr(value, self._symbols))
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        return "none" if value is None else _number(value)

    def _type(self, type_: TensorType) -> str:
        shape = tuple(substitute_expr(dim, self._symbols) if isinstance(dim, Expr) else dim for dim in type_.shape)
        return format_type(TensorType(shape, type_.dtype, type_.space))

    def _output_type(self, value: Value) -> str:
        missing = isinstance(value, Item) and value.index >= len(value.source.types)
        return "?" if missing else self._type(value.type)

    def _types(self, types: tuple[TensorType, ...]) -> str:
        return self._type(types[0]) if len(types) == 1 else f"({', '.join(map(self._type, types))})"

    def _name_symbols(self) -> dict[Var, Expr]:
        """Each symbol under a name of its own; in canonical form they are numbered."""
        result: dict[Var, Expr] = {}
        used: set[str] = set()
        for var in _symbols_of(self._function):
            if var in result:
                continue
            wanted = f"s{len(result)}" if self._canonical else var.name
            name, count = wanted, 0
            while name in used:
                count += 1
                name = f"{wanted}_{count}"
            used.add(name)
            result[var] = var if name == var.name else Var(name, var.dtype, var.lower, var.upper)
        return result


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not tuple(attribute_symbols(a)) and bool(a == b)


def _symbols_of(function: Function) -> Iterable[Var]:
    yield from function.symbols
    for value in (*function.inputs, *function.values()):
        if isinstance(value, Item):
            continue  # its source is among the values
        for type_ in value.types if isinstance(value, (Call, Fused)) else (value.type,):
            yield from attribute_symbols(type_.shape)
        if isinstance(value, Call):
            for attribute in value.attrs.values():
                yield from attribute_symbols(attribute)
        if isinstance(value, ExternalCall):
            yield from attribute_symbols(value.workspace)


def _bounds(var: Var) -> str:
    if var.lower is not None and var.upper is not None:
        return f"{var.lower} <= {var.name} <= {var.upper}"
    if var.lower is not None:
        return f"{var.name} >= {var.lower}"
    return var.name if var.upper is None else f"{var.name} <= {var.upper}"
