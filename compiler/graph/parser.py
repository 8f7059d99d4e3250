"""Reading back what the printer writes (see `printer` for the form)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import numpy as np

from kedge.compiler.errors import ParseError
from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.builder import make_call
from kedge.compiler.graph.dims import format_type, plain, same_type
from kedge.compiler.graph.ir import Call, Constant, Function, Fused, Input, Item, Module, Param, TensorType, Value
from kedge.compiler.graph.printer import digest
from kedge.compiler.tir.expr import BINARY_OPS, Binary, Dim, Expr, Select, Var, as_expr, binary

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
T = TypeVar("T")


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
        self._text = text
        self._given = data
        self._position = 0
        self._kind = ""
        self._token = ""
        self._start = 0
        self._symbols: dict[str, Var] = {}
        self._params: dict[str, Param] = {}
        self._advance()

    # -- tokens --

    def _advance(self) -> None:
        while True:
            self._start = self._position
            if self._position == len(self._text):
                self._kind, self._token = "end", "the end"
                return
            match = _TOKEN.match(self._text, self._position)
            if match is None:
                self._kind, self._token = "sign", self._text[self._position]
                self._fail("a token")
            # `#` before digits, right after a reference, picks a result; elsewhere it starts a comment.
            self._position = match.end()
            if match.lastgroup != "space":
                self._kind, self._token = match.lastgroup or "", match.group()
                return

    def _fail(self, wanted: str) -> NoReturn:
        line = self._text.count("\n", 0, self._start) + 1
        column = self._start - (self._text.rfind("\n", 0, self._start) + 1) + 1
        shown = [*self._text.split("\n"), ""][line - 1]
        raise ParseError(f"line {line}, column {column}: wanted {wanted}, not {self._token!r}\n  {shown.strip()}")

    def _take(self, *tokens: str) -> bool:
        if self._kind in ("sign", "name") and self._token in tokens:
            self._advance()
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._take(token):
            self._fail(repr(token))

    def _name(self) -> str:
        if self._kind not in ("name", "string"):
            self._fail("a name")
        token = self._token
        name = str(json.loads(token)) if self._kind == "string" else token
        self._advance()
        return name

    def _integer(self) -> int:
        negative = self._take("-")
        if self._kind != "number" or not self._token.isdigit():
            self._fail("an integer")
        value = int(self._token)
        self._advance()
        return -value if negative else value

    def _list(self, close: str, item: Callable[[], T]) -> list[T]:
        items: list[T] = []
        while not self._take(close):
            if items:
                self._expect(",")
            items.append(item())
        return items

    # -- modules and functions --

    def module(self) -> Module:
        self._expect("module")
        self._expect("{")
        bound: dict[str, np.ndarray[Any, Any]] = {}
        functions: dict[str, Function] = {}
        while not self._take("}"):
            if self._take("param"):
                self._param(bound)
            elif self._take("func"):
                function = self._function()
                functions[function.name] = function
            else:
                self._fail("param, func or '}'")
        if self._kind != "end":
            self._fail("the end")
        return Module(MappingProxyType(functions), MappingProxyType(bound))

    def _param(self, bound: dict[str, np.ndarray[Any, Any]]) -> None:
        name = self._name()
        self._expect(":")
        type_ = self._type()
        self._params[name] = Param(name, type_)
        if self._take("="):
            array = self._array(type_, name)
            if array is not None:
                bound[name] = array

    def _function(self) -> Function:
        # The header's types use symbols whose bounds follow it, so bounds are read first.
        self._symbols = self._bounds_ahead()
        name = self._name()
        self._expect("(")
        inputs = tuple(self._list(")", self._input))
        self._expect("->")
        self._expect("(")
        names = tuple(self._list(")", self._output))
        if self._take("where"):
            while not self._take("{"):
                self._advance()
        else:
            self._expect("{")
        outputs = self._body({value.name: value for value in inputs})
        return Function(name, inputs, outputs, names)

    def _bounds_ahead(self) -> dict[str, Var]:
        """The symbols that the `where` of the function that starts here declares, in order."""
        saved = (self._position, self._kind, self._token, self._start)
        while self._token not in ("where", "{") or self._kind == "string":
            if self._kind == "end":
                self._fail("'{'")
            self._advance()
        found: dict[str, Var] = {}
        if self._take("where"):
            for var in self._list("{", self._bound):
                found[var.name] = var
        self._position, self._kind, self._token, self._start = saved
        return found

    def _bound(self) -> Var:
        lower = upper = None
        if self._kind == "number":
            lower = self._integer()
            self._expect("<=")
        name = self._name()
        if self._take(">="):
            lower = self._integer()
        elif self._take("<="):
            upper = self._integer()
        return Var(name, lower=lower, upper=upper)

    def _input(self) -> Input:
        name = self._name()
        self._expect(":")
        return Input(name, self._type())

    def _output(self) -> str:
        name = self._name()
        self._expect(":")
        self._type()
        return name

    def _body(self, scope: dict[str, Value]) -> tuple[Value, ...]:
        values = dict(scope)
        while not self._take("return"):
            if self._kind != "ref" or not self._token.startswith("%"):
                self._fail("a statement or return")
            key = _key(self._token)
            self._advance()
            self._expect("=")
            values[key] = self._statement(values)
        outputs = [self._operand(values)]
        while self._take(","):
            outputs.append(self._operand(values))
        self._expect("}")
        return tuple(outputs)

    # -- statements --

    def _statement(self, values: Mapping[str, Value]) -> Value:
        if self._take("const"):
            type_ = self._type()
            array = self._array(type_, None)
            assert array is not None  # only parameters may lack data
            return Constant(array)
        if self._take("fused"):
            return self._fused(values)
        start = self._start
        op = self._name()
        self._expect("(")
        inputs = self._list(")", lambda: self._operand(values))
        attrs = dict(self._list("}", self._attr)) if self._take("{") else {}
        types = self._types()
        call = make_call(op, inputs, attrs, self._origin())
        if len(types) != len(call.types) or not all(map(same_type, types, call.types)):
            self._start, self._token = start, ", ".join(map(format_type, types))
            self._fail(f"{op} to have the type that it gives, {', '.join(map(format_type, call.types))}")
        return Call(call.op, call.inputs, call.attrs, types, call.origin)

    def _fused(self, values: Mapping[str, Value]) -> Fused:
        name = self._name()
        self._expect("(")
        pairs = self._list(")", lambda: self._argument(values))
        types = self._types()
        origin = self._origin()
        self._expect("{")
        own = tuple(Input(argument, value.type) for argument, value in pairs)
        outputs = self._body({value.name: value for value in own})
        body = Function(name, own, outputs, tuple(f"out{i}" for i in range(len(outputs))))
        return Fused(body, tuple(value for _, value in pairs), types, origin)

    def _argument(self, values: Mapping[str, Value]) -> tuple[str, Value]:
        name = self._name()
        self._expect("=")
        return name, self._operand(values)

    def _operand(self, values: Mapping[str, Value]) -> Value:
        if self._kind != "ref":
            self._fail("a value")
        known: Mapping[str, Value] = self._params if self._token.startswith("@") else values
        found = known.get(_key(self._token))
        if found is None:
            self._fail("a value that is defined before")
        result = _RESULT.match(self._text, self._position)
        if result is None:
            self._advance()
            return found
        if not isinstance(found, (Call, Fused)):
            self._fail("a call before '#'")
        self._position = result.end()
        self._advance()
        return Item(found, int(result.group(1)))

    def _attr(self) -> tuple[str, Any]:
        name = self._name()
        self._expect(":")
        return name, self._value()

    def _origin(self) -> tuple[str, ...]:
        if not self._take("from"):
            return ()
        names = [self._name()]
        while self._take(","):
            names.append(self._name())
        return tuple(names)

    # -- types, values, arrays --

    def _types(self) -> tuple[TensorType, ...]:
        self._expect(":")
        return tuple(self._list(")", self._type)) if self._take("(") else (self._type(),)

    def _type(self) -> TensorType:
        dtype = self._name()
        self._expect("[")
        shape = tuple(self._list("]", self._dim))
        if self._kind == "ref" and self._token == "@device":
            self._advance()
            return TensorType(shape, dtype, "device")
        return TensorType(shape, dtype)

    def _dim(self) -> Dim:
        value = self._sum()
        if not isinstance(value, Expr) and type(value) is not int:
            self._fail("a dim")
        return value

    def _value(self) -> Any:
        if self._kind == "string":
            return self._name()
        if self._take("["):
            return tuple(self._list("]", self._value))
        return self._sum()

    def _sum(self) -> Any:
        value = self._product()
        while self._token in ("+", "-") and self._kind == "sign":
            op = self._token
            self._advance()
            value = _fold("add" if op == "+" else "sub", value, self._product())
        return value

    def _product(self) -> Any:
        value = self._atom()
        while self._token in ("*", "//", "%") and self._kind == "sign":
            op = {"*": "mul", "//": "floordiv", "%": "floormod"}[self._token]
            self._advance()
            value = _fold(op, value, self._atom())
        return value

    def _atom(self) -> Any:
        if self._take("-"):
            return _fold("sub", 0, self._atom()) if self._kind == "name" and self._token != "inf" else -self._atom()
        if self._take("("):
            value = self._sum()
            self._expect(")")
            return value
        if self._kind == "number":
            token = self._token
            self._advance()
            return int(token) if token.isdigit() else float(token)
        name = self._name()
        if name in self._symbols:
            return self._symbols[name]
        if name in _LITERALS:
            return _LITERALS[name]
        if self._take("("):
            operands = self._list(")", self._sum)
            if name == "select" and len(operands) == 3:
                return plain(Select(*map(as_expr, operands)))
            if name in BINARY_OPS and len(operands) == 2:
                return _fold(name, *operands)
        return self._fail("a number or a symbol that the function declares")

    def _array(self, type_: TensorType, param: str | None) -> np.ndarray[Any, Any] | None:
        shape = tuple(int(str(dim)) for dim in type_.shape)
        if self._take("["):
            return frozen(np.array(self._list("]", self._value), dtype=type_.dtype).reshape(shape))
        self._expect("data")
        self._expect("(")
        self._integer()
        self._expect("bytes")
        self._expect(",")
        self._expect("sha256")
        wanted = re.compile(r"\s*([0-9a-f]{16})\)").match(self._text, self._start)
        if wanted is None:
            self._fail("16 hexadecimal digits and ')'")
        self._position = wanted.end()
        self._advance()
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
