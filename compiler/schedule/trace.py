"""What all primitives of a schedule share: they are checked, done as a whole or not at all, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

from kedge.compiler.errors import ParseError, ScheduleError
from kedge.compiler.schedule.arguments import Primitive
from kedge.compiler.schedule.handles import Handles, Ref
from kedge.compiler.schedule.primitives.prefetch import check_prefetched
from kedge.compiler.schedule.primitives.storage import check_private
from kedge.compiler.schedule.primitives.tensorize import check_tensorized
from kedge.compiler.tir.stmt import PrimFunc

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


class Traced:
    """A function under transformation, the handles of its parts, and the trace of what was done to it."""

    def __init__(self, func: PrimFunc) -> None:
        if not isinstance(func, PrimFunc):
            hint = "te.create_prim_func makes a PrimFunc, and a schedule `sch` has its own as sch.func"
            raise ScheduleError(f"Schedule(func={type(func).__name__}): it is no PrimFunc", hint=hint)
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
        for number, step in enumerate(trace):
            try:
                known = PRIMITIVES[step["primitive"]]
                positional, named = known.from_json(step["args"], made, func.symbols)
                result = getattr(sch, known.name)(*positional, **named)
                refs = () if result is None else result if isinstance(result, tuple) else (result,)
                made.update(zip(step.get("result", ()), refs, strict=True))
            except ScheduleError as error:
                raise ScheduleError(f"replay: step {number}: {error.message}", hint=error.hint) from error
            except (KeyError, TypeError, ValueError, AttributeError, ParseError) as error:
                raise ScheduleError(f"replay: step {number} is malformed ({error!r}): {step!r}") from error
        return sch

    def _commit(self, primitive: str, func: PrimFunc) -> None:
        """Take over the new function, and retire the handles of what it no longer has."""
        check_private(self._func, func, primitive)
        check_tensorized(self._func, func, primitive)
        check_prefetched(self._func, func, primitive)
        self._func = func
        self._handles.retire(func, primitive)

    def _record(self, primitive: str, args: Mapping[str, Any], result: object) -> None:
        step: dict[str, Any] = {"primitive": primitive, "args": dict(args)}
        refs = result if isinstance(result, tuple) else () if result is None else (result,)
        if refs:
            step["result"] = [ref.id for ref in refs]
        self._trace.append(step)
