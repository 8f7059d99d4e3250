"""Operators that users define by a function of te tensors: everything the compiler asks follows from that function.

An operator of a custom ONNX domain becomes one graph operator per fusion kind, `my.domain.Gelu.elementwise`, because a
declaration has one kind, and the kind follows from the function and from the types that a node gives it. The attributes
of such a graph operator are `attributes`, those of the node as pairs, and `result`: each result is a call of its own,
so that it fuses with what uses it, and what several results share is computed for each. `absent` has the positions of
inputs that the node leaves out before others; the function is given None for them.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from kedge.compiler import te
from kedge.compiler.errors import CompileError, ShapeError
from kedge.compiler.graph.dims import plain_shape, same_shape
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import registry
from kedge.compiler.ops.common import is_one
from kedge.compiler.ops.registry import Array, FusionKind, OpDef
from kedge.compiler.te import Compute, Placeholder, Reduce, Tensor
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Const, Expr, Load, Var
from kedge.compiler.tir.structural import expr_equal
from kedge.compiler.tir.visitor import free_vars, loads

#: Called as `function(tensors, **attributes)`.
TensorFunction: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]
#: An ONNX attribute: int, float, str, or a tuple of one of them.
Attributes: TypeAlias = Mapping[str, Any]

#: Installed packages name modules in this group that register operators, so that the command line knows them too.
ENTRY_POINTS: Final = "kedge.operators"
OperatorT = TypeVar("OperatorT", bound="OnnxOperator")
ItemT = TypeVar("ItemT")
_STANDARD_DOMAINS: Final = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, eq=False)
class OnnxOperator:
    """A registered operator of a custom domain. Leaving it as a context manager unregisters it."""

    domain: str
    op_type: str
    function: Callable[..., Any]

    @property
    def title(self) -> str:
        """The operator with its domain."""
        return f"{self.domain}.{self.op_type}"

    def unregister(self) -> None:
        """Forget the operator; nothing happens where that is done already."""
        if _OPERATORS.get((self.domain, self.op_type)) is self:
            unregister(self.domain, self.op_type)

    def __enter__(self) -> OnnxOperator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unregister()

    @property
    def graph_name(self) -> str:
        """The operator as graphs and patterns name it."""
        name = re.sub(r"[^\w.]", "_", self.title, flags=re.ASCII)
        return name if re.match(r"[A-Za-z_]", name) else f"_{name}"

    def graph_op(self, kind: FusionKind) -> str:
        """The name of the graph operator that fuses as `kind` says."""
        return f"{self.graph_name}.{kind.name.lower()}"

    def declarations(self) -> tuple[OpDef, ...]:
        """Its graph operators: one for each way of fusing."""
        return tuple(_declaration(self, kind) for kind in FusionKind)

    def results(self, tensors: Sequence[Tensor | None], attributes: Attributes) -> tuple[Tensor, ...]:
        """What the function makes of `tensors` (None: left out), each result a tensor that is computed.

        Raises:
            ShapeError: the function fails, does not take these attributes, or gives something else than tensors.
        """
        name, signature = getattr(self.function, "__name__", "its function"), inspect.signature(self.function)
        try:
            signature.bind(tensors, **attributes)
        except TypeError as error:
            raise ShapeError(f"{self.title}: {name}: {error}", hint=f"it takes {signature}") from None
        try:
            given = self.function(tensors, **attributes)
        except Exception as error:
            said, hint = (error.message, error.hint) if isinstance(error, CompileError) else (str(error), None)
            place = _place(self.function, error)
            raise ShapeError(f"{self.title}: {name} fails{place}: {type(error).__name__}: {said}", hint=hint) from error
        results = given if isinstance(given, tuple) else (given,)
        strange = next((type(each).__name__ for each in results if not isinstance(each, Tensor)), None)
        if strange is not None or not results:
            raise ShapeError(
                f"{self.title}: {name} gives {f'a {strange}' if strange else 'no result'}",
                hint="return a te tensor, or a tuple of them",
            )
        return tuple(map(_computed, results))

    def infer(
        self, types: Sequence[TensorType | None], attributes: Attributes
    ) -> tuple[tuple[TensorType, ...], tuple[FusionKind, ...]]:
        """The types of all results, and how each may fuse; `types` has None for an input that is left out.

        Raises:
            ShapeError: as `results`, and for tensors and symbolic dims that do not come from the inputs.
        """
        places = _placeholders(types)
        results = self.results(places, attributes)
        tensors = [tensor for tensor in places if tensor is not None]
        known = {var for tensor in tensors for dim in tensor.shape if isinstance(dim, Expr) for var in free_vars(dim)}
        for result in results:
            try:
                func = te.create_prim_func([*tensors, result], self.op_type)
            except CompileError as error:
                raise ShapeError(f"{self.title}: {error.message}", hint="compute from the tensors given") from error
            unknown = ", ".join(var.name for var in func.symbols if var not in known)
            if unknown:
                raise ShapeError(
                    f"{self.title}: {unknown} is no dim of its inputs", hint="take dims from the tensors' shapes"
                )
        given = [type_ for type_ in types if type_ is not None]
        space = given[0].space if given else "host"
        found = tuple(TensorType(plain_shape(each.shape), each.dtype, space) for each in results)
        return found, tuple(fusion_kind(each, tensors) for each in results)

    def reference(self, arrays: Sequence[Array | None], attributes: Attributes) -> tuple[Array, ...]:
        """All results for `arrays` (None: left out), by the tensor IR's interpreter."""
        places = _placeholders(
            [None if array is None else TensorType(tuple(array.shape), str(array.dtype)) for array in arrays]
        )
        results = self.results(places, attributes)
        given = [np.asarray(array) for array in arrays if array is not None]
        tensors = [tensor for tensor in places if tensor is not None]
        funcs = [te.create_prim_func([*tensors, result], self.op_type) for result in results]
        return tuple(interp.run(func, given)[0] for func in funcs)


