"""Winograd's convolution: tiles are transformed, multiplied and transformed back while they lie in a core's cache.

The blocks are those that `conv_winograd` lowers to. A block of tiles goes through all of them before the next: the
transformed input and the products of some output channels stay in the second cache, and weights stream through, once
for each block. Where there are few tiles, as late in a network, all of them are transformed first, and the loop over
output channels goes outside: every weight is then read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    inline_producers,
    is_reduction,
    reductions,
    spatial,
    store_of,
    strides,
)
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.rules.threads import cycles, parallelize
from kedge.compiler.schedule.rules.tile import take_consumer
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import blocks_in, intermediate, readers, writers
from kedge.compiler.target import free
from kedge.compiler.target.costs import stream_rate, transform_cycles
from kedge.compiler.tir.expr import Binary, Expr, Load, Select
from kedge.compiler.tir.stmt import Block, Buffer, PrimFunc
from kedge.compiler.tir.visitor import free_vars, loads, walk_expr

#: Tiles in a block, at most.
_MOST_TILES = 64
_MOST_ROWS = 16
_MOST_VECTORS = 6
#: Blocks of output channels whose products are kept at a time.
_MOST_OUTPUTS = 8
_MOST_PARTS = 256
#: Cycles to begin and end the products of a register tile.
_TILE_CYCLES = 20.0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How tiles and output channels are taken together.

    `tiles` of an image, down and across (and of several images) make a block; `rows` of them, times `vectors` of output
    channels, a register tile. `outputs` blocks of output channels are computed at a time. `by_outputs` has the loop
    over these outside. `parallel` names what is spread over threads, in `parts`.
    """

    batch: int
    down: int
    across: int
    rows_down: int
    rows_across: int
    vectors: int
    outputs: int
    by_outputs: bool
    parallel: str | None
    parts: int

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles in a block: images, down, across."""
        return self.batch, self.down, self.across

    @property
    def count(self) -> int:
        """Tiles in a block."""
        return math.prod(self.tiles)

    @property
    def rows(self) -> int:
        """Tiles in a register tile."""
        return self.rows_down * self.rows_across

    def decisions(self) -> Mapping[str, Any]:
        """The tiling as named decisions."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Stages:
    """The blocks of a Winograd convolution, in order."""

    rows: Block
    input: Block
    product: Block
    back: Block
    output: Block

    @property
    def names(self) -> tuple[str, ...]:
        return self.rows.name, self.input.name, self.product.name, self.back.name, self.output.name


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Extents: of the transformed tile's side, output tiles' side, channels in blocks and lanes, tiles (None: free)."""

    side: int
    m: int
    inner: int
    lanes_in: int
    blocks: int
    lanes_out: int
    tiles: tuple[int | None, int | None, int | None]

    @property
    def weight_bytes(self) -> int:
        return 4 * self.side**2 * self.inner * self.lanes_in * self.blocks * self.lanes_out


@dataclass(frozen=True, slots=True)
class Winograd:
    """Transforms around (m + 2)² products of matrices, block by block of tiles."""

    name: str = "winograd"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether the function is a Winograd convolution, perhaps with element-wise blocks around."""
        return _stages(func) is not None

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """The decisions of a `Tiling`."""
        small = tuple(range(1, _MOST_ROWS + 1))
        return {
            "batch": small,
            "down": small,
            "across": small,
            "rows_down": small,
            "rows_across": small,
            "vectors": tuple(range(1, _MOST_VECTORS + 1)),
            "outputs": tuple(range(1, _MOST_OUTPUTS + 1)),
            "by_outputs": (False, True),
            "parallel": (None, "batch", "down", "across", "outputs"),
            "parts": tuple(range(1, _MOST_PARTS + 1)),
        }

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """The tiling that costs the fewest cycles by the model."""
        stages = _stages(func)
        assert stages is not None, "only functions that match are asked about"
        sizes = _sizes(stages)
        return min(
            _candidates(sizes, target), key=lambda each: (_cycles(each, sizes, target), -each.across)
        ).decisions()

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        tiling = Tiling(**{key: decisions[key] for key in Tiling.__slots__})
        stages = _stages(sch.func)
        assert stages is not None, "only functions that match are scheduled"
        _check(tiling)
        inline_producers(sch, keep=stages.names)
        output = sch.get_block(stages.output.name)
        take_consumer(sch, output, _keeps_lanes)  # whose store then keeps lanes together
        sizes = _sizes(stages)
        scheduled = _schedule(sch, stages, sizes, _within(tiling, sizes), target)
        for block in blocks_in(sch.func.body):
            if block.name not in scheduled:
                schedule_map_by_model(sch, block.name, target)


