"""Functions, statements and expressions as text, for people and golden tests.

    func relu(x: float32[n, 10]) -> (y: float32[n, 10]) where n >= 1:
      for i in parallel(n):
        for j in range(10):
          block y:
            vi = spatial(n, i)
            vj = spatial(10, j)
            reads x[vi, vj]
            writes y[vi, vj]
            y[vi, vj] = max(x[vi, vj], 0.0)

Two things of one name in one scope are told apart by a suffix (`i`, `i_1`); a name that is no plain word stands in
quotes. `parser` reads the text back. A function's `attrs`, which say where it came from, are left out.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Call, Cast, Const, Dim, Expr, Lead, Load, Select, Var
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Range, Region, Seq, Stmt, Store

#: The operations that have a sign: that, and how tightly it binds.
INFIX: Mapping[str, tuple[str, int]] = {
    "or": ("or", 1), "and": ("and", 2),
    "eq": ("==", 3), "ne": ("!=", 3), "lt": ("<", 3), "le": ("<=", 3), "gt": (">", 3), "ge": (">=", 3),
    "add": ("+", 4), "sub": ("-", 4),
    "mul": ("*", 5), "div": ("/", 5), "floordiv": ("//", 5), "floormod": ("%", 5),
}  # fmt: skip
#: The word for each kind of loop; "thread" names its axis too.
LOOPS: Mapping[str, str] = {
    "serial": "range",
    "parallel": "parallel",
    "vectorized": "vectorized",
    "unrolled": "unrolled",
    "tensorized": "tensorized",
}
_COMPARISON = 3  # does not chain
_PLAIN = re.compile(r"[A-Za-z_]\w*\Z")
#: Words with a meaning of their own.
_RESERVED = frozenset(
    {"func", "alloc", "block", "for", "if", "else", "pass", "where", "reads", "writes", "init", "in", "and", "or",
     "True", "False", "inf", "nan"}
)  # fmt: skip


def print_func(func: PrimFunc) -> str:
    """A whole function as text, without a newline at its end."""
    return "\n".join(Printer(_all_buffers(func), func.symbols).func(func))


def print_stmt(stmt: Stmt, func: PrimFunc | None = None) -> str:
    """A statement as text; with `func`, under the names that its buffers and symbols have there."""
    printer = Printer(_all_buffers(func), func.symbols) if func else Printer((), ())
    return "\n".join(printer.stmt(stmt))


def print_expr(expr: Expr) -> str:
    """An expression as text."""
    return Printer((), ()).expr(expr)


def print_shape(shape: Iterable[Dim]) -> str:
    """Dims as text: `n, 10`."""
    return Printer((), ()).shape(shape)


def _all_buffers(func: PrimFunc) -> tuple[Buffer, ...]:
    return (*func.params, *func.allocs)


class Printer:
    """The names of one text, and its parts under these names."""

    def __init__(self, buffers: Iterable[Buffer], symbols: Iterable[Var]) -> None:
        self._names: dict[Var | Buffer, str] = {}
        self._used: set[str] = set()
        for symbol in symbols:
            self.name(symbol)
        for buffer in buffers:
            self.name(buffer)

    def name(self, item: Var | Buffer) -> str:
        """What a variable or buffer is called here."""
        if item not in self._names:
            name, count = item.name, 0
            while name in self._used:
                count += 1
                name = f"{item.name}_{count}"
            self._names[item] = name
            self._used.add(name)
        return word(self._names[item])

    @contextmanager
    def scope(self, declared: Iterable[Var]) -> Iterator[None]:
        """Names of `declared` are free again afterwards, so that sibling loops may both be called `i`."""
        variables = [var for var in declared if var not in self._names]
        for var in variables:
            self.name(var)
        yield
        for var in variables:
            self._used.discard(self._names.pop(var))

    # Expressions ------------------------------------------------------------------------------------------------

    def expr(self, expr: Expr, level: int = 0) -> str:
        """An expression, in brackets where what stands around it binds tighter than `level`."""
        match expr:
            case Const():
                return _literal(expr)
            case Var():
                return self.name(expr)
            case Load(buffer=buffer, indices=indices):
                return f"{self.name(buffer)}[{self.args(indices)}]"
            case Cast(value=Const() as value, dtype=dtype):
                return f"{dtype}({value.dtype}({value.value!r}))"  # `dtype(3)` is a literal of that dtype
            case Cast(value=value, dtype=dtype):
                return f"{dtype}({self.expr(value)})"
            case Select(condition=condition, a=a, b=b):
                return f"select({self.args((condition, a, b))})"
            case Call(name=name, args=args):
                return f"{name}({self.args(args)})"
            case Binary(op=op) if op in INFIX:
                return self.infix(expr, level)
            case Binary(op=op, a=a, b=b):
                return f"{op}({self.args((a, b))})"
        return f"<{type(expr).__name__}>"

    def infix(self, expr: Binary, level: int) -> str:
        """An operation that has a sign."""
        sign, own = INFIX[expr.op]
        left_level = own + 1 if own == _COMPARISON else own
        text = f"{self.expr(expr.a, left_level)} {sign} {self.expr(expr.b, own + 1)}"
        return f"({text})" if own < level else text

    def args(self, exprs: Iterable[Expr]) -> str:
        """Expressions with commas between."""
        return ", ".join(self.expr(e) for e in exprs)

    def shape(self, shape: Iterable[Dim]) -> str:
        """Dims with commas between."""
        return ", ".join(str(d) if isinstance(d, int) else self.expr(d) for d in shape)

    def region(self, region: Region) -> str:
        """A part of a buffer: `x[i, :8]`."""
        return f"{self.name(region.buffer)}[{', '.join(self.range(r) for r in region.ranges)}]"

    def range(self, r: Range) -> str:
        """An index, `:extent` from 0 on, or `start +: extent`."""
        if isinstance(r.extent, Const) and r.extent.value == 1:
            return self.expr(r.start)
        if isinstance(r.start, Const) and r.start.value == 0:
            return f":{self.expr(r.extent)}"
        return f"{self.expr(r.start)} +: {self.expr(r.extent)}"

    # Statements -------------------------------------------------------------------------------------------------

    def stmt(self, stmt: Stmt) -> Iterator[str]:
        """The lines of a statement."""
        match stmt:
            case Store(buffer=buffer, indices=indices, value=value):
                yield f"{self.name(buffer)}[{self.args(indices)}] = {self.expr(value)}"
            case Seq(stmts=stmts):
                for sub in stmts:
                    yield from self.stmt(sub)
                if not stmts:
                    yield "pass"
            case If(condition=condition, then=then, orelse=orelse):
                yield f"if {self.expr(condition)}:"
                yield from self.indented(then)
                if orelse is not None:
                    yield "else:"
                    yield from self.indented(orelse)
            case For():
                yield from self.loop(stmt)
            case Block():
                yield from self.block(stmt)
            case _:
                yield f"<{type(stmt).__name__}>"

    def indented(self, stmt: Stmt) -> Iterator[str]:
        """The lines of a statement that is nested."""
        return ("  " + line for line in self.stmt(stmt))

    def loop(self, loop: For) -> Iterator[str]:
        """The lines of a loop."""
        extent = self.expr(loop.extent)
        kind = (
            f"thread({extent}, {loop.thread!r})"
            if loop.kind == "thread"
            else f"{LOOPS.get(loop.kind, loop.kind)}({extent})"
        )
        with self.scope((loop.var,)):
            yield f"for {self.name(loop.var)} in {kind}:{attrs_text(loop.annotations)}"
            yield from self.indented(loop.body)

    def block(self, block: Block) -> Iterator[str]:
        """The lines of a block."""
        yield f"block {word(block.name)}:{attrs_text(block.annotations)}"
        bindings = [self.expr(b) for b in block.bindings]
        extents = [self.expr(it.extent) for it in block.iters]
        predicate = self.expr(block.predicate)
        with self.scope(it.var for it in block.iters):
            for it, extent, binding in zip(block.iters, extents, bindings, strict=False):
                yield f"  {self.name(it.var)} = {it.kind}({extent}, {binding})"
            if not (isinstance(block.predicate, Const) and block.predicate.value):
                yield f"  where {predicate}"
            for title, regions in (("reads", block.reads), ("writes", block.writes)):
                if regions:
                    yield f"  {title} {', '.join(map(self.region, regions))}"
            if block.init is not None:
                yield "  init:"
                yield from ("  " + line for line in self.indented(block.init))
            yield from self.indented(block.body)

    def func(self, func: PrimFunc) -> Iterator[str]:
        """The lines of a function."""
        cut = len(func.params) - func.n_outputs
        inputs, outputs = (", ".join(map(self.declare, part)) for part in (func.params[:cut], func.params[cut:]))
        where = f" where {', '.join(map(self.limits, func.symbols))}" if func.symbols else ""
        yield f"func {word(func.name)}({inputs}) -> ({outputs}){where}:"
        for buffer in func.allocs:
            yield f"  alloc {self.declare(buffer)}"
        yield from self.indented(func.body)

    def declare(self, buffer: Buffer) -> str:
        """A buffer with its type and scope."""
        scope = "" if buffer.scope == "global" else f" in {buffer.scope}"
        return f"{self.name(buffer)}: {buffer.dtype}[{self.shape(buffer.shape)}]{scope}"

    def limits(self, var: Var) -> str:
        """A symbol with what is known of it."""
        if isinstance(var, Lead):
            place = next((b for b in self._names if isinstance(b, Buffer) and b.name == var.buffer), None)
            return f"{self.name(var)} <= {var.upper} before {word(var.buffer) if place is None else self.name(place)}"
        low = f" >= {var.lower}" if var.lower is not None else ""
        high = f" <= {var.upper}" if var.upper is not None else ""
        name = self.name(var)
        return " and ".join(name + part for part in (low, high) if part) or name


def _literal(expr: Const) -> str:
    if expr.dtype in (INDEX_DTYPE, "bool", "float32"):
        return repr(expr.value)
    return f"{expr.dtype}({expr.value!r})"


def word(name: str) -> str:
    """A name as the text has it: in quotes where it is no plain word."""
    return name if _PLAIN.match(name) and name not in _RESERVED else json.dumps(name)


def attrs_text(attrs: Mapping[str, Any]) -> str:
    """Annotations as the comment that ends a line; nothing where there are none."""
    if not attrs:
        return ""
    if all(_PLAIN.match(key) and not keyword.iskeyword(key) for key in attrs):
        return f"  # {', '.join(f'{key}={value!r}' for key, value in sorted(attrs.items()))}"
    return f"  # {dict(sorted(attrs.items()))!r}"
