"""The graph IR: SSA values of operators over typed tensors whose dims are known or symbolic.

A `Module` holds functions that share named parameters (weights). A function is a directed acyclic graph reached
from its outputs; nothing is ordered but by data flow. Nodes are immutable and compared by identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

from kedge.compiler.tir.expr import Dim, Var

Attrs: TypeAlias = Mapping[str, Any]
EMPTY: Attrs = MappingProxyType({})
MemorySpace = Literal["host", "device"]


@dataclass(frozen=True, slots=True, eq=False)
class TensorType:
    """Shape (ints or int64 expressions over symbolic dims), dtype (a numpy name) and memory space of a value."""

    shape: tuple[Dim, ...]
    dtype: str
    space: MemorySpace = "host"

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        """Whether every dim is known."""
        return all(isinstance(dim, int) for dim in self.shape)


class Value:
    """Base of everything an operator can take."""

    __slots__ = ()
    type: TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Input(Value):
    """A named argument of a function, given on every call."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Param(Value):
    """A named weight shared by the functions of a module. Its data is `Module.params[name]`, where bound."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True, eq=False)
class Constant(Value):
    """A literal array. `data` must not be written to."""

    data: np.ndarray[Any, Any]
    name: str = ""

    @property
    def type(self) -> TensorType:  # type: ignore[override]
        """The array's own shape and dtype."""
        return TensorType(tuple(self.data.shape), str(self.data.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Call(Value):
    """An operator applied to values: one result, or with several `types` one that `Item` takes apart.

    `origin` names the nodes of the user's model that this call stands for; errors and reports speak of those.
    """

    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs
    types: tuple[TensorType, ...]
    origin: tuple[str, ...] = ()

    @property
    def type(self) -> TensorType:  # type: ignore[override]
        """The type of the only (or first) result."""
        return self.types[0]


@dataclass(frozen=True, slots=True, eq=False)
class Fused(Value):
    """A group of operators that becomes one kernel: `body` applied to `inputs` (one per input of `body`)."""

    body: Function
    inputs: tuple[Value, ...]
    types: tuple[TensorType, ...]
    origin: tuple[str, ...] = ()

    @property
    def type(self) -> TensorType:  # type: ignore[override]
        """The type of the only (or first) result."""
        return self.types[0]


@dataclass(frozen=True, slots=True, eq=False)
class ExternalCall(Fused):
    """A group that a C function named `body.name` computes, not code that kedge generates.

    `body` is what the function must compute: references evaluate it, and its inputs have the names that the pattern
    gave its leaves. `attrs` are numbers (or tuples of them) for the function; `workspace` is the bytes of scratch
    memory it wants, a dim. The code itself is found by name when the module is lowered.
    """

    attrs: Attrs = field(default_factory=lambda: EMPTY)
    workspace: Dim = 0


@dataclass(frozen=True, slots=True, eq=False)
class Item(Value):
    """Result `index` of a call with several results."""

    source: Call | Fused
    index: int

    @property
    def type(self) -> TensorType:  # type: ignore[override]
        """The type of that result."""
        return self.source.types[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """`outputs` as a function of `inputs` and of the module's parameters."""

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[Value, ...]
    output_names: tuple[str, ...]

    @property
    def symbols(self) -> tuple[Var, ...]:
        """The symbolic dims of the inputs' shapes, in order of appearance."""
        seen: dict[int, Var] = {}
        for value in self.inputs:
            for dim in value.type.shape:
                if isinstance(dim, Var):
                    seen.setdefault(id(dim), dim)
        return tuple(seen.values())

    def values(self) -> Iterator[Value]:
        """Every value reachable from the outputs, each once, operands before their users."""
        return postorder(self.outputs)


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """Functions by name and the data of the parameters they share.

    A parameter without an entry in `params` is unbound: it must be bound before compiling
    (`module.bind({"fc1.weight": array})`) or it becomes an input of the compiled functions.
    """

    functions: Mapping[str, Function]
    params: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def bind(self, params: Mapping[str, np.ndarray[Any, Any]]) -> Module:
        """A module with the data of more parameters; raises `InputError` on an unknown name, shape or dtype."""
        from kedge.compiler.graph.bind import bind

        return bind(self, params)

    def show(self) -> str:
        """The module as text that `kedge.compiler.graph.parser.parse` reads back."""
        from kedge.compiler.graph.printer import print_module

        return print_module(self)

    def print(self) -> None:
        """Write the text of `show` to standard output, in colour where that is a terminal (NO_COLOR: nowhere)."""
        from kedge.compiler.tir.highlight import write

        write(self.show())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module with its parameters to a `.kmod` file, which `kedge.load` reads back."""
        from kedge.compiler.graph.store import save_module

        save_module(self, path)

    def summary(self) -> str:
        """A table of inputs, outputs, operators, parameters and sizes."""
        from kedge.compiler.graph.summary import summarize

        return summarize(self)


def operands(value: Value) -> tuple[Value, ...]:
    """The values that `value` is computed from."""
    if isinstance(value, (Call, Fused)):
        return value.inputs
    if isinstance(value, Item):
        return (value.source,)
    return ()


def postorder(roots: tuple[Value, ...]) -> Iterator[Value]:
    """Every value reachable from `roots`, each once, operands first. Iterative: deep models do not overflow."""
    done: set[int] = set()
    stack: list[tuple[Value, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        value, expanded = stack.pop()
        if id(value) in done:
            continue
        if expanded:
            done.add(id(value))
            yield value
        else:
            stack.append((value, True))
            stack.extend((operand, False) for operand in reversed(operands(value)))


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dims are provably equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from kedge.compiler.tir.simplify import prove_equal

    return prove_equal(a, b)
