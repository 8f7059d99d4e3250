"""`compute`: a tensor from a function of its indices, and the checks of what that function gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.errors import CompileError
from kedge.compiler.te.reads import refuse_reads_outside
from kedge.compiler.te.reductions import staged_position, staged_truth
from kedge.compiler.te.scalars import refuse_python_bool
from kedge.compiler.te.tensor import (
    Compute,
    Position,
    ReduceAxis,
    Reduction,
    Tensor,
    Truth,
    as_scalar,
    checked_dims,
    checked_name,
    of_some_depth,
)
from kedge.compiler.tir.expr import COMPARISONS, LOGICAL, Binary, Dim, Expr, ExprLike, Var
from kedge.compiler.tir.visitor import children, loads


def compute(shape: Sequence[Dim], fcompute: Callable[..., ExprLike], *, name: str = "compute") -> Tensor:
    """The tensor of `shape` whose element at `(i, j, …)` is `fcompute(i, j, …)`.

    The loops take the names of the parameters of `fcompute` (`i0, i1, …` where it takes `*indices`). Its result is a
    scalar expression, or a reduction of one: `sum(a[i, k] * b[k, j], k)`.

    Raises:
        TypeError: `fcompute` takes another number of indices, gives no scalar, or applies an operation to a dtype that
            does not have it.
        CompileError: a reduction is only a part of the element, a reduce axis is used outside of its reduction, or a
            read is certain to leave its tensor.
    """
    dims = checked_dims(shape, checked_name(name))
    axes = tuple(Var(axis) for axis in _axis_names(fcompute, len(dims), name))
    with of_some_depth(name):
        given = fcompute(*axes)
        refuse_python_bool(given, f"the element of {name}")
        body = as_scalar(given, f"the element of {name}")
        _check_element(body, name)
        _check_reads(body, dict(zip(axes, dims, strict=True)), name)
        if isinstance(body, Position):
            return staged_position(dims, axes, body, name)
        if isinstance(body, Truth):
            return staged_truth(dims, axes, body, name)
        return Tensor(name, dims, body.dtype, op=Compute(axes, body))


def _axis_names(fcompute: Callable[..., ExprLike], rank: int, name: str) -> list[str]:
    try:
        signature = inspect.signature(fcompute)
    except (TypeError, ValueError):
        return [f"i{dim}" for dim in range(rank)]
    parameters = [p for p in signature.parameters.values() if p.default is p.empty]
    if len(parameters) == rank and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return [p.name for p in parameters]
    try:
        signature.bind(*range(rank))
    except TypeError:
        raise TypeError(
            f"{name} has {rank} dims, but its function takes {signature}; it needs one index each"
        ) from None
    return [f"i{dim}" for dim in range(rank)]


def _check_element(body: Expr, name: str) -> None:
    """Refuse what would otherwise come to light when the function is verified or compiled."""
    reduced = body.axes if isinstance(body, Reduction) else ()
    seen: set[int] = set()
    used: set[Var] = set()
    stack = [body.value if isinstance(body, Reduction) else body]
    while stack:
        expr = stack.pop()
        if id(expr) in seen:
            continue
        seen.add(id(expr))
        if isinstance(expr, Reduction):
            raise CompileError(f"{name}: a reduction must be the whole body of a compute", hint="compute it separately")
        if isinstance(expr, ReduceAxis) and expr not in reduced:
            raise CompileError(
                f"{name}: reduce axis {expr.name} is used, but not reduced over", hint=f"te.sum(…, {expr.name})"
            )
        if isinstance(expr, Var):
            used.add(expr)
        if isinstance(expr, Binary):
            _check_binary(expr, name)
        stack.extend(children(expr))
    if isinstance(body, Reduction) and next(loads(body.value), None) is None:
        return  # counting, or a literal in place of a tensor
    for axis in reduced:
        if axis not in used and not (isinstance(axis.extent, int) and axis.extent == 1):
            raise CompileError(
                f"{name}: its reduction does not use the axis {axis.name}",
                hint="index a tensor with it, or leave it out",
            )


def _check_reads(body: Expr, extents: dict[Var, Dim], name: str) -> None:
    if not isinstance(body, Reduction):
        refuse_reads_outside(body, extents, name)
    else:
        refuse_reads_outside(body.value, extents | {axis: axis.extent for axis in body.axes}, name)


def _check_binary(expr: Binary, name: str) -> None:
    dtype, op = expr.a.dtype, expr.op
    if op in LOGICAL and dtype != "bool":
        raise TypeError(f"{name}: {op} of {dtype}; compare it, or te.cast(value, 'bool')")
    if op in LOGICAL or op in COMPARISONS:
        return
    if dtype == "bool":
        raise TypeError(f"{name}: {op} of bools; te.cast them to a number first")
    if op == "div" and dtype not in FLOATS:
        raise TypeError(f"{name}: true division of {dtype}; use //, or te.cast(value, 'float32')")
    if op == "truncdiv" and dtype in FLOATS:
        raise TypeError(f"{name}: truncdiv of {dtype}; use //, which rounds down")
