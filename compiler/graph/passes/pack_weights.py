"""Weights of matrix products in the order in which kernels read them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.builder import call
from kedge.compiler.graph.ir import Call, Module, Param, Value, operands
from kedge.compiler.graph.passes.base import Context, Pass, rewrite
from kedge.compiler.ops.common import wide_dtype
from kedge.compiler.target import AnyTarget, Target
from kedge.compiler.target.tiles import RegisterTile, tile_for
from kedge.compiler.tir.expr import Dim


@dataclass(frozen=True, slots=True)
class PackWeights:
    """Bring constant second operands of matrix products into panels as wide as the target's register tiles.

    matmul(x, @w) -> packed_matmul(x, transpose(reshape(pad(@w)))) {columns: n}, which folds to @w.folded

    A panel is read from its first element to its last, in whole vectors. A weight that something else reads as it is
    stays as it is: packed, it would be in memory twice.
    """

    target: Target | None = None
    name: str = "pack-weights"

    def for_target(self, target: AnyTarget) -> Pass:
        """The pass for a CPU with vectors; for other targets it changes nothing."""
        return replace(self, target=target if isinstance(target, Target) and target.vector_bits else None)

    def __call__(self, module: Module) -> Module:
        """The module with such products."""
        target = self.target
        if target is None:
            return module
        elsewhere = _read_elsewhere(module)
        return rewrite(module, lambda context, _, new: _packed(context, new, target, elsewhere))


def _read_elsewhere(module: Module) -> frozenset[str]:
    """The parameters that are read by anything but products whose second operand they are."""
    uses: Counter[str] = Counter()
    for function in module.functions.values():
        uses.update(value.name for value in function.outputs if isinstance(value, Param))
        for value in function.values():
            own = value.inputs[1] if isinstance(value, Call) and value.op == "matmul" else None
            read = [operand for operand in operands(value) if isinstance(operand, Param)]
            uses.update(param.name for param in read)
            uses.subtract([own.name] if isinstance(own, Param) else [])
    return frozenset(name for name, count in uses.items() if count > 0)


def _packed(context: Context, new: Value, target: Target, elsewhere: frozenset[str]) -> Value | None:
    if not isinstance(new, Call) or new.op != "matmul" or new.type.dtype not in FLOATS:
        return None
    a, b = new.inputs
    if a.type.rank < 2 or b.type.rank < 2 or context.known(b) is None:
        return None
    if isinstance(b, Param) and b.name in elsewhere:
        return None
    *batch, depth, columns = b.type.shape
    assert isinstance(columns, int)  # of known data
    tile = _tile(a.type.shape, len(batch), columns, new.type.dtype, target)
    if columns in (0, 1, tile.columns):
        return None  # nothing to put together: what is read lies together already
    panels = -(-columns // tile.columns)
    rest = panels * tile.columns - columns
    if rest:
        b = call("pad", b, pads=(*[0] * (2 * len(batch) + 3), rest), origin=new.origin)
    b = call("reshape", b, shape=(*batch, depth, panels, tile.columns), origin=new.origin)
    rank = len(batch)
    b = call("transpose", b, perm=(*range(rank), rank + 1, rank, rank + 2), origin=new.origin)
    return call("packed_matmul", a, b, columns=columns, origin=new.origin)


def _tile(shape: tuple[Dim, ...], batch: int, columns: int, dtype: str, target: Target) -> RegisterTile:
    """The tile of a kernel with rows along the longest dim that does not tell weights apart."""
    dims = shape[-2:-1] if batch else shape[:-1]
    rows = None if any(not isinstance(dim, int) for dim in dims) else max(dim for dim in dims if isinstance(dim, int))
    return tile_for(target, np.dtype(wide_dtype(dtype)).itemsize, rows, columns)
