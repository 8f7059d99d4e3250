"""Matrix products and direct convolutions: sums of products of two tensors."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.schedule.rules.analysis import (
    attempt_inline,
    block_named,
    inline_producers,
    is_reduction,
    reductions,
    spatial,
    store_of,
)
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.product import factors
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.rules.tile import Tile, schedule_tile, tile_by_model, tile_space
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in, intermediate, writers
from kedge.compiler.tir.expr import Select
from kedge.compiler.tir.stmt import Block, PrimFunc, Store
from kedge.compiler.tir.visitor import free_vars, loads, walk_expr


@dataclass(frozen=True, slots=True)
class Contraction:
    """A register tile of outputs, the producers (padding) before it, the element-wise consumers in its epilogue."""

    name: str = "contraction"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether there is exactly one reduction, and it sums products of two tensors."""
        found = reductions(func)
        simple = all(isinstance(block.body, Store) for block in blocks_in(func.body))
        return simple and len(found) == 1 and bool(found[0].iters) and factors(found[0]) is not None

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """The tile, and whether padding is computed inside the inner loop instead of before."""
        return {**tile_space(reductions(func)[0], target), "inline_padding": (False, True)}

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """The tile of the model; padding where it is read, if whole vectors are padding or none of their elements.

        Tiles that reach no border then cost nothing. A choice per element would cost more than a padded copy.
        """
        main = reductions(func)[0]
        tile = tile_by_model(main, target)
        return {**tile.decisions(), "inline_padding": _pads_whole_vectors(func, main, tile)}

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        main = reductions(sch.func)[0].name
        inline_producers(sch)
        if decisions["inline_padding"]:
            for name in _producers(sch.func, block_named(sch.func, main)):
                attempt_inline(sch, name)
        schedule_tile(sch, main, Tile.of(decisions), target)
        done = {main, *(b.name for b in blocks_in(sch.func.body) if _touches_register(b))}
        for block in blocks_in(sch.func.body):
            if block.name not in done:
                schedule_map_by_model(sch, block.name, target)


def _pads_whole_vectors(func: PrimFunc, block: Block, tile: Tile) -> bool:
    """Whether what chooses in the producers of `block` is the same for all lanes of a vector."""
    if tile.vector is None:
        return False
    lane = spatial(block)[tile.vector].var
    for name in _producers(func, block):
        producer = block_named(func, name)
        store = store_of(producer)
        choices = {
            var for node in walk_expr(store.value) if isinstance(node, Select) for var in free_vars(node.condition)
        }
        chosen = [axis for axis, index in enumerate(store.indices) if index in choices]
        reads = [load for load in loads(block.body) if load.buffer is store.buffer]
        if any(lane in free_vars(load.indices[axis]) for load in reads for axis in chosen):
            return False
    return True


def _producers(func: PrimFunc, block: Block) -> list[str]:
    """The element-wise blocks whose results `block` reads."""
    sources = [load.buffer for load in loads(block.body) if intermediate(func, load.buffer)]
    made_by = [b for source in dict.fromkeys(sources) for b in writers(func, source)]
    return [b.name for b in made_by if b is not block and not is_reduction(b)]


def _touches_register(block: Block) -> bool:
    store = store_of(block)
    return any(buffer.scope == "register" for buffer in (store.buffer, *(load.buffer for load in loads(store))))
