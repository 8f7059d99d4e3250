"""Small Winograd convolutions as functions, with what follows them in a residual network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from kedge.compiler import te
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Dim, Var
from kedge.compiler.tir.stmt import PrimFunc

N, H, W = Var("n", lower=1), Var("h", lower=1), Var("w", lower=1)


def convolution(
    x: tuple[Dim, ...], filters: int, m: int = 2, lanes: int = 4, pads: Sequence[int] = (1, 1, 1, 1)
) -> PrimFunc:
    """`relu(conv(x) + bias + shortcut)` with x (N, I/i, H, W, i) and `filters` blocks of output channels."""
    u = (m + 2, m + 2, filters, int(str(x[1])), int(str(x[-1])), lanes)
    given = [te.placeholder(x, "float32", "x"), te.placeholder(u, "float32", "u")]
    op, attrs = registry.get("conv_winograd"), {"m": m, "pads": tuple(pads)}
    types = op.infer([TensorType(tensor.shape, "float32") for tensor in given], attrs)
    assert op.lower is not None
    (y,) = op.lower(given, attrs, types)
    shape = types[0].shape
    bias = te.placeholder((filters, 1, 1, lanes), "float32", "bias")
    shortcut = te.placeholder(shape, "float32", "shortcut")
    biased = te.compute(shape, lambda n, o, h, w, i: y[n, o, h, w, i] + bias[o, 0, 0, i], name="biased")
    added = te.compute(shape, lambda *i: biased.at(i) + shortcut.at(i), name="added")
    relu = te.compute(shape, lambda *i: te.maximum(added.at(i), 0.0), name="relu")
    return te.create_prim_func([*given, bias, shortcut, relu], "winograd")


#: What functions are made of, and the sizes of their free dims.
_CASES: dict[str, tuple[Callable[[], PrimFunc], dict[str, int]]] = {
    "whole tiles": (lambda: convolution((1, 2, 4, 4, 2), 2), {}),
    "tails": (lambda: convolution((2, 1, 3, 5, 2), 3, pads=(0, 2, 1, 0)), {}),
    "four": (lambda: convolution((1, 1, 6, 4, 2), 1, m=4), {}),
    "one tile": (lambda: convolution((1, 1, 2, 2, 2), 1), {}),
    "free batch": (lambda: convolution((N, 1, 4, 3, 2), 2), {"n": 2}),
    "free sizes": (lambda: convolution((N, 1, H, W, 2), 1), {"n": 2, "h": 3, "w": 4}),
}
NAMES = tuple(_CASES)


@cache  # making them takes a second: not while tests are collected
def case(name: str) -> tuple[PrimFunc, dict[str, int]]:
    """The function of that name, with the sizes of its free dims."""
    make, symbols = _CASES[name]
    return make(), symbols
