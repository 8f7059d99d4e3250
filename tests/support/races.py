"""Which iterations of a loop get into each other's way if they run at once: found by running them, not by proof."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from kedge.compiler.schedule.dependence import is_private, own_per_iteration
from kedge.compiler.tir.expr import Binary, Call, Const, Expr, Var
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Stmt
from kedge.compiler.tir.visitor import loads, stmt_children, stores

#: The elements that a statement touched, and whether it wrote them.
Touched: TypeAlias = dict[tuple[Buffer, tuple[int, ...]], bool]
_Value: TypeAlias = Callable[[], int]

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "floormod": operator.mod, "min": min, "max": max, "and": operator.and_, "or": operator.or_,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def race(func: PrimFunc, symbols: Mapping[str, int]) -> str | None:
    """Two iterations of a parallel or vectorized loop of which one writes what the other touches, in words.

    Buffers that each iteration of the loop has for itself do not count; that they are used outside of it, too, does.
    Indices and predicates must not depend on data. Both sides of a `select` count as read.
    """
    try:
        _Run(func, symbols).stmt(func.body)
    except _Race as found:
        return str(found)
    return None


class _Race(Exception):
    """Two iterations met."""


class _Run:
    def __init__(self, func: PrimFunc, symbols: Mapping[str, int]) -> None:
        self.func = func
        self.env = {var: symbols[var.name] for var in func.symbols}
        self.values: dict[Expr, _Value] = {}
        self.accesses: dict[Stmt, list[tuple[Buffer, tuple[Expr, ...], bool]]] = {}

    def stmt(self, stmt: Stmt) -> Touched:
        match stmt:
            case For(kind=kind):
                parts = (self.iteration(stmt, value) for value in range(self.value(stmt.extent)))
                if kind in ("parallel", "vectorized"):
                    parts = self.apart(stmt, parts)
            case Block():
                self.env.update({it.var: self.value(b) for it, b in zip(stmt.iters, stmt.bindings, strict=True)})
                first = all(self.env[it.var] == 0 for it in stmt.iters if it.kind == "reduce")
                runs = [stmt.init, stmt.body] if first else [stmt.body]
                parts = (self.stmt(s) for s in runs if s is not None and self.value(stmt.predicate))
            case If():
                raise NotImplementedError("blocks of these functions have no branches")
            case _ if stmt_children(stmt):
                parts = (self.stmt(child) for child in stmt_children(stmt))
            case _:
                return self.touched(stmt)
        result: Touched = {}
        for part in parts:
            for element, written in part.items():
                result[element] = written or result.get(element, False)
        return result

    def iteration(self, loop: For, value: int) -> Touched:
        self.env[loop.var] = value
        return self.stmt(loop.body)

    def apart(self, loop: For, parts: Iterator[Touched]) -> Iterator[Touched]:
        """The parts, of which no two may touch an element that one writes."""
        before: dict[tuple[Buffer, tuple[int, ...]], tuple[int, bool]] = {}
        for number, part in enumerate(parts):
            shared = {e: w for e, w in part.items() if loop.kind == "vectorized" or not own_per_iteration(loop, e[0])}
            for element, written in shared.items():
                other, wrote = before.setdefault(element, (number, written))
                if other != number and (written or wrote):
                    buffer, index = element
                    where = f"iterations {other} and {number} of {loop.kind} loop {loop.var.name}"
                    raise _Race(f"{where} meet in {buffer.name}{list(index)}")
            stray = next((b for b, _ in part.keys() - shared.keys() if not is_private(self.func, loop, b)), None)
            if stray is not None:
                raise _Race(f"{stray.name} in {stray.scope} scope is used outside of {loop.kind} loop {loop.var.name}")
            yield shared

    def touched(self, leaf: Stmt) -> Touched:
        if leaf not in self.accesses:
            written = [(store.buffer, store.indices, True) for store in stores(leaf)]
            self.accesses[leaf] = [*((load.buffer, load.indices, False) for load in loads(leaf)), *written]
        found: Touched = {}
        for buffer, indices, is_write in self.accesses[leaf]:
            element = buffer, tuple(map(self.value, indices))
            found[element] = is_write or found.get(element, False)
        return found

    def value(self, expr: Expr) -> int:
        if expr not in self.values:
            self.values[expr] = self.compiled(expr)
        return self.values[expr]()

    def compiled(self, expr: Expr) -> _Value:
        match expr:
            case Const(value=value):
                return lambda: int(value)
            case Var():
                return lambda: self.env[expr]
            case Binary(op=op, a=a, b=b):
                do, left, right = _OPERATIONS[op], self.compiled(a), self.compiled(b)
                return lambda: do(left(), right())
            case Call(name="not", args=(a,)):
                inner = self.compiled(a)
                return lambda: not inner()
        raise NotImplementedError(f"{type(expr).__name__} in an index")
