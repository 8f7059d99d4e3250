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


@dataclass(frozen=True, slots=True)
class Gone:
    """Why a handle stands for nothing any more: the primitive that removed it, the loops that this one made and the
    blocks that it changed."""

    primitive: str
    loops: tuple[str, ...]
    blocks: tuple[str, ...]

    def told(self, ref: Ref) -> tuple[str, str]:
        """As a refusal says it, and what to do."""
        if isinstance(ref, BlockRef):
            where = _listed("block", self.blocks)
            calls = " or ".join(f"sch.get_block({name!r})" for name in self.blocks)
            return f"it is gone: sch.{self.primitive} put what it computes into {where}", calls
        if self.primitive in ("split", "fuse"):
            remedy = f"use what sch.{self.primitive} returned: {'their handles' if self.loops[1:] else 'its handle'}"
            return f"it is gone: sch.{self.primitive} made {_listed('loop', self.loops)} of it", remedy
        made = f", and made {_listed('loop', self.loops)}" if self.loops else ""
        return f"it is gone: sch.{self.primitive} removed it{made}", "sch.get_loops gives the loops around a block now"


def _listed(kind: str, names: tuple[str, ...]) -> str:
    return f"{kind}{'s' if len(names) != 1 else ''} {', '.join(map(repr, names))}"


class Handles:
    """The handles that a schedule has given out, and what each stands for now."""

    def __init__(self) -> None:
        self._refs: dict[str, Ref] = {}
        self._live: dict[str, Var | str] = {}  # handle id -> the loop's variable or the block's name
        self._gone: dict[str, Gone] = {}  # handle id -> what removed it

    def copy(self) -> Handles:
        """Another table in which the handles given out so far stand for the same things."""
        other = Handles()
        other._refs, other._live, other._gone = dict(self._refs), dict(self._live), dict(self._gone)
        return other

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

    def removed_by(self, ref: Ref) -> Gone | None:
        """What removed the thing that the handle stood for; None while it is there."""
        return self._gone.get(ref.id)

    def retire(self, before: PrimFunc, func: PrimFunc, primitive: str) -> None:
        """Note that `primitive`, which made `func` of `before`, removed whatever `func` no longer has."""
        existing: set[Var | str] = {loop.var for loop in loops_in(func.body)}
        existing |= {block.name for block in blocks_in(func.body)}
        lost = [key for key, found in self._live.items() if found not in existing]
        if not lost:
            return
        old = {loop.var for loop in loops_in(before.body)}
        made = tuple(loop.var.name for loop in loops_in(func.body) if loop.var not in old)
        known = set(blocks_in(before.body))
        changed = tuple(block.name for block in blocks_in(func.body) if block not in known)
        for key in lost:
            del self._live[key]
            self._gone[key] = Gone(primitive, made, changed)

    def snapshot(self) -> tuple[object, ...]:
        """What the table holds, to compare with what it holds at another time."""
        return tuple(self._refs.items()), tuple(self._live.items()), tuple(self._gone.items())
