"""The arguments of primitives: checked here, against the primitive's signature, before anything else looks at them.

An integer of numpy's is taken as Python's, a list as a tuple, and a function of indices as the map that it computes.
"""

from __future__ import annotations

import inspect
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.handles import BlockRef, Handles, LoopRef, Ref
from kedge.compiler.schedule.primitives.storage import IndexMap, map_of
from kedge.compiler.schedule.tree import refuse
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import PrimFunc

_ONE = {int: "a whole number", str: "a text", NoneType: "None", LoopRef: "the handle of a loop",
        BlockRef: "the handle of a block", IndexMap: "a function of indices"}  # fmt: skip
_SEVERAL = {int: "whole numbers", str: "texts"}
_GIVEN = {LoopRef: "sch.get_loops(block) gives the handles of the loops around a block",
          BlockRef: "sch.get_block('name') gives the handle of a block"}  # fmt: skip


class _Mismatch(Exception):
    """A value that is not what a hint says: `what` it is and what was wanted, said of the value or of a part of it."""

    def __init__(self, what: str, part: str = "it") -> None:
        super().__init__(f"{part} {what}")
        self.what = what


@dataclass(frozen=True)
class Primitive:
    """A method of `Schedule` that takes part in traces, and a call of it that shows what its arguments look like."""

    method: Callable[..., Any]
    example: str

    @property
    def name(self) -> str:
        """What it is called."""
        return self.method.__name__

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Its parameters without `self`, their annotations resolved."""
        hints = get_type_hints(self.method)
        (_, *rest) = inspect.signature(self.method).parameters.values()
        return {each.name: each.replace(annotation=hints[each.name]) for each in rest}

    def bind(
        self, func: PrimFunc, handles: Handles, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> inspect.BoundArguments:
        """The arguments by name, each checked; raises ScheduleError."""
        try:
            bound = inspect.Signature(list(self.parameters.values())).bind(*args, **kwargs)
        except TypeError as error:
            raise ScheduleError(f"{self.name}: {error}", hint=f"it is called like this: {self.example}") from error
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            parameter = self.parameters[name]
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            hint = Sequence[parameter.annotation] if several else parameter.annotation  # type: ignore[name-defined]
            bound.arguments[name] = self._checked(func, handles, name, hint, value)
            if get_origin(parameter.annotation) is UnionType and IndexMap in get_args(parameter.annotation):
                block = handles.name(bound.arguments["block"])
                given = bound.arguments[name]
                bound.arguments[name] = given if isinstance(given, IndexMap) else map_of(func, block, given)
        return bound

    def _checked(self, func: PrimFunc, handles: Handles, name: str, hint: Any, value: Any) -> Any:
        try:
            found = _coerced(value, hint)
        except _Mismatch as error:
            wanted = next((text for kind, text in _GIVEN.items() if kind in (hint, *get_args(hint))), "")
            remedy = f"{wanted}; {self.example}" if wanted else self.example
            raise ScheduleError(f"{self.name}({name}={_shown(value)}): {error}", hint=remedy) from None
        for ref in found if isinstance(found, tuple) else (found,):
            if isinstance(ref, Ref):
                self._check_live(func, handles, ref)
        return found

    def _check_live(self, func: PrimFunc, handles: Handles, ref: Ref) -> None:
        what = _shown(ref)
        again = "sch.get_block and sch.get_loops give handles of what is there"
        if not handles.is_own(ref):
            raise refuse(func, self.name, what, "the handle belongs to another schedule", hint=again)
        gone = handles.removed_by(ref)
        if gone is not None:
            raise refuse(func, self.name, what, f"it is gone: {gone} removed it", hint=again)

    def to_json(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """Arguments as a trace holds them: ids instead of handles, lists, and maps as texts."""
        return {name: _to_json(value) for name, value in bound.arguments.items()}

    def from_json(
        self, args: Mapping[str, Any], made: Mapping[str, Ref], symbols: Sequence[Var]
    ) -> tuple[list[Any], dict[str, Any]]:
        """What `to_json` gave as positional and named arguments; `made` are the handles by their ids in the trace.

        Raises KeyError, TypeError or ParseError where they are no arguments of it.
        """
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in args.items():
            parameter = self.parameters[name]
            hint = parameter.annotation
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional = [made[each] for each in value]
            elif hint in (LoopRef, BlockRef, Ref):
                named[name] = made[value]
            else:
                is_map = IndexMap in get_args(hint)
                named[name] = IndexMap.from_json(value, symbols) if is_map else value
        return positional, named


def _to_json(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.id
    if isinstance(value, IndexMap):
        return value.to_json()
    return [_to_json(each) for each in value] if isinstance(value, tuple) else value


def _coerced(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Sequence:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _Mismatch(f"is {_kind(value)}, not {_words(hint)}")
        return tuple(_item(each, parts[0]) for each in value)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return _coerced(value, part)
            except _Mismatch:
                continue
    elif hint is Any or hint is int:
        if not isinstance(value, bool):
            try:
                return operator.index(value)
            except TypeError:
                pass
        if hint is Any:
            return value
    elif origin is Literal:
        if any(isinstance(value, type(part)) and value == part for part in parts):
            return value
    elif isinstance(value, hint if origin is None else origin):
        return value
    known = origin is Literal and isinstance(value, str)
    raise _Mismatch(f"is not {_words(hint)}" if known else f"is {_kind(value)}, not {_words(hint)}")


def _item(value: Any, hint: Any) -> Any:
    try:
        return _coerced(value, hint)
    except _Mismatch as error:
        raise _Mismatch(error.what, f"{_shown(value)} in it") from None


def _shown(value: Any) -> str:
    if isinstance(value, Ref):
        return f"{'loop' if isinstance(value, LoopRef) else 'block'} {value.name!r}"
    if isinstance(value, (tuple, list)) and len(value) < 8:
        return f"[{', '.join(map(_shown, value))}]"
    plain = isinstance(value, PrimFunc) or repr(value) == object.__repr__(value)
    return type(value).__name__ if plain else reprlib.repr(value)


def _kind(value: Any) -> str:
    if isinstance(value, LoopRef):
        return "a loop"
    if isinstance(value, BlockRef):
        return "a block"
    if isinstance(value, PrimFunc):
        return "a function"
    return "None" if value is None else f"of type {type(value).__name__}"


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Sequence:
        inside = get_args(parts[0]) or (parts[0],)
        return f"a list of {' or '.join(_SEVERAL.get(part) or _words(part) for part in inside)}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    return _ONE[IndexMap] if origin is Callable else _ONE.get(hint, str(hint))
