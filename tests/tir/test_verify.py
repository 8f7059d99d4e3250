"""Each invariant of the tensor IR has a function that breaks it."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from kedge.compiler.errors import VerifyError
from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Expr, Load, Select, Var, const
from kedge.compiler.tir.stmt import Block, Buffer, For, If, IterVar, PrimFunc, Range, Region, Seq, Store
from kedge.compiler.tir.verify import verify

N = Var("n", lower=1)
X, Y = Buffer("x", (N,), "float32"), Buffer("y", (N,), "float32")


def make(
    value: Callable[[Var], Expr] = lambda i: Load(X, (i,)),
    *,
    change: Callable[[Block], Block] = lambda b: b,
    loop: Callable[[For], For] = lambda f: f,
    func: Callable[[PrimFunc], PrimFunc] = lambda f: f,
    index: Callable[[Var], tuple[Expr, ...]] = lambda i: (i,),
) -> PrimFunc:
    i, vi = Var("i"), Var("vi")
    block = Block(
        "y",
        (IterVar(vi, N, "spatial"),),
        (i,),
        (Region(X, (Range(vi, const(1)),)),),
        (Region(Y, (Range(vi, const(1)),)),),
        Store(Y, index(vi), value(vi)),
    )
    nest = loop(For(i, N, "serial", change(block)))
    return func(PrimFunc("f", (X, Y), 1, nest, symbols=(N,)))


def test_valid_function_is_returned():
    func = make()
    assert verify(func) is func


OTHER = Buffer("other", (N,), "float32")
STRAY = Var("stray")

BAD = {
    "variable stray in an index of x is not bound": lambda: make(lambda i: Load(X, (STRAY,))),
    "load from undeclared buffer other": lambda: make(lambda i: Load(OTHER, (i,))),
    "load from x with 2 indices; it has 1 dims": lambda: make(lambda i: Load(X, (i, i))),
    "store to y with 0 indices": lambda: make(index=lambda i: ()),
    "an index of x is int32, not int64": lambda: make(lambda i: Load(X, (Cast(i, "int32"),))),
    "the value stored to y is int64, not float32": lambda: make(lambda i: i),
    "add of float32 and int64": lambda: make(lambda i: Binary("add", Load(X, (i,)), i)),
    "truncdiv of float32": lambda: make(lambda i: Binary("truncdiv", Load(X, (i,)), Load(X, (i,)))),
    "and of float32": lambda: make(lambda i: Cast(Binary("and", Load(X, (i,)), Load(X, (i,))), "float32")),
    "arithmetic on bool": lambda: make(
        lambda i: Cast(Binary("add", const(True, "bool"), const(True, "bool")), "float32")
    ),
    "unknown operation 'xor'": lambda: make(lambda i: Binary("xor", Load(X, (i,)), Load(X, (i,)))),
    "select in the value stored to y on int64": lambda: make(lambda i: Select(i, Load(X, (i,)), Load(X, (i,)))),
    "select in the value stored to y of float32 and int64": lambda: make(lambda i: Select(i < 1, Load(X, (i,)), i)),
    "unknown intrinsic 'gamma'": lambda: make(lambda i: Call("gamma", (Load(X, (i,)),), "float32")),
    "pow in the value stored to y has 1 arguments, not 2": lambda: make(
        lambda i: Call("pow", (Load(X, (i,)),), "float32")
    ),
    "cast in the value stored to y to unknown dtype 'float7'": lambda: make(lambda i: Cast(i, "float7")),
    "literal 1 in the value stored to y is no float32": lambda: make(lambda i: Const(1, "float32")),
    "has 1 iteration variables but 2 bindings": lambda: make(
        change=lambda b: replace(b, bindings=(*b.bindings, const(0)))
    ),
    "the predicate of block y is int64": lambda: make(change=lambda b: replace(b, predicate=const(1))),
    "block y reads x without saying so": lambda: make(change=lambda b: replace(b, reads=())),
    "block y writes y without saying so": lambda: make(change=lambda b: replace(b, writes=())),
    "region of x has a wrong rank": lambda: make(change=lambda b: replace(b, reads=(Region(X, ()),))),
    "vi is of unknown kind 'other'": lambda: make(
        change=lambda b: replace(b, iters=(replace(b.iters[0], kind="other"),))
    ),
    "vectorized loop i has no constant extent": lambda: make(loop=lambda f: replace(f, kind="vectorized")),
    "loop i has unknown kind 'magic'": lambda: make(loop=lambda f: replace(f, kind="magic")),
    "serial loop i: only a parallel loop has a schedule": lambda: make(
        loop=lambda f: replace(f, annotations={"schedule": "dynamic", "chunk": 1})
    ),
    "loop i: schedule 'guided'; a chunk belongs to 'dynamic'": lambda: make(
        loop=lambda f: replace(f, kind="parallel", annotations={"schedule": "guided", "chunk": 1})
    ),
    "loop i: chunk 0 is no number of iterations": lambda: make(
        loop=lambda f: replace(f, kind="parallel", annotations={"schedule": "dynamic", "chunk": 0})
    ),
    "only a thread loop has an axis": lambda: make(loop=lambda f: replace(f, thread="blockIdx.x")),
    "the extent of loop i is float32": lambda: make(loop=lambda f: replace(f, extent=const(1, "float32"))),
    "input y is written": lambda: make(func=lambda f: replace(f, params=(Y, X), body=f.body)),
    "a buffer is declared twice": lambda: make(func=lambda f: replace(f, allocs=(X,))),
    "n_outputs is 0": lambda: make(func=lambda f: replace(f, n_outputs=0)),
    "a symbol is declared twice": lambda: make(func=lambda f: replace(f, symbols=(N, N))),
    "variable n in a dim of buffer x is not bound": lambda: make(func=lambda f: replace(f, symbols=())),
    "variable i of a loop is declared twice": lambda: make(loop=lambda f: replace(f, body=f)),
    "block y is declared twice": lambda: make(
        loop=lambda f: replace(f, body=Seq((f.body, replace(f.body, iters=(), bindings=()))))
    ),
    "register buffer r has symbolic dim n": lambda: make(
        func=lambda f: replace(f, allocs=(Buffer("r", (N,), "float32", "register"),))
    ),
    "buffer r has unknown dtype 'float7'": lambda: make(
        func=lambda f: replace(f, allocs=(Buffer("r", (1,), "float7"),))
    ),
    "buffer r has unknown scope 'moon'": lambda: make(
        func=lambda f: replace(f, allocs=(Buffer("r", (1,), "float32", "moon"),))
    ),
    "buffer r has dim -1": lambda: make(func=lambda f: replace(f, allocs=(Buffer("r", (-1,), "float32"),))),
    "the condition of an if is int64": lambda: make(func=lambda f: replace(f, body=If(const(1), f.body))),
}


@pytest.mark.parametrize("reason", BAD)
def test_refuses(reason):
    with pytest.raises(VerifyError) as caught:
        verify(BAD[reason]())
    assert reason in str(caught.value)
    assert "func f(" in str(caught.value)


def test_block_sees_only_its_own_variables():
    # A block's meaning must not depend on the loops around it.
    i, vi = Var("i"), Var("vi")
    block = Block(
        "y",
        (IterVar(vi, N, "spatial"),),
        (i,),
        (Region(X, (Range(i, const(1)),)),),
        (Region(Y, (Range(vi, const(1)),)),),
        Store(Y, (vi,), Load(X, (i,))),
    )
    with pytest.raises(VerifyError, match="variable i in the region of x in block y is not bound here"):
        verify(PrimFunc("f", (X, Y), 1, For(i, N, "serial", block), symbols=(N,)))
