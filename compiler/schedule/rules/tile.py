"""Scheduling one reduction as register tiles: a tile of outputs stays in vector registers while the loops reduce.

The shape of the tile follows the model of Low et al., "Analytical Modeling Is Enough for High-Performance BLIS" (TOMS
2016), as far as registers go: as many independent accumulators as fit, as square as possible, dividing the extents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    fitting_lanes,
    lanes,
    spatial,
    store_of,
    strides,
)
from kedge.compiler.schedule.rules.rule import Space, TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, keeps_busy, parallelize
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import intermediate, readers
from kedge.compiler.target import free
from kedge.compiler.target.costs import asks_for_next
from kedge.compiler.tir.expr import Expr, Load, Select
from kedge.compiler.tir.stmt import Block, Buffer
from kedge.compiler.tir.visitor import free_vars, loads, walk_expr

#: Independent accumulators that hide the latency of a multiply-add (4 cycles, 2 a cycle on most cores).
_LATENCY_TILES = 8
#: A reduction loop this short is unrolled: the taps of a row of a 3x3 kernel, and steps of a sum by four.
_SHORT = 4
#: So is one that reads neighbours in memory, where these are elements of one register to multiply by: two vectors of
#: them.
_SHORT_BY_ELEMENT = 8
#: All reducing loops are, where that gives no more multiply-adds than this: the 9 taps of a depthwise tile of 14 rows,
#: the 49 of one of 8 or 10.
_MOST_UNROLLED = 512
#: The same for rows along a dim of unknown size, whose code is written out for borders and for the end of a row, too:
#: with 512 a 7x7 depthwise kernel over free sizes compiled for half a minute and ran at a third of its speed (Zen 4).
_MOST_UNROLLED_OPEN = 128
#: Sums of products of an element and a vector, as of 1x1 convolutions: LLVM 22 orders longer code by sums, which then
#: wait for themselves. 64 channels at 7x7 ran at 47 GFLOP/s unrolled whole, at 74 as a loop; 32 to 64 at 28x28 at 94
#: and 107 (Zen 4, peak 118).
_MOST_UNROLLED_DENSE = 256
#: Where no operand comes from memory, all loads of unrolled code want registers; some tens hide a loop's overhead.
#: Chosen by llvm-mca 19's shares of the peak for the shapes of benchmarks/arm_mca.py (docs/performance.md, "ARM").
_MOST_UNROLLED_LOADED = 48
#: What a step of the sums costs beside multiply-adds and loads, in multiply-adds. Chosen in the same way.
_STEP_CYCLES = 0.5
#: Of single elements, spread over a vector: what x86 cores with AVX or more load at least.
_ELEMENTS_PER_CYCLE = 2
#: Registers of ARMv7, where 14 rows spill and each neighbour is loaded again for every tap.
_FEW_REGISTERS = 16
#: Bounds of the search. 14 is a row of a map of 14x14, half of one of 28: with one vector each and one for what is
#: loaded that is half of AVX-512's registers, and longer rows share no more loads.
_MOST_ROWS = 14
_MOST_VECTORS = 6
#: With so many tiles in a row of an image there is none between the borders.
_FEW_TILES = 2


@dataclass(frozen=True, slots=True)
class Tile:
    """A register tile: `rows` x `vectors` vectors of `width` elements, along spatial dims given by number.

    `vector` is the dim of contiguous elements, or None for scalar code; `row` another dim, or None. `panel` is the dim
    along which the tile has its `vectors`: a third one, or None for that of contiguous elements. `next`: whether what
    rows share, as the filters of a convolution, is asked for while tiles go over what the iteration before reads of it.
    """

    vector: int | None = None
    width: int = 1
    vectors: int = 1
    panel: int | None = None
    row: int | None = None
    rows: int = 1
    unroll: bool = True
    next: bool = False
    parallel: bool = False

    def decisions(self) -> Mapping[str, Any]:
        """The tile as named decisions."""
        return asdict(self)

    @staticmethod
    def of(decisions: Mapping[str, Any]) -> Tile:
        """The tile that decisions describe; other decisions are left alone."""
        return Tile(**{key: decisions[key] for key in Tile.__slots__ if key in decisions})


def tile_by_model(block: Block, target: TargetModel) -> Tile:
    """The tile for a reduction that the analytic model picks."""
    parallel = is_worth_threads([block], target)
    vector = _vector_dim(block, target)
    if vector is None:
        return Tile(parallel=parallel)
    extent = extent_of(spatial(block)[vector].extent)
    width = fitting_lanes(lanes(target, block), extent)
    row = _row_dim(block, vector)
    panel = (
        _panel_dim(block, vector, row, target)
        if width == extent and _wants_several_vectors(block, vector, row, target)
        else None
    )
    rows, vectors = _tile_shape(block, vector, panel, row, width, target)
    tile = Tile(vector, width, vectors, panel if vectors > 1 else None, row, rows, parallel=parallel)
    return replace(tile, next=_pays_to_ask(block, tile, target))


def tile_space(block: Block, target: TargetModel) -> Space:
    """The candidates of every decision of a `Tile`."""
    dims = range(len(spatial(block)))
    most = lanes(target, block)
    return {
        "vector": (None, *dims),
        "width": tuple(1 << i for i in range(most.bit_length())),
        "vectors": tuple(range(1, _MOST_VECTORS + 1)),
        "panel": (None, *dims),
        "row": (None, *dims),
        "rows": tuple(range(1, _MOST_ROWS + 1)),
        "unroll": (False, True),
        "next": (False, True),
        "parallel": (False, True),
    }


def schedule_tile(sch: Schedule, name: str, tile: Tile, target: TargetModel) -> None:
    """Schedule reduction `name`, alone in its loops, and take its consumer into the copy of the tile if that goes.

    Rewrite:
        for i, j, k: block   ->   for i_0, j_0 in parallel(…):
                                    tile = 0
                                    for k: tile += …
                                    y[…] = tile   (with the consumer's computation)
    """
    ref = sch.get_block(name)
    _check(sch, ref, tile)
    main = block_named(sch.func, name)
    total, is_dense = cycles(main, target), _is_dense(main, tile)
    outer, reducing, inner = _order(sch, ref, tile, target)
    blocks = [ref]
    if outer:
        blocks.append(sch.cache_write(ref, outer[-1], "register"))
        take_consumer(sch, blocks[-1])
    if reducing:
        blocks.append(sch.decompose_reduction(ref, reducing[0]))
        is_open = tile.row is not None and extent_of(sch.extent(outer[tile.row])) is None
        for loop in _short(sch, reducing, tile, target, is_open=is_open, is_dense=is_dense) if tile.unroll else ():
            sch.unroll(loop)
    for block in blocks if inner else ():
        own = sch.get_loops(block)[-len(inner) :]
        for loop in own if tile.width == 1 else own[:-1]:
            sch.unroll(loop)
        if tile.width > 1:
            sch.vectorize(own[-1])
    shared = _shared(main, tile) if tile.next else None
    apart = len(outer) if shared is None else shared.outside[-1] + 1
    around, inside = outer[:apart], outer[apart:]
    if around and tile.parallel:
        around = parallelize(sch, around, total, target)
    if shared is not None:
        loops = list(sch.get_loops(ref))
        last = loops[loops.index((*inside, *reducing)[0]) - 1]
        sch.prefetch(ref, shared.load.buffer.name, last, 1, spread=True)
    if tile.row is not None and target.fma_by_element and outer[tile.row] in (*around, *inside):
        _take_ends_apart(sch, ref, outer[tile.row])


@dataclass(frozen=True, slots=True)
class _Shared:
    """What rows share, as filters: `outside` are dims of it that loops around tiles go along, `inside` other dims."""

    load: Load
    outside: Sequence[int]
    inside: Sequence[int]


def _shared(block: Block, tile: Tile) -> _Shared | None:
    """The operand that is the same for rows and goes along vectors, if dims inside of the last of its own are known."""
    if tile.vector is None or tile.row is None:
        return None
    axes, store = spatial(block), store_of(block)
    by_lane, by_row = (strides(block, axes[dim].var)[1:] for dim in (tile.vector, tile.row))
    read = [load for load in loads(store.value) if load.buffer is not store.buffer]
    for load, lane, row in zip(read, by_lane, by_row, strict=True):
        used = {var for index in load.indices for var in free_vars(index)}
        gathered = any(isinstance(node, Load) for index in load.indices for node in walk_expr(index))
        own = [number for number, axis in enumerate(axes) if number != tile.vector and axis.var in used]
        if lane == 0 or row != 0 or not own or own[-1] > tile.row or gathered or load.buffer.scope != "global":
            continue
        inside = [number for number in range(own[-1] + 1, len(axes)) if number != tile.vector]
        sizes = [*(axes[number].extent for number in (*inside, tile.vector)), *_sums(block)]
        if all(extent_of(size) is not None for size in sizes):
            return _Shared(load, own, inside)
    return None


def _sums(block: Block) -> list[Expr]:
    return [it.extent for it in block.iters if it.kind == "reduce"]


def _pays_to_ask(block: Block, tile: Tile, target: TargetModel) -> bool:
    """Whether the next filters come from afar, and tiles enough share the ones before; cores must have enough to do."""
    shared = _shared(block, tile)
    if shared is None:
        return False
    axes = spatial(block)
    used = {var for index in shared.load.indices for var in free_vars(index)}
    sizes = [extent_of(it.extent) for it in block.iters if it.var in used]
    own = [extent_of(axes[number].extent) for number in shared.outside]
    if None in sizes or None in own:
        return False

    def tiles(dims: Iterable[int]) -> int:
        several = tile.vector if tile.panel is None else tile.panel
        steps = {tile.row: tile.rows, tile.vector: tile.width}
        steps[several] = steps.get(several, 1) * tile.vectors
        return math.prod(-(-(extent_of(axes[number].extent) or 1) // steps.get(number, 1)) for number in dims)

    size = math.prod(size or 0 for size in sizes) * np.dtype(shared.load.buffer.dtype).itemsize
    around = range(shared.outside[-1] + 1)
    if tile.parallel and not keeps_busy(tiles(around), target.num_cores):
        return False
    return asks_for_next(target, tiles(shared.outside), size, tiles(shared.inside))


def _is_dense(block: Block, tile: Tile) -> bool:
    """Whether vectors of the tile are multiplied by single elements, and no padding makes loops of its own."""
    if tile.vector is None or any(isinstance(node, Select) for node in walk_expr(store_of(block).value)):
        return False
    return 0 in strides(block, spatial(block)[tile.vector].var)[1:]


def _take_ends_apart(sch: Schedule, ref: BlockRef, tiles: LoopRef) -> None:
    """Unroll a loop over two tiles of which each reaches another border of an image: code then knows which one."""
    chooses = any(isinstance(node, Select) for node in walk_expr(store_of(block_named(sch.func, ref.name)).value))
    if chooses and extent_of(sch.extent(tiles)) == _FEW_TILES:
        sch.unroll(tiles)


def _check(sch: Schedule, ref: BlockRef, tile: Tile) -> None:
    """Refuse a tile that no block of this rank can have."""
    rank = len(spatial(block_named(sch.func, ref.name)))
    dims = [dim for dim in (tile.vector, tile.panel, tile.row) if dim is not None]
    sizes = (tile.width, tile.vectors, tile.rows)
    if any(not 0 <= dim < rank for dim in dims) or len(set(dims)) < len(dims):
        raise ScheduleError(f"tile of block {ref.name!r}: {tile} names a dim twice, or one beyond its rank {rank}")
    if any(size < 1 for size in sizes) or tile.width & (tile.width - 1):
        raise ScheduleError(f"tile of block {ref.name!r}: {tile} has a size below 1 or a width that is no power of two")


def _order(
    sch: Schedule, ref: BlockRef, tile: Tile, target: TargetModel
) -> tuple[list[LoopRef], list[LoopRef], list[LoopRef]]:
    """Split and reorder the loops: those around tiles, those that reduce, those within a tile."""
    block = block_named(sch.func, ref.name)
    loops = sch.get_loops(ref)
    axes = [loop for loop, it in zip(loops, block.iters, strict=True) if it.kind == "spatial"]
    reducing = [loop for loop, it in zip(loops, block.iters, strict=True) if it.kind == "reduce"]
    elements = _elements(block, tile, target)
    if elements is not None:
        parts, step = sch.split(reducing.pop(), [None, lanes(target, block)])
        reducing = [parts, *reducing, step] if elements == "blocks" else [*reducing, parts, step]
    inner: list[LoopRef] = []
    if tile.row is not None and tile.rows > 1:
        axes[tile.row], rows = sch.split(axes[tile.row], [None, tile.rows])
        inner.append(rows)
    if tile.panel is not None and tile.vectors > 1:
        axes[tile.panel], vectors = sch.split(axes[tile.panel], [None, tile.vectors])
        # What takes the fewest registers: all vectors and one row's element at a time, or all elements and one vector.
        inner.insert(len(inner) if target.memory_operands else 0, vectors)
    factors = [f for f in (1 if tile.panel is not None else tile.vectors, tile.width) if f > 1]
    if tile.vector is not None and factors:
        axes[tile.vector], *steps = sch.split(axes[tile.vector], [None, *factors])
        inner += steps
    order = [*axes, *reducing, *inner]
    if len(order) > 1 and order != list(loops):
        sch.reorder(*order)
    return axes, reducing, inner


def _elements(block: Block, tile: Tile, target: TargetModel) -> Literal["row", "blocks"] | None:
    """How the elements lie, along the last sum, that vectors are multiplied by, where one load is to have several.

    None where none has. Of channels that fill no whole blocks the sum goes block by block, outside of its other loops:
    what a window reads of one lies together.
    """
    sums = [it for it in block.iters if it.kind == "reduce"]
    if not sums or not tile.unroll or tile.vector is None or not target.fma_by_element:
        return None
    depth = extent_of(sums[-1].extent)
    if depth is None or depth <= _SHORT_BY_ELEMENT:
        return None
    by_lane, by_step = (strides(block, it.var)[1:] for it in (spatial(block)[tile.vector], sums[-1]))
    found = {step for lane, step in zip(by_lane, by_step, strict=True) if lane == 0}
    return "row" if found == {1} else "blocks" if found == {None} else None


def take_consumer(
    sch: Schedule, copy: BlockRef, suits: Callable[[Block, Buffer], bool] = lambda user, made: True
) -> None:
    """Let the copy of the tile compute what follows, while there is just one element-wise consumer, and it suits."""
    while True:
        made = store_of(block_named(sch.func, copy.name)).buffer
        users = readers(sch.func, made)
        if not intermediate(sch.func, made) or len(users) != 1 or not suits(users[0], made):
            return
        try:
            sch.reverse_compute_inline(sch.get_block(users[0].name))
        except ScheduleError:
            return  # it reads the result in another order: it stays a nest of its own


def _short(
    sch: Schedule, reducing: Sequence[LoopRef], tile: Tile, target: TargetModel, *, is_open: bool, is_dense: bool
) -> Sequence[LoopRef]:
    """The reducing loops to be unrolled: the last one if it is short, or all if that makes no long code."""
    sizes = [extent_of(sch.extent(loop)) for loop in reducing]
    known = [size for size in sizes if size is not None]
    usual = _MOST_UNROLLED_OPEN if is_open else _MOST_UNROLLED_DENSE if is_dense else _MOST_UNROLLED
    longest = usual if target.memory_operands else _MOST_UNROLLED_LOADED
    if len(known) == len(sizes) and math.prod(known) * tile.rows * tile.vectors <= longest:
        return [loop for loop, size in zip(reducing, known, strict=True) if size > 1]
    most = _SHORT_BY_ELEMENT if target.fma_by_element else _SHORT
    return reducing[-1:] if sizes[-1] is not None and 1 < sizes[-1] <= most else ()


def _vector_dim(block: Block, target: TargetModel) -> int | None:
    """The spatial dim along which vectors cost least, or None where scalars cost no more."""
    limit = lanes(target, block)
    n_loads = sum(1 for load in loads(block.body) if load.buffer is not store_of(block).buffer)
    best: tuple[float, int | None] = (n_loads + 1.0, None)
    for number, axis in reversed(list(enumerate(spatial(block)))):
        width = fitting_lanes(limit, extent_of(axis.extent))
        steps = strides(block, axis.var)
        if width == 1 or any(step is None for step in steps):
            continue
        costs = [_load_cost(step or 0, width) for step in steps[1:]]
        if extent_of(axis.extent) is None and any(cost > 1 for cost in costs):
            continue  # a dim that is often 1 is no place for gathers
        cost = (sum(costs) + 1 + (0 if steps[0] == 1 else 0.25 * width)) / width
        if cost < best[0]:
            best = (cost, number)
    return best[1]


def _load_cost(step: int, width: int) -> float:
    """What loading a vector costs, in loads: broadcasts are free, small strides are shuffles, the rest is gathered."""
    if step == 0:
        return 0.0
    return 1.0 if step == 1 else 0.75 * width if abs(step) <= 4 else 2.0 * width


def _row_dim(block: Block, vector: int) -> int | None:
    """The other dim along which most of the vectors that are loaded can be used again.

    Of several the innermost that is long enough: what its rows read lies closer together. Free dims count as small.
    Depthwise convolutions use only their weights again.
    """
    axes = spatial(block)
    contiguous = [i for i, step in enumerate(strides(block, axes[vector].var)[1:]) if step]
    best, found = None, (0, 1)
    for number, axis in enumerate(axes):
        known = extent_of(axis.extent)
        extent = free.TILE_ROWS if known is None else min(known, _MOST_ROWS)
        steps = strides(block, axis.var)[1:]
        again = sum(1 for i in contiguous if steps[i] == 0)
        if number != vector and again and extent > 1 and (again, extent) >= found:
            best, found = number, (again, extent)
    return best


def _wants_several_vectors(block: Block, vector: int, row: int | None, target: TargetModel) -> bool:
    """Whether a tile of one vector may wait for loads, or for itself.

    It always may where no operand comes from memory. Where multiply-adds take one from there each takes a load. That is
    no less than they take themselves where a core does as many of them in a cycle as it loads elements, as Intel's with
    AVX-512 and all with AVX2.
    """
    return not target.memory_operands or (
        target.fma_per_cycle >= _ELEMENTS_PER_CYCLE and _has_elements(block, vector, row)
    )


def _has_elements(block: Block, vector: int, row: int | None) -> bool:
    """Whether each row multiplies vectors, which all rows share, by an element of its own."""
    if row is None:
        return False
    by_lane, by_row = (strides(block, spatial(block)[dim].var)[1:] for dim in (vector, row))
    return all((lane == 0) != (step == 0) for lane, step in zip(by_lane, by_row, strict=True))


def _panel_dim(block: Block, vector: int, row: int | None, target: TargetModel) -> int | None:
    """A third dim that takes the lanes' loads further and leaves the rows' ones: other output channels, in blocks.

    Where both kinds go further, as for depthwise convolutions, it is only for rows that have too few accumulators.
    """
    if row is None:
        return None
    axes = spatial(block)
    by_lane, by_row = (strides(block, axes[dim].var)[1:] for dim in (vector, row))
    for number, axis in enumerate(axes):
        extent = extent_of(axis.extent)
        steps = strides(block, axis.var)
        if number in (vector, row) or extent is None or extent < 2 or None in steps:
            continue
        loaded = zip(by_lane, by_row, steps[1:], strict=True)
        triples = list(loaded)
        if all((lane != 0) == (step != 0) and (rows != 0) == (step == 0) for lane, rows, step in triples):
            return number
        height = extent_of(axes[row].extent)
        few = height is not None and height < _LATENCY_TILES and target.vector_registers > _FEW_REGISTERS
        if few and extent % 2 == 0 and all(lane != 0 and step != 0 for lane, _, step in triples):
            return number
    return None


def _tile_shape(
    block: Block, vector: int, panel: int | None, row: int | None, width: int, target: TargetModel
) -> tuple[int, int]:
    """Rows and vectors of the tile: the best ratio of arithmetic to loads among what fits the registers."""
    axes = spatial(block)
    extent = extent_of(axes[vector].extent)
    chunks = None if extent is None else math.ceil(extent / width)
    if panel is not None:
        chunks = extent_of(axes[panel].extent)
    height = 1 if row is None else extent_of(axes[row].extent)
    most_vectors = min(_MOST_VECTORS, chunks or _MOST_VECTORS)
    open_rows = max(free.TILE_ROWS, -(-_LATENCY_TILES // most_vectors))
    most_rows = open_rows if height is None else min(_MOST_ROWS, height)
    registers = max(target.vector_registers, 4)
    least_vectors = min(free.TILE_VECTORS, most_vectors, (registers - 1) // 2) if height is None else 1
    others = _other_registers(block, vector, row, target)
    row_loads = 1 / width if target.fma_by_element else 1.0  # one vector has the elements of several steps
    shares_elements = target.memory_operands and panel is not None

    def cycles_of(rows: int, vectors: int) -> float:
        """Of one step of a tile's sums, in those that a multiply-add takes."""
        if not shares_elements:
            return max(rows * vectors, _LATENCY_TILES) + 0.5 * (row_loads * rows + vectors) + _STEP_CYCLES
        loads = rows / _ELEMENTS_PER_CYCLE + vectors / target.loads_per_cycle
        sums = rows * vectors / target.fma_per_cycle
        return target.fma_per_cycle * (max(sums, loads, target.fma_latency) + 0.1 * vectors) + _STEP_CYCLES

    def divmods(size: int, step: int) -> Sequence[tuple[int, int]]:
        """How often each size of a tile comes along a dim."""
        return [(count, each) for count, each in ((size // step, step), (1, size % step)) if count and each]

    def fit(size: int | None, step: int) -> float:
        """The share of useful work, less a fine for a tail."""
        if size is None:
            return 1.0 if step == 1 else 0.8
        return size / (math.ceil(size / step) * step) * (1.0 if size % step == 0 else 0.8)

    def score(rows: int, vectors: int) -> float:
        if (shares_elements or not target.memory_operands) and height is not None and chunks is not None:
            parts = [(n * m, r, v) for n, r in divmods(height, rows) for m, v in divmods(chunks, vectors)]
            return height * chunks / sum(count * cycles_of(r, v) for count, r, v in parts)
        count = rows * vectors
        intensity = count / (count + 0.5 * (row_loads * rows + vectors))
        return fit(height, rows) * fit(chunks, vectors) * intensity * min(1.0, (count + 1) / (_LATENCY_TILES + 1))

    shapes = [
        (rows, vectors)
        for rows in range(1, most_rows + 1)
        for vectors in range(least_vectors, most_vectors + 1)
        if rows * vectors + others(rows, vectors) <= registers or rows * vectors == 1
    ]
    return max(shapes, key=lambda shape: (score(*shape), -shape[1]))


def _other_registers(block: Block, vector: int, row: int | None, target: TargetModel) -> Callable[[int, int], int]:
    """The registers that a tile of so many rows and vectors needs beside its accumulators.

    With operands in memory those are for the vectors that rows share, and one for an element of a row. Else they are
    for all that is loaded: for each row a vector of elements, for each vector one in use and the next; or, where each
    row has vectors of its own, for the neighbours that the taps of a convolution read again.
    """
    if row is None or target.memory_operands:
        return lambda rows, vectors: vectors + 1
    axes = spatial(block)
    by_lane, by_row = (strides(block, axes[dim].var)[1:] for dim in (vector, row))
    if any(lane == 0 and step != 0 for lane, step in zip(by_lane, by_row, strict=True)):
        return lambda rows, vectors: (rows if target.fma_by_element else 1) + 2 * vectors
    width = min(abs(step) for step in by_lane if step) * lanes(target, block)
    if any(step is None or abs(step) > width for step in by_row):
        if target.vector_registers <= _FEW_REGISTERS:  # each is loaded for every tap
            return lambda rows, vectors: vectors + 6
        return lambda rows, vectors: vectors + rows + rows // 2 + 5
    return lambda rows, vectors: vectors * (rows // 2 + 1) + 4
