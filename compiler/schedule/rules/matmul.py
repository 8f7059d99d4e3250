"""Matrix products: register tiles over panels of the second operand, as packed by `PackWeights` or packed here.

The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (TOMS 2008), with the
loops that pay where a panel of the second operand fits a core's second-level cache: panels outside, tiles of rows
inside, so that a panel stays near while the rows of the first operand stream past it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    inline_producers,
    reductions,
    spatial,
    store_of,
    with_operands_inlined,
)
from kedge.compiler.schedule.rules.dot import Dot
from kedge.compiler.schedule.rules.lines import has_lines, one_row, tiles_gain
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.product import Product, aligned_loops, product_of
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.rules.stream import (
    MOST_BLOCK,
    MOST_TILES,
    schedule_stream,
    stream_decisions,
    streams,
)
from kedge.compiler.schedule.rules.sums import schedule_sums, steps_of, sum_decisions
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, keeps_busy, parallelize
from kedge.compiler.schedule.rules.tile import take_consumer
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.target import free
from kedge.compiler.target.core import lanes_of
from kedge.compiler.target.costs import MEMORY_LATENCY, asks_for_next, multiplies_fast, stays_near
from kedge.compiler.target.tiles import RegisterTile, tile_for
from kedge.compiler.tir.expr import Load
from kedge.compiler.tir.stmt import PrimFunc, Store
from kedge.compiler.tir.visitor import walk_expr

_FLOATS = ("float32", "float64")
#: Sums shorter than this are no matter of tiles.
_LEAST_DEPTH = 4
_MOST_ROWS = 14
_MOST_VECTORS = 8
#: Rows from which packing the second operand can pay: each of its elements is then used so often.
_ROWS_TO_PACK = 32
#: Tiles of rows from which it pays, where the third cache holds all of the second operand for each core, and where it
#: does not. To pack a vector takes about 4 cycles, more where its line comes from afar; one of a panel that lies too
#: far apart to stay in the second-level cache costs a tile 0.1 to 0.3 of a cycle more, since the next cache keeps up.
_TILES_TO_PACK, _TILES_TO_PACK_FROM_AFAR = 48, 24
#: Tiles from which packing pays on cores that multiply fast. On a Sapphire Rapids lines from the second cache took a
#: tile 1 to 2 cycles more than packed ones (256^3, 1000^3), from the third 6 (197x768x3072: 1.9 of numpy's time); a
#: Zen 4 has twice the time for each, and waited for neither.
_TILES_TO_PACK_FAST = 6
#: Times what the second cache holds from which such a core asks ahead for packed panels that one tile of rows goes
#: over: constants of 1024x4096 by 4 rows took 0.7 of the time on an Emerald Rapids, by 8 0.64, and one row gained
#: nothing. Of smaller ones part is there from the call before: 4x1024x768 lost 16 to 32 %, 2x2048x1024 10.
_CACHES_TO_ASK = 4
#: Steps of the sum for each row from which an operand with neighbours along the sum is best read as it is.
_DOT_DEPTH = 32
#: Steps of the sum in one iteration of its loop, where they are few instructions each.
_UNROLL = (1, 2, 4, 8)
_UNROLL_REGISTERS = 32
#: Elements of all rows that are multiplied by in one iteration, where a multiply-add takes one out of a register.
_UNROLL_ELEMENTS = 32
#: Steps of the sum ahead of which a row of the second operand can be asked for.
_AHEAD = (0, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Matmul:
    """Tiles of rows by vectors of columns in registers; what follows element by element happens where a tile is done.

    Decisions: `rows`, `vectors` and `width` of the tile; `row`, the spatial dim that its rows are; `inside`, whether
    rows along other dims go over a panel, too, before the next panel; `unroll`, steps of the sum at once; `block`, how
    many tiles of rows go over a panel before the next panel (0: all); `pack_a` and
    `pack_b`, whether the rows of a block and the panel are copied to where they lie together; `ahead`, how many steps
    of the sum before its use a row of a panel is prefetched that is not copied (0: it is not); `next`, whether the next
    panel is asked for bit by bit, while tiles of rows go over this one; `align`, whether tiles
    begin where cache lines of the second operand do; `parallel`; `stream`, whether the sum goes on outside of a block
    of results instead, for products of few rows: `block` then is how many tiles of columns that block has, and nothing
    is copied or prefetched; `depth`, steps of the sum after which tiles go on with the next columns (0: all of them),
    where `block` is how many tiles of columns have results that wait, and nothing is copied.

    What another decision would leave undone is refused, so that what is written down of a kernel is what it does:
    `contradiction` says of decisions whether they have such, before anything is scheduled.
    """

    name: str = "matmul"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether the function sums products of two float tensors over one dim, with columns that lie together."""
        product = _product(func)
        if product is None or target.vector_bits == 0:
            return False
        return not (product.turned and _is_dots(product) and Dot().match(func, target))

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """See the class. The first ones of each go together; of others `contradiction` says whether they do."""
        product = _known(func)
        most = lanes_of(target, product.itemsize)
        return {
            "rows": tuple(range(1, _MOST_ROWS + 1)) if product.rows else (1,),
            "vectors": tuple(range(1, _MOST_VECTORS + 1)),
            "width": tuple(1 << i for i in range(most.bit_length())),
            "row": (None, *product.rows),
            "inside": (False, True) if _inside(product, product.longest_row) else (False,),
            "unroll": _UNROLL,
            "block": (
                *range(MOST_TILES + 1),
                *(1 << i for i in range(MOST_TILES.bit_length(), MOST_BLOCK.bit_length())),
            ),
            "pack_a": (False, True) if product.rows else (False,),
            "pack_b": (True,) if product.turned else (False, True) if product.panel is None else (False,),
            "ahead": (0,) if product.turned or _is_gathered(product) else _AHEAD,
            "next": (False, True) if _asks_for_next(product) or steps_of(product) else (False,),
            "align": (False, True) if has_lines(product, func) else (False,),
            "parallel": (False, True),
            "stream": (False,) if product.turned else (False, True),
            "depth": (0, *steps_of(product)),
        }

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """The tile of the model; packing where elements are used often enough."""
        product = _known(func)
        row = product.longest_row
        height = 1 if row is None else product.extent(row)
        tile = tile_for(target, product.itemsize, height, product.extent(product.column), panel=product.panel)
        pack_b = _pays_to_pack(product, tile, height, target)
        unroll = _unroll(product, tile, target)
        chosen = {
            "rows": tile.rows,
            "vectors": tile.vectors,
            "width": tile.width,
            "row": row,
            "inside": not pack_b and _pays_inside(product, tile, height, target),
            "unroll": unroll,
            "block": (_block if pack_b else _block_that_stays)(product, tile, height, target),
            "pack_a": False,
            "pack_b": pack_b,
            "ahead": 0 if pack_b or _is_gathered(product) else _ahead(product, tile, height, target),
            "next": False,
            "align": False,
            "parallel": is_worth_threads([product.block], target),
            "stream": False,
            "depth": 0,
        }
        if chosen["inside"]:
            chosen |= {"block": 0, "ahead": 0}
        if height is not None:
            tiles = math.ceil(height / tile.rows) * (_passes(product) if chosen["inside"] else 1)
            pays = _pays_to_ask(product, tile, tiles, target)
            chosen["next"] = pays and _panels_suffice(product, tile, chosen, target)
        if streams(product, target):
            chosen |= stream_decisions(product, target)
            chosen |= {"inside": False, "pack_b": False, "ahead": 0, "next": False, "stream": True}
        elif chosen["ahead"]:
            found = sum_decisions(product, tile, unroll, target)
            if found:
                return chosen | found | {"ahead": 0}
        return {**chosen, **_aligned(product, tile, chosen, func, target)}

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        _check(_known(sch.func), decisions)
        inline_producers(sch)
        product = _known(sch.func)
        done = _schedule(decisions)(sch, product, decisions, target)
        for block in blocks_in(sch.func.body):
            if block.name not in done:
                schedule_map_by_model(sch, block.name, target)

    def contradiction(self, func: PrimFunc, decisions: Decisions) -> str | None:
        """Which of the decisions another one would leave undone, and why, in words; None if they all go together."""
        return _contradiction(_known(func), decisions)


