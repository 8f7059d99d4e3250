"""Operators of which kedge knows only types and a reference: external code computes them (see `kedge.External`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.errors import CompileError, ShapeError
from kedge.compiler.graph.dims import format_type, plain_shape
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import custom
from kedge.compiler.ops.custom import Attributes, OnnxOperator
from kedge.compiler.ops.registry import Array, FusionKind, OpDef
from kedge.compiler.tir.expr import Dim

#: Called as `infer(types, **attributes)`: gives the shape and the dtype of the result.
Infer: TypeAlias = Callable[..., tuple[Sequence[Dim], str]]


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueOperator(OnnxOperator):
    """A registered operator that only external code can compute. `function` is its reference in numpy."""

    result: Infer

    def graph_op(self, kind: FusionKind) -> str:
        """Its only graph operator: it fuses with nothing."""
        return self.graph_name

    def declarations(self) -> tuple[OpDef, ...]:
        """Its only graph operator, which has no lowering."""

        def infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
            return self.infer(types, dict(attrs["attributes"]))[0]

        def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
            return self.reference(arrays, dict(attrs["attributes"]))

        attrs = MappingProxyType({"attributes": (), "result": 0})
        return (OpDef(self.graph_name, FusionKind.OPAQUE, infer, reference, None, attrs, (0, None)),)

    def infer(
        self, types: Sequence[TensorType | None], attributes: Attributes
    ) -> tuple[tuple[TensorType, ...], tuple[FusionKind, ...]]:
        """The type of the result.

        Raises:
            ShapeError: the function fails, or gives something else than a shape and a dtype; an input is left out
                before others, which external code would not see.
        """
        if None in types:
            raise ShapeError(
                f"{self.title}: input {types.index(None)} is left out before others",
                hint="external code gets the inputs that there are, in order; leave out the last ones only",
            )
        given = self._call("infer", self.result, types, attributes)
        try:
            shape, dtype = given
            name = str(np.dtype(dtype))
            found = TensorType(plain_shape(shape), name, "host" if not types or types[0] is None else types[0].space)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                f"{self.title}: infer gives {given!r}, which is no shape and dtype", hint="return (n, 16), 'float32'"
            ) from error
        return (found,), (FusionKind.OPAQUE,)

    def reference(self, arrays: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
        """The result for `arrays`, by the user's reference."""
        given = [np.asarray(array) for array in arrays]
        result = np.asarray(self._call("reference", self.function, given, attributes))
        types = [TensorType(tuple(array.shape), str(array.dtype)) for array in given]
        (expected,), _ = self.infer(types, attributes)
        if result.shape != expected.shape or str(result.dtype) != expected.dtype:
            raise ShapeError(
                f"{self.title}: its reference gives {result.dtype}{list(result.shape)}, its type is "
                f"{format_type(expected)}",
                hint="infer and reference must agree",
            )
        return (result,)

    def _call(self, what: str, function: Callable[..., Any], given: Sequence[Any], attributes: Attributes) -> Any:
        try:
            return function(given, **attributes)
        except Exception as error:
            said, hint = (error.message, error.hint) if isinstance(error, CompileError) else (str(error), None)
            raise ShapeError(f"{self.title}: {what} fails: {type(error).__name__}: {said}", hint=hint) from error


def register_onnx(domain: str, op_type: str, *, infer: Infer, reference: Callable[..., Array]) -> OnnxOperator:
    """Make an operator of a custom ONNX domain known that only code from outside computes.

    It has one result. A model that uses it compiles once an `External` has the pattern `p.op("my.domain.Op", …)`.

    Args:
        domain, op_type: how ONNX nodes name it.
        infer: `infer(types, **attributes)` gives shape and dtype of the result. `types` have `.shape`, whose dims may
            be symbolic, and `.dtype`; attributes are those of the node: int, float, str, or a tuple of them.
        reference: `reference(arrays, **attributes)` gives the result in numpy. The external code is checked against it.

    Returns:
        The registration: `.unregister()`, or leaving it as a context manager, takes it back.

    Raises:
        CompileError: the domain is ONNX's own, or the operator is registered already.
    """
    return custom.add(OpaqueOperator(domain, op_type, reference, infer))