# -- the blocks --------------------------------------------------------------------------------------------------


def _stages(func: PrimFunc) -> _Stages | None:
    """The blocks of a Winograd convolution, or None: products between transforms of two steps each."""
    found = reductions(func)
    if len(found) != 1:
        return None
    (product,) = found
    value = store_of(product).value
    if not (isinstance(value, Binary) and isinstance(value.b, Binary) and isinstance(value.b.a, Load)):
        return None
    transformed = _made(func, value.b.a.buffer)
    first = None if transformed is None else _source(func, transformed)
    back = _user(func, store_of(product).buffer)
    output = None if back is None else _user(func, store_of(back).buffer)
    if transformed is None or first is None or back is None or output is None:
        return None
    ranks = [len(spatial(each)) for each in (first, transformed, product, back, output)]
    sides = [extent_of(axis.extent) for axis in (*spatial(product)[:2], *spatial(back)[:2])]
    known = all(each is not None for each in sides)
    if ranks != [7, 7, 7, 7, 5] or not known or sides[0] != sides[1] or not _chooses(transformed, back, output):
        return None
    return _Stages(first, transformed, product, back, output)


def _chooses(*blocks: Block) -> bool:
    """Whether each block chooses between sums by its place in the tile."""
    return all(any(isinstance(node, Select) for node in walk_expr(store_of(block).value)) for block in blocks)


def _made(func: PrimFunc, buffer: Buffer) -> Block | None:
    """The only block that writes an intermediate buffer, if it is element-wise."""
    made = writers(func, buffer) if intermediate(func, buffer) else ()
    return made[0] if len(made) == 1 and not is_reduction(made[0]) else None


def _source(func: PrimFunc, block: Block) -> Block | None:
    sources = {load.buffer for load in loads(block.body)}
    return _made(func, sources.pop()) if len(sources) == 1 else None


def _user(func: PrimFunc, buffer: Buffer) -> Block | None:
    """The only block that reads an intermediate buffer, but for the one that sums into it."""
    users = [each for each in readers(func, buffer) if each not in writers(func, buffer)]
    return users[0] if intermediate(func, buffer) and len(users) == 1 and not is_reduction(users[0]) else None


def _sizes(stages: _Stages) -> _Sizes:
    side, _, blocks, *tiles, lanes_out, inner, lanes_in = (extent_of(it.extent) for it in stages.product.iters)
    m = extent_of(spatial(stages.back)[0].extent)
    assert side and m and blocks and lanes_out and inner and lanes_in, "known by the weight's shape"
    batch, down, across = tiles
    return _Sizes(side, m, inner, lanes_in, blocks, lanes_out, (batch, down, across))


# -- the schedule ------------------------------------------------------------------------------------------------


def _check(tiling: Tiling) -> None:
    """Refuse sizes that do not make up one another."""
    whole = tiling.down % tiling.rows_down == 0 and tiling.across % tiling.rows_across == 0
    if not whole or tiling.outputs % tiling.vectors:
        raise ScheduleError(
            f"winograd: blocks of {tiling.down}x{tiling.across} tiles and {tiling.outputs} of outputs are not made of "
            f"register tiles of {tiling.rows_down}x{tiling.rows_across} and {tiling.vectors}",
            hint="take divisors",
        )


def _keeps_lanes(block: Block, made: Buffer) -> bool:
    """Whether elements that are neighbours in `made` are neighbours in what the block stores."""
    if is_reduction(block):
        return False
    last = next(load.indices[-1] for load in loads(block.body) if load.buffer is made)
    lane = next((it.var for it in block.iters if it.var is last), None)
    return lane is not None and strides(block, lane)[0] == 1


