"""Patterns of operators: what a subgraph must look like to be taken out of a graph.

    from kedge import patterns as p

    x, w, b = p.wildcard("x"), p.constant("w"), p.wildcard("b")
    dense = p.op("add", p.op("matmul", x, w), b).optional(lambda y: p.op("relu", y))

A pattern is matched from its result towards its operands. Wildcards and constants are leaves: values that the subgraph
takes from outside, in the order in which a pattern names them from left to right. One pattern object used twice stands
for one value. The operands of commutative operators match in either order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.dtypes import DTYPES
from kedge.compiler.errors import CompileError
from kedge.compiler.graph.builder import freeze
from kedge.compiler.graph.ir import EMPTY, Attrs, Call, Param, Value

#: Says whether a value may stand where a pattern stands.
Predicate: TypeAlias = Callable[[Value], bool]
#: Gives the data of a constant or of a bound parameter.
Known: TypeAlias = Callable[[Value], "np.ndarray[Any, Any] | None"]

COMMUTATIVE = frozenset(
    {"add", "mul", "minimum", "maximum", "equal", "not_equal", "logical_and", "logical_or", "logical_xor"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Base of all patterns; `a | b` matches what either matches, and tries `a` first."""

    def __or__(self, other: Pattern) -> Pattern:
        return Either((*_alternatives(self), *_alternatives(other)))

    def optional(self, wrap: Callable[[Pattern], Pattern]) -> Pattern:
        """This pattern inside of what `wrap` makes of it, or by itself: `dense.optional(lambda y: op("relu", y))`."""
        return wrap(self) | self


