"""Handles of loops and blocks: stable symbolic ids, resolved through a table, never references to nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kedge.compiler.schedule.tree import blocks_in, loops_in
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import PrimFunc


@dataclass(frozen=True, slots=True, eq=False)
class LoopRef:
    """A handle of a loop; it stays valid for as long as the loop exists, whatever happens around it."""

    id: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class BlockRef:
    """A handle of a block; it stays valid for as long as the block exists, wherever it moves."""

    id: str
    name: str


Ref: TypeAlias = LoopRef | BlockRef


class Handles:
    """The handles that a schedule has given out, and what each stands for now."""

    def __init__(self) -> None:
        self._refs: dict[str, Ref] = {}
        self._live: dict[str, Var | str] = {}  # handle id -> the loop's variable or the block's name
        self._gone: dict[str, str] = {}  # handle id -> the primitive that removed it

    def loop(self, var: Var) -> LoopRef:
        """The handle of the loop over `var`, a new one if there is none."""
        for key, found in self._live.items():
            ref = self._refs[key]
            if found is var and isinstance(ref, LoopRef):
                return ref
        made = LoopRef(f"l{len(self._refs)}", var.name)
        self._refs[made.id], self._live[made.id] = made, var
        return made

    def block(self, name: str) -> BlockRef:
        """The handle of the block `name`, a new one if there is none."""
        for key, found in self._live.items():
            ref = self._refs[key]
            if found == name and isinstance(ref, BlockRef):
                return ref
        made = BlockRef(f"b{len(self._refs)}", name)
        self._refs[made.id], self._live[made.id] = made, name
        return made

    def var(self, ref: LoopRef) -> Var:
        """The variable of the loop that a live handle stands for."""
        found = self._live[ref.id]
        assert isinstance(found, Var)
        return found

    def name(self, ref: BlockRef) -> str:
        """The name of the block that a live handle stands for."""
        found = self._live[ref.id]
        assert isinstance(found, str)
        return found

    def is_own(self, ref: Ref) -> bool:
        """Whether this table gave the handle out."""
        return self._refs.get(ref.id) is ref

    def removed_by(self, ref: Ref) -> str | None:
        """The primitive that removed what the handle stood for; None while it is there."""
        return self._gone.get(ref.id)

    def retire(self, func: PrimFunc, primitive: str) -> None:
        """Note that `primitive` removed whatever `func` no longer has."""
        existing: set[Var | str] = {loop.var for loop in loops_in(func.body)}
        existing |= {block.name for block in blocks_in(func.body)}
        for key in [key for key, found in self._live.items() if found not in existing]:
            del self._live[key]
            self._gone[key] = primitive

    def snapshot(self) -> tuple[object, ...]:
        """What the table holds, to compare with what it holds at another time."""
        return tuple(self._refs.items()), tuple(self._live.items()), tuple(self._gone.items())