def _schedule(sch: Schedule, stages: _Stages, sizes: _Sizes, tiling: Tiling, target: TargetModel) -> set[str]:
    """Schedule the blocks; returns the names of all that are done."""
    least = cycles(stages.product, target)
    rows, product, back, output = (
        sch.get_block(each.name) for each in (stages.rows, stages.product, stages.back, stages.output)
    )
    transformed = _whole_blocks(sch, stages, product, tiling)
    nest, part, innermost = _nest(sch, output, sizes.m, tiling)
    sch.compute_at(back, innermost)
    sch.compute_at(product, nest[-1])
    if not tiling.by_outputs:
        sch.compute_at(transformed, nest[-2])
    _schedule_input(sch, transformed, rows, 0 if tiling.by_outputs else len(nest) - 1)
    for block in (transformed, rows, back, output):
        *_, down, across, lane = sch.get_loops(block)
        sch.unroll(down)
        sch.unroll(across)
        sch.vectorize(lane)
    for block in (rows, back, product, *(() if tiling.by_outputs else (transformed,))):
        sch.set_scope(block, "local")
    made = _schedule_product(sch, product, len(nest), tiling, target)
    if part is not None:
        if tiling.by_outputs:
            sch.parallel(sch.get_loops(transformed)[0])
        parallelize(sch, [part], least, target)
    return {block.name for block in (rows, transformed, product, back, output, *made)}


def _whole_blocks(sch: Schedule, stages: _Stages, product: BlockRef, tiling: Tiling) -> BlockRef:
    """Pad the numbers of tiles to whole blocks, so that products need no conditions; the transform of the input."""
    before = {block.name for block in blocks_in(sch.func.body)}
    sch.pad_einsum(product, [1, 1, 1, *tiling.tiles, 1, 1, 1])
    transformed = sch.get_block(stages.input.name)
    for block in blocks_in(sch.func.body):
        if block.name in before:
            continue
        if any(load.buffer is store_of(stages.input).buffer for load in loads(block.body)):
            sch.compute_inline(transformed)
            transformed = sch.get_block(block.name)
        else:
            sch.compute_inline(sch.get_block(block.name))  # what cuts the products
    return transformed


def _nest(
    sch: Schedule, output: BlockRef, m: int, tiling: Tiling
) -> tuple[list[LoopRef], LoopRef | None, LoopRef]:  # fmt: skip
    """The loops around blocks, of tiles and of output channels, the first of them if it is parallel, and the innermost
    one over the tiles of a block.
    """
    batch, blocks, height, width, lane = sch.get_loops(output)
    height, down = sch.split(height, [None, m])
    width, across = sch.split(width, [None, m])
    outer: dict[str, LoopRef] = {}
    inner: list[LoopRef] = []
    sizes = {"batch": tiling.batch, "down": tiling.down, "across": tiling.across, "outputs": tiling.outputs}
    for (name, size), loop in zip(sizes.items(), (batch, height, width, blocks), strict=True):
        outer[name], within = sch.split(loop, [None, size])
        inner.append(within)
    part = None
    if tiling.parallel is not None and tiling.parts > 1:
        part, outer[tiling.parallel] = sch.split(outer[tiling.parallel], [tiling.parts, None])
    tiles = [outer["batch"], outer["down"], outer["across"]]
    nest = [outer["outputs"], *tiles] if tiling.by_outputs else [*tiles, outer["outputs"]]
    if part is not None:
        nest.insert(0, part)
    elif tiling.parallel is not None:  # each iteration is a part of its own
        part = outer[tiling.parallel]
        nest.remove(part)
        nest.insert(0, part)
    sch.reorder(*nest, inner[3], *inner[:3], down, across, lane)
    return nest, part, inner[2]


def _schedule_input(sch: Schedule, transformed: BlockRef, rows: BlockRef, around: int) -> None:
    """The input's transform, `around` loops inside: a tile of a block of channels at a time."""
    loops = list(sch.get_loops(transformed))
    down, across, *places, lane = loops[around:]
    sch.reorder(*places, down, across, lane)
    sch.compute_at(rows, [*loops[:around], *places][-1])


