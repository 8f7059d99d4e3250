"""Modules and parameters: how a network is described, and how its functions become a kedge module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.nn import spec as specs
from kedge.compiler.graph.builder import Builder, call
from kedge.compiler.graph.ir import Function, Param, TensorType, Value
from kedge.compiler.graph.ir import Module as GraphModule
from kedge.compiler.tir.expr import Dim, Var
from kedge.rpc.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]
#: Makes the initial data of a parameter of this shape and dtype.
Initializer: TypeAlias = Callable[[np.random.Generator, tuple[int, ...], str], Array]
FunctionSpec: TypeAlias = Mapping[str, specs.Tensor]


def constant_init(value: float) -> Initializer:
    """Every element is `value`."""
    return lambda rng, shape, dtype: np.full(shape, value, dtype)


def uniform_init(bound: float) -> Initializer:
    """Uniform in [-bound, bound)."""
    return lambda rng, shape, dtype: rng.uniform(-bound, bound, shape).astype(dtype)


@dataclass(slots=True, eq=False)
class Parameter:
    """A weight, named by where it stands in its module (`fc1.weight`).

    `data` is None until it is set, directly or by `load_state_dict` or `init_params`; without data the exported
    parameter is unbound, and is given at compile time (`mod.bind`) or on every call.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    init: Initializer = field(default_factory=lambda: constant_init(0.0))
    data: Array | None = None

    def set(self, data: Any, name: str = "parameter") -> None:
        """Give the parameter its data.

        Raises:
            InputError: another shape or dtype than declared.
        """
        array = np.asarray(data)
        if array.shape != tuple(self.shape) or str(array.dtype) != self.dtype:
            raise InputError(
                f"{name} is {self.dtype}{list(self.shape)}, but its data is {array.dtype}{list(array.shape)}",
                hint="reshape the data, or cast it with .astype",
            )
        self.data = np.ascontiguousarray(array)


