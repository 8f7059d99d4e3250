"""Reading back what the printer writes (see `printer` for the form): a function from its text.

The text is read line by line, its nesting from the indentation, as Python's is. Names refer to what the lines around
declare; each declaration makes a new variable or buffer.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from kedge.compiler.dtypes import DTYPES, FLOATS
from kedge.compiler.errors import ParseError
from kedge.compiler.tir.expr import (
    BINARY_OPS,
    INDEX_DTYPE,
    INTRINSICS,
    Binary,
    BinaryOp,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Lead,
    Load,
    Select,
    Var,
    const,
)
from kedge.compiler.tir.printer import INFIX, LOOPS
from kedge.compiler.tir.stmt import (
    EMPTY,
    Block,
    Buffer,
    For,
    If,
    IterKind,
    IterVar,
    LoopKind,
    PrimFunc,
    Range,
    Region,
    Scope,
    Seq,
    Stmt,
    Store,
)
from kedge.compiler.tir.tokens import MOST_DIGITS, Tokens
from kedge.compiler.tir.verify import verify
from kedge.compiler.tir.visitor import free_vars, seq

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
      | (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<sign>->|\+:|<=|>=|==|!=|//|[-+*/%()\[\]:,=<>])
      | (?P<attrs>\#.*)""",
    re.VERBOSE,
)
_LEVELS: Mapping[str, tuple[BinaryOp, int]] = {
    sign: (cast(BinaryOp, op), level) for op, (sign, level) in INFIX.items()
}  # fmt: skip
_KINDS: Mapping[str, LoopKind] = {word: cast(LoopKind, kind) for kind, word in LOOPS.items()} | {"thread": "thread"}
_SCOPES = ("global", "shared", "local", "register")
_FLOAT_WORDS = {"inf": float("inf"), "nan": float("nan")}
_TIGHTEST = max(level for _, level in _LEVELS.values()) + 1


def parse_func(text: str) -> PrimFunc:
    """The function that `text` describes, verified.

    Raises:
        ParseError: the text is malformed; says in which line and column, and what was wanted there.
        VerifyError: it is well formed but no valid function.
    """
    with _of_some_depth():
        return verify(read_func(text))


@contextmanager
def _of_some_depth() -> Iterator[None]:
    """Refuse a text of more parentheses, or longer chains of operators, than can be followed."""
    try:
        yield
    except RecursionError as error:
        raise ParseError("the text is nested too deeply, or an expression has too many operators") from error


def read_func(text: str) -> PrimFunc:
    """The function that `text` describes, valid or not; raises ParseError."""
    with _of_some_depth():
        return _read_func(text)