_OPERATORS: dict[tuple[str, str], OnnxOperator] = {}


def register(domain: str, op_type: str, function: TensorFunction) -> OnnxOperator:
    """See `te.register_onnx`."""
    if not (isinstance(domain, str) and isinstance(op_type, str) and op_type):
        raise TypeError(f"an operator is named by two texts, its domain and its type, not {domain!r} and {op_type!r}")
    if not callable(function):
        raise TypeError(f"the function of {domain}.{op_type} is a {type(function).__name__}, which cannot be called")
    try:
        inspect.signature(function).bind_partial(())
    except TypeError:
        raise TypeError(
            f"the function of {domain}.{op_type} takes {inspect.signature(function)}; "
            "it is called as function(tensors, **attributes)"
        ) from None
    return add(OnnxOperator(domain, op_type, function))


def add(operator: OperatorT) -> OperatorT:
    """Make an operator known.

    Raises:
        CompileError: one of its name is known already, or its domain is ONNX's own.
    """
    if operator.domain in _STANDARD_DOMAINS:
        raise CompileError(
            f"{operator.op_type!r} cannot be registered in ONNX's own domain",
            hint='name a domain of your own, such as "my.domain", and use it in the model',
        )
    declarations = operator.declarations()
    other = next((each.title for each in registered() if each.graph_name == operator.graph_name), operator.title)
    taken = {each.name for each in declarations} & set(registry.names())
    if taken and other != operator.title:
        raise CompileError(
            f"{operator.title} would be called {operator.graph_name} in graphs, as {other} is",
            hint="rename one of them",
        )
    if (operator.domain, operator.op_type) in _OPERATORS or taken:
        raise CompileError(
            f"{operator.title} is registered already", hint="te.unregister_onnx(domain, op_type) forgets the other one"
        )
    for each in declarations:
        registry.register(each)
    _OPERATORS[operator.domain, operator.op_type] = operator
    return operator


def unregister(domain: str, op_type: str) -> None:
    """See `te.unregister_onnx`."""
    operator = _OPERATORS.pop((domain, op_type), None)
    if operator is None:
        raise CompileError(f"{domain}.{op_type} is not registered", hint=f"registered are: {', '.join(_titles())}")
    for each in operator.declarations():
        registry.forget(each.name)


def find(domain: str, op_type: str) -> OnnxOperator | None:
    """The operator that is registered, here or by an installed package."""
    if (domain, op_type) not in _OPERATORS and domain not in _STANDARD_DOMAINS:
        _load_installed()
    return _OPERATORS.get((domain, op_type))


def registered() -> tuple[OnnxOperator, ...]:
    """All of them."""
    return tuple(_OPERATORS.values())


def _titles() -> list[str]:
    return sorted(operator.title for operator in registered()) or ["none"]


@functools.cache
def _load_installed() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise CompileError(
                f"the operators {entry.value} of an installed package cannot be loaded: {error}",
                hint=f"mend or remove the package that names it in {ENTRY_POINTS!r}",
            ) from error


def _declaration(operator: OnnxOperator, kind: FusionKind) -> OpDef:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        found, _ = operator.infer(with_gaps(types, attrs["absent"]), dict(attrs["attributes"]))
        return (found[attrs["result"]],)

    def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
        return (operator.reference(with_gaps(arrays, attrs["absent"]), dict(attrs["attributes"]))[attrs["result"]],)

    def lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
        given = [TensorType(tensor.shape, tensor.dtype) for tensor in tensors]
        found, kinds = operator.infer(with_gaps(given, attrs["absent"]), dict(attrs["attributes"]))
        index = attrs["result"]
        if index >= len(found) or not _same_values(found[index], types[0]) or kinds[index] is not kind:
            raise CompileError(
                f"{operator.title}: its function does not give what it gave when the model was imported",
                hint="load the model again; the function must give the same each time",
            )
        return (operator.results(with_gaps(tensors, attrs["absent"]), dict(attrs["attributes"]))[index],)

    attrs = MappingProxyType({"attributes": (), "result": 0, "absent": ()})
    return OpDef(operator.graph_op(kind), kind, infer, reference, lower, attrs, (0, None), uniform=False)