def _schedule_product(
    sch: Schedule, product: BlockRef, around: int, tiling: Tiling, target: TargetModel
) -> list[BlockRef]:
    """The products as register tiles, in loops of their own `around` loops inside; the blocks that this makes."""
    loops = list(sch.get_loops(product))[around:]
    bindings = block_named(sch.func, product.name).bindings
    # What runs once there has no loop.
    k, l, outputs, batch, down, across, lane, *reducing = (_driving(loops, binding) for binding in bindings)  # noqa: E741
    parts = [
        _split(sch, down, tiling.down, tiling.rows_down),
        _split(sch, across, tiling.across, tiling.rows_across),
        _split(sch, outputs, tiling.outputs, tiling.vectors),
    ]
    outer = [loop for loop in (k, l, parts[2][0], batch, parts[0][0], parts[1][0]) if loop is not None]
    # Where no operand is in memory, vectors are outside of rows: each is loaded for all of them in turn.
    within = parts if target.memory_operands else parts[-1:] + parts[:-1]
    inner = [loop for loop in (*(loop for _, loop in within), lane) if loop is not None]
    sums = [loop for loop in reducing if loop is not None]
    sch.reorder(*outer, *sums, *inner)
    copy = sch.cache_write(product, outer[-1], "register")
    init = sch.decompose_reduction(product, sums[0])
    if target.fma_by_element and len(sums) > 1:
        sch.unroll(sums[-1])  # the elements of one load
    for block in (product, copy, init):
        *unrolled, last = list(sch.get_loops(block))[-len(inner) :]
        for loop in unrolled:
            sch.unroll(loop)
        sch.vectorize(last)
    return [copy, init]


def _driving(loops: Sequence[LoopRef], binding: Expr) -> LoopRef | None:
    """The loop that `binding` runs with, or None."""
    names = {var.name for var in free_vars(binding)}
    return next((loop for loop in loops if loop.name in names), None)


def _split(
    sch: Schedule, loop: LoopRef | None, extent: int, size: int
) -> tuple[LoopRef | None, LoopRef | None]:  # fmt: skip
    """A loop as one around tiles of `size` and one within, where there is more than one iteration."""
    if loop is None or size == extent:
        return None, loop
    if size == 1:
        return loop, None
    outer, inner = sch.split(loop, [None, size])
    return outer, inner


# -- the model ---------------------------------------------------------------------------------------------------


def _candidates(sizes: _Sizes, target: TargetModel) -> Iterator[Tiling]:
    """Tilings with the best register tile for each block of tiles."""
    images, down, across = sizes.tiles
    whole = [(n, down, across) for n in _shares(images)] if images and down and across else []
    blocks = {*whole, *((1, d, a) for d in _shares(down) for a in _shares(across))}
    outputs = [n for n in range(1, _MOST_OUTPUTS + 1) if sizes.blocks % n == 0]
    for tiles in sorted(blocks):
        if math.prod(tiles) > _MOST_TILES:
            continue
        for count in outputs:
            rows = _register_tile(tiles, count, target)
            for by_outputs in (False, True) if down and across else (False,):
                for parallel, parts in _spreads(tiles, count, by_outputs, sizes, target):
                    yield Tiling(*tiles, *rows, count, by_outputs, parallel, parts)


