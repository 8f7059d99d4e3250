"""The invariants of the tensor IR. Every pass takes valid functions and returns valid functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np

from kedge.compiler.dtypes import DTYPES, FLOATS
from kedge.compiler.errors import VerifyError
from kedge.compiler.tir.expr import (
    BINARY_OPS,
    COMPARISONS,
    INDEX_DTYPE,
    INTRINSICS,
    LOGICAL,
    Binary,
    Call,
    Cast,
    Const,
    Expr,
    Lead,
    Load,
    Select,
    Var,
)
from kedge.compiler.tir.printer import print_expr, print_func
from kedge.compiler.tir.stmt import Block, Buffer, For, If, LoopKind, PrimFunc, Region, Scope, Seq, Stmt, Store
from kedge.compiler.tir.visitor import children, loads, stores


def verify(func: PrimFunc) -> PrimFunc:
    """`func` itself, if it is valid.

    Checked: parameters and allocations are distinct and sized by the function's symbols; every variable is bound by
    a loop, a block or a symbol, and by one only; a block uses nothing of the loops around it but through its
    bindings; operands' dtypes fit; buffers are declared and indexed with as many int64 values as they have dims;
    inputs are not written; block names are unique; regions name what the body touches; registers are of fixed size.

    Raises:
        VerifyError: naming the first violation, with the printed function.
    """
    _Verifier(func).run()
    return func


class _Verifier:
    def __init__(self, func: PrimFunc) -> None:
        self.f = func
        self.inputs = frozenset(func.params[: len(func.params) - func.n_outputs])
        self.buffers = frozenset((*func.params, *func.allocs))
        self.declared: set[Var] = set(func.symbols)
        self.blocks: set[str] = set()

    def fail(self, reason: str) -> VerifyError:
        return VerifyError(f"{self.f.name} is not valid: {reason}\n{print_func(self.f)}")

    def need(self, holds: bool, reason: str) -> None:
        if not holds:
            raise self.fail(reason)

    # The function -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        func = self.f
        self.need(1 <= func.n_outputs <= len(func.params), f"n_outputs is {func.n_outputs}")
        everything = (*func.params, *func.allocs)
        self.need(len(set(everything)) == len(everything), "a buffer is declared twice")
        self.need(len(set(func.symbols)) == len(func.symbols), "a symbol is declared twice")
        for symbol in func.symbols:
            self.need(symbol.dtype == INDEX_DTYPE, f"symbol {symbol.name} is {symbol.dtype}, not {INDEX_DTYPE}")
            if isinstance(symbol, Lead):
                known = symbol.buffer in (buffer.name for buffer in func.params)
                self.need(known, f"symbol {symbol.name} is of {symbol.buffer!r}, which is no parameter")
        for buffer in everything:
            self.buffer(buffer)
        for buffer in func.params:
            self.need(buffer.scope == "global", f"parameter {buffer.name} is in scope {buffer.scope!r}")
        self.stmt(func.body, frozenset(func.symbols), frozenset(func.symbols))

    def buffer(self, buffer: Buffer) -> None:
        self.need(_is_dtype(buffer.dtype), f"buffer {buffer.name} has unknown dtype {buffer.dtype!r}")
        self.need(buffer.scope in get_args(Scope), f"buffer {buffer.name} has unknown scope {buffer.scope!r}")
        for dim in buffer.shape:
            if isinstance(dim, int):
                self.need(dim >= 0, f"buffer {buffer.name} has dim {dim}")
                continue
            self.need(buffer.scope != "register", f"register buffer {buffer.name} has symbolic dim {print_expr(dim)}")
            self.index(dim, frozenset(self.f.symbols), f"a dim of buffer {buffer.name}")

    # Statements. `scope` are the variables in sight; `outer` those that a block may use besides its own. ----------

    def stmt(self, stmt: Stmt, scope: frozenset[Var], outer: frozenset[Var]) -> None:
        match stmt:
            case Store():
                self.access(stmt.buffer, stmt.indices, scope, "store to")
                self.need(stmt.buffer not in self.inputs, f"input {stmt.buffer.name} is written")
                self.typed(stmt.value, stmt.buffer.dtype, scope, f"the value stored to {stmt.buffer.name}")
            case Seq(stmts=stmts):
                for sub in stmts:
                    self.stmt(sub, scope, outer)
            case If(condition=condition, then=then, orelse=orelse):
                self.typed(condition, "bool", scope, "the condition of an if")
                self.stmt(then, scope, outer)
                if orelse is not None:
                    self.stmt(orelse, scope, outer)
            case For():
                self.loop(stmt, scope, outer)
            case Block():
                self.block(stmt, scope, outer)
            case _:
                raise self.fail(f"{type(stmt).__name__} is no statement")

    def declare(self, var: Var, where: str) -> None:
        self.need(var not in self.declared, f"variable {var.name} of {where} is declared twice")
        self.need(var.dtype == INDEX_DTYPE, f"variable {var.name} of {where} is {var.dtype}")
        self.declared.add(var)

    def loop(self, loop: For, scope: frozenset[Var], outer: frozenset[Var]) -> None:
        name = loop.var.name
        self.declare(loop.var, "a loop")
        self.index(loop.extent, scope, f"the extent of loop {name}")
        self.need(loop.kind in get_args(LoopKind), f"loop {name} has unknown kind {loop.kind!r}")
        self.need((loop.kind == "thread") == (loop.thread is not None), f"loop {name}: only a thread loop has an axis")
        if loop.kind in ("vectorized", "unrolled", "tensorized"):
            self.need(isinstance(loop.extent, Const), f"{loop.kind} loop {name} has no constant extent")
        if "schedule" in loop.annotations or "chunk" in loop.annotations:
            self.chunks(loop)
        for key in ("prefetch", "spread"):
            if key in loop.annotations:
                self.prefetches(loop, key)
        self.stmt(loop.body, scope | {loop.var}, outer)

    def chunks(self, loop: For) -> None:
        """How a parallel loop is dealt out."""
        name, schedule, chunk = loop.var.name, loop.annotations.get("schedule"), loop.annotations.get("chunk")
        self.need(loop.kind == "parallel", f"{loop.kind} loop {name}: only a parallel loop has a schedule")
        self.need(schedule == "dynamic", f"loop {name}: schedule {schedule!r}; a chunk belongs to 'dynamic'")
        fits = type(chunk) is int and 1 <= chunk < 2**63
        self.need(fits, f"loop {name}: chunk {chunk!r} is no number of iterations (1 to 2**63 - 1)")

    def prefetches(self, loop: For, key: str) -> None:
        """How far ahead a loop asks for what it reads."""
        name, ahead = loop.var.name, loop.annotations[key]
        self.need(isinstance(ahead, Mapping), f"loop {name}: {key} is no mapping from buffers to iterations")
        read = {load.buffer.name for load in loads(loop.body)}
        for buffer, offset in ahead.items():
            self.need(buffer in read, f"loop {name} prefetches {buffer!r}, which nothing in it reads")
            fits = type(offset) is int and 1 <= offset < 2**31
            self.need(fits, f"loop {name}: offset {offset!r} of {key} is no number of iterations (1 to 2**31 - 1)")

    def block(self, block: Block, scope: frozenset[Var], outer: frozenset[Var]) -> None:
        where = f"block {block.name}"
        self.need(block.name not in self.blocks, f"{where} is declared twice")
        self.blocks.add(block.name)
        self.need(
            len(block.iters) == len(block.bindings),
            f"{where} has {len(block.iters)} iteration variables but {len(block.bindings)} bindings",
        )
        for it, binding in zip(block.iters, block.bindings, strict=True):
            self.declare(it.var, where)
            self.need(it.kind in ("spatial", "reduce"), f"{where}: {it.var.name} is of unknown kind {it.kind!r}")
            self.index(it.extent, outer, f"the extent of {it.var.name} in {where}")
            self.index(binding, scope, f"the binding of {it.var.name} in {where}")
        self.typed(block.predicate, "bool", scope, f"the predicate of {where}")
        inside = outer | {it.var for it in block.iters}
        for region in (*block.reads, *block.writes):
            self.region(region, inside, where)
        self.stmt(block.body, inside, inside)
        if block.init is not None:
            self.stmt(block.init, inside, inside)
        self.touched(block)

    def region(self, region: Region, scope: frozenset[Var], where: str) -> None:
        name = region.buffer.name
        self.need(region.buffer in self.buffers, f"{where} names undeclared buffer {name} in its regions")
        self.need(len(region.ranges) == len(region.buffer.shape), f"{where}: region of {name} has a wrong rank")
        for r in region.ranges:
            self.index(r.start, scope, f"the region of {name} in {where}")
            self.index(r.extent, scope, f"the region of {name} in {where}")

    def touched(self, block: Block) -> None:
        written = {store.buffer for store in stores(block.body)}
        own = written if block.init is not None else set()
        read = {load.buffer for load in loads(block.body)} - own
        for kind, used, regions in (("reads", read, block.reads), ("writes", written, block.writes)):
            named = {region.buffer for region in regions}
            missing = sorted(buffer.name for buffer in used - named)
            self.need(not missing, f"block {block.name} {kind} {', '.join(missing)} without saying so")

    # Expressions ------------------------------------------------------------------------------------------------

    def index(self, expr: Expr, scope: frozenset[Var], where: str) -> None:
        self.typed(expr, INDEX_DTYPE, scope, where)

    def typed(self, expr: Expr, dtype: str, scope: frozenset[Var], where: str) -> None:
        self.expr(expr, scope, where)
        self.need(expr.dtype == dtype, f"{where} is {expr.dtype}, not {dtype}: {print_expr(expr)}")

    def access(self, buffer: Buffer, indices: tuple[Expr, ...], scope: frozenset[Var], what: str) -> None:
        self.need(buffer in self.buffers, f"{what} undeclared buffer {buffer.name}")
        self.need(
            len(indices) == len(buffer.shape),
            f"{what} {buffer.name} with {len(indices)} indices; it has {len(buffer.shape)} dims",
        )
        for index in indices:
            self.index(index, scope, f"an index of {buffer.name}")

    def expr(self, expr: Expr, scope: frozenset[Var], where: str) -> None:
        if isinstance(expr, Load):
            return self.access(expr.buffer, expr.indices, scope, "load from")
        for child in _children(expr, self):
            self.expr(child, scope, where)
        match expr:
            case Const(value=value, dtype=dtype):
                self.need(_fits(value, dtype), f"literal {value!r} in {where} is no {dtype}")
            case Var():
                self.need(expr in scope, f"variable {expr.name} in {where} is not bound here")
            case Binary():
                self.binary(expr, where)
            case Select(condition=condition, a=a, b=b):
                self.need(condition.dtype == "bool", f"select in {where} on {condition.dtype}: {print_expr(expr)}")
                self.need(a.dtype == b.dtype, f"select in {where} of {a.dtype} and {b.dtype}: {print_expr(expr)}")
            case Call(name=name, args=args):
                arity = 2 if name == "pow" else 1
                self.need(name in INTRINSICS, f"unknown intrinsic {name!r} in {where}")
                self.need(len(args) == arity, f"{name} in {where} has {len(args)} arguments, not {arity}")
            case Cast(dtype=dtype):
                self.need(_is_dtype(dtype), f"cast in {where} to unknown dtype {dtype!r}")
        return None

    def binary(self, expr: Binary, where: str) -> None:
        op, dtype, text = expr.op, expr.a.dtype, print_expr(expr)
        self.need(op in BINARY_OPS, f"unknown operation {op!r} in {where}")
        self.need(dtype == expr.b.dtype, f"{op} of {dtype} and {expr.b.dtype} in {where}: {text}")
        if op in LOGICAL:
            self.need(dtype == "bool", f"{op} of {dtype} in {where}: {text}")
        elif op not in COMPARISONS:
            self.need(dtype != "bool", f"arithmetic on bool in {where}: {text}")
        if op in ("div", "truncdiv"):
            floating = dtype in FLOATS
            self.need(floating == (op == "div"), f"{op} of {dtype} in {where}: {text}")


def _children(expr: Expr, verifier: _Verifier) -> tuple[Expr, ...]:
    try:
        return children(expr)
    except TypeError as error:
        raise verifier.fail(f"{type(expr).__name__} is no expression of the tensor IR") from error


def _is_dtype(name: str) -> bool:
    return name in DTYPES


def _fits(value: object, dtype: str) -> bool:
    if dtype == "bool":
        return isinstance(value, bool)
    if not _is_dtype(dtype) or isinstance(value, bool):
        return False
    if dtype in FLOATS:
        return isinstance(value, float)
    info = np.iinfo(dtype)
    return isinstance(value, int) and info.min <= value <= info.max
