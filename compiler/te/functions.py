"""From tensors to a `PrimFunc`: the order in which they are computed, and a block with its loops for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from kedge.compiler.errors import CompileError
from kedge.compiler.te.tensor import Compute, Placeholder, Reduce, Tensor, checked_name, of_some_depth
from kedge.compiler.tir.expr import BinaryOp, Expr, Load, Var, as_expr, binary, identity
from kedge.compiler.tir.regions import access_regions
from kedge.compiler.tir.simplify import over, simplify
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, replace_buffers_expr, seq, substitute_expr


def create_prim_func(tensors: Sequence[Tensor], name: str, attrs: Mapping[str, Any] | None = None) -> PrimFunc:
    """The function that computes the outputs among `tensors` (last) from the placeholders (first).

    Computes in between become allocations, each with a block of its own, in data-flow order. `symbols` are the
    variables in the shapes of `tensors`, in order of appearance, and then those that only computing depends on.
    Buffers and blocks get unique names.

    Raises:
        CompileError: an output stands before a placeholder, there is no output, or a placeholder that is read or a
            symbol that is used is missing from `tensors`.
        TypeError: a parameter is no tensor.
    """
    checked_name(name)
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name}: the parameters are a {type(tensors).__name__}; give a list of te tensors")
    for given in tensors:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: a {type(given).__name__} is among the parameters; give te tensors")
    outputs = [t for t in tensors if isinstance(t.op, Compute)]
    n_inputs = len(tensors) - len(outputs)
    mixed = any(isinstance(t.op, Compute) for t in tensors[:n_inputs])
    if not outputs or mixed or len(set(tensors)) < len(tensors):
        raise CompileError(f"{name}: give each placeholder once, then each output once (at least one)")
    order = dataflow_order(outputs)
    for tensor in order:
        if isinstance(tensor.op, Placeholder) and tensor not in tensors:
            raise CompileError(f"{name}: placeholder {tensor.name!r} is read but missing from the parameters")
    names = _Names()
    buffers: dict[Buffer, Buffer] = {}
    for tensor in (*tensors, *order):
        if tensor not in buffers:
            buffers[tensor] = Buffer(names.unique(tensor.name), tensor.shape, tensor.dtype)
    blocks = []
    for tensor in order:
        if isinstance(tensor.op, Compute):
            with of_some_depth(tensor.name):
                blocks.append(_block_nest(tensor, tensor.op, buffers))
    allocs = tuple(buffers[t] for t in order if isinstance(t.op, Compute) and t not in tensors)
    params = tuple(buffers[t] for t in tensors)
    shown = dict.fromkeys(v for t in tensors for d in t.shape if isinstance(d, Expr) for v in free_vars(d))
    symbols = tuple(dict.fromkeys((*shown, *(v for t in order for v in _symbols_in(t)))))
    return PrimFunc(
        name, params, len(outputs), seq(*blocks), allocs, symbols, MappingProxyType(dict(attrs or {}))
    )  # fmt: skip


def dataflow_order(outputs: Sequence[Tensor]) -> list[Tensor]:
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
