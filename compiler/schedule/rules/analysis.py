"""What rules ask of a function: kinds of blocks, strides, amounts of work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.rules.rule import TargetModel
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, intermediate, readers
from kedge.compiler.target.core import lanes_of
from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Dim, Expr, Load, Select, Var, as_expr, const
from kedge.compiler.tir.simplify import Ranges, Simplifier, over
from kedge.compiler.tir.stmt import Block, IterVar, PrimFunc, Store
from kedge.compiler.tir.visitor import free_vars, loads, walk_expr

#: Scalar operations that an intrinsic counts for.
_CALL_COST = 12
#: Scalar operations of a cheap producer that its readers may compute again.
_MOST_REPEATED = 64


def is_reduction(block: Block) -> bool:
    """Whether the block reduces over anything."""
    return any(it.kind == "reduce" for it in block.iters)


def reductions(func: PrimFunc) -> tuple[Block, ...]:
    """The blocks that reduce, in order."""
    return tuple(block for block in blocks_in(func.body) if is_reduction(block))


def block_named(func: PrimFunc, name: str) -> Block:
    """The block `name`."""
    block = block_path(func, name)[-1]
    assert isinstance(block, Block)
    return block


def store_of(block: Block) -> Store:
    """The single store that the block's body is."""
    assert isinstance(block.body, Store)
    return block.body


def extent_of(expr: Expr) -> int | None:
    """A constant extent, or None."""
    return int(expr.value) if isinstance(expr, Const) else None


def at_least(expr: Expr) -> int:
    """The least value of an extent: symbolic dims count with their lower bound, at least 1."""
    low, _ = Simplifier().bounds(expr)
    return max(1, low or 1)


def work(block: Block) -> int:
    """Scalar operations of the block at the least size of its symbolic dims."""
    return operations(store_of(block).value) * math.prod(at_least(it.extent) for it in block.iters)


def operations(expr: Expr) -> int:
    """Scalar operations to evaluate `expr` once; intrinsics and divisions count for several."""
    nodes = list(walk_expr(expr))
    costly = sum(1 for n in nodes if isinstance(n, Call) or (isinstance(n, Binary) and n.op == "div"))
    return len([n for n in nodes if isinstance(n, (Binary, Cast, Select, Load))]) + _CALL_COST * costly + 1


def is_cheap(block: Block) -> bool:
    """Whether computing an element again costs no more than reading it: no intrinsics, no choices."""
    return not any(isinstance(n, (Call, Select)) for n in walk_expr(store_of(block).value))


def lanes(target: TargetModel, block: Block) -> int:
    """Elements of the widest type that the block touches in one vector register; 1 without vectors."""
    dtypes = {store_of(block).buffer.dtype, *(load.dtype for load in loads(block.body))}
    return lanes_of(target, max(np.dtype(dtype).itemsize for dtype in dtypes))