def _shares(size: int | None) -> tuple[int, ...]:
    """Numbers of tiles along a dim for a block: as even parts of all as can be."""
    if size is None:
        return free.WINOGRAD_TILES
    return tuple(sorted({-(-size // parts) for parts in range(1, size + 1) if -(-size // parts) <= _MOST_ROWS}))


def _register_tile(tiles: tuple[int, int, int], outputs: int, target: TargetModel) -> tuple[int, int, int]:
    """Tiles down and across and vectors of the cheapest register tile."""
    found = [
        (down, across, vectors)
        for down in _divisors(tiles[1])
        for across in _divisors(tiles[2])
        for vectors in _divisors(outputs)
        if vectors <= _MOST_VECTORS and down * across <= _MOST_ROWS
        if _registers(down * across, vectors, target) <= max(target.vector_registers, 4) or down * across * vectors == 1
    ]
    return min(
        found, key=lambda each: (_step_cycles(each[0] * each[1], each[2], target) / math.prod(each), -math.prod(each))
    )


def _registers(rows: int, vectors: int, target: TargetModel) -> int:
    """What a register tile needs: by element, rows have vectors of their own; the next weights may be loaded."""
    elements = rows if target.fma_by_element else 1
    return rows * vectors + (vectors + 1 if target.memory_operands else elements + 2 * vectors)


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _step_cycles(rows: int, vectors: int, target: TargetModel) -> float:
    """Cycles for one channel of a register tile, with what begins and ends the tile spread over 64 channels."""
    busy = rows * vectors / target.fma_per_cycle
    steps = max(1, target.vector_bits // 32) if target.fma_by_element else 1  # that a row's load has elements for
    return max(busy, (rows / steps + vectors) / target.loads_per_cycle, float(target.fma_latency)) + _TILE_CYCLES / 64


def _spreads(
    tiles: tuple[int, int, int], outputs: int, by_outputs: bool, sizes: _Sizes, target: TargetModel
) -> Iterator[tuple[str | None, int]]:
    """Loops that may be spread over the cores, and over how many parts."""
    if target.num_cores < 2:
        yield None, 1
        return
    units: dict[str, int | None] = {"outputs": sizes.blocks // outputs}
    if not by_outputs:
        names = ("batch", "down", "across")
        units = {n: None if e is None else -(-e // t) for n, e, t in zip(names, sizes.tiles, tiles, strict=True)}
    for name, count in units.items():
        cores = min(target.num_cores, _MOST_PARTS)
        if count is None and name != "batch":
            yield name, cores
        elif count is not None and count > 1:
            yield name, -(-count // -(-count // min(cores, count)))
    yield None, 1


def _cycles(tiling: Tiling, sizes: _Sizes, target: TargetModel) -> float:
    """The cycles that a convolution takes, on all cores: by the slower of arithmetic and the stream of weights."""
    square = sizes.side**2
    extents = [size if size is not None else 1 if axis == 0 else 16 for axis, size in enumerate(sizes.tiles)]
    blocks = [-(-size // step) for size, step in zip(extents, tiling.tiles, strict=True)]
    tiles = math.prod(blocks) * tiling.count
    channels, vectors = sizes.inner * sizes.lanes_in, sizes.blocks
    step = _step_cycles(tiling.rows, tiling.vectors, target)
    product = square * channels * tiles * vectors / (tiling.rows * tiling.vectors) * step
    panel = 4 * tiling.count * channels  # of one element of the transformed tiles
    kept = 4 * square * tiling.count * tiling.outputs * sizes.lanes_out
    again = sizes.weight_bytes // (vectors // tiling.outputs if tiling.by_outputs else 1)
    others = (math.prod(blocks) - 1) / stream_rate(target, again + square * panel)
    weights = sizes.weight_bytes * (1 / stream_rate(target, sizes.weight_bytes) + others)
    input_bytes = square * panel * (math.prod(blocks) if tiling.by_outputs else 1) + kept
    reads = vectors / (tiling.outputs if panel <= target.l1_bytes / 2 else tiling.vectors)
    inputs = 4 * square * tiles * channels * reads / stream_rate(target, input_bytes)
    transforms = transform_cycles(target) * square * tiles * (sizes.inner + vectors)
    return (max(product, weights) + 0.5 * inputs + transforms) / _speedup(tiling, sizes)


def _units(tiling: Tiling, sizes: _Sizes) -> int | None:
    """Iterations of the loop that is spread over cores, if they are known."""
    if tiling.parallel == "outputs":
        return -(-sizes.blocks // tiling.outputs)
    axis = ("batch", "down", "across").index(str(tiling.parallel))
    size = sizes.tiles[axis]
    return None if size is None else -(-size // tiling.tiles[axis])


def _within(tiling: Tiling, sizes: _Sizes) -> Tiling:
    """The tiling with no more parts than there are iterations to spread; each by itself if their number is free."""
    if tiling.parallel is None:
        return tiling
    units = _units(tiling, sizes)
    if units is None:
        return replace(tiling, parts=1)
    parts = min(units, tiling.parts)
    return replace(tiling, parts=parts, parallel=tiling.parallel if parts > 1 else None)


def _speedup(tiling: Tiling, sizes: _Sizes) -> float:
    """How many times as fast the parts run at once, where they are not equal."""
    if tiling.parallel is None:
        return 1.0
    units = _units(tiling, sizes)
    return float(tiling.parts) if units is None else units / -(-units // tiling.parts)