def _schedule(decisions: Decisions) -> Callable[[Schedule, Product, Decisions, TargetModel], set[str]]:
    """What schedules a product so."""
    if decisions["stream"]:
        return schedule_stream
    return schedule_sums if decisions["depth"] else _schedule_tiles


def _product(func: PrimFunc) -> Product | None:
    """The product that the function computes, with its operands where they come from, if it is one for this rule."""
    if len(reductions(func)) != 1 or not all(isinstance(block.body, Store) for block in blocks_in(func.body)):
        return None
    (main,) = reductions(with_operands_inlined(func))
    product = product_of(main)
    if product is None or store_of(main).buffer.dtype not in _FLOATS:
        return None
    depth, width = extent_of(product.depth.extent), product.extent(product.column)
    return None if (depth is not None and depth < _LEAST_DEPTH) or width == 1 else product


def _known(func: PrimFunc) -> Product:
    product = _product(func)
    assert product is not None, f"{func.name} was not matched"
    return product


def _is_dots(product: Product) -> bool:
    """Whether rows are too few to turn an operand for.

    As dot products nothing is moved, and each has a sum at its end: to move an element takes about 0.4 cycles, to add
    up a vector for one result 12.
    """
    row, depth = product.longest_row, extent_of(product.depth.extent)
    height = 1 if row is None else product.extent(row)
    enough = free.DEPTH if depth is None else depth
    return height is not None and (height == 1 or height * _DOT_DEPTH <= enough)


