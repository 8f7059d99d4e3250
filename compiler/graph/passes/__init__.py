"""Passes over graphs: each takes a module and gives a module, the same object where nothing changed."""

from __future__ import annotations

from kedge.compiler.graph.passes.base import Pass, TargetPass, for_target, run_passes
from kedge.compiler.graph.passes.common import CommonSubexpressions
from kedge.compiler.graph.passes.fold import FoldConstants
from kedge.compiler.graph.passes.fold_batch_norm import FoldBatchNorm
from kedge.compiler.graph.passes.fuse import Fuse
from kedge.compiler.graph.passes.layout import BlockChannels
from kedge.compiler.graph.passes.legalize import Legalize
from kedge.compiler.graph.passes.pack_weights import PackWeights
from kedge.compiler.graph.passes.partition import Partition
from kedge.compiler.graph.passes.simplify import Simplify

__all__ = [
    "BlockChannels",
    "CommonSubexpressions",
    "FoldBatchNorm",
    "FoldConstants",
    "Fuse",
    "Legalize",
    "PackWeights",
    "Partition",
    "Pass",
    "Simplify",
    "TargetPass",
    "default_passes",
    "for_target",
    "run_passes",
]


def default_passes() -> tuple[Pass, ...]:
    """What every module goes through before lowering, in order.

    Batch norms are folded while they still are operators of their own; what is left of them is legalized. The second
    folding takes in what legalizing made of parameters (transposed weights, per-channel factors), the last one packs
    weights as the layouts want them.
    """
    return (
        FoldConstants(),
        Simplify(),
        FoldBatchNorm(),
        Legalize(),
        FoldConstants(),
        Simplify(),
        FoldConstants(),
        CommonSubexpressions(),
        PackWeights(),
        BlockChannels(),
        FoldConstants(),
        Simplify(),
        Fuse(),
    )
