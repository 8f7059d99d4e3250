"""Tensor expressions: say what each element is, get a `PrimFunc` with one block per tensor.

    n = Var("n", lower=1)
    x, w = placeholder((n, 784), "float32", "x"), placeholder((784, 10), "float32", "w")
    k = reduce_axis(784, "k")
    y = compute((n, 10), lambda i, j: sum(x[i, k] * w[k, j], k), name="y")
    func = create_prim_func([x, w, y], "dense")

A tensor is a `Buffer` that remembers how it is computed, so reading one (`x[i, k]`) is an ordinary `Load`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from kedge.compiler.errors import CompileError
from kedge.compiler.tir.expr import (
    INDEX_DTYPE,
    BinaryOp,
    Combiner,
    Dim,
    Expr,
    ExprLike,
    Load,
    Var,
    as_expr,
    binary,
    identity,
)  # fmt: skip
from kedge.compiler.tir.regions import access_regions
from kedge.compiler.tir.simplify import over, simplify
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import children, free_vars, loads, replace_buffers_expr, seq, substitute_expr

Indices: TypeAlias = "ExprLike | tuple[ExprLike, ...]"


@dataclass(frozen=True, slots=True, eq=False)
class ReduceAxis(Var):
    """A variable to reduce over, running over `[0, extent)`."""

    extent: Dim = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reduce(Expr):
    """`value` combined over `axes`, starting from the combiner's identity. Only as the root of a `compute` body."""

    combiner: Combiner
    value: Expr
    axes: tuple[ReduceAxis, ...]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype of `value`, in which it is accumulated."""
        return self.value.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """A tensor given from outside."""


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """A tensor whose element at `axes` is `body`: a scalar expression, or a `Reduce` of one."""

    axes: tuple[Var, ...]
    body: Expr

    @property
    def value(self) -> Expr:
        """The scalar under the reduction, or the body itself."""
        return self.body.value if isinstance(self.body, Reduce) else self.body

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the body reads, each once, in order of appearance."""
        sources = (load.buffer for load in loads(self.value))
        return tuple(dict.fromkeys(source for source in sources if isinstance(source, Tensor)))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor(Buffer):
    """A tensor and how it comes to be. `t[i, j]` reads one element."""

    op: Placeholder | Compute = Placeholder()

    @property
    def buffer(self) -> Buffer:
        """The buffer that loads of this tensor name (the tensor itself; functions get plain copies)."""
        return self

    def __getitem__(self, indices: Indices) -> Load:
        given = indices if isinstance(indices, tuple) else (indices,)
        if len(given) != len(self.shape):
            raise IndexError(f"{self.name} has {len(self.shape)} dims but was given {len(given)} indices")
        exprs = tuple(as_expr(index) for index in given)
        for index in exprs:
            if index.dtype != INDEX_DTYPE:
                raise TypeError(f"index of {self.name} is {index.dtype}; cast it: Cast(value, {INDEX_DTYPE!r})")
        return Load(self, exprs)

    def at(self, indices: Sequence[ExprLike]) -> Load:
        """The element at a sequence of indices; also reads a tensor without dims: `t.at(())`."""
        return self[tuple(indices)]


def placeholder(shape: Sequence[Dim], dtype: str, name: str) -> Tensor:
    """A tensor given from outside."""
    return Tensor(name, tuple(shape), dtype)


def reduce_axis(extent: Dim, name: str = "k") -> ReduceAxis:
    """A variable running over `[0, extent)`, for `sum`, `prod`, `max` and `min`.

    A symbolic extent must be at least 1 when the function runs: a loop without iterations initialises nothing.
    """
    return ReduceAxis(name, extent=extent)