def _check(product: Product, decisions: Decisions) -> None:
    """Refuse decisions that no product of this shape can have."""
    name = product.block.name
    sizes = {key: decisions[key] for key in ("rows", "vectors", "width", "unroll")}
    for key, size in sizes.items():
        if size < 1 or (key == "width" and size & (size - 1)):
            raise ScheduleError(f"tile of block {name!r}: {key}={size} is below 1, or a width that is no power of two")
    if decisions["row"] is not None and decisions["row"] not in product.rows:
        raise ScheduleError(f"tile of block {name!r}: row={decisions['row']} is none of its rows {product.rows}")
    if product.turned and (not decisions["pack_b"] or decisions["stream"]):
        raise ScheduleError(f"tile of block {name!r}: {product.b.buffer.name!r} is turned, which pack_b=True is for")
    if decisions["pack_b"] and product.panel is not None:
        raise ScheduleError(f"tile of block {name!r}: pack_b, but {product.b.buffer.name!r} is packed already")
    if decisions["depth"] and decisions["depth"] not in steps_of(product):
        can = ", ".join(map(str, steps_of(product))) or "no steps but 0"
        raise ScheduleError(f"tile of block {name!r}: depth={decisions['depth']}, and its sum goes in blocks of {can}")
    wrong = _contradiction(product, decisions)
    if wrong is not None:
        raise ScheduleError(f"tile of block {name!r}: {wrong}")


def _contradiction(product: Product, decisions: Decisions) -> str | None:
    """See `Matmul.contradiction`."""
    whole = {"pack_a": "nothing is copied", "pack_b": "nothing is copied", "ahead": "no row is asked for ahead"}
    whole |= {"inside": "all rows go over a block of columns"}
    without: dict[str, dict[str, str]] = {
        "stream": {"depth": "the sum is outside of columns", **whole, "next": "there are no panels"},
        "depth": whole,
        "pack_b": {"ahead": "panels are copied", "next": "panels are copied"},
    }
    for key, others in without.items():
        for other, why in others.items() if decisions[key] else ():
            if decisions[other]:
                return f"{other}={decisions[other]}, but with {key}={decisions[key]} {why}"
    if decisions["pack_a"] and (decisions["row"] is None or not decisions["block"]):
        return f"pack_a=True, but with row={decisions['row']} and block={decisions['block']} there is no block of rows"
    if decisions["inside"] and not _inside(product, decisions["row"]):
        return f"inside=True, but with row={decisions['row']} no other rows of known size can be inside"
    return None


