"""Matrix products: which dims are rows, columns and batches, how the operands lie in memory, and their loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kedge.compiler.schedule.rules.analysis import extent_of, spatial, store_of, stride
from kedge.compiler.schedule.rules.rule import Decisions
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.tir.expr import Binary, Cast, Const, Expr, Load
from kedge.compiler.tir.simplify import over
from kedge.compiler.tir.stmt import Block, IterVar
from kedge.compiler.tir.visitor import free_vars


@dataclass(frozen=True, slots=True)
class Product:
    """`c[batch…, row…, column] += a[batch…, row…, depth] * b[batch…, depth, column]`, dims in any order.

    Axes are numbers of spatial dims of the block. `panel` is the number of columns that lie together where b is packed
    as `b[…, column // panel, depth, column % panel]`. Of an operand that is `turned`, neighbours are along the depth.
    """

    block: Block
    a: Load
    b: Load
    depth: IterVar
    column: int
    rows: tuple[int, ...]
    batch: tuple[int, ...]
    panel: int | None
    turned: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an accumulator."""
        return np.dtype(store_of(self.block).buffer.dtype).itemsize

    def extent(self, axis: int) -> int | None:
        """The size of a dim; None where it is free."""
        return extent_of(spatial(self.block)[axis].extent)

    @property
    def longest_row(self) -> int | None:
        """The dim that tiles have rows along; of two that are free, the inner one."""
        sizes = {axis: self.extent(axis) for axis in self.rows}
        wide = [axis for axis, size in sizes.items() if size != 1]
        return max(wide, key=lambda axis: (math.inf if sizes[axis] is None else sizes[axis] or 0, axis), default=None)

    @property
    def depth_bytes(self) -> int:
        """Bytes between neighbours of `b` along the sum; 0 where that is not known."""
        ranges = {it.var: over(it.extent) for it in self.block.iters}
        step = stride(self.b.indices, self.b.buffer.shape, self.depth.var, ranges)
        return (step or 0) * np.dtype(self.b.buffer.dtype).itemsize


def aligned_loops(sch: Schedule, product: Product, decisions: Decisions) -> list[LoopRef]:
    """The product's loops; with `align` that of its columns begins where a cache line of the second operand does."""
    loops = list(sch.get_loops(sch.get_block(product.block.name)))
    if decisions["align"]:
        loops[product.column] = sch.align(loops[product.column], product.b.buffer.name)
    return loops


def product_of(block: Block) -> Product | None:
    """The matrix product that a reduction is, or None."""
    axes = spatial(block)
    found = operands(block)
    reduced = [it for it in block.iters if it.kind == "reduce"]
    if len(reduced) != 1 or block.iters[-1] is not reduced[0] or found is None or not axes:
        return None
    wide = [number for number, axis in enumerate(axes) if extent_of(axis.extent) != 1]
    column = wide[-1] if wide else len(axes) - 1
    for a, b in (found, found[::-1]):
        if axes[column].var in _used(b) and axes[column].var not in _used(a):
            return _with(block, a, b, reduced[0], column)
    return None


def _with(block: Block, a: Load, b: Load, depth: IterVar, column: int) -> Product | None:
    axes = spatial(block)
    ranges = {it.var: over(it.extent) for it in block.iters}
    store, last = store_of(block), axes[column].var
    if stride(store.indices, store.buffer.shape, last, ranges) != 1:
        return None
    panel = _panel(b, axes[column], depth)
    turned = panel is None and stride(b.indices, b.buffer.shape, last, ranges) != 1
    if turned and not _is_turned(b, axes[column], depth):
        return None
    others = [number for number in range(len(axes)) if number != column]
    rows = tuple(n for n in others if axes[n].var in _used(a) and axes[n].var not in _used(b))
    batch = tuple(n for n in others if n not in rows)
    if depth.var not in _used(a) or depth.var not in _used(b):
        return None
    return Product(block, a, b, depth, column, rows, batch, panel, turned)


def operands(block: Block) -> tuple[Load, Load] | None:
    """The two loads whose products the block sums, where they are of two tensors."""
    found = factors(block)
    return found if found is not None and found[0].buffer is not found[1].buffer else None


def factors(block: Block) -> tuple[Load, Load] | None:
    """The two loads whose products the block sums."""
    value = store_of(block).value
    if not isinstance(value, Binary) or value.op != "add":
        return None
    update = value.b
    if not isinstance(update, Binary) or update.op != "mul":
        return None
    a, b = _uncast(update.a), _uncast(update.b)
    return (a, b) if isinstance(a, Load) and isinstance(b, Load) else None


def _uncast(expr: Expr) -> Expr:
    return expr.value if isinstance(expr, Cast) else expr


def _used(load: Load) -> set[object]:
    return {var for index in load.indices for var in free_vars(index)}


def _is_turned(load: Load, column: IterVar, depth: IterVar) -> bool:
    """Whether one of the operand's dims is that of columns, and the last one is the sum's."""
    by_column = [index for index in load.indices if column.var in free_vars(index)]
    return load.indices[-1] is depth.var and len(by_column) == 1 and by_column[0] is column.var


def _panel(load: Load, column: IterVar, depth: IterVar) -> int | None:
    """The columns of a panel, if the operand is packed in panels along `column`."""
    if len(load.indices) < 3 or load.indices[-2] is not depth.var:
        return None
    match load.indices[-3], load.indices[-1]:
        case Binary(op="floordiv", a=x, b=Const(value=n)), Binary(op="floormod", a=y, b=Const(value=m)):
            same = x is column.var and y is column.var and n == m == load.buffer.shape[-1]
            return int(n) if same else None
    return None
