"""What the inputs of an exported function are: `nn.spec.Tensor(("n", 784), "float32")`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kedge.compiler.tir.expr import Expr

#: A dim of an input: a size, the name of a symbolic dim (the same name is the same dim), or an int64 expression.
DimSpec: TypeAlias = int | str | Expr


@dataclass(frozen=True, slots=True)
class Tensor:
    """The shape and dtype of an input."""

    shape: Sequence[DimSpec]
    dtype: str = "float32"
