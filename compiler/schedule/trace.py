"""What all primitives of a schedule share: they are checked, done as a whole or not at all, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

from kedge.compiler.errors import ParseError, ScheduleError
from kedge.compiler.schedule.arguments import Primitive, UnknownHandle, described
from kedge.compiler.schedule.handles import Handles, Ref
from kedge.compiler.schedule.primitives.prefetch import check_prefetched
from kedge.compiler.schedule.primitives.storage import check_private
from kedge.compiler.schedule.primitives.tensorize import check_tensorized
from kedge.compiler.tir.flatten import holds_blocks
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.stmt import Block, PrimFunc
from kedge.compiler.tir.visitor import map_func

#: One step of a trace: the primitive, its arguments and the ids of the handles it made. Plain JSON.
Step: TypeAlias = Mapping[str, Any]

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Traced")

#: All primitives by name.
PRIMITIVES: dict[str, Primitive] = {}


def primitive(
    example: str, *, recorded: bool = True
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """A method as a primitive: its arguments are checked against its signature, its call is a step of the trace.

    The method raises ScheduleError, or calls `_commit` at most once, and only then asks for new handles. `example` is
    a call of it, shown where the arguments are wrong. A mere question, which makes no handles, need not be `recorded`.
    """

    def wrap(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        known = Primitive(method, example)
        if recorded:
            PRIMITIVES[known.name] = known

        @wraps(method)
        def call(sch: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            if not isinstance(sch, Traced):
                kind = type(sch).__name__
                raise ScheduleError(f"{known.name}: it is a method of Schedule, not of {kind}", hint="Schedule(func)")
            bound = known.bind(sch._func, sch._handles, args, kwargs)
            result = method(sch, *bound.args, **bound.kwargs)
            if recorded:
                sch._record(known.name, known.to_json(bound), result)
            return result

        return call

    return wrap


_WHOLE = "replay the whole trace of a schedule, as sch.trace gives it"


class _Malformed(ScheduleError):
    """A step that is no step of a trace."""


def _steps_of(trace: object) -> Sequence[Step]:
    """`trace`, if it is a sequence of steps; raises ScheduleError."""
    if isinstance(trace, Sequence) and not isinstance(trace, (str, bytes)):
        return trace
    if isinstance(trace, Traced):
        raise ScheduleError("replay(trace): it is a Schedule, not a trace", hint="Schedule.replay(func, sch.trace)")
    hint = "Schedule.replay(func, json.loads(trace))" if isinstance(trace, (str, bytes)) else _WHOLE
    raise ScheduleError(f"replay(trace): it is {described(trace)}, not a list of steps", hint=hint)


def _primitive_of(number: int, step: object) -> Primitive:
    """The primitive that a step names."""
    if not isinstance(step, Mapping) or not isinstance(step.get("args"), Mapping):
        reason = 'it is no mapping with a "primitive" and its "args"'
        raise _Malformed(f"replay: step {number}: {reason}: {step!r}", hint=_WHOLE)
    name = step.get("primitive")
    if not isinstance(name, str) or name not in PRIMITIVES:
        close = get_close_matches(str(name), PRIMITIVES, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(PRIMITIVES))}"
        raise _Malformed(f"replay: step {number}: there is no primitive {name!r}: {step!r}", hint=hint)
    return PRIMITIVES[name]


def _with_outer_regions(func: PrimFunc) -> PrimFunc:
    """`func` with the regions of blocks that hold others as these are now."""
    return map_func(func, lambda s: with_regions(s) if isinstance(s, Block) and holds_blocks(s) else s)


def no_function(where: str, value: object) -> ScheduleError:
    """The refusal of a value that should be a PrimFunc."""
    remedy = 'te.create_prim_func([x, y], "main") makes one of tensors'
    if isinstance(value, Traced):
        remedy = "a schedule `sch` has its function as sch.func"
    return ScheduleError(f"{where}: it is {described(value)}, not a PrimFunc", hint=remedy)


class Traced:
    """A function under transformation, the handles of its parts, and the trace of what was done to it."""

    def __init__(self, func: PrimFunc) -> None:
        """A schedule of `func` with an empty trace; raises ScheduleError where it is no PrimFunc."""
        if not isinstance(func, PrimFunc):
            raise no_function("Schedule(func)", func)
        self._func = func
        self._trace: list[Step] = []
        self._handles = Handles()

    @property
    def func(self) -> PrimFunc:
        """The function as it is now."""
        return self._func

    @property
    def trace(self) -> tuple[Step, ...]:
        """The steps so far, each a JSON-able mapping."""
        return tuple(self._trace)

    @classmethod
    def replay(cls, func: PrimFunc, trace: Sequence[Step]) -> Self:
        """The schedule that `trace` describes, on a function built like the one it was recorded on.

        Raises:
            ScheduleError: a step does not apply, or is malformed.
        """
        sch = cls(func)
        made: dict[str, Ref] = {}
        for number, step in enumerate(_steps_of(trace)):
            try:
                known = _primitive_of(number, step)
                positional, named = known.from_json(step["args"], made, func.symbols)
                result = getattr(sch, known.name)(*positional, **named)
                refs = () if result is None else result if isinstance(result, tuple) else (result,)
                made.update(zip(step.get("result", ()), refs, strict=True))
            except _Malformed as error:
                raise ScheduleError(error.message, hint=error.hint) from None
            except UnknownHandle as error:
                reason = f"replay: step {number}: no step before it made handle {error.handle!r}"
                raise ScheduleError(f"{reason}: {step!r}", hint=_WHOLE) from None
            except ScheduleError as error:
                hint = error.hint
                if step["primitive"] == "get_block":
                    hint = "the trace was recorded on a function with other blocks: give a function built like that one"
                raise ScheduleError(f"replay: step {number}: {error.message}", hint=hint) from error
            except (KeyError, TypeError, ValueError, AttributeError, ParseError) as error:
                reason = f"replay: step {number}: its arguments or result are none of {step['primitive']}"
                raise ScheduleError(f"{reason} ({error!r}): {step!r}", hint=_WHOLE) from error
        return sch

    def copy(self) -> Self:
        """An independent schedule with the same function, trace and handles.

        Handles that were given out before are valid for both; what one makes later is unknown to the other, which
        refuses it. `copy.copy` and `copy.deepcopy` do the same.
        """
        other = type(self)(self._func)
        other._trace, other._handles = list(self._trace), self._handles.copy()
        return other

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.copy()  # functions, steps and handles are immutable

    def _commit(self, primitive: str, func: PrimFunc) -> None:
        """Take over the new function, and retire the handles of what it no longer has."""
        func = _with_outer_regions(func)
        check_private(self._func, func, primitive)
        check_tensorized(self._func, func, primitive)
        check_prefetched(self._func, func, primitive)
        before, self._func = self._func, func
        self._handles.retire(before, func, primitive)

    def _record(self, primitive: str, args: Mapping[str, Any], result: object) -> None:
        step: dict[str, Any] = {"primitive": primitive, "args": dict(args)}
        refs = result if isinstance(result, tuple) else () if result is None else (result,)
        if refs:
            step["result"] = [ref.id for ref in refs]
        self._trace.append(step)
