"""Statements, blocks and functions of the tensor IR.

A `PrimFunc` is a nest of loops around blocks. A block is the unit that schedules move: it names the values of its
iteration variables (`bindings`), says which of them are spatial and which reduce, and declares what it reads and
writes, so that its meaning does not depend on the loops around it (Feng et al., "TensorIR", ASPLOS 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from kedge.compiler.tir.expr import Dim, Expr, Lead, Var, const

if TYPE_CHECKING:
    import os

    from kedge.compiler.schedule.drawing import Picture

Scope = Literal["global", "shared", "local", "register"]
LoopKind = Literal["serial", "parallel", "vectorized", "unrolled", "thread", "tensorized"]
LoopSchedule = Literal["static", "dynamic"]
IterKind = Literal["spatial", "reduce"]

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A dense row-major array. Two buffers are the same only if they are the same object.

    A buffer in scope "local" or "register" that is used only inside a parallel (or thread) loop is private: each
    iteration has its own, and nothing of it lasts beyond the iteration.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    scope: Scope = "global"


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """The half-open interval `[start, start + extent)`."""

    start: Expr
    extent: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A rectangular part of a buffer, one range per dim."""

    buffer: Buffer
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, eq=False)
class IterVar:
    """A block's iteration variable: runs over `[0, extent)`; `reduce` ones may be visited in any order."""

    var: Var
    extent: Expr
    kind: IterKind


class Stmt:
    """Base of all statements."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class Store(Stmt):
    """`buffer[indices] = value`."""

    buffer: Buffer
    indices: tuple[Expr, ...]
    value: Expr


@dataclass(frozen=True, slots=True, eq=False)
class Seq(Stmt):
    """Statements in order."""

    stmts: tuple[Stmt, ...]


@dataclass(frozen=True, slots=True, eq=False)
class If(Stmt):
    """`then` where `condition` holds, else `orelse` where there is one."""

    condition: Expr
    then: Stmt
    orelse: Stmt | None = None


@dataclass(frozen=True, slots=True, eq=False)
class For(Stmt):
    """`for var in [0, extent): body`. `thread` names the axis ("blockIdx.x", …) of a loop of kind "thread".

    A loop of kind "parallel" runs in one chunk for each thread, or, where it is annotated with schedule="dynamic" and
    chunk=n, in chunks of n iterations that threads take when they are free.
    """

    var: Var
    extent: Expr
    kind: LoopKind
    body: Stmt
    thread: str | None = None
    annotations: Mapping[str, Any] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True, eq=False)
class Block(Stmt):
    """One computation: `body` over iteration variables whose values are `bindings` of the loops around it.

    The instance runs only where `predicate` holds. `init`, where present, runs before `body` for the instances in
    which every reduce iteration variable is at its first value (0).
    """

    name: str
    iters: tuple[IterVar, ...]
    bindings: tuple[Expr, ...]
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    body: Stmt
    init: Stmt | None = None
    predicate: Expr = field(default_factory=lambda: const(True, "bool"))
    annotations: Mapping[str, Any] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True, eq=False)
class PrimFunc:
    """One kernel. `params` are its buffers in call order, inputs first and then the `n_outputs` results.

    `symbols` are the free dims of the parameters' shapes, passed as int64 scalars after the buffers, and behind these
    where parameters begin in cache lines (`Lead`), which code finds out. `allocs` are buffers that live only inside the
    call. `attrs` carries facts for rules and reports (`kind`, `origin`, …).
    """

    name: str
    params: tuple[Buffer, ...]
    n_outputs: int
    body: Stmt
    allocs: tuple[Buffer, ...] = ()
    symbols: tuple[Var, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=lambda: EMPTY)

    @property
    def sizes(self) -> tuple[Var, ...]:
        """The symbols that a caller gives: all but the leads."""
        return tuple(symbol for symbol in self.symbols if not isinstance(symbol, Lead))

    def show(self) -> str:
        """The function as text."""
        from kedge.compiler.tir.printer import print_func

        return print_func(self)

    def print(self) -> None:
        """Write the text of `show` to standard output, in colour where that is a terminal (NO_COLOR: nowhere)."""
        from kedge.compiler.tir.highlight import write

        write(self.show())

    def visualize(self, path: str | os.PathLike[str] | None = None) -> Picture:
        """A picture (SVG) of the loop nest, which notebooks show; written to `path` too if given."""
        from kedge.compiler.schedule.visualize import visualize

        return visualize(self, path)
