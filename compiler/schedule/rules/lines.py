"""Products whose vectors of the second operand each lie in one cache line, wherever a caller's array begins.

numpy's large arrays begin 16 bytes into a line. Vectors as long as a line are in two then, each of which is read: that
halves what the first-level cache gives, and a panel of three vectors takes a third more lines from caches further away.
"""

from __future__ import annotations

import numpy as np

from kedge.compiler.schedule.rules.analysis import extent_of, spatial
from kedge.compiler.schedule.rules.product import Product
from kedge.compiler.schedule.rules.rule import Decisions, TargetModel
from kedge.compiler.schedule.rules.stream import MOST_TILES, PART_OF_L1
from kedge.compiler.schedule.rules.threads import is_worth_threads
from kedge.compiler.target.core import lanes_of
from kedge.compiler.target.costs import LINE_BYTES
from kedge.compiler.target.tiles import RegisterTile
from kedge.compiler.tir.stmt import PrimFunc

#: How much longer tiles may make rows, since their first one is cut: they gain 4 to 10 % where panels come from afar.
_MOST_LONGER = 1.02
#: Vectors that a row of a product of one row has at least, the sum's least length, and the vectors of its chunks.
_LEAST_VECTORS, _LEAST_DEPTH, _CHUNKS = 3, 32, range(3, 7)


def has_lines(product: Product, func: PrimFunc) -> bool:
    """Whether all rows of the second operand begin at the same place of a line, as only the caller knows."""
    b, column = product.b, spatial(product.block)[product.column]
    row = b.buffer.shape[-1]
    lies = product.panel is None and b.indices[-1] is column.var and any(each is b.buffer for each in func.params)
    alike = np.dtype(b.dtype).itemsize == product.itemsize
    return lies and alike and isinstance(row, int) and row % _line(product) == 0


def tiles_gain(product: Product, tile: RegisterTile, target: TargetModel) -> bool:
    """Whether tiles whose panels come from beyond the second-level cache should begin at lines."""
    columns, whole = product.extent(product.column), _vectors(product, target)
    if columns is None or whole is None:
        return False
    return -(-whole // tile.vectors) * tile.columns <= _MOST_LONGER * columns


def one_row(product: Product, target: TargetModel, *, stream: bool) -> Decisions:
    """What a product of one row gains by; nothing where memory takes longer than lines do, or threads share it.

    At both ends of a block of columns there are conditions for each row of the second operand: a `stream` has one
    block, whose results fit the nearest cache.
    """
    depth, vectors = extent_of(product.depth.extent), _vectors(product, target)
    if depth is None or vectors is None or depth < _LEAST_DEPTH or vectors <= _LEAST_VECTORS:
        return {}
    # An element of the first operand is put into all lanes for each chunk.
    width = min(_CHUNKS, key=lambda each: (-(-vectors // each) * (each + 1), each))
    chunks = -(-vectors // width)
    if not stream:
        return {"vectors": width, "align": True} if chunks == 1 else {}
    fits = PART_OF_L1 * chunks * width * LINE_BYTES <= target.l1_bytes and chunks <= MOST_TILES
    near = depth * vectors * LINE_BYTES < max(target.l2_bytes, target.l3_share_bytes)
    alone = not is_worth_threads([product.block], target)
    return {"vectors": width, "block": chunks, "align": True} if fits and near and alone else {}


def _line(product: Product) -> int:
    """Elements of the second operand in a line."""
    return LINE_BYTES // product.itemsize


def _vectors(product: Product, target: TargetModel) -> int | None:
    """The vectors of a row that begins within a line; None where they are not as long as lines."""
    columns, lanes = product.extent(product.column), lanes_of(target, product.itemsize)
    if columns is None or lanes != _line(product):
        return None
    return -(-(columns + lanes - 1) // lanes)
