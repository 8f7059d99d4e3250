"""Text of expressions and functions."""

from types import MappingProxyType

import pytest

from kedge.compiler.tir.expr import Cast, Load, Var, binary, call, const, eq, logical_and, minimum, select
from kedge.compiler.tir.printer import print_expr, print_func
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Range, Region, Seq, Store
from kedge.compiler.tir.verify import verify

A, B, C = Var("a"), Var("b"), Var("c")
X = Buffer("x", (4, 4), "float32")


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        (A + B * C, "a + b * c"),
        ((A + B) * C, "(a + b) * c"),
        (A - (B - C), "a - (b - c)"),
        (A - B - C, "a - b - c"),
        (A + (B + C), "a + (b + c)"),
        (A // B % C, "a // b % c"),
        (A // (B % C), "a // (b % c)"),
        (binary("truncdiv", A, B), "truncdiv(a, b)"),
        (minimum(A, 3), "min(a, 3)"),
        (logical_and(A < B, eq(B, C)), "a < b and b == c"),
        (select(binary("or", A < B, B < C), A, B), "select(a < b or b < c, a, b)"),
        (Load(X, (A, B + 1)), "x[a, b + 1]"),
        (Cast(A, "float32"), "float32(a)"),
        (call("exp", Load(X, (A, A))), "exp(x[a, a])"),
        (const(1.5, "float32"), "1.5"),
        (const(1.5, "float64"), "float64(1.5)"),
        (const(2, "uint8"), "uint8(2)"),
        (const(True, "bool"), "True"),
        (Var("a") + Var("a"), "a + a_1"),
    ],
)
def test_expressions(expr, text):
    assert print_expr(expr) == text


def test_everything_a_function_can_have(golden):
    n = Var("n", lower=1, upper=8)
    y = Buffer("y", (n,), "float32")
    r = Buffer("r", (1,), "float32", "register")
    i, j = Var("i"), Var("i")
    note = MappingProxyType({"b": 1, "a": "x"})
    whole = (Region(r, (Range(const(0), const(1)),)),)
    first = Block("first", (), (), (), whole, Store(r, (const(0),), const(0.0, "float32")), annotations=note)
    last = Block(
        "last", (), (), whole, (Region(y, (Range(const(1), const(2)),)),), Store(y, (const(0),), Load(r, (const(0),)))
    )
    body = Seq(
        (
            For(i, n, "thread", If(i < 2, first, Seq(())), "blockIdx.x", note),
            For(j, const(1), "unrolled", last),
        )
    )
    golden("everything.txt", print_func(verify(PrimFunc("f", (y,), 1, body, (r,), (n,)))))
