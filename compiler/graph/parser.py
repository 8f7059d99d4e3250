"""Reading back what the printer writes (see `printer` for the form)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from kedge.compiler.errors import ParseError
from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.builder import make_call
from kedge.compiler.graph.dims import format_type, plain, same_type
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
from kedge.compiler.graph.printer import digest
from kedge.compiler.tir.expr import BINARY_OPS, Binary, Dim, Expr, Select, Var, as_expr, binary
from kedge.compiler.tir.tokens import Tokens

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
      | (?P<ref>[%@](?:[\w.]+|"(?:[^"\\]|\\.)*"))
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_][\w.]*)
      | (?P<sign>->|<=|>=|//|[-+*%(){}\[\]:,=\#<>])""",
    re.VERBOSE,
)
_RESULT = re.compile(r"#(\d+)")
_LITERALS = {"true": True, "false": False, "none": None, "nan": float("nan"), "inf": float("inf")}


def parse(text: str, data: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Module:
    """The module that `text` describes.

    `data` holds the arrays that the text leaves out: parameters by name, constants by digest. A parameter that is
    left out there too is unbound in the result.

    Raises:
        ParseError: the text is malformed, data is missing for a constant or has another digest.
        ShapeError: an operator does not fit its inputs.
    """
    return _Parser(text, data or {}).module()


class _Parser:
    def __init__(self, text: str, data: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._at = Tokens(text, _TOKEN)
        self._given = data
        self._symbols: dict[str, Var] = {}
        self._params: dict[str, Param] = {}

    # -- modules and functions --

    def module(self) -> Module:
        self._at.expect("module")
        self._at.expect("{")
        bound: dict[str, np.ndarray[Any, Any]] = {}
        functions: dict[str, Function] = {}
        while not self._at.take("}"):
            if self._at.take("param"):
                self._param(bound)
            elif self._at.take("func"):
                function = self._function()
                functions[function.name] = function
            else:
                self._at.fail("param, func or '}'")
        self._at.end()
        return Module(MappingProxyType(functions), MappingProxyType(bound))

    def _param(self, bound: dict[str, np.ndarray[Any, Any]]) -> None:
        name = self._at.name()
        self._at.expect(":")
        type_ = self._type()
        self._params[name] = Param(name, type_)
        if self._at.take("="):
            array = self._array(type_, name)
            if array is not None:
                bound[name] = array

    def _function(self) -> Function:
        # The header's types use symbols whose bounds follow it, so bounds are read first.
        self._symbols = self._bounds_ahead()
        name = self._at.name()
        self._at.expect("(")
        inputs = tuple(self._at.items(")", self._input))
        self._at.expect("->")
        self._at.expect("(")
        names = tuple(self._at.items(")", self._output))
        if self._at.take("where"):
            while not self._at.take("{"):
                self._at.advance()
        else:
            self._at.expect("{")
        outputs = self._body({value.name: value for value in inputs})
        return Function(name, inputs, outputs, names)

    def _bounds_ahead(self) -> dict[str, Var]:
        """The symbols that the `where` of the function that starts here declares, in order."""
        here = self._at.mark()
        while self._at.token not in ("where", "{") or self._at.kind == "string":
            if self._at.kind == "end":
                self._at.fail("'{'")
            self._at.advance()
        found: dict[str, Var] = {}
        if self._at.take("where"):
            for var in self._at.items("{", self._bound):
                found[var.name] = var
        self._at.back_to(here)
        return found

    def _bound(self) -> Var:
        lower = upper = None
        if self._at.kind == "number":
            lower = self._at.integer()
            self._at.expect("<=")
        name = self._at.name()
        if self._at.take(">="):
            lower = self._at.integer()
        elif self._at.take("<="):
            upper = self._at.integer()
        return Var(name, lower=lower, upper=upper)

    def _input(self) -> Input:
        name = self._at.name()
        self._at.expect(":")
        return Input(name, self._type())

    def _output(self) -> str:
        name = self._at.name()
        self._at.expect(":")
        self._type()
        return name

    def _body(self, scope: dict[str, Value]) -> tuple[Value, ...]:
        values = dict(scope)
        while not self._at.take("return"):
            if self._at.kind != "ref" or not self._at.token.startswith("%"):
                self._at.fail("a statement or return")
            key = _key(self._at.token)
            self._at.advance()
            self._at.expect("=")
            values[key] = self._statement(values)
        outputs = [self._operand(values)]
        while self._at.take(","):
            outputs.append(self._operand(values))
        self._at.expect("}")
        return tuple(outputs)

    # -- statements --

    def _statement(self, values: Mapping[str, Value]) -> Value:
        if self._at.take("const"):
            type_ = self._type()
            array = self._array(type_, None)
            assert array is not None  # only parameters may lack data
            return Constant(array)
        if self._at.take("fused"):
            return self._fused(values)
        if self._at.take("external"):
            return self._fused(values, external=True)
        start = self._at.start
        op = self._at.name()
        self._at.expect("(")
        inputs = self._at.items(")", lambda: self._operand(values))
        attrs = dict(self._at.items("}", self._attr)) if self._at.take("{") else {}
        types = self._types()
        call = make_call(op, inputs, attrs, self._origin())
        if len(types) != len(call.types) or not all(map(same_type, types, call.types)):
            self._at.start, self._at.token = start, ", ".join(map(format_type, types))
            self._at.fail(f"{op} to have the type that it gives, {', '.join(map(format_type, call.types))}")
        return Call(call.op, call.inputs, call.attrs, types, call.origin)

    def _fused(self, values: Mapping[str, Value], *, external: bool = False) -> Fused:
        name = self._at.name()
        self._at.expect("(")
        pairs = self._at.items(")", lambda: self._argument(values))
        attrs = dict(self._at.items("}", self._attr)) if external and self._at.take("{") else {}
        workspace = self._workspace() if external and self._at.take("workspace") else 0
        types = self._types()
        origin = self._origin()
        self._at.expect("{")
        own = tuple(Input(argument, value.type) for argument, value in pairs)
        outputs = self._body({value.name: value for value in own})
        body = Function(name, own, outputs, tuple(f"out{i}" for i in range(len(outputs))))
        inputs = tuple(value for _, value in pairs)
        if external:
            return ExternalCall(body, inputs, types, origin, MappingProxyType(attrs), workspace)
        return Fused(body, inputs, types, origin)

    def _workspace(self) -> Dim:
        self._at.expect("(")
        size = self._dim()
        self._at.expect(")")
        return size

    def _argument(self, values: Mapping[str, Value]) -> tuple[str, Value]:
        name = self._at.name()
        self._at.expect("=")
        return name, self._operand(values)

    def _operand(self, values: Mapping[str, Value]) -> Value:
        if self._at.kind != "ref":
            self._at.fail("a value")
        known: Mapping[str, Value] = self._params if self._at.token.startswith("@") else values
        found = known.get(_key(self._at.token))
        if found is None:
            self._at.fail("a value that is defined before")
        result = _RESULT.match(self._at.text, self._at.position)
        if result is None:
            self._at.advance()
            return found
        if not isinstance(found, (Call, Fused)):
            self._at.fail("a call before '#'")
        self._at.position = result.end()
        self._at.advance()
        return Item(found, int(result.group(1)))

    def _attr(self) -> tuple[str, Any]:
        name = self._at.name()
        self._at.expect(":")
        return name, self._value()

    def _origin(self) -> tuple[str, ...]:
        if not self._at.take("from"):
            return ()
        names = [self._at.name()]
        while self._at.take(","):
            names.append(self._at.name())
        return tuple(names)

    # -- types, values, arrays --

    def _types(self) -> tuple[TensorType, ...]:
        self._at.expect(":")
        return tuple(self._at.items(")", self._type)) if self._at.take("(") else (self._type(),)

    def _type(self) -> TensorType:
        dtype = self._at.name()
        self._at.expect("[")
        shape = tuple(self._at.items("]", self._dim))
        if self._at.kind == "ref" and self._at.token == "@device":
            self._at.advance()
            return TensorType(shape, dtype, "device")
        return TensorType(shape, dtype)

    def _dim(self) -> Dim:
        value = self._sum()
        if not isinstance(value, Expr) and type(value) is not int:
            self._at.fail("a dim")
        return value

    def _value(self) -> Any:
        if self._at.kind == "string":
            return self._at.name()
        if self._at.take("["):
            return tuple(self._at.items("]", self._value))
        return self._sum()

    def _sum(self) -> Any:
        value = self._product()
        while self._at.token in ("+", "-") and self._at.kind == "sign":
            op = self._at.token
            self._at.advance()
            value = _fold("add" if op == "+" else "sub", value, self._product())
        return value

    def _product(self) -> Any:
        value = self._atom()
        while self._at.token in ("*", "//", "%") and self._at.kind == "sign":
            op = {"*": "mul", "//": "floordiv", "%": "floormod"}[self._at.token]
            self._at.advance()
            value = _fold(op, value, self._atom())
        return value

    def _atom(self) -> Any:
        if self._at.take("-"):
            return (
                _fold("sub", 0, self._atom()) if self._at.kind == "name" and self._at.token != "inf" else -self._atom()
            )
        if self._at.take("("):
            value = self._sum()
            self._at.expect(")")
            return value
        if self._at.kind == "number":
            token = self._at.token
            self._at.advance()
            return int(token) if token.isdigit() else float(token)
        name = self._at.name()
        if name in self._symbols:
            return self._symbols[name]
        if name in _LITERALS:
            return _LITERALS[name]
        if self._at.take("("):
            operands = self._at.items(")", self._sum)
            if name == "select" and len(operands) == 3:
                return plain(Select(*map(as_expr, operands)))
            if name in BINARY_OPS and len(operands) == 2:
                return _fold(name, *operands)
        return self._at.fail("a number or a symbol that the function declares")

    def _array(self, type_: TensorType, param: str | None) -> np.ndarray[Any, Any] | None:
        shape = tuple(int(str(dim)) for dim in type_.shape)
        if self._at.take("["):
            return frozen(np.array(self._at.items("]", self._value), dtype=type_.dtype).reshape(shape))
        self._at.expect("data")
        self._at.expect("(")
        self._at.integer()
        self._at.expect("bytes")
        self._at.expect(",")
        self._at.expect("sha256")
        wanted = re.compile(r"\s*([0-9a-f]{16})\)").match(self._at.text, self._at.start)
        if wanted is None:
            self._at.fail("16 hexadecimal digits and ')'")
        self._at.position = wanted.end()
        self._at.advance()
        found = self._given.get(param if param is not None else wanted.group(1))
        if found is None:
            if param is None:
                raise ParseError(f"no data for the constant with digest {wanted.group(1)}", hint="pass it in `data`")
            return None
        array = np.asarray(found)
        if array.shape != shape or str(array.dtype) != type_.dtype or digest(array) != wanted.group(1):
            raise ParseError(f"the data given for {param or 'a constant'} is not what the text describes")
        return frozen(array)


def _key(token: str) -> str:
    """What a reference refers to: a name, or a number that no quoted name can be taken for."""
    name = token[1:]
    if name.startswith('"'):
        return str(json.loads(name))
    return f"\0{name}" if name.isdigit() else name


def _fold(op: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Expr) or isinstance(b, Expr):
        return plain(binary(op, a, b))
    return plain(Binary(op, as_expr(a), as_expr(b)))