class Module:
    """Base of networks: assign parameters and modules to attributes, and say in `forward` what is computed.

        class MLP(nn.Module):
            def __init__(self):
                self.fc1 = nn.Linear(784, 256)
                self.act = nn.ReLU()
                self.fc2 = nn.Linear(256, 10)

            def forward(self, x):
                return self.fc2(self.act(self.fc1(x)))

        mod, params = MLP().export({"forward": {"x": nn.spec.Tensor(("n", 784), "float32")}})

    `forward` runs once, while exporting, on symbolic tensors. Lists, tuples and dicts of modules are traversed too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`."""
        return self.forward(*args, **kwargs)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter with its name, in the order of the attributes; a shared one has its first name."""
        seen: set[int] = set()
        for name, item in _walk("", self, set()):
            if isinstance(item, Parameter) and id(item) not in seen:
                seen.add(id(item))
                yield name, item

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """This module (named "") and every module below it."""
        for name, item in _walk("", self, set()):
            if isinstance(item, Module):
                yield name, item

    def state_dict(self) -> dict[str, Array]:
        """The data of all parameters that have some."""
        return {name: parameter.data for name, parameter in self.named_parameters() if parameter.data is not None}

    def load_state_dict(self, data: Mapping[str, Array]) -> None:
        """Set the data of all parameters.

        Raises:
            InputError: a name is missing or unknown, or an array has another shape or dtype.
        """
        parameters = dict(self.named_parameters())
        missing, unknown = sorted(set(parameters) - set(data)), sorted(set(data) - set(parameters))
        if missing or unknown:
            parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
                unknown
            )
            raise InputError(
                f"the state of {type(self).__name__} " + " and ".join(parts),
                hint=f"its parameters are {', '.join(parameters)}",
            )
        for name, parameter in parameters.items():
            parameter.set(data[name], name)

    def init_params(self, seed: int) -> dict[str, Array]:
        """Seeded random data for every parameter, by its layer's initializer; sets it, and returns it by name."""
        rng = np.random.default_rng(seed)
        for name, parameter in self.named_parameters():
            parameter.set(parameter.init(rng, parameter.shape, parameter.dtype), name)
        return self.state_dict()

    def export(self, spec: Mapping[str, FunctionSpec]) -> tuple[GraphModule, dict[str, TensorType]]:
        """Turn methods into the functions of a kedge module.

        Args:
            spec: the methods to export, each with the specs of its arguments by name. A dim that is a string is a
                symbol, at least 1, the same wherever its name occurs.

        Returns:
            The module, with the data of those parameters that have some, and the type of every parameter.

        Raises:
            FrontendError: no such method or argument, or a method that does not return tensors.
            ShapeError: an operator is applied to tensors that do not fit.
        """
        if not spec:
            raise FrontendError("export needs at least one function", hint='spec={"forward": {"x": nn.spec.Tensor(…)}}')
        symbols: dict[str, Var] = {}
        functions = {name: self._export_function(name, inputs, symbols) for name, inputs in spec.items()}
        parameters = dict(self.named_parameters())
        types = {name: TensorType(tuple(p.shape), p.dtype) for name, p in parameters.items()}
        used = {v.name for function in functions.values() for v in function.values() if isinstance(v, Param)}
        bound = {name: data for name, data in self.state_dict().items() if name in used}
        return GraphModule(functions, bound), types

    def _export_function(self, name: str, inputs: FunctionSpec, symbols: dict[str, Var]) -> Function:
        method = getattr(self, name, None)
        if not callable(method):
            raise FrontendError(f"{type(self).__name__} has no method {name!r} to export")
        try:
            signature(method).bind(**inputs)
        except TypeError as error:
            raise FrontendError(
                f"{type(self).__name__}.{name} does not take the arguments {', '.join(inputs)}: {error}",
                hint=f"its signature is {name}{signature(method)}",
            ) from None
        names = {id(parameter): path for path, parameter in self.named_parameters()}
        modules = {id(module): path for path, module in self.named_modules()}
        tracer = Tracer(Builder(name), names, modules)
        token = _TRACER.set(tracer)
        try:
            arguments = {
                key: Tensor(tracer.builder.input(key, TensorType(_shape(entry, symbols), entry.dtype)))
                for key, entry in inputs.items()
            }
            outputs = _outputs(method(**arguments), f"{type(self).__name__}.{name}")
        finally:
            _TRACER.reset(token)
        return tracer.builder.finish(outputs)


def _walk(path: str, item: object, above: set[int]) -> Iterator[tuple[str, object]]:
    """`item` and all parameters and modules below it, with their paths; a module inside itself ends there."""
    if isinstance(item, Parameter):
        yield path, item
        return
    children: Mapping[Any, object]
    if isinstance(item, Module):
        yield path, item
        children = vars(item)
    elif isinstance(item, (list, tuple)):
        children = dict(enumerate(item))
    elif isinstance(item, dict):
        children = item
    else:
        return
    if id(item) in above:
        return
    for key, child in children.items():
        yield from _walk(f"{path}.{key}" if path else str(key), child, above | {id(item)})


def _shape(entry: specs.Tensor, symbols: dict[str, Var]) -> tuple[Dim, ...]:
    return tuple(symbols.setdefault(dim, Var(dim, lower=1)) if isinstance(dim, str) else dim for dim in entry.shape)


