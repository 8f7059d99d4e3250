"""Primitives that change where an intermediate buffer lives and how it is laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kedge.compiler.schedule.dependence import conflict, crossing, is_private, own_per_iteration
from kedge.compiler.schedule.nest import index_ends
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.remedies import cache_write_call
from kedge.compiler.schedule.tree import (
    LARGEST_INDEX,
    block_path,
    intermediate,
    loops_in,
    of_kind,
    refuse,
    setter,
    users,
    writers,
)
from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Const, Dim, Expr, ExprLike, Var, as_expr, const
from kedge.compiler.tir.parser import parse_expr
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier, over, simplify
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Scope, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, map_stmt, replace_buffers, stores, substitute_expr, walk_expr

_MAP_HINT = "it takes the indices of an element and returns the new ones: lambda i, j: (j, i)"


@dataclass(frozen=True, slots=True, eq=False)
class IndexMap:
    """Where an element goes: the new indices as expressions of the old ones."""

    axes: tuple[Var, ...]
    indices: tuple[Expr, ...]

    @staticmethod
    def from_json(form: Mapping[str, Any], symbols: Sequence[Var]) -> IndexMap:
        """What `to_json` gave, in a function of these symbols; raises ParseError."""
        axes = {name: Var(name) for name in form["axes"]}
        known = {**{symbol.name: symbol for symbol in symbols}, **axes}
        return IndexMap(tuple(axes.values()), tuple(parse_expr(text, known) for text in form["indices"]))

    def to_json(self) -> dict[str, Any]:
        """The map as names of indices and texts of expressions."""
        return {"axes": [axis.name for axis in self.axes], "indices": [print_expr(index) for index in self.indices]}

    def at(self, indices: Sequence[Expr]) -> tuple[Expr, ...]:
        """The new indices of the element at `indices`."""
        mapping = dict(zip(self.axes, indices, strict=True))
        return tuple(substitute_expr(index, mapping) for index in self.indices)


def map_of(func: PrimFunc, name: str, function: Callable[..., Sequence[ExprLike]]) -> IndexMap:
    """The map of a Python function on the indices of the buffer that block `name` writes."""
    block, buffer = _own_buffer(func, "transform_layout", name)
    taken = {symbol.name for symbol in func.symbols}
    axes = tuple(Var(f"i{dim}" if f"i{dim}" not in taken else f"axis{dim}") for dim in range(len(buffer.shape)))
    try:
        indices = function(*axes)
    except TypeError as error:
        why = str(error).rpartition("<locals>.")[2]
        reason = f"index_map does not work on the {len(axes)} indices of {buffer.name!r}: {why}"
        raise refuse(func, "transform_layout", block, reason, hint=_MAP_HINT) from error
    if not isinstance(indices, (tuple, list)) or not all(isinstance(index, (Expr, int)) for index in indices):
        given = print_expr(indices) if isinstance(indices, Expr) else repr(indices)
        raise refuse(func, "transform_layout", block, f"index_map returns {given}, no tuple of indices", hint=_MAP_HINT)
    return IndexMap(axes, tuple(as_expr(index) for index in indices))


def check_allocation(
    before: PrimFunc, func: PrimFunc, primitive: str, block: Block, buffer: Buffer, again: str = ""
) -> None:
    """Refuse unless `buffer`, an allocation of `func`, fits its scope and the loops that run at once around its users.

    `before` is the function that the refusal shows, `block` the one that the primitive was about, and `again` the call
    as a hint has it, with {} for the scope.
    """

    def with_scope(scope: str) -> str:
        return again.format(f'"{scope}"') if again else f'give it scope "{scope}"'

    if buffer.scope == "register" and not all(isinstance(dim, int) for dim in buffer.shape):
        reason = f"{buffer.name!r} in register scope has a dim of no constant size"
        raise refuse(before, primitive, block, reason, hint=with_scope("local"))
    loop = crossing(func, buffer)
    if loop is None:
        return
    where = of_kind(func, loop)
    if own_per_iteration(loop, buffer):
        reason = f"{buffer.name!r} is used outside of {where}, too, so that its iterations must share it"
        hint = with_scope("global")
    else:
        reason = (
            f"each iteration of {where} fills {buffer.name!r} with other values; in {buffer.scope} scope they share it"
        )
        hint = with_scope("local")
        if loop.kind == "vectorized":
            hint = f"in a new Schedule, sch.{primitive} before sch.vectorize"
    raise refuse(before, primitive, block, reason, hint=hint)


def check_private(before: PrimFunc, func: PrimFunc, primitive: str) -> None:
    """Refuse what `primitive` made of `before` if a buffer of one iteration of a loop is used outside of it now."""
    found = _astray(func)
    known = {buffer.name for _, buffer in _astray(before)} if found else frozenset()
    for loop, buffer in found:
        if buffer.name not in known:
            where = f"each iteration of {of_kind(before, loop)}"
            reason = (
                f"{where} would have its own {buffer.name!r}, which is in {buffer.scope} scope and would be used "
                "outside of the loop"
            )
            makers = writers(before, buffer)
            hint = f"in a new Schedule, sch.{primitive} before sch.{setter(loop)}"
            if makers:
                hint = f'give all one: sch.set_scope({makers[0].name}, "global"); or, {hint}'
            raise refuse(before, primitive, loop.var, reason, hint=hint)


def _astray(func: PrimFunc) -> list[tuple[For, Buffer]]:
    """Loops each of whose iterations would have a buffer of its own, were that not used outside, too."""
    return [
        (loop, buffer)
        for loop in loops_in(func.body)
        if loop.kind in ("parallel", "thread")
        for buffer in func.allocs
        if own_per_iteration(loop, buffer) and users(loop.body, buffer)
        if not is_private(func, loop, buffer)
    ]


def set_scope(func: PrimFunc, name: str, scope: Scope) -> PrimFunc:
    """The buffer that block `name` writes in another scope."""
    block, buffer = _own_buffer(func, "set_scope", name)
    new = replace(buffer, scope=scope)
    moved = with_buffer(func, buffer, new)
    check_allocation(func, moved, "set_scope", block, new, f"sch.set_scope({name}, {{}})")
    return moved


def storage_align(func: PrimFunc, name: str, axis: int, factor: int, offset: int) -> PrimFunc:
    """The buffer that block `name` writes with a stride of dim `axis` that is `offset` modulo `factor`, in elements."""
    primitive = "storage_align"
    block, buffer = _own_buffer(func, primitive, name)
    rank = len(buffer.shape)
    if not -rank <= axis < rank:
        hint = _aligned(block, rank)
        raise refuse(func, primitive, block, f"axis {axis}: {buffer.name!r} has {rank} dims", hint=hint)
    axis %= rank
    if axis == rank - 1:
        reason = f"axis {axis} is the last of {buffer.name!r}: its elements lie side by side"
        raise refuse(func, primitive, block, reason, hint=_aligned(block, rank))
    if not 0 <= offset < factor <= LARGEST_INDEX:
        reason = f"factor {factor}, offset {offset}: it takes 0 <= offset < factor"
        call = f"sch.storage_align({block.name}, {axis}, {max(factor, 2)}"
        hint = f"offset 0 aligns rows: {call}); offset 1 spreads them over banks: {call}, 1)"
        raise refuse(func, primitive, block, reason, hint=hint)
    inner = buffer.shape[axis + 1 :]
    if not all(isinstance(dim, int) for dim in inner):
        reason = f"the dims of {buffer.name!r} after axis {axis} are not all of constant size"
        hint = "take an axis after the last dim of no constant size, such as -2"
        raise refuse(func, primitive, block, reason, hint=hint)
    row = math.prod(dim for dim in inner[1:] if isinstance(dim, int))
    first = inner[0]
    assert isinstance(first, int)
    fitting = (size for size in range(first, first + factor) if size * row % factor == offset)
    size = next(fitting, None)
    if size is None:
        reason = f"factor {factor}, offset {offset}: whole rows of {row} elements never make such a stride"
        hint = f"offset 0 or a multiple of {math.gcd(row, factor)}: sch.storage_align({block.name}, {axis}, {factor})"
        raise refuse(func, primitive, block, reason, hint=hint)
    shape = (*buffer.shape[: axis + 1], size, *inner[1:])
    return func if size == first else with_buffer(func, buffer, replace(buffer, shape=shape))


def _aligned(block: Block, rank: int) -> str:
    return f"sch.storage_align({block.name}, {rank - 2}, 8)" if rank > 1 else "it takes buffers of two dims or more"


def transform_layout(func: PrimFunc, name: str, index_map: IndexMap) -> PrimFunc:
    """The buffer that block `name` writes with its elements at other indices, everywhere."""
    primitive = "transform_layout"
    block, buffer = _own_buffer(func, primitive, name)
    if len(index_map.axes) != len(buffer.shape):
        reason = f"index_map takes {len(index_map.axes)} indices, {buffer.name!r} has {len(buffer.shape)} dims"
        raise refuse(func, primitive, block, reason, hint="it takes one index for each dim")
    wrong = next((index for index in index_map.indices if index.dtype != INDEX_DTYPE), None)
    if wrong is not None:
        reason = f"index {print_expr(wrong)} of index_map is {wrong.dtype}, not {INDEX_DTYPE}"
        raise refuse(func, primitive, block, reason, hint=_MAP_HINT)
    broken = next((i for i in index_map.indices for e in walk_expr(i) if isinstance(e, Binary) and e.op == "div"), None)
    if broken is not None:
        reason = f"index {print_expr(broken)} of index_map is a fraction"
        raise refuse(func, primitive, block, reason, hint="// rounds down to a whole index")
    new = Buffer(buffer.name, _mapped_shape(func, block, buffer, index_map), buffer.dtype, buffer.scope)
    _check_injective(func, block, buffer, new, index_map)
    return with_buffer(func, buffer, new, index_map)


def with_buffer(func: PrimFunc, old: Buffer, new: Buffer, index_map: IndexMap | None = None) -> PrimFunc:
    """`func` with the allocation `old` replaced by `new`, its elements at the places that the map says."""
    allocs = tuple(new if buffer is old else buffer for buffer in func.allocs)
    if index_map is None:
        return replace(func, body=replace_buffers(func.body, {old: new}), allocs=allocs)
    mapping = index_map

    def visit(stmt: Stmt) -> Stmt:
        if not isinstance(stmt, Block):
            return stmt
        simplifier = Simplifier({it.var: over(it.extent) for it in stmt.iters})

        def move(buffer: Buffer, indices: tuple[Expr, ...]) -> Place | None:
            if buffer is not old:
                return None
            return new, tuple(simplifier.simplify(index) for index in mapping.at(indices))

        return redirected(stmt, move)

    return replace(func, body=map_stmt(func.body, visit), allocs=allocs)


def _own_buffer(func: PrimFunc, primitive: str, name: str) -> tuple[Block, Buffer]:
    """The block and the intermediate buffer that it writes."""
    block = block_path(func, name)[-1]
    assert isinstance(block, Block)
    written = tuple(dict.fromkeys(store.buffer for store in stores(block)))
    if len(written) != 1:
        names = ", ".join(repr(each.name) for each in written) or "nothing"
        hint = "write each buffer with a te.compute of its own"
        raise refuse(func, primitive, block, f"it writes {names}, not one buffer", hint=hint)
    if not intermediate(func, written[0]):
        reason = f"{written[0].name!r} is an argument of the function, whose scope and layout the caller decides"
        call = cache_write_call(func, block)
        hint = "change the blocks that compute what it reads"
        if call is not None:
            hint = f"{call}, then sch.{primitive} on block {name!r} again: it writes the small buffer then"
        raise refuse(func, primitive, block, reason, hint=hint)
    return block, written[0]


def _mapped_shape(func: PrimFunc, block: Block, buffer: Buffer, index_map: IndexMap) -> tuple[Dim, ...]:
    """The smallest shape that holds every mapped element."""
    loops = [
        For(var, as_expr(dim), "serial", Store(buffer, (), const(0)))
        for var, dim in zip(index_map.axes, buffer.shape, strict=True)
    ]
    ranges = {loop.var: over(loop.extent) for loop in loops}
    simplifier = Simplifier(ranges)
    shape: list[Dim] = []
    for number, index in enumerate(index_map.indices):
        low, high = simplifier.bounds(index)
        if low is None or low < 0:
            reason = f"index {number} of index_map, {print_expr(index)}, can be below 0"
            hint = "add a constant"
            if low is not None:
                hint = f"add a constant: {print_expr(simplify(index - const(low)))}"
            raise refuse(func, "transform_layout", block, reason, hint=hint)
        last: Expr | None = const(high) if high is not None else None
        if last is None:
            ends = index_ends(index, loops, ranges)
            last = None if ends is None else ends[1]
        if last is None or any(var in ranges for var in free_vars(last)):
            reason = f"index {number} of index_map, {print_expr(index)}, has no known largest value"
            raise refuse(func, "transform_layout", block, reason, hint="it must rise or fall with each of its indices")
        size = simplifier.simplify(last + 1)
        if any(isinstance(e, Const) and e.value > LARGEST_INDEX for each in (size, index) for e in walk_expr(each)):
            reason = f"index {number} of index_map, {print_expr(index)}, is more than {INDEX_DTYPE} holds"
            raise refuse(func, "transform_layout", block, reason, hint="take smaller factors")
        shape.append(int(size.value) if isinstance(size, Const) else size)
    return tuple(shape)


def _check_injective(func: PrimFunc, block: Block, buffer: Buffer, new: Buffer, index_map: IndexMap) -> None:
    """Refuse unless different elements provably go to different places: as if loops stored one after the other."""
    iters = tuple(IterVar(var, as_expr(dim), "spatial") for var, dim in zip(index_map.axes, buffer.shape, strict=True))
    variables = tuple(Var(var.name) for var in index_map.axes)
    store = Store(new, index_map.indices, const(0, buffer.dtype))
    nest: Stmt = Block("map", iters, variables, (), (), store)
    loops: list[For] = []
    for var, it in zip(reversed(variables), reversed(iters), strict=True):
        nest = For(var, it.extent, "serial", nest)
        loops.insert(0, nest)
    for position, loop in enumerate(loops):
        if conflict(func, loop, loops[:position], [new]) is not None:
            reason = f"index_map may send elements of {buffer.name!r} that differ in dim {position} to the same place"
            raise refuse(
                func, "transform_layout", block, reason, hint="give each its own: besides i // 4, return i % 4, too"
            )
