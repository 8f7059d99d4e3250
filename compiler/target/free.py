"""What a size that is known only when a program is called counts as, where an analytic model needs a number.

Code for a free size serves all sizes; only the choice between ways to write it rests on these. Each question has its
own number, since what a wrong guess costs differs: too many rows of a tile are computed in vain for a batch of one, too
few iterations leave cores idle. All are for sizes that networks have between their input and their output.
"""

from __future__ import annotations

from typing import Final

#: Images at once, where a cost per image is weighed against one per call: programs on devices mostly take one.
BATCH: Final = 1
#: Height or width of a feature map: the middle one of 112, 56, 28, 14 and 7, which 3x3 convolutions of networks for
#: images of 224 have. Winograd's tiles cost by whole tiles; 28 is a multiple of both sizes of them.
IMAGE: Final = 28
#: Iterations of a loop that is to be spread over cores, but for the outermost, which may be a batch of one. Were it
#: the least size, 1, all loops down to the elements would be fused, and each iteration would take divisions to find
#: its place.
ITERATIONS: Final = 16
#: Rows of a matrix, such as a batch, for register tiles: several whole tiles of them and no end, so that tiles are
#: chosen for many rows. One row alone is weighed beside these (`target/tiles.py`).
ROWS: Final = 32
#: Columns of a matrix, for the same.
COLUMNS: Final = 256
#: Steps of a sum: as many as make dot products of up to 16 rows cheaper than turning an operand (`rules/matmul.py`).
DEPTH: Final = 512
#: Rows of a register tile along a free dim. One row alone takes the time of all, so few; a batch of 64 through an MLP
#: went from 52 to 109 of 118 GFLOP/s (Zen 4) when its weights were loaded for 4 rows instead of one.
TILE_ROWS: Final = 4
#: Vectors of such a tile, at least: with 4 rows more than the 8 sums in flight that keep two units busy, and with one
#: row still 4.
TILE_VECTORS: Final = 4
#: Winograd tiles in a block along a free dim: powers of two, of which the end of a row wastes few.
WINOGRAD_TILES: Final = (1, 2, 4)
#: Elements from one lane to the next, where that depends on free sizes, as from channel to channel of an image: far
#: apart.
STRIDE: Final = 1 << 20
