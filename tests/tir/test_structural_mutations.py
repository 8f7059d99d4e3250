"""Equality by structure: any renaming is equal, any other change of any node is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Expr, Load, Select, Var, const
from kedge.compiler.tir.stmt import Block, Buffer, For, If, IterVar, PrimFunc, Range, Region, Seq, Stmt, Store
from kedge.compiler.tir.structural import equal, structural_hash
from kedge.compiler.tir.visitor import with_children
from support.functions import SAMPLES


class Rewriter:
    """Rebuilds a whole function, every variable and buffer anew; `hit` says at which node to change something."""

    def __init__(self, names: random.Random, hit: int = -1) -> None:
        self.names, self.hit, self.count = names, hit, 0
        self.vars: dict[Var, Var] = {}
        self.buffers: dict[Buffer, Buffer] = {}

    def here(self) -> bool:
        self.count += 1
        return self.count - 1 == self.hit

    def fresh(self) -> str:
        return f"v{self.names.randrange(1 << 30)}"

    def var(self, var: Var) -> Var:
        if var not in self.vars:
            lower = (var.lower or 0) + 1 if self.here() else var.lower
            self.vars[var] = Var(self.fresh(), var.dtype, lower, var.upper)
        return self.vars[var]

    def buffer(self, buffer: Buffer) -> Buffer:
        if buffer not in self.buffers:
            shape = tuple(self.expr(d) if isinstance(d, Expr) else d + 1 if self.here() else d for d in buffer.shape)
            dtype = "float64" if self.here() else buffer.dtype
            scope = "shared" if self.here() else buffer.scope
            self.buffers[buffer] = Buffer(self.fresh(), shape, dtype, scope)
        return self.buffers[buffer]

    def expr(self, expr: Expr) -> Expr:
        match expr:
            case Var():
                return self.var(expr)
            case Const(value=value, dtype=dtype):
                changed = (not value) if isinstance(value, bool) else -value or type(value)(1)
                return Const(changed if self.here() else value, dtype)
            case Load():
                return Load(self.buffer(expr.buffer), tuple(map(self.expr, expr.indices)))
            case Binary(op=op, a=a, b=b):
                new = self.expr(a), self.expr(b)
                other = {"add": "sub", "lt": "le", "and": "or"}.get(op, "add" if expr.dtype != "bool" else "eq")
                return Binary(other if self.here() else op, *new)  # type: ignore[arg-type]
            case Cast(value=value, dtype=dtype):
                return Cast(self.expr(value), "float16" if self.here() else dtype)
            case Call(name=name, args=args, dtype=dtype):
                return Call("sin" if self.here() else name, tuple(map(self.expr, args)), dtype)
            case Select(condition=condition, a=a, b=b):
                parts = self.expr(condition), self.expr(a), self.expr(b)
                return with_children(expr, (parts[0], parts[2], parts[1]) if self.here() else parts)
        raise AssertionError(expr)

    def stmt(self, stmt: Stmt) -> Stmt:
        match stmt:
            case Store():
                return Store(self.buffer(stmt.buffer), tuple(map(self.expr, stmt.indices)), self.expr(stmt.value))
            case Seq(stmts=stmts):
                new = tuple(map(self.stmt, stmts))
                return Seq(tuple(reversed(new)) if self.here() else new)
            case If(condition=condition, then=then, orelse=orelse):
                return If(self.expr(condition), self.stmt(then), None if orelse is None else self.stmt(orelse))
            case For():
                kind = "serial" if stmt.kind != "serial" else "unrolled"
                notes = {"key": 1} if self.here() else stmt.annotations
                var, extent = self.var(stmt.var), self.expr(stmt.extent)
                return For(
                    var, extent, kind if self.here() else stmt.kind, self.stmt(stmt.body), stmt.thread, notes
                )  # fmt: skip
            case Block():
                return self.block(stmt)
        raise AssertionError(stmt)

    def region(self, region: Region) -> Region:
        ranges = tuple(Range(self.expr(r.start), self.expr(r.extent)) for r in region.ranges)
        return Region(self.buffer(region.buffer), ranges)

    def block(self, block: Block) -> Block:
        iters = []
        for it in block.iters:
            kind = ("reduce" if it.kind == "spatial" else "spatial") if self.here() else it.kind
            iters.append(IterVar(self.var(it.var), self.expr(it.extent), kind))
        return Block(
            self.fresh(), tuple(iters), tuple(map(self.expr, block.bindings)), tuple(map(self.region, block.reads)),
            tuple(map(self.region, block.writes)), self.stmt(block.body),
            None if block.init is None or self.here() else self.stmt(block.init), self.expr(block.predicate),
            {"key": 1} if self.here() else dict(reversed(list(block.annotations.items()))),
        )  # fmt: skip

    def func(self, func: PrimFunc) -> PrimFunc:
        params = tuple(map(self.buffer, func.params))
        body = self.stmt(func.body)
        allocs = tuple(map(self.buffer, reversed(func.allocs)))
        return PrimFunc(self.fresh(), params, func.n_outputs, body, allocs, tuple(map(self.var, func.symbols)))


def mutants(func: PrimFunc) -> Iterator[tuple[int, PrimFunc]]:
    """The function with one change each, at every place where `Rewriter` can make one."""
    counter = Rewriter(random.Random(0))
    counter.func(func)
    for hit in range(counter.count):
        yield hit, Rewriter(random.Random(hit), hit).func(func)


@pytest.mark.parametrize("name", SAMPLES)
def test_renamed_functions_are_equal(name: str) -> None:
    func = SAMPLES[name]
    for seed in range(5):
        other = Rewriter(random.Random(seed)).func(func)
        assert equal(func, other)
        assert structural_hash(func) == structural_hash(other)


@pytest.mark.parametrize("name", SAMPLES)
def test_any_single_change_is_seen(name: str) -> None:
    func, seen = SAMPLES[name], set()
    for hit, other in mutants(func):
        assert not equal(func, other), f"change {hit} is not seen:\n{other.show()}"
        seen.add(structural_hash(other))
    assert structural_hash(func) not in seen


def test_buffers_that_swap_roles_are_seen() -> None:
    x, y, z = (Buffer(name, (4,), "float32") for name in "xyz")

    def func(first: Buffer, second: Buffer, params: tuple[Buffer, ...]) -> PrimFunc:
        i = Var("i")
        store = Store(z, (i,), Load(first, (i,)) - Load(second, (i,)))
        return PrimFunc("f", params, 1, For(i, const(4), "serial", store))

    straight, crossed = func(x, y, (x, y, z)), func(y, x, (x, y, z))
    assert not equal(straight, crossed)
    assert equal(straight, func(y, x, (y, x, z)))


def test_one_variable_is_not_two() -> None:
    x = Buffer("x", (4, 4), "float32")
    i, j = Var("i"), Var("j")

    def nest(a: Var, b: Var) -> PrimFunc:
        inner = For(j, const(4), "serial", Store(x, (a, b), const(0.0, "float32")))
        return PrimFunc("f", (x,), 1, For(i, const(4), "serial", inner))

    forms = [structural_hash(nest(a, b)) for a, b in ((i, i), (i, j), (j, i), (j, j))]
    assert len(set(forms)) == 4


def test_the_order_of_annotations_does_not_count() -> None:
    func = SAMPLES["dense"]
    body = func.body
    assert isinstance(body, (For, Seq))
    loop = body if isinstance(body, For) else next(s for s in body.stmts if isinstance(s, For))
    one, two = (replace(loop, annotations=notes) for notes in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert equal(replace(func, body=one), replace(func, body=two))
    assert not equal(replace(func, body=one), replace(func, body=replace(loop, annotations={"a": 1, "b": 3})))


def test_names_with_signs_do_not_run_together() -> None:
    """Texts in the canonical form are quoted: no value can pass for two."""
    func = SAMPLES["chain"]
    body = func.body
    loop = body if isinstance(body, For) else next(s for s in body.stmts if isinstance(s, For))  # type: ignore[attr-defined]
    one = replace(func, body=replace(loop, annotations={"a": "1,b=2"}))
    two = replace(func, body=replace(loop, annotations={"a": "1", "b": "2"}))
    assert not equal(one, two)