def _read_func(text: str) -> PrimFunc:
    lines = [
        _Line(number, len(line) - len(line.lstrip(" ")), line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    parser = _Parser(lines)
    func = parser.func()
    parser.end()
    return func


def parse_expr(text: str, variables: Mapping[str, Var]) -> Expr:
    """The expression of some variables that `text` describes; raises ParseError."""
    with _of_some_depth():
        return _Parser([_Line(1, 0, text)], variables).expr()


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    indent: int
    text: str


class _Cursor(Tokens):
    """The tokens of one line."""

    ending = "the end of the line"

    def __init__(self, line: _Line) -> None:
        self.indent = line.indent
        super().__init__(line.text, _TOKEN, position=line.indent, first_line=line.number)

    def attrs(self) -> Mapping[str, Any]:
        """What a `# key=value, …` at the end of the line says."""
        if self.kind != "attrs":
            return EMPTY
        text = self.token[1:].strip()
        try:
            found = ast.literal_eval(text) if text.startswith("{") else _keywords(text)
            if not isinstance(found, dict) or json.loads(json.dumps(found, allow_nan=False)) != found:
                raise ValueError(text)
        except (SyntaxError, TypeError, ValueError, MemoryError):
            self.fail("annotations: key=value, …")
        self.advance()
        return MappingProxyType(found)


def _text(at: _Cursor) -> str:
    """What a text in quotes says."""
    try:
        return str(ast.literal_eval(at.token))
    except (SyntaxError, ValueError):
        at.fail("a text whose escapes are those of Python")


def _keywords(text: str) -> dict[str, Any]:
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
        raise ValueError(text)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


class _Parser:
    def __init__(self, lines: list[_Line], variables: Mapping[str, Var] = MappingProxyType({})) -> None:
        self._lines = lines
        self._next = 0
        self._vars = dict(variables)
        self._buffers: dict[str, Buffer] = {}
        self._at = _Cursor(lines[0] if lines else _Line(1, 0, ""))

    def _take_line(self) -> _Cursor:
        self._at = _Cursor(self._lines[self._next])
        self._next += 1
        return self._at

    def _below(self, indent: int) -> bool:
        """Whether the next line is nested under one that is indented by `indent`."""
        return self._next < len(self._lines) and self._lines[self._next].indent > indent

    def _word(self, indent: int) -> str:
        """The first word of the next line, if that is indented by `indent`."""
        if self._next == len(self._lines) or self._lines[self._next].indent != indent:
            return ""
        cursor = _Cursor(self._lines[self._next])
        return cursor.token if cursor.kind == "name" else ""

    def end(self) -> None:
        """Refuse what follows the function."""
        if self._next < len(self._lines):
            self._take_line().fail("the end of the text")

    @contextmanager
    def _scope(self) -> Iterator[None]:
        saved = dict(self._vars)
        yield
        self._vars = saved

    def expr(self) -> Expr:
        """The first line as an expression."""
        value = self._expr()
        self._at.end()
        return value

    # Functions --------------------------------------------------------------------------------------------------

    def func(self) -> PrimFunc:
        if not self._lines:
            self._at.fail("func")
        at = self._take_line()
        indent = at.indent
        at.expect("func")
        self._symbols_ahead(self._lines[0])
        name = at.name()
        at.expect("(")
        inputs = at.items(")", self._declaration)
        at.expect("->")
        at.expect("(")
        outputs = at.items(")", self._declaration)
        symbols = tuple(self._vars.values())
        if at.take("where"):
            while not at.take(":"):
                at.advance()
        else:
            at.expect(":")
            shapes = (d for buffer in (*inputs, *outputs) for d in buffer.shape)
            symbols = tuple(dict.fromkeys(v for d in shapes if isinstance(d, Expr) for v in free_vars(d)))
        at.end()
        inner = self._inner(indent)
        allocs = []
        while self._word(inner) == "alloc":
            at = self._take_line()
            at.advance()
            allocs.append(self._declaration())
            at.end()
        body = self._suite(indent, inner)
        return PrimFunc(name, (*inputs, *outputs), len(outputs), body, tuple(allocs), symbols)

    def _symbols_ahead(self, line: _Line) -> None:
        """Declare the function's symbols, which the header's types use before it names them.

        Those of the `where` clause come first, in its order; without one any name in a shape is a symbol.
        """
        ahead = _Cursor(line)
        while ahead.kind != "end" and not (ahead.kind == "name" and ahead.token == "where"):
            ahead.advance()
        if ahead.take("where"):
            self._at, back = ahead, self._at
            for var in ahead.items(":", self._limits):
                self._vars[var.name] = var
            self._at = back
            return
        for shape in re.findall(r"\[([^\]]*)\]", line.text):
            for name in re.findall(r"[A-Za-z_]\w*", shape):
                if name not in BINARY_OPS and name != "select":
                    self._vars.setdefault(name, Var(name))

    def _limits(self) -> Var:
        at = self._at
        name, lower, upper = at.name(), None, None
        while at.kind == "sign" and at.token in (">=", "<="):
            if at.take(">="):
                lower = at.integer()
            else:
                at.advance()
                upper = at.integer()
            if at.take("and") and at.name() != name:
                at.fail(f"another limit of {name}")
        if at.take("before"):
            return Lead(name, lower=0, upper=upper, buffer=at.name())
        return Var(name, lower=lower, upper=upper)

    def _declaration(self) -> Buffer:
        at = self._at
        name = at.name()
        at.expect(":")
        dtype = self._dtype()
        at.expect("[")
        shape = tuple(at.items("]", self._dim))
        scope: Scope = "global"
        if at.take("in"):
            if at.token not in _SCOPES:
                at.fail(f"a scope: {', '.join(_SCOPES)}")
            scope = cast(Scope, at.token)
            at.advance()
        if name in self._buffers:
            at.fail(f"another name: {name} is declared twice")
        self._buffers[name] = Buffer(name, shape, dtype, scope)
        return self._buffers[name]

    def _dtype(self) -> str:
        at = self._at
        if at.kind != "name" or not _is_dtype(at.token):
            at.fail("a dtype")
        name = at.token
        at.advance()
        return name

    def _dim(self) -> Dim:
        begin = self._at.mark()
        dim = self._expr()
        if dim.dtype != INDEX_DTYPE or (isinstance(dim, Const) and not 0 <= dim.value < 2**63):
            self._at.back_to(begin)
            self._at.fail("a dim, a whole number or an expression of some")
        return int(dim.value) if isinstance(dim, Const) else dim

    # Statements -------------------------------------------------------------------------------------------------

    def _inner(self, indent: int) -> int:
        """The indentation of the lines nested under one indented by `indent`."""
        if not self._below(indent):
            line = self._lines[self._next - 1]
            raise ParseError(f"line {line.number}: nothing is nested under it\n  {line.text.strip()}")
        return self._lines[self._next].indent

    def _suite(self, indent: int, inner: int | None = None) -> Stmt:
        """The statements nested under a line indented by `indent`, where `inner` is known of its other lines."""
        first, found = self._inner(indent), list[Stmt]()
        inner = first if inner is None else inner
        while self._below(indent):
            if self._lines[self._next].indent != inner:
                self._take_line().fail(f"an indentation of {inner} blanks")
            found.append(self._stmt())
        return seq(*found)

    def _stmt(self) -> Stmt:
        at = self._take_line()
        if at.take("pass"):
            at.end()
            return Seq(())
        if at.take("if"):
            return self._if(at)
        if at.take("for"):
            return self._for(at)
        if at.take("block"):
            return self._block(at)
        buffer, indices = self._access()
        at.expect("=")
        value = self._expr()
        at.end()
        return Store(buffer, indices, value)

    def _if(self, at: _Cursor) -> Stmt:
        condition = self._expr()
        at.expect(":")
        at.end()
        indent = at.indent
        then = self._suite(indent)
        if self._word(indent) != "else":
            return If(condition, then)
        at = self._take_line()
        at.advance()
        at.expect(":")
        at.end()
        return If(condition, then, self._suite(indent))

    def _for(self, at: _Cursor) -> Stmt:
        name = at.name()
        at.expect("in")
        if at.token not in _KINDS:
            at.fail(f"a kind of loop: {', '.join(_KINDS)}")
        kind = _KINDS[at.token]
        at.advance()
        at.expect("(")
        extent, thread = self._expr(), None
        if kind == "thread":
            at.expect(",")
            if at.kind != "string":
                at.fail("a thread axis, such as 'blockIdx.x'")
            thread = _text(at)
            at.advance()
        at.expect(")")
        at.expect(":")
        annotations = at.attrs()
        at.end()
        with self._scope():
            var = self._vars[name] = Var(name)
            return For(var, extent, kind, self._suite(at.indent), thread, annotations)

    def _block(self, at: _Cursor) -> Block:
        name = at.name()
        at.expect(":")
        annotations = at.attrs()
        at.end()
        indent = at.indent
        inner = self._inner(indent)
        iters: list[IterVar] = []
        bindings: list[Expr] = []
        predicate: Expr = const(True, "bool")
        outside = dict(self._vars)
        while self._is_iter(inner):
            it, binding = self._iter()
            iters.append(it)
            bindings.append(binding)
        if self._word(inner) == "where":
            at = self._take_line()
            at.advance()
            predicate = self._expr()
            at.end()
        with self._scope():
            self._vars.update({it.var.name: it.var for it in iters})
            reads, writes = self._regions("reads", inner), self._regions("writes", inner)
            init = None
            if self._word(inner) == "init":
                at = self._take_line()
                at.advance()
                at.expect(":")
                at.end()
                init = self._suite(inner)
            body = self._suite(indent, inner)
        self._vars = outside
        return Block(name, tuple(iters), tuple(bindings), reads, writes, body, init, predicate, annotations)

    def _is_iter(self, indent: int) -> bool:
        if self._next == len(self._lines) or self._lines[self._next].indent != indent:
            return False
        return re.search(r"= (spatial|reduce)\(", self._lines[self._next].text) is not None

    def _iter(self) -> tuple[IterVar, Expr]:
        at = self._take_line()
        name = at.name()
        at.expect("=")
        kind = cast(IterKind, at.name())
        at.expect("(")
        extent = self._expr()
        at.expect(",")
        binding = self._expr()
        at.expect(")")
        at.end()
        return IterVar(Var(name), extent, kind), binding

    def _regions(self, title: str, indent: int) -> tuple[Region, ...]:
        if self._word(indent) != title:
            return ()
        at = self._take_line()
        at.advance()
        found = [self._region()]
        while at.take(","):
            found.append(self._region())
        at.end()
        return tuple(found)

    def _region(self) -> Region:
        buffer = self._buffer()
        self._at.expect("[")
        return Region(buffer, tuple(self._at.items("]", self._range)))

    def _range(self) -> Range:
        if self._at.take(":"):
            return Range(const(0), self._expr())
        start = self._expr()
        return Range(start, self._expr() if self._at.take("+:") else const(1))

    # Expressions ------------------------------------------------------------------------------------------------

    def _expr(self, level: int = 1) -> Expr:
        if level == _TIGHTEST:
            return self._atom()
        left = self._expr(level + 1)
        while (found := _LEVELS.get(self._at.token)) is not None and found[1] == level:
            if self._at.kind not in ("sign", "name"):
                break
            self._at.advance()
            left = self._binary(found[0], left, self._expr(level + 1))
            if level == _LEVELS["<"][1]:
                break  # comparisons do not chain
        return left

    def _binary(self, op: BinaryOp, a: Expr, b: Expr) -> Expr:
        if a.dtype != b.dtype:
            self._at.fail(f"operands of {op} to have one dtype, which {a.dtype} and {b.dtype} have not: before")
        return Binary(op, a, b)

    def _atom(self) -> Expr:
        at = self._at
        if at.take("("):
            inner = self._expr()
            at.expect(")")
            return inner
        if self._is_literal():
            return self._literal()
        if at.kind not in ("name", "string"):
            at.fail("an expression")
        name = at.name()
        if at.take("("):
            return self._call(name)
        if at.kind == "sign" and at.token == "[":
            if name not in self._buffers:
                at.fail(f"no index: {name} is no buffer; before")
            at.advance()
            return Load(self._buffers[name], tuple(at.items("]", self._expr)))
        if name not in self._vars:
            at.fail(f"a variable that is declared around this line, which {name} is not; before")
        return self._vars[name]

    def _is_literal(self) -> bool:
        at = self._at
        word = at.kind == "name" and at.token in (*_FLOAT_WORDS, "True", "False")
        return at.kind == "number" or word or (at.kind == "sign" and at.token == "-")

    def _literal(self) -> Const:
        """A number or truth value; a whole number is int64, one with a point float32."""
        at = self._at
        begin = at.mark()
        negative = at.take("-")
        token, kind = at.token, at.kind
        at.advance()
        if kind == "name" and token in ("True", "False") and not negative:
            return const(token == "True", "bool")
        if kind == "number" and token.isdigit():
            if len(token) > MOST_DIGITS:
                at.back_to(begin)
                at.fail(f"a number of at most {MOST_DIGITS} digits")
            return const(-int(token) if negative else int(token))
        if kind != "number" and token not in _FLOAT_WORDS:
            at.fail("a number after '-'; before")
        value = _FLOAT_WORDS[token] if kind == "name" else float(token)
        if kind == "number" and math.isinf(value):
            at.back_to(begin)
            at.fail("a number that float64 holds")
        return const(-value if negative else value, "float32")

    def _call(self, name: str) -> Expr:
        """What `name(` begins: a literal or cast of a dtype, a select, an operation without a sign, an intrinsic."""
        at = self._at
        if _is_dtype(name):
            begin, bare = at.mark(), self._is_literal()
            operand = self._expr()
            if not bare or not isinstance(operand, Const):
                at.expect(")")
                return Cast(operand, name)
            kinds = (bool,) if name == "bool" else (int, float) if name in FLOATS else (int,)
            if type(operand.value) not in kinds:
                at.back_to(begin)
                at.fail(f"a value of {name}")
            at.expect(")")
            return const(operand.value, name)
        args = at.items(")", self._expr)
        wanted = 3 if name == "select" else 2 if name in BINARY_OPS or name == "pow" else 1
        if name != "select" and name not in BINARY_OPS and name not in INTRINSICS:
            at.fail(f"a function that exists, which {name} does not; before")
        if len(args) != wanted:
            at.fail(f"{wanted} arguments of {name}, not {len(args)}; before")
        if name == "select":
            return Select(*args)
        if name in BINARY_OPS:
            return self._binary(cast(BinaryOp, name), args[0], args[1])
        return Call(name, tuple(args), "bool" if name in ("isnan", "not") else args[0].dtype)

    def _access(self) -> tuple[Buffer, tuple[Expr, ...]]:
        buffer = self._buffer()
        self._at.expect("[")
        return buffer, tuple(self._at.items("]", self._expr))

    def _buffer(self) -> Buffer:
        name = self._at.name()
        if name not in self._buffers:
            self._at.fail(f"a buffer that is declared, which {name} is not; before")
        return self._buffers[name]


def _is_dtype(name: str) -> bool:
    return name in DTYPES
