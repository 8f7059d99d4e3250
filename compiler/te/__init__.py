"""Tensor expressions: say what each element is, get a `PrimFunc` with one block per tensor.

    n = Var("n", lower=1)
    x, w = placeholder((n, 784), "float32", "x"), placeholder((784, 10), "float32", "w")
    k = reduce_axis(784, "k")
    y = compute((n, 10), lambda i, j: sum(x[i, k] * w[k, j], k), name="y")
    func = create_prim_func([x, w, y], "dense")

A tensor is a `Buffer` that remembers how it is computed, so reading one (`x[i, k]`) is an ordinary `Load`. Elements are
scalar expressions: Python's arithmetic and order comparisons, the functions below, and reads whose indices may be read
from other tensors (a gather: `x[cast(index[i], "int64"), j]`). A `Var` is a symbolic dim.

A reduction is the whole body of a `compute`. `sum`, `prod`, `max` and `min` become one block; `argmax`, `argmin`, `any`
and `all` become several that every schedule, the interpreter and code generation know already.

`register_onnx` makes such a function the meaning of an operator of ONNX models; docs/tutorials/custom_operator.md shows
how.
"""

from __future__ import annotations

from kedge.compiler.te.computing import compute
from kedge.compiler.te.functions import create_prim_func
from kedge.compiler.te.functions import dataflow_order as dataflow_order
from kedge.compiler.te.operators import onnx_operator, register_onnx, unregister_onnx
from kedge.compiler.te.reductions import all, any, argmax, argmin, max, min, prod, sum  # noqa: A004
from kedge.compiler.te.scalars import (
    abs,  # noqa: A004
    cast,
    ceil,
    const,
    cos,
    eq,
    erf,
    exp,
    floor,
    isnan,
    log,
    logical_and,
    logical_not,
    logical_or,
    maximum,
    minimum,
    ne,
    pow,  # noqa: A004
    round,  # noqa: A004
    rsqrt,
    select,
    sigmoid,
    sin,
    sqrt,
    tanh,
    where,
)
from kedge.compiler.te.tensor import Compute as Compute
from kedge.compiler.te.tensor import Placeholder as Placeholder
from kedge.compiler.te.tensor import Reduce as Reduce
from kedge.compiler.te.tensor import ReduceAxis, Tensor, placeholder, reduce_axis
from kedge.compiler.tir.expr import Var

__all__ = [
    "ReduceAxis", "Tensor", "Var", "abs", "all", "any", "argmax", "argmin", "cast", "ceil", "compute", "const", "cos",
    "create_prim_func", "eq", "erf", "exp", "floor", "isnan", "log", "logical_and", "logical_not", "logical_or", "max",
    "maximum", "min", "minimum", "ne", "onnx_operator", "placeholder", "pow", "prod", "reduce_axis", "register_onnx",
    "round", "rsqrt", "select", "sigmoid", "sin", "sqrt", "sum", "tanh", "unregister_onnx", "where",
]  # fmt: skip
