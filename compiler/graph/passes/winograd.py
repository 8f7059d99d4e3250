"""Whether a convolution costs less by Winograd's algorithm, and with which tiles: an analytic model, in cycles.

For N images of O x P outputs, C input and F output channels, vectors of L lanes, f of them multiplied and added in a
cycle, and tiles of m x m outputs, which are T = N * ceil(O / m) * ceil(P / m), tails counted whole:

    direct        max(N * O * P * 9 * C * F / (L * f), 9 * C * F * 4 / rate)
    Winograd      max(T * (m + 2)^2 * C * F / (L * f), (m + 2)^2 * C * F * 4 / rate)
                  + T * (m + 2)^2 * (C + F) / L * transform

`rate` is at how many bytes in a cycle weights come: from memory, where those of the network do not fit the last cache.
`transform` is what a vector costs in the transforms of inputs and outputs, which are spread over F and C products.
"""

from __future__ import annotations

from kedge.compiler.graph.ir import Call
from kedge.compiler.target import Target, free
from kedge.compiler.target.costs import stream_rate, transform_cycles
from kedge.compiler.tir.expr import Dim

#: The share of direct convolution's cycles that is left at most: less gain is not worth less exact results.
_WORTH = 0.8
#: Cycles of a direct convolution from which less is worth looking for: some microseconds of whole kernels.
_LEAST_CYCLES = 1 << 16
#: The share of peak that the products of either kind reach.
_EFFICIENCY = 0.9


def winograd_tile(conv: Call, target: Target, network_bytes: int) -> int | None:
    """Output tiles' side, 2 or 4, for a convolution that costs less by Winograd's algorithm; else None.

    `network_bytes` are those of all weights of the network, which stream through the caches with this one's.
    """
    if not _is_possible(conv):
        return None
    direct = _direct_cycles(conv, target, network_bytes)
    if direct < _LEAST_CYCLES:
        return None
    costs = {m: _cycles(conv, m, target, network_bytes) for m in (2, 4)}
    best = min(costs, key=lambda m: costs[m])
    return best if costs[best] <= _WORTH * direct else None


def _is_possible(conv: Call) -> bool:
    """Whether it is a 3x3 convolution of float32 at stride 1 of undilated windows, in one group."""
    weight = conv.inputs[1].type
    ones = all(set(conv.attrs[name] or (1,)) == {1} for name in ("strides", "dilations"))
    return conv.type.dtype == "float32" and weight.shape[2:] == (3, 3) and ones and conv.attrs["groups"] == 1


def _sizes(conv: Call) -> tuple[int, int, int, int, int]:
    """Images, rows and columns of outputs, input and output channels."""
    filters, channels = (int(str(dim)) for dim in conv.inputs[1].type.shape[:2])
    batch, _, height, width = conv.type.shape
    return _known(batch, free.BATCH), _known(height, free.IMAGE), _known(width, free.IMAGE), channels, filters


def _known(dim: Dim, otherwise: int) -> int:
    return dim if isinstance(dim, int) else otherwise


def _product_cycles(places: int, weights: int, target: Target, network_bytes: int) -> float:
    """Cycles to multiply and add each of `weights` at `places`, or for them to come, whichever is more."""
    vectors = places * weights / (target.vector_bits // 32)
    stream = 4 * weights / stream_rate(target, max(4 * weights, network_bytes))
    return max(vectors / (target.fma_per_cycle * _EFFICIENCY), stream)


def _direct_cycles(conv: Call, target: Target, network_bytes: int) -> float:
    batch, height, width, channels, filters = _sizes(conv)
    return _product_cycles(batch * height * width, 9 * channels * filters, target, network_bytes)


def _cycles(conv: Call, m: int, target: Target, network_bytes: int) -> float:
    batch, height, width, channels, filters = _sizes(conv)
    square, tiles = (m + 2) ** 2, batch * -(-height // m) * -(-width // m)
    product = _product_cycles(tiles, square * channels * filters, target, network_bytes)
    vectors = tiles * square * (channels + filters) / (target.vector_bits // 32)
    return product + vectors * transform_cycles(target)