def _outputs(result: Any, where: str) -> dict[str, Value]:
    """A tensor is called "output", those of a tuple "output0", "output1", …, those of a dict by their keys."""
    if isinstance(result, (tuple, list)):
        result = {f"output{index}": item for index, item in enumerate(result)}
    elif not isinstance(result, dict):
        result = {"output": result}
    if not result or not all(isinstance(item, (Tensor, Parameter)) for item in result.values()):
        kinds = ", ".join(type(item).__name__ for item in result.values()) or "nothing"
        raise FrontendError(f"{where} returns {kinds}", hint="return a tensor, or a tuple or dict of tensors")
    return {str(key): as_value(item) for key, item in result.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Tracer:
    """One function while it is being exported: where its parameters and modules stand."""

    builder: Builder
    names: Mapping[int, str]
    modules: Mapping[int, str]


_TRACER: ContextVar[Tracer | None] = ContextVar("kedge_nn_tracer", default=None)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A symbolic tensor inside `forward`; arithmetic with numbers, parameters and other tensors broadcasts."""

    value: Value

    # numpy must not take `array * tensor` apart element by element.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The dims: ints or symbolic expressions."""
        return self.value.type.shape

    @property
    def dtype(self) -> str:
        """The element type."""
        return self.value.type.dtype

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def __add__(self, other: TensorLike) -> Tensor:
        return binary("add", self, other)

    def __radd__(self, other: TensorLike) -> Tensor:
        return binary("add", other, self)

    def __sub__(self, other: TensorLike) -> Tensor:
        return binary("sub", self, other)

    def __rsub__(self, other: TensorLike) -> Tensor:
        return binary("sub", other, self)

    def __mul__(self, other: TensorLike) -> Tensor:
        return binary("mul", self, other)

    def __rmul__(self, other: TensorLike) -> Tensor:
        return binary("mul", other, self)

    def __truediv__(self, other: TensorLike) -> Tensor:
        return binary("div", self, other)

    def __rtruediv__(self, other: TensorLike) -> Tensor:
        return binary("div", other, self)

    def __pow__(self, other: TensorLike) -> Tensor:
        return binary("pow", self, other)

    def __matmul__(self, other: Tensor | Parameter) -> Tensor:
        return emit("matmul", self, other)

    def __neg__(self) -> Tensor:
        return emit("neg", self)

    def __bool__(self) -> bool:
        raise TypeError("a tensor has no truth value while exporting; use op.where(condition, a, b)")


TensorLike: TypeAlias = "Tensor | Parameter | Array | float"


def as_value(operand: Tensor | Parameter | Array | float, like: Tensor | None = None) -> Value:
    """The graph value of an operand; a number or array becomes a literal, in the dtype of `like` where given.

    Raises:
        FrontendError: a parameter that is no attribute of the exported module, or used while nothing is exported.
    """
    if isinstance(operand, Tensor):
        return operand.value
    if isinstance(operand, Parameter):
        tracer = _TRACER.get()
        if tracer is None:
            raise FrontendError("a parameter has a value only while its module is exported", hint="call .export(spec)")
        name = tracer.names.get(id(operand))
        if name is None:
            raise FrontendError(
                f"a parameter of shape {list(operand.shape)} is used in forward but stands in no attribute",
                hint="assign it in __init__: self.weight = nn.Parameter(...)",
            )
        return tracer.builder.param(name, TensorType(tuple(operand.shape), operand.dtype))
    array = np.asarray(operand)
    if like is not None and array.ndim == 0:
        converted = array.astype(like.dtype)
        if like.dtype not in FLOATS and not np.array_equal(converted, array):
            raise FrontendError(f"{operand!r} is no {like.dtype}", hint=f"cast the {like.dtype} tensor first")
        array = converted
    elif array.dtype == np.float64 and not isinstance(operand, np.ndarray):
        array = array.astype(np.float32)
    builder = Builder("literal")
    return builder.constant(array)


def emit(op: str, *operands: Tensor | Parameter, **attrs: Any) -> Tensor:
    """A graph operator with one result."""
    return Tensor(call(op, *map(as_value, operands), **attrs))


def binary(op: str, a: TensorLike, b: TensorLike) -> Tensor:
    """A broadcasting operator; a Python number takes the dtype of the other side."""
    like = next((operand for operand in (a, b) if isinstance(operand, Tensor)), None)
    if like is None:
        like = next((Tensor(as_value(operand)) for operand in (a, b) if isinstance(operand, Parameter)), None)
    return Tensor(call(op, as_value(a, like), as_value(b, like)))


def per_dim(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One entry per spatial dim: a single number stands for all of them."""
    return (value,) * rank if isinstance(value, int) else tuple(value)