def sum(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The sum of `value` over `axis`, accumulated in the dtype of `value`; 0 where there is nothing to add."""
    return _reduce("add", value, axis)


def prod(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    """The product of `value` over `axis`; 1 where there is nothing to multiply."""
    return _reduce("mul", value, axis)


def max(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The largest `value` over `axis` (NaN wins); the dtype's lowest value where there is none."""
    return _reduce("max", value, axis)


def min(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The smallest `value` over `axis` (NaN wins); the dtype's highest value where there is none."""
    return _reduce("min", value, axis)


def compute(shape: Sequence[Dim], fcompute: Callable[..., ExprLike], *, name: str = "compute") -> Tensor:
    """The tensor of `shape` whose element at `(i, j, …)` is `fcompute(i, j, …)`.

    The loops take the names of the parameters of `fcompute` (`i0, i1, …` where it takes `*indices`). Its result is a
    scalar expression, or a reduction of one: `sum(a[i, k] * b[k, j], k)`.
    """
    axes = tuple(Var(axis) for axis in _axis_names(fcompute, len(shape)))
    body = as_expr(fcompute(*axes))
    op = Compute(axes, body)
    if _has_reduce(op.value):
        raise CompileError(f"{name}: a reduction must be the whole body of a compute", hint="compute it separately")
    return Tensor(name, tuple(shape), body.dtype, op=op)


def create_prim_func(tensors: Sequence[Tensor], name: str, attrs: Mapping[str, Any] | None = None) -> PrimFunc:
    """The function that computes the outputs among `tensors` (last) from the placeholders (first).

    Computes in between become allocations, each with a block of its own, in data-flow order. `symbols` are the
    variables in the shapes of `tensors`, in order of appearance, and then those that only computing depends on.
    Buffers and blocks get unique names.

    Raises:
        CompileError: an output stands before a placeholder, there is no output, or a placeholder that is read or a
            symbol that is used is missing from `tensors`.
    """
    outputs = [t for t in tensors if isinstance(t.op, Compute)]
    n_inputs = len(tensors) - len(outputs)
    if not outputs or any(isinstance(t.op, Compute) for t in tensors[:n_inputs]) or len(set(tensors)) < len(tensors):
        raise CompileError(f"{name}: give each placeholder once, then each output once (at least one)")
    order = _dataflow_order(outputs)
    for tensor in order:
        if isinstance(tensor.op, Placeholder) and tensor not in tensors:
            raise CompileError(f"{name}: placeholder {tensor.name!r} is read but missing from the parameters")
    names = _Names()
    buffers: dict[Buffer, Buffer] = {}
    for tensor in (*tensors, *order):
        if tensor not in buffers:
            buffers[tensor] = Buffer(names.unique(tensor.name), tensor.shape, tensor.dtype)
    blocks = [_block_nest(t, t.op, buffers) for t in order if isinstance(t.op, Compute)]
    allocs = tuple(buffers[t] for t in order if isinstance(t.op, Compute) and t not in tensors)
    params = tuple(buffers[t] for t in tensors)
    shown = dict.fromkeys(v for t in tensors for d in t.shape if isinstance(d, Expr) for v in free_vars(d))
    symbols = tuple(dict.fromkeys((*shown, *(v for t in order for v in _symbols_in(t)))))
    return PrimFunc(
        name, params, len(outputs), seq(*blocks), allocs, symbols, MappingProxyType(dict(attrs or {}))
    )  # fmt: skip


def _symbols_in(tensor: Tensor) -> Iterator[Var]:
    """The symbolic dims that computing a tensor depends on."""
    extents = list(tensor.shape)
    own: tuple[Var, ...] = ()
    if isinstance(tensor.op, Compute):
        reduced = tensor.op.body.axes if isinstance(tensor.op.body, Reduce) else ()
        own = (*tensor.op.axes, *reduced)
        extents += [axis.extent for axis in reduced]
        yield from (var for var in free_vars(tensor.op.value) if var not in own)
    yield from (var for dim in extents if isinstance(dim, Expr) for var in free_vars(dim))


class _Names:
    """Hands out each name once: a second `x` becomes `x_1`."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._used:
            count += 1
            candidate = f"{name}_{count}"
        self._used.add(candidate)
        return candidate


def _reduce(combiner: Combiner, value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    axes = (axis,) if isinstance(axis, ReduceAxis) else tuple(axis)
    if not axes:
        raise CompileError("a reduction needs at least one axis")
    neutral = identity(combiner, value.dtype)
    empty = any(isinstance(each.extent, int) and each.extent == 0 for each in axes)
    return neutral if empty else Reduce(combiner, value, axes)


def _axis_names(fcompute: Callable[..., ExprLike], rank: int) -> list[str]:
    parameters = [p for p in inspect.signature(fcompute).parameters.values() if p.default is p.empty]
    if len(parameters) == rank and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return [p.name for p in parameters]
    return [f"i{dim}" for dim in range(rank)]


def _has_reduce(expr: Expr) -> bool:
    return isinstance(expr, Reduce) or any(map(_has_reduce, children(expr)))


def _dataflow_order(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor that `outputs` need and they themselves, producers first."""
    order: dict[Tensor, None] = {}
    stack: list[tuple[Tensor, bool]] = [(t, False) for t in reversed(outputs)]
    while stack:
        tensor, expanded = stack.pop()
        if tensor in order:
            continue
        if expanded or isinstance(tensor.op, Placeholder):
            order[tensor] = None
        else:
            stack.append((tensor, True))
            stack.extend((source, False) for source in reversed(tensor.op.inputs))
    return list(order)


def _block_nest(tensor: Tensor, op: Compute, buffers: Mapping[Buffer, Buffer]) -> Stmt:
    """Serial loops over the axes of `tensor`, and over those it reduces, around its block."""
    spatial = list(zip(op.axes, tensor.shape, strict=True))
    reduced = [(axis, axis.extent) for axis in op.body.axes] if isinstance(op.body, Reduce) else []
    loops = [(Var(axis.name), as_expr(extent)) for axis, extent in (*spatial, *reduced)]
    kinds: list[Literal["spatial", "reduce"]] = ["spatial"] * len(spatial)
    kinds += ["reduce"] * len(reduced)
    iters = tuple(IterVar(Var(f"v{var.name}"), extent, kind) for (var, extent), kind in zip(loops, kinds, strict=True))
    mapping: dict[Var, Expr] = {a: it.var for (a, _), it in zip((*spatial, *reduced), iters, strict=True)}
    value = replace_buffers_expr(substitute_expr(op.value, mapping), buffers)
    value = simplify(value, {it.var: over(it.extent) for it in iters})
    target, indices = buffers[tensor], tuple(it.var for it in iters[: len(spatial)])
    init: Stmt | None = None
    if isinstance(op.body, Reduce):
        init = Store(target, indices, identity(op.body.combiner, tensor.dtype))
        combiner: BinaryOp = op.body.combiner
        value = binary(combiner, Load(target, indices), value)
    body = Store(target, indices, value)
    reads, writes = access_regions(body, init)
    stmt: Stmt = Block(target.name, iters, tuple(var for var, _ in loops), reads, writes, body, init)
    for var, extent in reversed(loops):
        stmt = For(var, extent, "serial", stmt)
    return stmt
