"""Tensors: what they are made of, and how each comes to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kedge.compiler.dtypes import DTYPES
from kedge.compiler.errors import CompileError
from kedge.compiler.tir.expr import INDEX_DTYPE, Combiner, Dim, Expr, ExprLike, Load, Var, as_expr
from kedge.compiler.tir.stmt import Buffer
from kedge.compiler.tir.visitor import loads

Indices: TypeAlias = "ExprLike | tuple[ExprLike, ...]"


@dataclass(frozen=True, slots=True, eq=False)
class ReduceAxis(Var):
    """A variable to reduce over, running over `[0, extent)`."""

    extent: Dim = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reduction(Expr):
    """`value` over all of `axes`. Only as the root of a `compute` body."""

    combiner: Combiner
    value: Expr
    axes: tuple[ReduceAxis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reduce(Reduction):
    """`value` combined over `axes`, starting from the combiner's identity."""

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype of `value`, in which it is accumulated."""
        return self.value.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Position(Reduction):
    """Where the extreme of `value` is: `compute` makes two reductions of it."""

    last: bool = False

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """That of an index."""
        return INDEX_DTYPE


@dataclass(frozen=True, slots=True, eq=False)
class Truth(Reduction):
    """Whether any ("max") or each ("min") of the bools `value` holds: `compute` reduces them as numbers."""

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """It is a bool."""
        return "bool"


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """A tensor given from outside."""


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """A tensor whose element at `axes` is `body`: a scalar expression, or a `Reduce` of one."""

    axes: tuple[Var, ...]
    body: Expr

    @property
    def value(self) -> Expr:
        """The scalar under the reduction, or the body itself."""
        return self.body.value if isinstance(self.body, Reduce) else self.body

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the body reads, each once, in order of appearance."""
        sources = (load.buffer for load in loads(self.value))
        return tuple(dict.fromkeys(source for source in sources if isinstance(source, Tensor)))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor(Buffer):
    """A tensor and how it comes to be. `t[i, j]` reads one element."""

    op: Placeholder | Compute = Placeholder()

    @property
    def buffer(self) -> Buffer:
        """The buffer that loads of this tensor name (the tensor itself; functions get plain copies)."""
        return self

    def __getitem__(self, indices: Indices) -> Load:
        given = indices if isinstance(indices, tuple) else (indices,)
        if len(given) != len(self.shape):
            raise IndexError(f"{self.name} has {len(self.shape)} dims but was given {len(given)} indices")
        exprs = tuple(as_scalar(index, f"an index of {self.name}") for index in given)
        for index in exprs:
            if index.dtype != INDEX_DTYPE:
                raise TypeError(f"index of {self.name} is {index.dtype}; cast it: te.cast(value, {INDEX_DTYPE!r})")
        return Load(self, exprs)

    def at(self, indices: Sequence[ExprLike]) -> Load:
        """The element at a sequence of indices; also reads a tensor without dims: `t.at(())`."""
        return self[tuple(indices)]


def placeholder(shape: Sequence[Dim], dtype: str, name: str) -> Tensor:
    """A tensor given from outside.

    Raises:
        TypeError: a dim is neither an int nor an int64 expression, the dtype is none that kernels compute with, or the
            name is no text.
        CompileError: a dim is negative.
    """
    return Tensor(checked_name(name), checked_dims(shape, name), checked_dtype(dtype, name))


def reduce_axis(extent: Dim, name: str = "k") -> ReduceAxis:
    """A variable running over `[0, extent)`, for the reductions.

    A symbolic extent must be at least 1 when the function runs: a loop without iterations initialises nothing.
    """
    return ReduceAxis(checked_name(name), extent=checked_dims((extent,), name)[0])


def as_scalar(value: object, what: str) -> Expr:
    """`value` as an expression; `what` names it in the message."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return as_expr(value)
    if isinstance(value, Tensor):
        indices = ", ".join("ijklmn"[: len(value.shape)])
        raise TypeError(f"{what} is the whole tensor {value.name}; read an element of it: {value.name}[{indices}]")
    raise TypeError(f"{what} is of type {type(value).__name__}; give a scalar expression or a number")


def checked_dims(shape: Sequence[Dim], name: str) -> tuple[Dim, ...]:
    """`shape` as a tuple of dims; `name` is the tensor's in the messages.

    Raises:
        TypeError: it is no sequence, or a dim is neither an int nor an int64 expression.
        CompileError: a dim is negative.
    """
    if isinstance(shape, (int, str, Expr)) or not hasattr(shape, "__iter__"):
        raise TypeError(f"the shape of {name} is {shape!r}; give a tuple of dims")
    dims = tuple(int(dim) if isinstance(dim, np.integer) else dim for dim in shape)
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, (int, Expr)):
            raise TypeError(f"dim {dim!r} of {name} is a {type(dim).__name__}; give an int or a symbolic dim (te.Var)")
        if isinstance(dim, Expr) and dim.dtype != INDEX_DTYPE:
            raise TypeError(f"a dim of {name} is {dim.dtype}; symbolic dims are {INDEX_DTYPE}")
        if isinstance(dim, int) and dim < 0:
            raise CompileError(f"dim {dim} of {name} is negative")
    return dims


def checked_dtype(dtype: str, what: str) -> str:
    """`dtype`, if kernels compute with it or store it; a `TypeError` that names `what` otherwise."""
    if dtype not in DTYPES:
        raise TypeError(f"{what} has the unknown dtype {dtype!r}; give one of {', '.join(sorted(DTYPES))}")
    return dtype


def checked_name(name: str) -> str:
    """`name`, if it is a text that the C side can hold; a `TypeError` or `CompileError` otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"a name is {name!r}, a {type(name).__name__}; give a text")
    if "\0" in name:
        raise CompileError(
            f"the name {name!r} has a null character", hint="leave it out: names are C strings at run time"
        )
    return name


@contextmanager
def of_some_depth(name: str) -> Iterator[None]:
    """Refuse an element of `name` that is nested deeper than expressions can be followed, with a `CompileError`."""
    try:
        yield
    except RecursionError as error:
        raise CompileError(
            f"{name}: its element is nested too deeply, or has too many operators in a row",
            hint="te.sum over a te.reduce_axis instead of adding up in Python, or compute a part of it by itself",
        ) from error
