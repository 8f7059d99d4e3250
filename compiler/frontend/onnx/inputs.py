"""The inputs of a model: their types, symbolic dims, and what `shapes=` says about them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx

from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx.model import Model, dtype_name
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.tir.expr import Dim, Var

#: One dim that a user gives: a size, the name of a symbolic dim, the symbol itself, or None to keep the model's.
DimSpec: TypeAlias = int | str | Var | None
ShapeSpec: TypeAlias = Sequence[DimSpec]


@dataclass(slots=True)
class Symbols:
    """The symbolic dims of one model by the name that the model gives them; `fixed` are those that `shapes=` sets."""

    by_name: dict[str, Var] = field(default_factory=dict)
    fixed: dict[str, Dim] = field(default_factory=dict)

    def get(self, name: str) -> Dim:
        """The dim called `name`: one and the same wherever the model says that name; at least 1."""
        if name in self.fixed:
            return self.fixed[name]
        if name not in self.by_name:
            self.by_name[name] = Var(self._identifier(name), lower=1)
        return self.by_name[name]

    def fresh(self, hint: str) -> Var:
        """A new dim for one that the model leaves unnamed."""
        var = Var(self._identifier(hint), lower=1)
        self.by_name[f"\0{var.name}"] = var  # no name of a model's dim collides with this one
        return var

    def _identifier(self, name: str) -> str:
        """`name` with only the letters, digits and underscores that printed IR allows, and not taken yet."""
        taken = {var.name for var in self.by_name.values()}
        base = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name) or "dim"
        base = f"d{base}" if base[0].isdigit() else base
        candidates = (base if count == 1 else f"{base}_{count}" for count in range(1, len(taken) + 3))
        return next(candidate for candidate in candidates if candidate not in taken)


def declare_inputs(model: Model, shapes: Mapping[str, ShapeSpec], symbols: Symbols) -> Mapping[str, TensorType]:
    """The types of the inputs that are given on every call. (Older models list their initializers as inputs too.)

    Raises:
        FrontendError: `shapes` names an unknown input, has another rank, or contradicts the model or itself.
    """
    graph = model.proto.graph
    bound = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    infos = [info for info in graph.input if info.name not in bound]
    unknown = sorted(set(shapes) - {info.name for info in infos})
    if unknown:
        raise FrontendError(
            f"{model.source} has no input {', '.join(map(repr, unknown))}", hint=_which_inputs(unknown[0], infos)
        )
    for info in infos:
        _fix_symbols(model, info, shapes.get(info.name), symbols)
    return {info.name: _declare(model, info, shapes.get(info.name), symbols) for info in infos}


def _which_inputs(unknown: str, infos: Iterable[onnx.ValueInfoProto]) -> str:
    names = [info.name for info in infos]
    close = difflib.get_close_matches(unknown, names, n=1)
    listing = f"its inputs are {', '.join(names)}" if names else "it has no inputs"
    return f"did you mean {close[0]!r}? {listing}" if close else listing


def _tensor_type(model: Model, info: onnx.ValueInfoProto) -> onnx.TypeProto.Tensor:
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        label = "no type" if kind is None else f"type {kind.removesuffix('_type')}"
        raise FrontendError(
            f"{model.source}: input {info.name!r} has {label}",
            hint="kedge compiles functions of dense tensors; export the model without sequences, maps and optionals",
        )
    return info.type.tensor_type


def _declared_dims(model: Model, info: onnx.ValueInfoProto) -> list[int | str | None] | None:
    """The dims that the model states: a size, a name, or None for unknown; None where even the rank is unknown."""
    tensor = _tensor_type(model, info)
    if not tensor.HasField("shape"):
        return None
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or None)  # some exporters write -1 for "unknown"
    return dims


def _fix_symbols(model: Model, info: onnx.ValueInfoProto, spec: ShapeSpec | None, symbols: Symbols) -> None:
    """Where `shapes` gives a size for a named dim, that name has this size everywhere."""
    declared = _declared_dims(model, info)
    if spec is None or declared is None:
        return
    if len(spec) != len(declared):
        raise FrontendError(
            f"{model.source}: input {info.name!r} has {len(declared)} dims {_shown(declared)}, "
            f"but shapes= gives {len(spec)}: {_shown(spec)}",
            hint=f"give one entry for each dim, such as {_example(declared)}",
        )
    for given, stated in zip(spec, declared, strict=True):
        if not isinstance(stated, str) or given is None or given == stated:
            continue
        _check_size(model, info.name, given)
        size = symbols.get(given) if isinstance(given, str) else given
        before = symbols.fixed.get(stated)
        if before is not None and before is not size and before != size:
            raise FrontendError(
                f"{model.source}: shapes= gives dim {stated!r} two sizes, {_shown_dim(before)} and {_shown_dim(size)}",
                hint=f"every dim that the model calls {stated!r} has to be the same",
            )
        symbols.fixed[stated] = size


def _declare(model: Model, info: onnx.ValueInfoProto, spec: ShapeSpec | None, symbols: Symbols) -> TensorType:
    dtype = dtype_name(model, _tensor_type(model, info).elem_type, f"input {info.name!r}")
    declared = _declared_dims(model, info)
    if declared is None:
        if spec is None:
            raise FrontendError(
                f"{model.source}: input {info.name!r} has no shape, not even a rank",
                hint=f"give one: shapes={{{info.name!r}: (1, 3, 224, 224)}} or --shape {info.name}=1,3,224,224",
            )
        declared = [None] * len(spec)
    given = spec if spec is not None else [None] * len(declared)
    dims = tuple(
        _dim(model, info.name, axis, stated, asked, symbols)
        for axis, (stated, asked) in enumerate(zip(declared, given, strict=True))
    )
    return TensorType(dims, dtype)


def _dim(model: Model, name: str, axis: int, stated: int | str | None, asked: DimSpec, symbols: Symbols) -> Dim:
    if isinstance(stated, int):
        if isinstance(asked, int) and asked != stated:
            raise FrontendError(
                f"{model.source}: dim {axis} of input {name!r} is {stated}, but shapes= gives {asked}",
                hint="only dims that the model leaves open can be set; export the model with dynamic axes",
            )
        if isinstance(asked, (str, Var)):
            raise FrontendError(
                f"{model.source}: dim {axis} of input {name!r} is {stated} and cannot become the symbol "
                f"{asked if isinstance(asked, str) else asked.name!r}",
                hint="export the model with dynamic axes",
            )
        return stated
    if isinstance(stated, str):
        return symbols.get(stated)
    if asked is None:
        return symbols.fresh(f"{name}_d{axis}")
    _check_size(model, name, asked)
    return symbols.get(asked) if isinstance(asked, str) else asked


def _check_size(model: Model, name: str, asked: DimSpec) -> None:
    if isinstance(asked, bool) or not isinstance(asked, (int, str, Var)) or (isinstance(asked, int) and asked < 1):
        raise FrontendError(
            f"{model.source}: {asked!r} is not a dim of input {name!r}",
            hint="a dim is a positive integer, the name of a symbolic dim, or None to keep the model's",
        )


def _shown_dim(dim: object) -> str:
    return dim.name if isinstance(dim, Var) else "?" if dim is None else str(dim)


def _shown(dims: Iterable[object]) -> str:
    return "(" + ", ".join(map(_shown_dim, dims)) + ")"


def _example(declared: Sequence[int | str | None]) -> str:
    return _shown([dim if isinstance(dim, int) else 1 for dim in declared])
