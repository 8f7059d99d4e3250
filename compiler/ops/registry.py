"""How an operator is declared: once, in one place, with everything the compiler asks of it side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from kedge.compiler.errors import CompileError
from kedge.compiler.graph.ir import EMPTY, Attrs, TensorType

if TYPE_CHECKING:
    from kedge.compiler.te import Tensor
    from kedge.compiler.tir.expr import Dim

Array: TypeAlias = np.ndarray[Any, Any]


class _Required(Enum):
    REQUIRED = "required"

    def __repr__(self) -> str:
        return "required"


#: Stands for the default of an attribute that has none.
REQUIRED: Final = _Required.REQUIRED


class FusionKind(IntEnum):
    """What may be fused with an operator; the larger kind of a group decides (Relax's pattern kinds)."""

    ELEMENTWISE = 0  # one output element from the same element of each input
    BROADCAST = 1  # the same, with broadcasting
    INJECTIVE = 2  # one output element from one element of each input, anywhere (transpose, slice, …)
    REDUCTION = 3  # sums over axes; injective producers may be computed inside it
    CONTRACTION = 4  # matmul, convolution: element-wise users join its epilogue
    OPAQUE = 5  # stands alone


@dataclass(frozen=True, slots=True)
class Agreement:
    """Dims of an operator's inputs that must be equal: of each the input's number and the axis, counted from the end.

    `spread` says that dims of 1 need not, which are spread over the others. `size` is what all are, where something
    else than the dims says so, such as the weight of a convolution in groups.
    """

    dims: tuple[tuple[int, int], ...]
    spread: bool = False
    size: Dim | None = None


@dataclass(frozen=True, slots=True)
class OpDef:
    """One operator.

    `infer` gives the result types or raises `ShapeError`; `reference` is the numpy meaning; `lower` gives the result
    as te tensors (None: the operator must be rewritten away by legalization before lowering). All three see every
    attribute: those left out have the default given in `attrs`; `reference` sees symbolic dims evaluated.
    `arity` is the least and the most inputs (None: any number). `single` is False where there are several results.
    `uniform` is False where an element of the result may depend on its indices or on the number of dims, as in
    operators that users define: such a call keeps the shapes it was given.
    `agree` says for inputs of given shapes which of their dims must be equal (None: all that meet in an operator that
    broadcasts, and none in others); what is not known of these while compiling is checked when a program is called.
    """

    name: str
    kind: FusionKind
    infer: Callable[[Sequence[TensorType], Attrs], tuple[TensorType, ...]]
    reference: Callable[[Sequence[Array], Attrs], tuple[Array, ...]]
    lower: Callable[[Sequence[Tensor], Attrs, tuple[TensorType, ...]], tuple[Tensor, ...]] | None
    attrs: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    arity: tuple[int, int | None] = (1, 1)
    single: bool = True
    uniform: bool = True
    agree: Callable[[Sequence[Sequence[Dim]], Attrs], Iterable[Agreement]] | None = None


_OPS: dict[str, OpDef] = {}
_OWN: dict[str, OpDef] = {}


def register(op: OpDef) -> OpDef:
    """Add an operator; a name can be declared only once."""
    if op.name in _OPS:
        raise ValueError(f"operator {op.name!r} is declared twice")
    _OPS[op.name] = op
    return op


def seal() -> None:
    """What is declared by now is the compiler's own; what comes later is its users'."""
    _OWN.update(_OPS)


def is_own(name: str) -> bool:
    """Whether the compiler's own sources say all of an operator."""
    return name in _OWN and _OPS.get(name) is _OWN[name]


def forget(name: str) -> None:
    """Take a declaration back: only operators that users define come and go."""
    del _OPS[name]


def get(name: str) -> OpDef:
    """The declaration of `name`."""
    try:
        return _OPS[name]
    except KeyError:
        raise CompileError(
            f"unknown graph operator {name!r}",
            hint="kedge.compiler.ops has the known ones; register one of your own before (kedge.te.register_onnx)",
        ) from None


def names() -> tuple[str, ...]:
    """All declared operators, sorted."""
    return tuple(sorted(_OPS))
