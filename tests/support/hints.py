"""Following hints: the calls that a refusal names are done, just as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.verify import verify

NO_NAMES: Mapping[str, str] = MappingProxyType({})
_CALL = re.compile(r"(?:\w+(?:, \w+)* = )?(?:sch|Schedule)\.\w+\(")


def calls_in(hint: str) -> list[list[str]]:
    """The calls that a hint names, in order, for each of the ways that it leads with "or" between them."""
    ways: list[list[str]] = [[]]
    end = 0
    while (found := _CALL.search(hint, end)) is not None:
        if re.search(r"\bor\b", hint[end : found.start()]) and ways[-1]:
            ways.append([])
        end, depth = found.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(hint[end], 0)
            end += 1
        ways[-1].append(hint[found.start() : end])
    return [way for way in ways if way]


def follow(sch: Schedule, hint: str, names: Mapping[str, str] = NO_NAMES, beginning: PrimFunc | None = None) -> int:
    """Do what `hint` says, each of its ways on a schedule of its own; the number of calls.

    A name stands for the first block or loop that is called so, or for what `names` says. `beginning` is the function
    with which a new schedule begins.
    """
    ways = calls_in(hint)
    for calls in ways:
        anew = "in a new Schedule" in hint[: hint.index(calls[0])]
        assert beginning is not None or not anew, "the hint wants a new schedule"
        one = Schedule(beginning) if anew and beginning is not None else sch.copy()
        scope: dict[str, Any] = {"sch": one, "Schedule": Schedule, "json": json, "func": beginning}
        for block in reversed(blocks_in(one.func.body)):
            handle = one.get_block(block.name)
            scope.update({loop.name: loop for loop in reversed(one.get_loops(handle))})
            scope["block"] = handle
        scope.update({block.name: one.get_block(block.name) for block in blocks_in(one.func.body)})
        scope.update({name: eval(text, scope) for name, text in names.items()})
        for each in calls:
            exec(each, scope)
        verify(one.func)
    return sum(map(len, ways))