@dataclass(frozen=True, slots=True, eq=False)
class Named(Pattern):
    """A pattern for one value, which must have the type that is asked for; None asks for nothing.

    `shape` has one entry for each dim: a number, or None for any dim.
    """

    name: str = ""
    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None
    where: Predicate | None = None

    def accepts(self, value: Value) -> bool:
        """Whether type and predicate fit."""
        if self.dtype is not None and value.type.dtype != self.dtype:
            return False
        if self.shape is not None:
            if value.type.rank != len(self.shape):
                return False
            pairs = zip(value.type.shape, self.shape, strict=True)
            if not all(wanted is None or (isinstance(dim, int) and dim == wanted) for dim, wanted in pairs):
                return False
        return self.where is None or self._holds(self.where, value)

    def _holds(self, where: Predicate, value: Value) -> bool:
        try:
            return bool(where(value))
        except Exception as error:
            shown = f"pattern {self.name!r}" if self.name else "a pattern"
            origin = ", ".join(value.origin) if isinstance(value, Call) else getattr(value, "name", "")
            at = f" at {origin}" if origin else ""
            raise CompileError(f"{shown}: where(value) fails{at}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Leaf(Named):
    """Any value; with `constant`, one whose data is known while compiling."""

    constant: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Literal(Pattern):
    """A constant of one element that has this value, and stays inside of the subgraph."""

    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Operator(Named):
    """A call of one of `ops` with these attributes (others may have any value) and these operands."""

    ops: tuple[str, ...] = ()
    inputs: tuple[Pattern, ...] = ()
    attrs: Attrs = field(default_factory=lambda: EMPTY)

    def accepts(self, value: Value) -> bool:
        """Whether the value is such a call, whatever its operands are."""
        return isinstance(value, Call) and self._fits(value) and Named.accepts(self, value)

    def _fits(self, call: Call) -> bool:
        if len(call.types) != 1 or len(call.inputs) != len(self.inputs) or call.attrs.get("absent"):
            return False  # where an input is left out, the others are not at their places
        # An operator that users defined has a name for each way of fusing: my.domain.Gelu.elementwise.
        if call.op not in self.ops and call.op.rpartition(".")[0] not in self.ops:
            return False
        given = attributes_of(call)
        return all(name in given and given[name] == value for name, value in self.attrs.items())


@dataclass(frozen=True, slots=True, eq=False)
class Either(Pattern):
    """Alternatives, tried in order."""

    patterns: tuple[Pattern, ...]


def wildcard(
    name: str = "",
    *,
    dtype: Any = None,
    shape: Sequence[int | None] | None = None,
    where: Predicate | None = None,
) -> Pattern:
    """Any value of this dtype and shape for which `where(value)` holds."""
    return Leaf(name, _dtype(dtype), _shape(shape), where)


def constant(
    name: str = "",
    *,
    dtype: Any = None,
    shape: Sequence[int | None] | None = None,
    where: Predicate | None = None,
) -> Pattern:
    """The same for constants and bound parameters: weights, in general."""
    return Leaf(name, _dtype(dtype), _shape(shape), where, constant=True)


def literal(value: float) -> Pattern:
    """A constant of one element with this value, as in 0.5 · x; it is no argument of the external function."""
    return Literal(value)


def op(
    ops: str | Sequence[str],
    *inputs: Pattern,
    name: str = "",
    attrs: Mapping[str, Any] = EMPTY,
    dtype: Any = None,
    shape: Sequence[int | None] | None = None,
    where: Predicate | None = None,
) -> Pattern:
    """A call of the operator (or of one of several) on operands that match `inputs`, as many as the call has.

    Args:
        ops: names of graph operators, see `kedge.compiler.ops`; of operators that users registered, domain and type.
        name: how `Match` calls the call, so that its attributes can be read.
        attrs: attributes that must have these values.
        dtype, shape, where: ask for the type of the result, and more.
    """
    names = (ops,) if isinstance(ops, str) else tuple(ops)
    frozen = MappingProxyType({key: freeze(value) for key, value in attrs.items()})
    strange = next((type(each).__name__ for each in inputs if not isinstance(each, Pattern)), None)
    if not names or strange is not None:
        raise TypeError(f"op takes names and then patterns, not {f'a {strange}' if strange else 'nothing'}")
    return Operator(name, _dtype(dtype), _shape(shape), where, names, tuple(inputs), frozen)


def attributes_of(call: Call) -> Attrs:
    """The attributes of a call by name; of an operator that users registered, those of its node."""
    pairs = call.attrs.get("attributes")
    return MappingProxyType(dict(pairs)) if isinstance(pairs, tuple) and "result" in call.attrs else call.attrs


# What a pattern consists of -------------------------------------------------------------------------------------------


def leaves(pattern: Pattern) -> tuple[tuple[Leaf, str], ...]:
    """The leaves of a pattern with their names, each once, from left to right; `arg0`, … where they have none.

    Raises:
        CompileError: two patterns have one name.
    """
    named: dict[str, Pattern] = {}
    found: dict[int, tuple[Leaf, str]] = {}
    for each in _parts(pattern):
        name = each.name if isinstance(each, Named) else ""
        if isinstance(each, Leaf) and id(each) not in found:
            name = name or f"arg{len(found)}"
            found[id(each)] = each, name
        if name and named.setdefault(name, each) is not each:
            raise CompileError(
                f"two patterns are called {name!r}", hint="use one pattern object twice where the same value is meant"
            )
    return tuple(found.values())


def operators(pattern: Pattern) -> frozenset[str]:
    """The names of all operators in a pattern."""
    return frozenset(name for each in _parts(pattern) if isinstance(each, Operator) for name in each.ops)


def roots(pattern: Pattern) -> tuple[Pattern, ...]:
    """What may stand for the result: the pattern itself, or each of its alternatives."""
    if not isinstance(pattern, Either):
        return (pattern,)
    return tuple(root for each in pattern.patterns for root in roots(each))


def _parts(pattern: Pattern) -> Iterator[Pattern]:
    yield pattern
    inner = pattern.inputs if isinstance(pattern, Operator) else ()
    for each in (*inner, *(pattern.patterns if isinstance(pattern, Either) else ())):
        yield from _parts(each)


def _alternatives(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.patterns if isinstance(pattern, Either) else (pattern,)


def _shape(shape: Sequence[int | None] | None) -> tuple[int | None, ...] | None:
    return None if shape is None else tuple(shape)


def _dtype(dtype: Any) -> str | None:
    """The name of a dtype, which may be given as numpy's."""
    if dtype is None:
        return None
    try:
        name = str(np.dtype(dtype))
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise TypeError(f"dtype={dtype!r} is no element type of tensors; there are {', '.join(sorted(DTYPES))}")
    return name


# Matching -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A subgraph that a pattern matches.

    `inputs` are the leaves that this alternative of the pattern has, by name and in their order; `calls` the operators
    it covers, operands first, with the result last.
    """

    inputs: Mapping[str, Value]
    calls: tuple[Call, ...]
    literals: tuple[Value, ...]
    named: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def root(self) -> Call:
        """The call whose result the subgraph gives."""
        return self.calls[-1]

    def __getitem__(self, name: str) -> Value:
        """The value that the pattern of that name matched; raises KeyError where this alternative lacks it."""
        return self.named[name]

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def attrs(self, name: str) -> Attrs:
        """The attributes of the call that the operator pattern of that name matched."""
        value = self.named[name]
        return attributes_of(value) if isinstance(value, Call) else EMPTY


@dataclass(frozen=True, slots=True)
class _State:
    """What is bound so far: patterns to values, and the covered calls in the order of matching."""

    bound: Mapping[int, Value]
    calls: tuple[Call, ...] = ()
    literals: tuple[Value, ...] = ()


def matches(pattern: Pattern, value: Value, known: Known) -> Iterator[Match]:
    """Every way in which `value` is the result of a subgraph that `pattern` describes.

    A leaf never stands for a value that the subgraph computes itself.
    """
    names: tuple[tuple[Leaf, str], ...] | None = None  # most values match nothing
    for state in _match(pattern, value, _State({}), known):
        names = leaves(pattern) if names is None else names
        named = {id(each): each.name for each in _parts(pattern) if isinstance(each, Named) and each.name}
        taken = {id(call) for call in state.calls}
        inputs = {name: state.bound[id(leaf)] for leaf, name in names if id(leaf) in state.bound}
        if not state.calls or any(id(leaf) in taken for leaf in inputs.values()):
            continue
        by_name = {name: state.bound[key] for key, name in named.items() if key in state.bound}
        calls = tuple({id(call): call for call in state.calls}.values())
        yield Match(
            MappingProxyType(inputs), _operands_first(calls), state.literals, MappingProxyType({**inputs, **by_name})
        )


def _match(pattern: Pattern, value: Value, state: _State, known: Known) -> Iterator[_State]:
    if id(pattern) in state.bound:
        if _same(state.bound[id(pattern)], value):
            yield state
        return
    if isinstance(pattern, Either):
        for each in pattern.patterns:
            yield from _match(each, value, state, known)
    elif isinstance(pattern, Literal):
        data = known(value)
        if data is not None and data.size == 1 and data.reshape(-1)[0] == data.dtype.type(pattern.value):
            yield _State(state.bound, state.calls, (*state.literals, value))
    elif isinstance(pattern, Leaf):
        if (not pattern.constant or known(value) is not None) and pattern.accepts(value):
            yield _State({**state.bound, id(pattern): value}, state.calls, state.literals)
    elif isinstance(pattern, Operator) and pattern.accepts(value):
        assert isinstance(value, Call)  # accepted
        start = _State({**state.bound, id(pattern): value}, (*state.calls, value), state.literals)
        for operands in _orders(value):
            yield from _match_all(pattern.inputs, operands, start, known)


def _match_all(
    patterns: tuple[Pattern, ...], values: tuple[Value, ...], state: _State, known: Known
) -> Iterator[_State]:
    if not patterns:
        yield state
        return
    for first in _match(patterns[0], values[0], state, known):
        yield from _match_all(patterns[1:], values[1:], first, known)


def _orders(call: Call) -> tuple[tuple[Value, ...], ...]:
    a = call.inputs
    return (a, a[::-1]) if call.op in COMMUTATIVE and a[0] is not a[1] else (a,)


def _same(a: Value, b: Value) -> bool:
    """Whether two nodes are one value: parameters are known by their names."""
    return a is b or (isinstance(a, Param) and isinstance(b, Param) and a.name == b.name)


def _operands_first(calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """The calls of a subgraph in the order of computation."""
    own = {id(call): call for call in calls}
    done: dict[int, Call] = {}

    def visit(call: Call) -> None:
        if id(call) in done:
            return
        for operand in call.inputs:
            if id(operand) in own:
                visit(own[id(operand)])
        done[id(call)] = call

    for call in calls:
        visit(call)
    return tuple(done.values())


__all__ = ["Match", "Pattern", "constant", "literal", "op", "wildcard"]
