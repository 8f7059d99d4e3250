"""Handing subgraphs to external code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kedge.compiler.errors import CompileWarning
from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.external import External, by_function
from kedge.compiler.graph.ir import Call, Constant, ExternalCall, Function, Input, Module, Value, operands
from kedge.compiler.graph.passes.base import Context, with_functions, with_operands
from kedge.compiler.graph.patterns import Match, matches, operators


@dataclass(frozen=True, slots=True)
class Partition:
    """Put every subgraph that the pattern of an external matches into an `ExternalCall`.

    relu(add(matmul(x, w), b)) -> external my_dense_relu(x, w, b)

    The largest matches come first, among equals those of externals that are given earlier, then those nearer to the
    inputs. No operator belongs to two. What a subgraph computes on the way to its result is used by nothing else; with
    one result, that also keeps every way from the subgraph from leading back into it.

    Warns of externals that match nothing, with the likely reason.
    """

    externals: Sequence[External]
    name: str = "partition"

    def __call__(self, module: Module) -> Module:
        """The module with external calls."""
        by_function(self.externals)
        reasons: dict[str, dict[str, None]] = {external.function: {} for external in self.externals}
        context, functions, used = Context(module), {}, set[str]()
        for name, function in module.functions.items():
            matcher = _Matcher(function, context, reasons)
            chosen = matcher.choose(self.externals)
            used |= {external.function for external, _ in chosen}
            functions[name] = _partitioned(function, chosen, context) if chosen else function
        for external in self.externals:
            if external.function not in used:
                _warn(external, module, tuple(reasons[external.function]))
        if all(function is module.functions[name] for name, function in functions.items()):
            return module
        return with_functions(module, functions)


@dataclass(frozen=True, slots=True)
class _Candidate:
    external: External
    match: Match
    order: tuple[int, int, int]  # the largest, then the first external, then the first place
    calls: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", frozenset(map(id, self.match.calls)))


class _Matcher:
    """Chooses what goes to external code in one function; notes why the rest does not."""

    def __init__(self, function: Function, context: Context, reasons: dict[str, dict[str, None]]) -> None:
        self._function = function
        self._context = context
        self._reasons = reasons
        self._users: dict[int, set[int]] = {}
        for value in function.values():
            for operand in operands(value):
                self._users.setdefault(id(operand), set()).add(id(value))
        self._outputs = {id(value) for value in function.outputs}

    def choose(self, externals: Sequence[External]) -> list[tuple[External, Match]]:
        """Matches that do not overlap."""
        chosen: list[tuple[External, Match]] = []
        taken: set[int] = set()
        for candidate in sorted(self._candidates(externals), key=lambda each: each.order):
            external, match = candidate.external, candidate.match
            if candidate.calls & taken:
                self._note(external, match, "other matches took a part of it")
            elif self._is_closed(external, match, candidate.calls) and self._accepts(external, match):
                taken |= candidate.calls
                chosen.append((external, match))
        return chosen

    def _candidates(self, externals: Sequence[External]) -> Iterator[_Candidate]:
        calls = [value for value in self._function.values() if isinstance(value, Call)]
        for number, external in enumerate(externals):
            for place, call in enumerate(calls):
                for match in matches(external.pattern, call, self._context.known):
                    yield _Candidate(external, match, (-len(match.calls), number, place))

    def _is_closed(self, external: External, match: Match, own: frozenset[int]) -> bool:
        """Whether only the result is seen from outside."""
        for call in match.calls[:-1]:
            if id(call) in self._outputs or not self._users[id(call)] <= own:
                self._note(external, match, f"its {call.op} is used outside of it too")
                return False
        return True

    def _accepts(self, external: External, match: Match) -> bool:
        accepted = external.accepts(match)
        if not accepted:
            self._note(external, match, "supports(match) says no")
        return accepted

    def _note(self, external: External, match: Match, reason: str) -> None:
        self._reasons[external.function][f"at {_origin_text(match)} {reason}"] = None


def _partitioned(function: Function, chosen: Sequence[tuple[External, Match]], context: Context) -> Function:
    groups = {id(match.root): external_call(external, match, context) for external, match in chosen}
    done: dict[int, Value] = {}
    for old in function.values():
        value = groups.get(id(old), old)
        # Operands of a group come before its result; what is inside of it is no longer reached from the outputs.
        done[id(old)] = with_operands(value, [done[id(operand)] for operand in operands(value)])
    return replace(function, outputs=tuple(done[id(value)] for value in function.outputs))


def external_call(external: External, match: Match, context: Context) -> ExternalCall:
    """The call of `external` in place of what it matched."""
    inputs = {name: Input(name, value.type) for name, value in match.inputs.items()}
    inner: dict[int, Value] = {}
    for name, value in match.inputs.items():
        inner.setdefault(id(value), inputs[name])
    for value in match.literals:
        data = context.known(value)
        assert data is not None  # it was matched for its data
        inner[id(value)] = Constant(frozen(data))
    for call in match.calls:
        inner[id(call)] = with_operands(call, [inner[id(operand)] for operand in call.inputs])
    root = match.root
    body = Function(external.function, tuple(inputs.values()), (inner[id(root)],), ("out0",))
    return ExternalCall(
        body, tuple(match.inputs.values()), root.types, _origin(match),
        external.attributes_for(match), external.workspace_for(match),
    )  # fmt: skip


def _origin(match: Match) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for call in match.calls for name in call.origin))


def _origin_text(match: Match) -> str:
    return ", ".join(_origin(match)) or match.root.op


def _warn(external: External, module: Module, reasons: tuple[str, ...]) -> None:
    present = {
        value.op for function in module.functions.values() for value in function.values() if isinstance(value, Call)
    }
    present |= {op.rpartition(".")[0] for op in present}
    missing = sorted(operators(external.pattern) - present)
    if reasons:
        why = "; ".join(reasons[:3])
    elif missing:
        why = f"here the graph has no {', '.join(missing)}"
    else:
        why = "no subgraph has the form of its pattern"
    warnings.warn(f"external {external.function} matches nothing: {why}", CompileWarning, stacklevel=2)