def _same_values(a: TensorType, b: TensorType) -> bool:
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def with_gaps(items: Sequence[ItemT], absent: Sequence[int]) -> list[ItemT | None]:
    """`items` in order, with None at the positions `absent`."""
    result: list[ItemT | None] = list(items)
    for position in sorted(absent):
        result.insert(position, None)
    return result


def _placeholders(types: Sequence[TensorType | None]) -> list[Tensor | None]:
    return [
        None if type_ is None else te.placeholder(type_.shape, type_.dtype, f"x{index}")
        for index, type_ in enumerate(types)
    ]


def _computed(result: Tensor) -> Tensor:
    """An input that is handed on as a result is copied: a kernel writes its results."""
    if isinstance(result.op, Placeholder):
        return te.compute(result.shape, lambda *indices: result.at(indices), name="copy")
    return result


def _place(function: TensorFunction, error: BaseException) -> str:
    """The line of the user's file where the function failed."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    file = getattr(code, "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]} of {Path(str(file)).name}" if lines else ""


# How it fuses ---------------------------------------------------------------------------------------------------------


def fusion_kind(result: Tensor, inputs: Sequence[Tensor]) -> FusionKind:
    """What `result` does to the elements of `inputs` (see `FusionKind`); OPAQUE where it fits no other kind."""
    stages = [tensor for tensor in te.dataflow_order([result]) if isinstance(tensor.op, Compute)]
    reads = [(stage, load) for stage in stages for load in _distinct_loads(stage)]
    if any(_is_reduced(stage) for stage in stages):
        return _reduction_kind(result, stages, reads)
    if not any(load.buffer in inputs for _, load in reads):
        return FusionKind.OPAQUE
    if all(_is_own_element(stage, load) for stage, load in reads):
        return FusionKind.ELEMENTWISE
    if all(
        _is_own_element(stage, load) or (load.buffer in inputs and _is_broadcast(stage, load)) for stage, load in reads
    ):
        return FusionKind.BROADCAST
    places = [load.buffer for _, load in reads]
    # Several elements of an input make one: a reduction written out, which takes an epilogue and repeats no producer.
    return FusionKind.INJECTIVE if len(set(places)) == len(places) else FusionKind.REDUCTION


def _reduction_kind(result: Tensor, stages: Sequence[Tensor], reads: Sequence[tuple[Tensor, Load]]) -> FusionKind:
    """A reduction whose outcome is used where it is made, element by element, can take an epilogue."""
    tainted: set[int] = set()
    for stage in stages:  # producers come first
        outcomes = [load for owner, load in reads if owner is stage and id(load.buffer) in tainted]
        if not all(_is_own_element(stage, load) for load in outcomes):
            return FusionKind.OPAQUE
        if outcomes or _is_reduced(stage):
            tainted.add(id(stage))
    if id(result) not in tainted:
        return FusionKind.OPAQUE
    for stage in stages:
        body = stage.op.body if isinstance(stage.op, Compute) else None
        sources = {load.buffer for owner, load in reads if owner is stage}
        if isinstance(body, Reduce) and body.combiner == "add" and len(sources) > 1:
            return FusionKind.CONTRACTION
    return FusionKind.REDUCTION


def _is_reduced(stage: Tensor) -> bool:
    return isinstance(stage.op, Compute) and isinstance(stage.op.body, Reduce)


def _distinct_loads(stage: Tensor) -> list[Load]:
    """The places that a stage reads, each once."""
    assert isinstance(stage.op, Compute)
    found: list[Load] = []
    for load in loads(stage.op.value):
        if not any(expr_equal(load, other) for other in found):
            found.append(load)
    return found


def _axes(stage: Tensor) -> tuple[Var, ...]:
    assert isinstance(stage.op, Compute)
    return stage.op.axes


def _is_own_element(stage: Tensor, load: Load) -> bool:
    """Whether a read is at the very indices of the element that is computed, in a tensor of the same shape."""
    axes = _axes(stage)
    same = len(load.indices) == len(axes) and all(index is axis for index, axis in zip(load.indices, axes, strict=True))
    return same and same_shape(load.buffer.shape, stage.shape)


def _is_broadcast(stage: Tensor, load: Load) -> bool:
    """Whether every index is 0 in a dim of 1, or one of the element's own, each at most once and in their order."""
    axes, after = _axes(stage), 0
    aligned = len(load.indices) == len(axes)
    for at, (index, dim) in enumerate(zip(load.indices, load.buffer.shape, strict=True)):
        if is_one(dim) and isinstance(index, Const):
            continue
        position = next((place for place, axis in enumerate(axes) if axis is index), -1)
        if position < after or (aligned and position != at) or not same_dim(dim, stage.shape[position]):
            return False
        after = position + 1
    return True
