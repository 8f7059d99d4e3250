"""Primitives that change where an intermediate buffer lives and how it is laid out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kedge.compiler.schedule.dependence import conflict, crossing, is_private, own_per_iteration
from kedge.compiler.schedule.nest import index_ends
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.tree import LARGEST_INDEX, accesses, block_path, intermediate, loops_in, refuse
from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Const, Dim, Expr, ExprLike, Var, as_expr, const
from kedge.compiler.tir.parser import parse_expr
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier, over
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
        reason = f"index_map does not work on the {len(axes)} indices of {buffer.name!r}: {error}"
        raise refuse(func, "transform_layout", block, reason, hint=_MAP_HINT) from error
    if not isinstance(indices, (tuple, list)) or not all(isinstance(index, (Expr, int)) for index in indices):
        given = print_expr(indices) if isinstance(indices, Expr) else repr(indices)
        raise refuse(func, "transform_layout", block, f"index_map returns {given}, no tuple of indices", hint=_MAP_HINT)
    return IndexMap(axes, tuple(as_expr(index) for index in indices))


def check_allocation(before: PrimFunc, func: PrimFunc, primitive: str, block: Block, buffer: Buffer) -> None:
    """Refuse unless `buffer`, an allocation of `func`, fits its scope and the loops that run at once around its users.

    `before` is the function that the refusal shows, `block` the one that the primitive was about.
    """
    if buffer.scope == "register" and not all(isinstance(dim, int) for dim in buffer.shape):
        raise refuse(
            before, primitive, block, f"{buffer.name!r} in register scope has a free dim", hint="scope 'local'"
        )
    loop = crossing(func, buffer)
    if loop is not None:
        where = f"{loop.kind} loop {loop.var.name!r}"
        reason = f"{buffer.name!r} in {buffer.scope} scope does not fit {where}: its iterations would share or miss it"
        hint = "scope 'local' gives each one of its own, 'global' one to all"
        raise refuse(before, primitive, block, reason, hint=hint)


def check_private(before: PrimFunc, func: PrimFunc, primitive: str) -> None:
    """Refuse what `primitive` made of `before` if a buffer of one iteration of a loop is used outside of it now."""
    found = _astray(func)
    known = {buffer.name for _, buffer in _astray(before)} if found else frozenset()
    for loop, buffer in found:
        if buffer.name not in known:
            where = f"each iteration of {loop.kind} loop {loop.var.name!r}"
            reason = f"{where} has a {buffer.name!r} of its own in {buffer.scope} scope, which would be used outside"
            hint = "do this before the loops get their kinds, or give the buffer scope 'global'"
            raise refuse(before, primitive, loop.var, reason, hint=hint)


def _astray(func: PrimFunc) -> list[tuple[For, Buffer]]:
    """Loops each of whose iterations would have a buffer of its own, were that not used outside, too."""
    return [
        (loop, buffer)
        for loop in loops_in(func.body)
        if loop.kind in ("parallel", "thread")
        for buffer in func.allocs
        if own_per_iteration(loop, buffer) and any(a.buffer is buffer for a in accesses(loop.body))
        if not is_private(func, loop, buffer)
    ]


def set_scope(func: PrimFunc, name: str, scope: Scope) -> PrimFunc:
    """The buffer that block `name` writes in another scope."""
    block, buffer = _own_buffer(func, "set_scope", name)
    new = replace(buffer, scope=scope)
    moved = with_buffer(func, buffer, new)
    check_allocation(func, moved, "set_scope", block, new)
    return moved


def storage_align(func: PrimFunc, name: str, axis: int, factor: int, offset: int) -> PrimFunc:
    """The buffer that block `name` writes with a stride of dim `axis` that is `offset` modulo `factor`, in elements."""
    primitive = "storage_align"
    block, buffer = _own_buffer(func, primitive, name)
    rank = len(buffer.shape)
    if not -rank <= axis < rank:
        hint = f"axes 0 to {rank - 2}; the last one has no stride" if rank > 1 else "it takes two dims or more"
        raise refuse(func, primitive, block, f"axis {axis}: {buffer.name!r} has {rank} dims", hint=hint)
    axis %= rank
    if axis == rank - 1:
        reason = f"axis {axis} is the last of {buffer.name!r}: its elements lie side by side"
        hint = (
            f"axis -2, whose stride is the length of a row of {buffer.name!r}"
            if rank > 1
            else "it takes two dims or more"
        )
        raise refuse(func, primitive, block, reason, hint=hint)
    if not 0 <= offset < factor <= LARGEST_INDEX:
        reason = f"factor {factor}, offset {offset}: it takes 0 <= offset < factor"
        raise refuse(func, primitive, block, reason, hint="offset 0 aligns rows, offset 1 spreads them over banks")
    inner = buffer.shape[axis + 1 :]
    if not all(isinstance(dim, int) for dim in inner):
        reason = f"the dims of {buffer.name!r} after axis {axis} are not all constant"
        raise refuse(func, primitive, block, reason, hint="take an axis after the free dims")
    row = math.prod(dim for dim in inner[1:] if isinstance(dim, int))
    first = inner[0]
    assert isinstance(first, int)
    fitting = (size for size in range(first, first + factor) if size * row % factor == offset)
    size = next(fitting, None)
    if size is None:
        reason = f"factor {factor}, offset {offset}: whole rows of {row} elements never make such a stride"
        raise refuse(func, primitive, block, reason, hint=f"offset 0, or multiples of {math.gcd(row, factor)}")
    shape = (*buffer.shape[: axis + 1], size, *inner[1:])
    return func if size == first else with_buffer(func, buffer, replace(buffer, shape=shape))


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
        raise refuse(func, primitive, block, f"it writes {names}, not one buffer")
    if not intermediate(func, written[0]):
        reason = f"{written[0].name!r} is an argument of the function: its place and layout belong to the caller"
        raise refuse(func, primitive, block, reason, hint="cache_write it, and change the copy")
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
            raise refuse(
                func, "transform_layout", block, f"index {number} of index_map, {print_expr(index)}, can be below 0"
            )
        last: Expr | None = const(high) if high is not None else None
        if last is None:
            ends = index_ends(index, loops, ranges)
            last = None if ends is None else ends[1]
        if last is None or any(var in ranges for var in free_vars(last)):
            reason = f"index {number} of index_map, {print_expr(index)}, has no known largest value"
            raise refuse(func, "transform_layout", block, reason, hint="it must rise or fall with each of its indices")
        size = simplifier.simplify(last + 1)
        if any(isinstance(e, Const) and e.value > LARGEST_INDEX for each in (size, index) for e in walk_expr(each)):
            reason = f"index {number} of index_map, {print_expr(index)}, is beyond {INDEX_DTYPE}"
            raise refuse(func, "transform_layout", block, reason)
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
            raise refuse(func, "transform_layout", block, reason, hint="a map must give each element one of its own")
