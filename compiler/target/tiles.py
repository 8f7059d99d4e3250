"""Register tiles of matrix products, by an analytic model of the core.

After Low et al., "Analytical Modeling Is Enough for High-Performance BLIS" (TOMS 2016): a tile of outputs stays in
registers while a step of the sum loads one element for each of its rows and one vector for each of its vectors of
columns. The model counts the cycles of such steps for a whole product, smaller tiles at its ends included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kedge.compiler.target import free
from kedge.compiler.target.core import TargetModel, lanes_of

#: Rows of a tile: those of a matrix whose rows are a power of two apart meet in one set of the first-level cache,
#: which has eight ways nearly everywhere.
_MOST_ROWS = 8
_MOST_VECTORS = 4
#: What the cycles of one row alone count beside those of each of many: memory often takes longer than either.
_ONE_ROW = 0.02
#: Registers that are neither accumulators nor vectors of the second operand: one for the elements of the first, one
#: that the compiler may want.
_OTHER_REGISTERS = 2
#: Cores with so few registers of so few bits hold an element of the first operand, in all lanes, for each row: their
#: code loads all of them ahead of their uses.
_FEW_REGISTERS, _SHORT_BITS = 16, 128


@dataclass(frozen=True, slots=True)
class RegisterTile:
    """`rows` times `vectors` accumulators of `width` elements."""

    rows: int
    vectors: int
    width: int

    @property
    def columns(self) -> int:
        """Elements in a row of the tile."""
        return self.vectors * self.width


def tile_for(
    target: TargetModel, itemsize: int, rows: int | None, columns: int | None, *, panel: int | None = None
) -> RegisterTile:
    """The tile with which a product of so many rows and columns (None: free) takes the fewest cycles.

    `itemsize` is the bytes of an accumulator. With a `panel`, columns lie together in panels of so many: the tile is
    one of these, or part of one, or several for a product of few rows. A product without rows or columns gets the tile
    of one of them.
    """
    rows, columns = (None if size is None else max(1, size) for size in (rows, columns))
    width = lanes_of(target, itemsize)
    if panel is not None:
        width = min(width, panel)
    elif columns is not None:
        while width > 1 and columns <= width // 2:
            width //= 2
    tiles = (RegisterTile(r, v, width) for r, v in _shapes(target, rows, columns, width, panel))
    return min(tiles, key=lambda tile: (_cycles(target, tile, rows, columns), tile.rows * tile.vectors))


def _shapes(
    target: TargetModel, rows: int | None, columns: int | None, width: int, panel: int | None
) -> Iterator[tuple[int, int]]:
    """Rows and vectors that the registers hold; one accumulator always is possible."""
    if panel is None:
        most = _MOST_VECTORS if columns is None else min(_MOST_VECTORS, -(-columns // width))
        choices = set(range(1, most + 1))
    else:
        count = panel // width
        choices = {v for v in range(1, count + 1) if count % v == 0}
        if columns is None or columns > panel:
            choices.add(2 * count)
    most_rows = _MOST_ROWS if rows is None else min(_MOST_ROWS, rows)
    for vectors in sorted(choices):
        for r in range(1, most_rows + 1):
            fits = r * vectors + _others(target, r, vectors) <= target.vector_registers
            if fits or (r == 1 and vectors == min(choices)):
                yield r, vectors


def _others(target: TargetModel, rows: int, vectors: int) -> int:
    """Registers that are no accumulators.

    By element, each row has a vector of the first operand. Where no operand is in memory, a vector of the second one is
    loaded while one is in use.
    """
    elements = rows if target.fma_by_element or _is_small(target) else _OTHER_REGISTERS
    return elements + (vectors if target.memory_operands else 2 * vectors)


def _is_small(target: TargetModel) -> bool:
    return not target.fma_by_element and target.vector_registers <= _FEW_REGISTERS and target.vector_bits <= _SHORT_BITS


def _cycles(target: TargetModel, tile: RegisterTile, rows: int | None, columns: int | None) -> float:
    """Cycles of a step of the sum, over all tiles; of a free number of rows, those of one and of some together."""
    if rows is None:
        return _cycles(target, tile, free.ROWS, columns) / free.ROWS + _ONE_ROW * _cycles(target, tile, 1, columns)
    vectors = -(-(free.COLUMNS if columns is None else columns) // tile.width)
    total = 0.0
    for count, r in ((rows // tile.rows, tile.rows), (1, rows % tile.rows)):
        for times, v in ((vectors // tile.vectors, tile.vectors), (1, vectors % tile.vectors)):
            if count and r and times and v:
                total += count * times * _step(target, r, v, tile.width if target.fma_by_element else 1)
    return total


def _step(target: TargetModel, rows: int, vectors: int, elements: int) -> float:
    """Cycles of one step of a tile, with a little for what comes from the second-level cache in the long run.

    A row's load has the `elements` of so many steps.
    """
    sums, loads = rows * vectors / target.fma_per_cycle, (rows / elements + vectors) / target.loads_per_cycle
    # To put an element in all lanes takes such cores the unit that multiplies.
    arithmetic = sums + rows / target.loads_per_cycle if _is_small(target) else max(sums, loads)
    return max(arithmetic, target.fma_latency) + 0.12 * vectors + 0.05 * rows
