"""Comparing and hashing functions by structure, whatever their variables and buffers are called.

The canonical form numbers variables and buffers in the order in which they appear, so it is the same in every
process; `structural_hash` is its SHA-256 and serves as a key of caches on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Dim, Expr, Lead, Load, Select, Var
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Region, Seq, Stmt, Store

#: A hashable value that two expressions share exactly if they are built alike from the same variables and buffers.
Key: TypeAlias = tuple[Any, ...]


def expr_key(expr: Expr, numbers: Mapping[Var, int] | None = None) -> Key:
    """A hashable key of `expr` within this process: variables and buffers count by identity.

    Variables that stand in `numbers` count by these, so that expressions over other ones may be alike.
    """
    if not numbers:
        return _expr_form(expr, id, id)
    return _expr_form(expr, lambda var: (numbers[var],) if var in numbers else id(var), id)


def expr_equal(a: Expr, b: Expr) -> bool:
    """Whether two expressions are built alike from the same variables and buffers."""
    waiting = [(a, b)]  # no recursion is as deep as sums are long
    while waiting:
        a, b = waiting.pop()
        if a is b:
            continue
        if isinstance(a, Binary) and isinstance(b, Binary):  # most differ near the root, or share what is below it
            if a.op != b.op:
                return False
            waiting += ((a.b, b.b), (a.a, b.a))
        elif isinstance(a, Var) or type(a) is not type(b) or expr_key(a) != expr_key(b):
            return False
    return True


def numbered_key(expr: Expr, numbers: dict[Var, int]) -> Key:
    """A key of `expr` that is the same in every process: variables count by their numbers.

    Those that `numbers` lacks get the next ones, and are entered there.

    Raises:
        TypeError: `expr` loads from a buffer.
    """

    def var(own: Var) -> object:
        return numbers.setdefault(own, len(numbers)), own.dtype, own.lower, own.upper

    def buffer(own: Buffer) -> object:
        raise TypeError(f"a load from {own.name} has no key")

    return _expr_form(expr, var, buffer)


def equal(a: PrimFunc, b: PrimFunc) -> bool:
    """Whether two functions are the same but for the names of the function, its variables and buffers."""
    return canonical(a) == canonical(b)


def structural_hash(func: PrimFunc) -> str:
    """SHA-256 (hex) of the canonical form: equal for equal functions, in any process on any machine."""
    return hashlib.sha256(canonical(func).encode()).hexdigest()


def canonical(func: PrimFunc) -> str:
    """The canonical form: a text without names or `attrs`; variables and buffers are numbered, typed at first use."""
    return _Canonical().func(func)


def _literal(value: object) -> str:
    # repr alone would make 1 and True differ but -0.0 and 0.0 alike under ==; text keeps all apart.
    return value.hex() if isinstance(value, float) else repr(value)


def _expr_form(expr: Expr, var: Callable[[Var], object], buffer: Callable[[Buffer], object]) -> Key:
    def go(node: Expr) -> Key:
        match node:
            case Var():
                return ("var", var(node))
            case Const(value=value, dtype=dtype):
                return ("const", _literal(value), dtype)
            case Binary(op=op, a=a, b=b):
                return (op, go(a), go(b))
            case Load(buffer=source, indices=indices):
                return ("load", buffer(source), *map(go, indices))
            case Cast(value=value, dtype=dtype):
                return ("cast", dtype, go(value))
            case Select(condition=condition, a=a, b=b):
                return ("select", go(condition), go(a), go(b))
            case Call(name=name, args=args, dtype=dtype):
                return ("call", name, dtype, *map(go, args))
        raise TypeError(f"not an expression of the tensor IR: {node!r}")

    return go(expr)


class _Canonical:
    """Numbers variables and buffers as they come up."""

    def __init__(self) -> None:
        self.vars: dict[Var, str] = {}
        self.buffers: dict[Buffer, str] = {}
        self.params: list[str] = []  # as the leads call them

    def var(self, var: Var) -> str:
        if var in self.vars:
            return self.vars[var]
        self.vars[var] = name = f"v{len(self.vars)}"
        lead = f"@{self.params.index(var.buffer)}" if isinstance(var, Lead) else ""
        return f"{name}:{var.dtype}[{var.lower},{var.upper}]{lead}"

    def buffer(self, buffer: Buffer) -> str:
        if buffer in self.buffers:
            return self.buffers[buffer]
        self.buffers[buffer] = name = f"b{len(self.buffers)}"
        shape = ",".join(map(self.dim, buffer.shape))
        return f"{name}:{buffer.dtype}({shape}){buffer.scope}"

    def dim(self, dim: Dim) -> str:
        if isinstance(dim, Const):
            return str(dim.value)
        return self.expr(dim) if isinstance(dim, Expr) else str(dim)

    def expr(self, expr: Expr) -> str:
        return str(_expr_form(expr, self.var, self.buffer))

    def region(self, region: Region) -> str:
        ranges = ",".join(f"{self.expr(r.start)}:{self.expr(r.extent)}" for r in region.ranges)
        return f"{self.buffer(region.buffer)}[{ranges}]"

    def stmt(self, stmt: Stmt) -> str:
        match stmt:
            case Store(buffer=buffer, indices=indices, value=value):
                return f"store({self.buffer(buffer)};{';'.join(map(self.expr, indices))};{self.expr(value)})"
            case Seq(stmts=stmts):
                return f"seq({';'.join(map(self.stmt, stmts))})"
            case If(condition=condition, then=then, orelse=orelse):
                other = "" if orelse is None else self.stmt(orelse)
                return f"if({self.expr(condition)};{self.stmt(then)};{other})"
            case For():
                head = f"{self.var(stmt.var)};{self.expr(stmt.extent)};{stmt.kind};{stmt.thread}"
                return f"for({head};{_attrs(stmt.annotations)};{self.stmt(stmt.body)})"
            case Block():
                return self.block(stmt)
        raise TypeError(f"not a statement of the tensor IR: {stmt!r}")

    def block(self, block: Block) -> str:
        bindings = ";".join(map(self.expr, block.bindings))
        iters = ";".join(f"{self.var(it.var)},{self.expr(it.extent)},{it.kind}" for it in block.iters)
        access = ";".join(map(self.region, (*block.reads, *block.writes)))
        init = "" if block.init is None else self.stmt(block.init)
        head = f"{len(block.reads)}|{bindings}|{iters}|{access}|{self.expr(block.predicate)}"
        return f"block({head}|{_attrs(block.annotations)}|{init}|{self.stmt(block.body)})"

    def func(self, func: PrimFunc) -> str:
        self.params = [buffer.name for buffer in func.params]
        params = ";".join(map(self.buffer, func.params))
        symbols = ";".join(map(self.var, func.symbols))
        # Allocations are numbered and typed where they are used, so their order carries no meaning.
        body = self.stmt(func.body)
        return f"func({params}|{func.n_outputs}|{symbols}|{body}|{len(func.allocs)})"


def _attrs(attrs: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={attrs[key]!r}" for key in sorted(attrs))
