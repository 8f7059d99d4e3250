"""Small functions of the tensor IR that several tests schedule and run, and data for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kedge.compiler import te
from kedge.compiler.tir.expr import Binary, Call, Const, Dim, Expr, Select, Var, call, logical_and, maximum, select
from kedge.compiler.tir.interp import Array, run
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.verify import verify


def dense(m: Dim, k: int, n: int, *, relu: bool = True) -> PrimFunc:
    """`max(x @ w + b, 0)`, or `x @ w` alone."""
    x, w = te.placeholder((m, k), "float32", "x"), te.placeholder((k, n), "float32", "w")
    b, axis = te.placeholder((n,), "float32", "b"), te.reduce_axis(k, "k")
    y = te.compute((m, n), lambda i, j: te.sum(x[i, axis] * w[axis, j], axis), name="y")
    if not relu:
        return te.create_prim_func([x, w, y], "dense")
    z = te.compute((m, n), lambda i, j: maximum(y[i, j] + b[j], 0.0), name="z")
    return te.create_prim_func([x, w, b, z], "dense_relu")


def conv(n: Dim, c: int, size: int, o: int, *, kernel: int = 3, stride: int = 1, pad: int = 1) -> PrimFunc:
    """A convolution in NCHW with padding, bias and ReLU."""
    x = te.placeholder((n, c, size, size), "float32", "x")
    weight, bias = te.placeholder((o, c, kernel, kernel), "float32", "w"), te.placeholder((o,), "float32", "b")
    out = (size + 2 * pad - kernel) // stride + 1

    def padded(b: Expr, ch: Expr, h: Expr, w: Expr) -> Expr:
        inside = logical_and(h >= pad, h < size + pad, w >= pad, w < size + pad)
        return select(inside, x[b, ch, h - pad, w - pad], 0.0)

    p = te.compute((n, c, size + 2 * pad, size + 2 * pad), padded, name="pad")
    i, r, s = te.reduce_axis(c, "c"), te.reduce_axis(kernel, "r"), te.reduce_axis(kernel, "s")
    y = te.compute(
        (n, o, out, out),
        lambda b, f, h, w: te.sum(p[b, i, h * stride + r, w * stride + s] * weight[f, i, r, s], (i, r, s)),
        name="conv",
    )
    z = te.compute((n, o, out, out), lambda b, f, h, w: maximum(y[b, f, h, w] + bias[f], 0.0), name="relu")
    return te.create_prim_func([x, weight, bias, z], "conv")


def softmax(m: Dim, n: Dim) -> PrimFunc:
    """Softmax over the last axis, in four blocks."""
    x = te.placeholder((m, n), "float32", "x")
    k, j = te.reduce_axis(n, "k"), te.reduce_axis(n, "j")
    top = te.compute((m,), lambda i: te.max(x[i, k], k), name="top")
    e = te.compute((m, n), lambda i, j: call("exp", x[i, j] - top[i]), name="e")
    total = te.compute((m,), lambda i: te.sum(e[i, j], j), name="total")
    return te.create_prim_func([x, te.compute((m, n), lambda i, j: e[i, j] / total[i], name="y")], "softmax")


def pool(n: Dim, c: int, size: int) -> PrimFunc:
    """2x2 maximum pooling."""
    x = te.placeholder((n, c, size, size), "float32", "x")
    r, s = te.reduce_axis(2, "r"), te.reduce_axis(2, "s")
    half = size // 2
    y = te.compute((n, c, half, half), lambda b, f, h, w: te.max(x[b, f, h * 2 + r, w * 2 + s], (r, s)), name="y")
    return te.create_prim_func([x, y], "pool")


def mean(n: Dim, c: int, size: int) -> PrimFunc:
    """The mean over the last two of four dims."""
    x = te.placeholder((n, c, size, size), "float32", "x")
    r, s = te.reduce_axis(size, "r"), te.reduce_axis(size, "s")
    total = te.compute((n, c), lambda b, f: te.sum(x[b, f, r, s], (r, s)), name="total")
    return te.create_prim_func([x, te.compute((n, c), lambda b, f: total[b, f] / float(size * size), name="y")], "mean")


def bias_sigmoid(n: Dim, c: int, h: int, w: int) -> PrimFunc:
    """`sigmoid(x + b)` with a bias per channel."""
    x, b = te.placeholder((n, c, h, w), "float32", "x"), te.placeholder((c,), "float32", "b")
    y = te.compute((n, c, h, w), lambda i, f, p, q: x[i, f, p, q] + b[f], name="y")
    z = te.compute((n, c, h, w), lambda i, f, p, q: call("sigmoid", y[i, f, p, q]), name="z")
    return te.create_prim_func([x, b, z], "bias_sigmoid")


def transpose(m: Dim, n: Dim) -> PrimFunc:
    """`x.T`."""
    x = te.placeholder((m, n), "float32", "x")
    return te.create_prim_func([x, te.compute((n, m), lambda i, j: x[j, i], name="y")], "transpose")


def chain(n: Dim) -> PrimFunc:
    """`(x + 1) * 2 + x`, one block per step."""
    x = te.placeholder((n,), "float32", "x")
    a = te.compute((n,), lambda i: x[i] + 1.0, name="a")
    b = te.compute((n,), lambda i: a[i] * 2.0, name="b")
    return te.create_prim_func([x, te.compute((n,), lambda i: b[i] + x[i], name="c")], "chain")


_N, _M = Var("n", lower=1), Var("m", lower=2, upper=9)
#: One function of each kind, with free dims where it may have them.
SAMPLES = {
    "dense": dense(_N, 5, 6),
    "conv": conv(_N, 2, 3, 2),
    "pool": pool(_N, 2, 4),
    "chain": chain(_N),
    "bias": bias_sigmoid(_N, 2, 2, 3),
    "softmax": softmax(_N, _M),
    "mean": mean(_N, 3, 4),
    "transpose": transpose(_N, _M),
}


def evaluate(expr: Expr, env: Mapping[Var, int]) -> int | bool:
    """The value of an index expression, worked out by Python alone."""
    if isinstance(expr, Const):
        return expr.value if isinstance(expr.value, bool) else int(expr.value)
    if isinstance(expr, Var):
        return env[expr]
    if isinstance(expr, Select):
        return evaluate(expr.a if evaluate(expr.condition, env) else expr.b, env)
    if isinstance(expr, Call) and expr.name == "not":
        return not evaluate(expr.args[0], env)
    assert isinstance(expr, Binary), expr
    a, b = evaluate(expr.a, env), evaluate(expr.b, env)
    table = {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "floordiv": lambda: a // b,
        "floormod": lambda: a % b, "min": lambda: min(a, b), "max": lambda: max(a, b), "and": lambda: a and b,
        "or": lambda: a or b, "eq": lambda: a == b, "ne": lambda: a != b, "lt": lambda: a < b, "le": lambda: a <= b,
        "gt": lambda: a > b, "ge": lambda: a >= b,
    }  # fmt: skip
    return table[expr.op]()


def inputs(func: PrimFunc, symbols: Mapping[str, int] | None = None, seed: int = 0) -> list[Array]:
    """Small whole numbers as inputs: sums of their products are exact in float32, whatever the order."""
    env = {var: (symbols or {})[var.name] for var in func.sizes}
    rng = np.random.default_rng(seed)
    return [
        rng.integers(-4, 5, [d if isinstance(d, int) else int(evaluate(d, env)) for d in p.shape]).astype(p.dtype)
        for p in func.params[: len(func.params) - func.n_outputs]
    ]


def assert_same(
    before: PrimFunc, after: PrimFunc, symbols: Mapping[str, int] | None = None, *, rtol: float = 0.0
) -> None:
    """`after` is valid and computes what `before` does, one iteration at a time and vectorized; exactly, by default."""
    verify(after)
    data = inputs(before, symbols)
    expected = run(before, data, symbols)
    for vectorize in (True, False):
        for got, want in zip(run(after, data, symbols, vectorize=vectorize), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=rtol)