def fitting_lanes(limit: int, extent: int | None) -> int:
    """The vector length for an axis: the power of two up to the limit that wastes least, tails counted in."""
    if extent is None:
        return limit
    best, best_speed = 1, 1.0
    width = 2
    while width <= min(limit, extent):
        steps = -(-extent // width)
        # A tail costs a step of its own; how much more than a full one is a guess.
        speed = extent / (steps + (0.5 if extent % width else 0.0))
        if speed >= best_speed:
            best, best_speed = width, speed
        width *= 2
    return best


def stride(
    indices: Sequence[Expr], shape: Sequence[Dim], var: Var, ranges: Ranges, *, free: int | None = None
) -> int | None:
    """By how many elements an access moves when `var` goes up by one; None where that varies.

    `free` is what it counts as where it is the same for all values of the variables in `ranges`, but not known.
    """
    return Access(indices, shape, Simplifier(ranges)).stride(var, free=free)


class Access:
    """An access to a buffer of `shape`, for variables whose ranges `simplifier` knows.

    Asked for several strides, it is analysed once; accesses that have indices in common share a simplifier.
    """

    def __init__(self, indices: Sequence[Expr], shape: Sequence[Dim], simplifier: Simplifier) -> None:
        address = address_of(indices, shape)
        self._simplifier = simplifier
        self._by_data = {var for node in walk_expr(address) if isinstance(node, Load) for var in free_vars(node)}
        self._poly = self._simplifier.poly(address)

    def stride(self, var: Var, *, free: int | None = None) -> int | None:
        """As the function `stride`."""
        if var in self._by_data:
            return None
        numbers = self._simplifier.poly(var).atoms()
        if not numbers:
            return 0
        parts = self._poly.coefficient(numbers[0])
        if parts is None:
            return None
        factor, rest = parts
        if var in free_vars(self._simplifier.expr_of(rest)):
            return None
        if factor.value is None:
            known = any(each in self._simplifier.ranges for each in free_vars(self._simplifier.expr_of(factor)))
            return None if known else free
        return factor.value


def address_of(indices: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    """The number of an element of a buffer of that shape, in the order of its elements (row-major)."""
    address: Expr = const(0)
    for index, dim in zip(indices, shape, strict=True):
        address = address * as_expr(dim) + index
    return address


def strides(block: Block, var: Var) -> list[int | None]:
    """The strides in iteration variable `var` of the block's store, then of each load but that of an accumulator."""
    ranges = {it.var: over(it.extent) for it in block.iters}
    store = store_of(block)
    found = [stride(store.indices, store.buffer.shape, var, ranges)]
    outside = (load for load in loads(store.value) if load.buffer is not store.buffer)
    return [*found, *(stride(load.indices, load.buffer.shape, var, ranges) for load in outside)]


def spatial(block: Block) -> tuple[IterVar, ...]:
    """The block's spatial iteration variables."""
    return tuple(it for it in block.iters if it.kind == "spatial")


def with_operands_inlined(func: PrimFunc) -> PrimFunc:
    """`func` with its reductions reading what comes from outside, where nothing but cheap blocks stands in between."""
    if not any(intermediate(func, load.buffer) for block in reductions(func) for load in loads(store_of(block).value)):
        return func
    trial = Schedule(func)
    inline_producers(trial)
    return trial.func


def inline_producers(sch: Schedule, keep: Iterable[str] = ()) -> None:
    """Inline every intermediate element-wise block into its consumers, where that does not repeat costly work.

    Blocks whose names are in `keep` stay.
    """
    kept = set(keep)
    for name in [block.name for block in blocks_in(sch.func.body)]:
        block = block_named(sch.func, name)  # with what was inlined into it
        if block.name in kept or is_reduction(block) or not isinstance(block.body, Store):
            continue
        buffer = block.body.buffer
        if intermediate(sch.func, buffer) and (_is_cheap_for_all(sch.func, block) or _used_once(sch.func, block)):
            attempt_inline(sch, block.name)


def _is_cheap_for_all(func: PrimFunc, block: Block) -> bool:
    """Whether the block is cheap, and what its readers compute again of it stays small.

    Without the limit a chain of `y = x + x` would double with every link.
    """
    if not is_cheap(block):
        return False
    buffer = store_of(block).buffer
    uses = sum(1 for user in readers(func, buffer) for load in loads(user.body) if load.buffer is buffer)
    return (uses - 1) * operations(store_of(block).value) <= _MOST_REPEATED


def attempt_inline(sch: Schedule, name: str) -> bool:
    """Inline a block into its consumers if that is legal; False leaves it where it is."""
    try:
        sch.compute_inline(sch.get_block(name))
    except ScheduleError:
        return False
    return True


def _used_once(func: PrimFunc, block: Block) -> bool:
    """Whether each element of what the block computes is read at most once: by one element-wise block of its size."""
    buffer = store_of(block).buffer
    users = readers(func, buffer)
    if len(users) != 1 or is_reduction(users[0]):
        return False
    reads = [load for load in loads(users[0].body) if load.buffer is buffer]
    simplifier = Simplifier()
    size, own = (simplifier.poly(_product(b)) for b in (users[0], block))
    return len(reads) == 1 and size == own


def _product(block: Block) -> Expr:
    result: Expr = const(1)
    for it in block.iters:
        result = result * it.extent
    return result