def _pays_to_pack(product: Product, tile: RegisterTile, height: int | None, target: TargetModel) -> bool:
    """Whether a panel of the second operand is used for rows enough, and is not near already as it lies.

    Of free sizes nothing can be told of where panels lie: those are packed.
    """
    if product.turned:
        return True
    if product.panel is not None or height is None or height < _ROWS_TO_PACK:
        return False
    columns, depth, step = product.extent(product.column), extent_of(product.depth.extent), product.depth_bytes
    if columns is None or depth is None or not step:
        return columns is None or columns > tile.columns
    if columns <= tile.columns:
        return False
    tiles = -(-height // tile.rows)
    keeps_up = target.l3_share_bytes > 0  # else what does not stay near comes from memory
    if multiplies_fast(target):
        stays = 2 * depth * tile.columns * product.itemsize <= target.l1_bytes
        pays = not stays and tiles >= _TILES_TO_PACK_FAST
        if pays or keeps_up:
            return pays
    least = _TILES_TO_PACK if depth * step < target.l3_share_bytes else _TILES_TO_PACK_FROM_AFAR
    if keeps_up and tiles < least:
        return False
    return not stays_near(target, depth, tile.columns * product.itemsize, step)


def _is_gathered(product: Product) -> bool:
    """Whether data says which rows of the second operand are read: none of them can be prefetched."""
    reads = [load for load in (product.a, product.b) if load.buffer.name == product.b.buffer.name]
    return any(isinstance(node, Load) for load in reads for index in load.indices for node in walk_expr(index))


def _aligned(product: Product, tile: RegisterTile, chosen: Decisions, func: PrimFunc, target: TargetModel) -> Decisions:
    """What changes of the choices where tiles should begin at cache lines of the second operand."""
    if not has_lines(product, func):
        return {}
    if product.longest_row is None:
        return one_row(product, target, stream=chosen["stream"])
    return {"align": True} if chosen["ahead"] and tiles_gain(product, tile, target) else {}


def _ahead(product: Product, tile: RegisterTile, height: int | None, target: TargetModel) -> int:
    """Steps of the sum that take as long as memory does, where the second operand comes from beyond the second cache.

    Its rows are too far apart for the hardware, which foresees no further than to the end of a page. Those of packed
    panels lie together: only cores that multiply faster than the hardware asks for them gain, where rows are few.
    """
    columns, depth = product.extent(product.column), extent_of(product.depth.extent)
    if columns is None or depth is None or not product.depth_bytes:
        return 0
    caches = 1
    if product.panel is not None:
        few = height is not None and 1 < height <= tile.rows
        if not few or not multiplies_fast(target):
            return 0
        caches = _CACHES_TO_ASK
    if depth * columns * product.itemsize <= caches * target.l2_bytes:
        return 0
    steps = MEMORY_LATENCY * target.fma_per_cycle / (tile.rows * tile.vectors)
    return min(_AHEAD[1:], key=lambda ahead: abs(math.log(ahead / steps)))


def _pays_inside(product: Product, tile: RegisterTile, height: int | None, target: TargetModel) -> bool:
    """Whether less comes from beyond the second cache if rows along other dims go over a panel before the next one.

    Else all panels come again for each of them, and cores that multiply fast wait for that.
    """
    columns, depth = product.extent(product.column), extent_of(product.depth.extent)
    passes = _passes(product)
    if product.panel is None or columns is None or depth is None or height is None or not multiplies_fast(target):
        return False
    a, b = (size * depth * product.itemsize for size in (passes * height, columns))
    if passes == 1 or 2 * b <= target.l2_bytes:
        return False
    again = 1 if 2 * a <= target.l2_bytes else math.ceil(columns / tile.columns)
    return b + a * again < passes * b


def _inside(product: Product, row: int | None) -> list[int]:
    """The dims of rows, but for that of tiles, that can be inside of panels: those of known size."""
    return [axis for axis in product.rows if axis != row and product.extent(axis) is not None]


def _passes(product: Product) -> int:
    """How many rows there are along these dims."""
    return math.prod(product.extent(axis) or 0 for axis in _inside(product, product.longest_row))


def _asks_for_next(product: Product) -> bool:
    """Whether the next panel can be asked for bit by bit: panels lie together, and loops over them have known sizes."""
    row = product.longest_row
    sizes = (extent_of(product.depth.extent), 1 if row is None else product.extent(row))
    return product.panel is not None and None not in sizes and not _is_gathered(product)


def _pays_to_ask(product: Product, tile: RegisterTile, tiles: int, target: TargetModel) -> bool:
    """Whether its `tiles` of rows ask for the next panel, while they go over this one."""
    columns, depth = product.extent(product.column), extent_of(product.depth.extent)
    if not _asks_for_next(product) or columns is None or depth is None:
        return False
    panels = math.ceil(columns / tile.columns)
    return asks_for_next(target, panels, depth * columns * product.itemsize, tiles)


def _panels_suffice(product: Product, tile: RegisterTile, chosen: Decisions, target: TargetModel) -> bool:
    """Whether cores are kept busy where no two of them share a panel, as none do that ask for the next one.

    With blocks of rows panels are not shared anyway. Free sizes count as 1.
    """
    if not chosen["parallel"] or chosen["block"]:
        return True
    columns, inside = product.extent(product.column), _inside(product, chosen["row"]) if chosen["inside"] else []
    outer = [axis for axis in (*product.batch, *product.rows) if axis != chosen["row"] and axis not in inside]
    count = math.prod(product.extent(axis) or 1 for axis in outer) * math.ceil((columns or 1) / tile.columns)
    return keeps_busy(count, target.num_cores)


def _unroll(product: Product, tile: RegisterTile, target: TargetModel) -> int:
    """Steps of the sum at once: some tens of multiply-adds, without a rest. They want registers of their own.

    By element they are those whose elements come in one load of each row, or in two where rows are few, and there may
    be a rest: to load elements one by one costs more.
    """
    depth = extent_of(product.depth.extent)
    if target.fma_by_element:
        fitting = [u for u in _UNROLL if u <= tile.width or u * tile.rows <= _UNROLL_ELEMENTS]
        return max(u for u in fitting if depth is None or u <= depth)
    if depth is None or target.vector_registers < _UNROLL_REGISTERS:
        return 1
    return max(u for u in _UNROLL if depth % u == 0 and (u == 1 or u * tile.rows * tile.vectors <= 48))


def _block(product: Product, tile: RegisterTile, height: int | None, target: TargetModel) -> int:
    """Tiles of rows that go over a packed panel: all, unless cores would have nothing to do."""
    columns = product.extent(product.column)
    if height is None or columns is None or target.num_cores < 2:
        return 0
    panels = math.ceil(columns / tile.columns)
    others = math.prod(
        product.extent(axis) or 1 for axis in (*product.batch, *product.rows) if axis != product.longest_row
    )
    tiles = math.ceil(height / tile.rows)
    if panels * others >= 4 * target.num_cores or (panels * others) % target.num_cores == 0:
        return 0
    least = max(_ROWS_TO_PACK // tile.rows, math.ceil(tiles / (2 * target.num_cores)))
    return min(MOST_BLOCK, 1 << (least - 1).bit_length())


def _block_that_stays(product: Product, tile: RegisterTile, height: int | None, target: TargetModel) -> int:
    """Tiles of rows that have half of the second cache, so that the first operand is not read again from further away.

    None where all rows fit in there, where panels would be read as often as blocks save, and where cores would not have
    blocks enough: panels would be spread with them, and the last ones not told from the others.
    """
    columns, depth = product.extent(product.column), extent_of(product.depth.extent)
    if height is None or columns is None or depth is None or columns <= tile.columns:
        return 0
    tiles, tile_bytes = math.ceil(height / tile.rows), tile.rows * depth * product.itemsize
    most = min(MOST_TILES, target.l2_bytes // 2 // tile_bytes)
    if tiles <= most or most * tile.rows <= 2 * tile.columns:
        return 0
    enough = [block for block in range(most, most // 2, -1) if keeps_busy(math.ceil(tiles / block), target.num_cores)]
    if not enough:
        return 0
    return next((block for block in enough if tiles % block == 0), enough[0])


@dataclass(frozen=True, slots=True)
class _Nest:
    """The loops of a tiled product, outermost first."""

    outer: list[LoopRef]  # over dims that no tile has
    block: LoopRef | None  # over blocks of tiles of rows
    panel: LoopRef
    tiles: list[LoopRef]  # over tiles of rows
    sums: list[LoopRef]
    inner: list[LoopRef]  # within a tile


def _schedule_tiles(sch: Schedule, product: Product, decisions: Decisions, target: TargetModel) -> set[str]:
    """Rewrite the product and what follows it; returns the names of the blocks that are in its tiles.

    Rewrite:
        for i, j, k: block   ->   for j_0, i_0 in parallel(…):
                                    tile = 0
                                    for k: tile += a[…] * panel[…]
                                    y[…] = tile   (with the consumer's computation)
    """
    name = product.block.name
    ref = sch.get_block(name)
    total = cycles(block_named(sch.func, name), target)
    nest = _split(sch, product, decisions, target)
    made = [ref]
    packs: list[BlockRef] = []
    if decisions["ahead"] and not decisions["pack_b"]:
        sch.prefetch(ref, product.b.buffer.name, nest.sums[0], math.ceil(decisions["ahead"] / decisions["unroll"]))
    if decisions["pack_b"]:
        packs.append(sch.cache_read(ref, product.b.buffer.name, nest.panel, "local"))
    if decisions["pack_a"] and nest.block is not None:
        packs.append(sch.cache_read(ref, product.a.buffer.name, nest.block, "local"))
    innermost = (nest.panel, *nest.tiles)[-1]
    made.append(sch.cache_write(ref, innermost, "register"))
    take_consumer(sch, made[-1])
    made.append(sch.decompose_reduction(ref, nest.sums[0]))
    for loop in nest.sums[1:]:
        sch.unroll(loop)
    for block in made if nest.inner else ():
        own = sch.get_loops(block)[-len(nest.inner) :]
        for loop in own if decisions["width"] == 1 else own[:-1]:
            sch.unroll(loop)
        if decisions["width"] > 1:
            sch.vectorize(own[-1])
    for pack in packs:
        if product.turned and pack is packs[0]:
            _schedule_turning(sch, pack, product, nest.panel, target)
        else:
            _schedule_pack(sch, pack, target)
    if decisions["parallel"]:
        parallelize(sch, _separable(sch, _spread(nest, decisions)), total, target)
    if decisions["next"]:
        loops = list(sch.get_loops(ref))
        around = loops[loops.index((*nest.tiles, *nest.sums)[0]) - 1]
        sch.prefetch(ref, product.b.buffer.name, around, 1, spread=True)
    return {block.name for block in (*made, *packs)}


def _split(sch: Schedule, product: Product, decisions: Decisions, target: TargetModel) -> _Nest:
    """Split and reorder the loops."""
    loops = aligned_loops(sch, product, decisions)
    column, depth = loops[product.column], loops[-1]
    row = None if decisions["row"] is None else loops[decisions["row"]]
    tiles = [loops[axis] for axis in (_inside(product, decisions["row"]) if decisions["inside"] else ())]
    outer = [loop for loop in loops[:-1] if loop is not column and loop is not row and loop not in tiles]
    inner: list[LoopRef] = []
    block = None
    if row is not None:
        tile = row
        if decisions["rows"] > 1:
            tile, step = sch.split(row, [None, decisions["rows"]])
            inner.append(step)
        if decisions["block"]:
            block, tile = sch.split(tile, [None, decisions["block"]])
        tiles.append(tile)
    panel = column
    factors = [factor for factor in (decisions["vectors"], decisions["width"]) if factor > 1]
    if factors:
        panel, *lanes = sch.split(column, [None, *factors])
        # Where no operand is in memory, vectors are outside of rows: each is loaded for all of them in turn.
        first = lanes[:-1] if not target.memory_operands and decisions["width"] > 1 else []
        inner = [*first, *inner, *lanes[len(first) :]]
    sums = list(sch.split(depth, [None, decisions["unroll"]])) if decisions["unroll"] > 1 else [depth]
    around = [*outer, *([block] if block is not None else []), panel, *tiles]
    if [*around, *sums, *inner] != list(sch.get_loops(sch.get_block(product.block.name))):
        sch.reorder(*around, *sums, *inner)
    return _Nest(outer, block, panel, tiles, sums, inner)


def _spread(nest: _Nest, decisions: Decisions) -> list[LoopRef]:
    """The loops whose iterations are spread over threads: as many as hold nothing but one another."""
    loops = list(nest.outer)
    if nest.block is not None:
        loops.append(nest.block)
        if decisions["pack_a"]:
            return loops
    loops.append(nest.panel)
    if nest.block is None and not (decisions["pack_b"] or decisions["next"]):
        loops += nest.tiles
    return loops


def _separable(sch: Schedule, loops: list[LoopRef]) -> list[LoopRef]:
    """As many of the loops, from the outermost, as can be told to be independent when they are one.

    Quotients and remainders by several free dims are more than can be proved.
    """
    while sum(extent_of(sch.extent(loop)) is None for loop in loops) > 1:
        trial = sch.copy()
        try:
            trial.parallel(trial.fuse(*loops))
            break
        except ScheduleError:
            loops = loops[:-1]
    return loops


def _schedule_pack(sch: Schedule, pack: BlockRef, target: TargetModel) -> None:
    """Vectorize the copy along the source's last dim."""
    source = store_of(block_named(sch.func, pack.name))
    width = lanes_of(target, np.dtype(source.buffer.dtype).itemsize)
    last = sch.get_loops(pack)[-1]
    extent = extent_of(sch.extent(last))
    if width > 1 and extent is not None and extent >= width:
        sch.vectorize(sch.split(last, [None, width])[1])


def _schedule_turning(sch: Schedule, pack: BlockRef, product: Product, panel: LoopRef, target: TargetModel) -> None:
    """Columns together, and the copy in squares that are turned in registers.

    Rewrite:
        for j, k: panel[j, k] = b[j, k]   ->   for j_0, k_0: for k_1 in unrolled(…): for j_1 in vectorized(…):
                                                 panel[k, j] = b[j, k]
    """
    indices = product.b.indices
    column = next(at for at, index in enumerate(indices) if index is spatial(product.block)[product.column].var)
    others = [at for at in range(len(indices) - 1) if at != column]
    sch.transform_layout(pack, lambda *at: (*(at[other] for other in others), at[-1], at[column]))
    _, *own = sch.get_loops(pack)[list(sch.get_loops(pack)).index(panel) :]
    if len(own) < 2:
        return  # a single column
    width = lanes_of(target, product.itemsize)
    columns, lane = sch.split(own[0], [None, width])
    steps, step = sch.split(own[1], [None, width])
    sch.reorder(columns, steps, step, lane)
    sch.unroll(step)
    sch.vectorize(lane)
