"""The arguments of primitives: checked here, against the primitive's signature, before anything else looks at them.

An integer of numpy's is taken as Python's, a list as a tuple, and a function of indices as the map that it computes.
"""

from __future__ import annotations

import ast
import inspect
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.handles import BlockRef, Handles, LoopRef, Ref
from kedge.compiler.schedule.primitives.storage import IndexMap, map_of
from kedge.compiler.schedule.tree import blocks_in, refuse
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import PrimFunc

_WORDS = {int: "int", str: "str", NoneType: "None", LoopRef: "the handle of a loop", BlockRef: "the handle of a block",
          IndexMap: "a function of indices"}  # fmt: skip
_PLAIN = (int, str, NoneType)


class _Mismatch(Exception):
    """A value that is not what a hint says: `what` it is and what was wanted, said of the value or of a part of it."""

    def __init__(self, what: str, part: str = "it") -> None:
        super().__init__(f"{part} {what}")
        self.what = what


class UnknownHandle(Exception):
    """A step of a trace names a handle that no step before it made."""

    def __init__(self, handle: object) -> None:
        super().__init__(f"no step made handle {handle!r}")
        self.handle = handle


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
            reason, remedy = self._unbound(args, kwargs, error)
            raise ScheduleError(f"{self.name}: {reason}", hint=remedy) from error
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            parameter = self.parameters[name]
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            hint = Sequence[parameter.annotation] if several else parameter.annotation  # type: ignore[name-defined]
            if several and any(isinstance(each, (tuple, list)) for each in value):
                call = f"sch.{self.name}({', '.join(_name_of(each) for each in _flat(value))})"
                reason = f"it takes the {name} one by one, not in a list"
                raise ScheduleError(f"{self.name}({name}={_shown(value)}): {reason}", hint=call)
            bound.arguments[name] = self._checked(func, handles, name, hint, value, bound.arguments)
            if get_origin(parameter.annotation) is UnionType and IndexMap in get_args(parameter.annotation):
                block = handles.name(bound.arguments["block"])
                given = bound.arguments[name]
                bound.arguments[name] = given if isinstance(given, IndexMap) else map_of(func, block, given)
        return bound

    def _unbound(self, args: Sequence[Any], kwargs: Mapping[str, Any], error: TypeError) -> tuple[str, str]:
        """Why a call does not fit the signature, and a remedy."""
        like = f"it is called like this: {self._call(dict(zip(self.parameters, args, strict=False)))}"
        unknown = next((key for key in kwargs if key not in self.parameters), None)
        if unknown is not None:
            close = get_close_matches(unknown, self.parameters, 1)
            meant = f"did you mean {close[0]}=? " if close else ""
            return f"unexpected keyword argument {unknown!r}", f"{meant}{like}"
        if len(args) > len(self.parameters):
            most = len(self.parameters)
            return f"it takes {most} argument{'s' if most != 1 else ''}, and {len(args)} were given", like
        return str(error), like

    def _call(self, given: Mapping[str, Any]) -> str:
        """The example, on the loops and blocks that were given."""
        return " or ".join(self._filled(each, given) for each in self.example.split(" or "))

    def _filled(self, example: str, given: Mapping[str, Any]) -> str:
        call = ast.parse(example, mode="eval").body
        assert isinstance(call, ast.Call)
        names = [*self.parameters, *[""] * len(call.args)]
        shown: list[str] = []
        for name, arg in zip(names, call.args, strict=False):
            value = given.get(name)
            if isinstance(value, Ref) and self._takes(name, value):
                shown.append(value.name)
            else:
                shown.append(ast.get_source_segment(example, arg) or "")
        shown += [f"{each.arg}={ast.get_source_segment(example, each.value)}" for each in call.keywords]
        return f"sch.{self.name}({', '.join(shown)})"

    def _takes(self, name: str, value: Ref) -> bool:
        """Whether a handle is of the kind that the parameter wants."""
        kind = self.parameters[name].annotation if name else None
        return kind in (LoopRef, BlockRef, Ref) and isinstance(value, kind)

    def _checked(
        self, func: PrimFunc, handles: Handles, name: str, hint: Any, value: Any, given: Mapping[str, Any]
    ) -> Any:
        try:
            found = _coerced(value, hint)
        except _Mismatch as error:
            wanted = next((_given(func, kind) for kind in (hint, *get_args(hint)) if kind in (LoopRef, BlockRef)), "")
            remedy = f"{wanted}{self._call(given)}"
            raise ScheduleError(f"{self.name}({name}={_shown(value)}): {error}", hint=remedy) from None
        for ref in found if isinstance(found, tuple) else (found,):
            if isinstance(ref, Ref):
                self._check_live(func, handles, ref)
        return found

    def _check_live(self, func: PrimFunc, handles: Handles, ref: Ref) -> None:
        what = _shown(ref)
        if not handles.is_own(ref):
            again = "sch.get_block and sch.get_loops of this schedule give handles of what is there"
            raise refuse(func, self.name, what, "the handle belongs to another schedule", hint=again)
        gone = handles.removed_by(ref)
        if gone is not None:
            reason, remedy = gone.told(ref)
            raise refuse(func, self.name, what, reason, hint=remedy)

    def to_json(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        """Arguments as a trace holds them: ids instead of handles, lists, and maps as texts."""
        return {name: _to_json(value) for name, value in bound.arguments.items()}

    def from_json(
        self, args: Mapping[str, Any], made: Mapping[str, Ref], symbols: Sequence[Var]
    ) -> tuple[list[Any], dict[str, Any]]:
        """What `to_json` gave as positional and named arguments; `made` are the handles by their ids in the trace.

        Raises UnknownHandle where a handle is none of `made`, and KeyError, TypeError or ParseError where they are no
        arguments of it.
        """
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for name, value in args.items():
            parameter = self.parameters[name]
            hint = parameter.annotation
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional = [_made(made, each) for each in value]
            elif hint in (LoopRef, BlockRef, Ref):
                named[name] = _made(made, value)
            else:
                is_map = IndexMap in get_args(hint)
                named[name] = IndexMap.from_json(value, symbols) if is_map else value
        return positional, named


def _made(made: Mapping[str, Ref], handle: Any) -> Ref:
    if not isinstance(handle, str) or handle not in made:
        raise UnknownHandle(handle)
    return made[handle]


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
            raise _Mismatch(f"is {described(value)}, not {_wanted(hint)}")
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
    raise _Mismatch(f"is not {_wanted(hint)}" if known else f"is {described(value)}, not {_wanted(hint)}")


def _item(value: Any, hint: Any) -> Any:
    try:
        return _coerced(value, hint)
    except _Mismatch as error:
        raise _Mismatch(error.what, f"its element {_shown(value)}") from None


def _shown(value: Any) -> str:
    if isinstance(value, Ref):
        return f"{'loop' if isinstance(value, LoopRef) else 'block'} {value.name!r}"
    if isinstance(value, (tuple, list)) and len(value) < 8:
        return f"[{', '.join(map(_shown, value))}]"
    plain = isinstance(value, PrimFunc) or repr(value) == object.__repr__(value)
    return f"<{type(value).__name__}>" if plain else reprlib.repr(value)


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, Ref) else _shown(value)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [one for each in values for one in (_flat(each) if isinstance(each, (tuple, list)) else (each,))]


def _given(func: PrimFunc, kind: Any) -> str:
    """How one gets such a handle."""
    name = next((block.name for block in blocks_in(func.body)), "y")
    if kind is LoopRef:
        return f"sch.get_loops({name}) gives the handles of the loops around block {name!r}; "
    return f"sch.get_block({name!r}) gives the handle of block {name!r}; "


def described(value: Any) -> str:
    """What a value is, as messages say it: "None", "a loop", "an int"."""
    if value is None:
        return "None"
    if isinstance(value, Ref):
        return "a loop" if isinstance(value, LoopRef) else "a block"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _wanted(hint: Any) -> str:
    """What a value should be, with its article."""
    words = _words(hint)
    return f"{'an' if words.startswith('int') else 'a'} {words}" if words.split()[0] in ("int", "str") else words


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Sequence:
        return f"a list of {_words(parts[0])}" if parts[0] in _PLAIN or get_args(parts[0]) else f"several of {parts[0]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    return _WORDS[IndexMap] if origin is Callable else _WORDS.get(hint, str(hint))
