"""Converters of operators that work element by element, with numpy's broadcasting."""

from __future__ import annotations

from functools import reduce

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.frontend.onnx.model import dtype_name
from kedge.compiler.frontend.onnx.node import Converter, Node, converter
from kedge.compiler.graph.ir import Value

_UNARY = {
    "Abs": "abs", "Ceil": "ceil", "Cos": "cos", "Erf": "erf", "Exp": "exp", "Floor": "floor",
    "IsNaN": "isnan", "Log": "log", "Neg": "neg", "Not": "not", "Relu": "relu", "Round": "round",
    "Sigmoid": "sigmoid", "Sin": "sin", "Sqrt": "sqrt", "Tanh": "tanh",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div",
    "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
    "Equal": "equal", "Less": "less", "LessOrEqual": "less_equal",
    "Greater": "greater", "GreaterOrEqual": "greater_equal",
}  # fmt: skip
_VARIADIC = {"Max": "maximum", "Min": "minimum", "Sum": "add"}


def _unary(op: str) -> Converter:
    return lambda node: node.emit(op, node.value(0))


def _binary(op: str) -> Converter:
    return lambda node: node.emit(op, node.value(0), node.value(1))


def _variadic(op: str) -> Converter:
    return lambda node: reduce(lambda a, b: node.emit(op, a, b), node.values())


for _name, _op in _UNARY.items():
    converter(_name)(_unary(_op))
for _name, _op in _BINARY.items():
    converter(_name)(_binary(_op))
for _name, _op in _VARIADIC.items():
    converter(_name)(_variadic(_op))


def scalar(node: Node, value: float, like: Value) -> Value:
    """A literal of rank 0 with the dtype of `like`, which must not cut a fraction off."""
    if like.type.dtype not in FLOATS and not float(value).is_integer():
        raise node.error(f"its input is {like.type.dtype}; it takes floats", hint="cast the input to float32")
    return node.constant(value, like.type.dtype)


@converter("Mean")
def _mean(node: Node) -> Value:
    values = node.values()
    total = reduce(lambda a, b: node.emit("add", a, b), values)
    return node.emit("div", total, scalar(node, len(values), total))


@converter("Reciprocal")
def _reciprocal(node: Node) -> Value:
    x = node.value(0)
    return node.emit("div", scalar(node, 1, x), x)


@converter("Sign")
def _sign(node: Node) -> Value:
    x = node.value(0)
    zero = scalar(node, 0, x)
    positive = node.emit("cast", node.emit("greater", x, zero), dtype=x.type.dtype)
    if x.type.dtype.startswith("uint"):
        return positive
    negative = node.emit("cast", node.emit("less", x, zero), dtype=x.type.dtype)
    sign = node.emit("sub", positive, negative)
    return node.emit("where", node.emit("isnan", x), x, sign) if x.type.dtype in FLOATS else sign


@converter("Tan")
def _tan(node: Node) -> Value:
    return node.emit("div", node.emit("sin", node.value(0)), node.emit("cos", node.value(0)))


@converter("Mod")
def _mod(node: Node) -> Value:
    x, fmod = node.value(0), bool(node.attr("fmod", 0))
    if x.type.dtype in FLOATS and not fmod and node.opset < 28:
        raise node.error("its inputs are floats; before opset 28 it takes them with fmod=1 alone")
    return node.emit("mod", x, node.value(1), fmod=fmod)


@converter("Pow")
def _pow(node: Node) -> Value:
    base, exponent = node.value(0), node.value(1)
    if exponent.type.dtype != base.type.dtype:
        # ONNX lets the types differ and gives the result that of the base. A fraction must not be cut off an
        # exponent, so that integers with a float exponent compute in float64, which holds as many digits as it can.
        wide = "float64" if exponent.type.dtype in FLOATS else "int64"
        wide = base.type.dtype if base.type.dtype in FLOATS else wide
        power = node.emit("pow", _as(node, base, wide), _as(node, exponent, wide))
        return _as(node, power, base.type.dtype)
    return node.emit("pow", base, exponent)


def _as(node: Node, value: Value, dtype: str) -> Value:
    return value if value.type.dtype == dtype else node.emit("cast", value, dtype=dtype)


@converter("LeakyRelu")
def _leaky_relu(node: Node) -> Value:
    return node.emit("leaky_relu", node.value(0), alpha=float(node.attr("alpha", 0.01)))


@converter("PRelu")
def _prelu(node: Node) -> Value:
    x, slope = node.value(0), node.value(1)
    return node.emit("where", node.emit("less", x, scalar(node, 0, x)), node.emit("mul", slope, x), x)


@converter("Clip")
def _clip(node: Node) -> Value:
    """Bounds that are constants become attributes, those computed while running operators."""
    x = node.value(0)
    dtype = x.type.dtype
    for index in (1, 2):
        bound = node.value(index).type.dtype if node.has(index) else dtype
        # ONNX's converter gives the attributes of old opsets as float32, whatever floats they bound.
        if bound != dtype and not (bound in FLOATS and dtype in FLOATS):
            raise node.error(f"its bound (input {index}) is {bound}, its input {dtype}", hint=f"cast it to {dtype}")
    bounds = [node.literal(index) if node.has(index) else None for index in (1, 2)]
    if all(bound is not None or not node.has(index) for index, bound in enumerate(bounds, start=1)):
        low, high = (None if bound is None else bound.reshape(()).item() for bound in bounds)
        if low is not None and high is not None and low > high:
            low = high  # ONNX: the upper bound wins
        return x if low is None and high is None else node.emit("clip", x, min=low, max=high)
    if node.has(1):
        x = node.emit("maximum", x, node.value(1))
    return node.emit("minimum", x, node.value(2)) if node.has(2) else x


@converter("HardSigmoid")
def _hard_sigmoid(node: Node) -> Value:
    x = node.value(0)
    return _clamped_line(node, x, node.attr("alpha", 0.2), node.attr("beta", 0.5))


@converter("HardSwish")
def _hard_swish(node: Node) -> Value:
    x = node.value(0)
    return node.emit("mul", x, _clamped_line(node, x, 1 / 6, 0.5))


def _clamped_line(node: Node, x: Value, slope: float, offset: float) -> Value:
    """min(max(slope * x + offset, 0), 1)."""
    line = node.emit("add", node.emit("mul", x, scalar(node, slope, x)), scalar(node, offset, x))
    return node.emit("clip", line, min=0.0, max=1.0)


@converter("Elu")
def _elu(node: Node) -> Value:
    return _exponential_below_zero(node, node.value(0), node.attr("alpha", 1.0), 1.0)


@converter("Celu")
def _celu(node: Node) -> Value:
    """By ONNX's own definition a tensor without dims would become one with a dim of 1."""
    x, alpha = node.value(0), node.attr("alpha", 1.0)
    zero = scalar(node, 0, x)
    shrunk = node.emit("div", node.emit("minimum", x, zero), scalar(node, alpha, x))
    below = node.emit("mul", node.emit("sub", node.emit("exp", shrunk), scalar(node, 1, x)), scalar(node, alpha, x))
    return node.emit("where", node.emit("less", x, zero), below, x)


@converter("Selu")
def _selu(node: Node) -> Value:
    alpha, gamma = node.attr("alpha", 1.67326319217681884765625), node.attr("gamma", 1.05070102214813232421875)
    return _exponential_below_zero(node, node.value(0), alpha, gamma)


def _exponential_below_zero(node: Node, x: Value, alpha: float, gamma: float) -> Value:
    """gamma * x above zero, gamma * alpha * (exp(x) - 1) below."""
    zero = scalar(node, 0, x)
    # exp sees no positive number: an overflow on the side that is not chosen would still be computed.
    decay = node.emit("sub", node.emit("exp", node.emit("minimum", x, zero)), scalar(node, 1, x))
    below = node.emit("mul", decay, scalar(node, alpha, x))
    result = node.emit("where", node.emit("less", x, zero), below, x)
    return result if gamma == 1.0 else node.emit("mul", result, scalar(node, gamma, x))


@converter("Swish")
def _swish(node: Node) -> Value:
    """x * sigmoid(alpha * x)."""
    x = node.value(0)
    alpha = float(node.attr("alpha", 1.0))
    line = x if alpha == 1.0 else node.emit("mul", x, scalar(node, alpha, x))
    return node.emit("mul", x, node.emit("sigmoid", line))


@converter("IsInf")
def _is_inf(node: Node) -> Value:
    x = node.value(0)
    infinity = scalar(node, float("inf"), x)
    below, above = bool(node.attr("detect_negative", 1)), bool(node.attr("detect_positive", 1))
    if below and above:
        return node.emit("equal", node.emit("abs", x), infinity)
    if not below and not above:
        return node.emit("broadcast_to", node.constant(False, "bool"), shape=x.type.shape)
    return node.emit("equal", x if above else node.emit("neg", x), infinity)


@converter("Softplus")
def _softplus(node: Node) -> Value:
    """log(1 + exp(x)), as max(x, 0) + log(1 + exp(-|x|)) so that it does not overflow."""
    x = node.value(0)
    decay = node.emit("exp", node.emit("neg", node.emit("abs", x)))
    tail = node.emit("log", node.emit("add", decay, scalar(node, 1, x)))
    return node.emit("add", node.emit("maximum", x, scalar(node, 0, x)), tail)


@converter("Gelu")
def _gelu(node: Node) -> Value:
    x = node.value(0)
    half = scalar(node, 0.5, x)
    if node.attr("approximate", "none") == "tanh":
        cube = node.emit("mul", node.emit("mul", x, x), x)
        inner = node.emit("add", x, node.emit("mul", cube, scalar(node, 0.044715, x)))
        bell = node.emit("tanh", node.emit("mul", inner, scalar(node, float(np.sqrt(2 / np.pi)), x)))
    else:
        bell = node.emit("erf", node.emit("mul", x, scalar(node, float(np.sqrt(0.5)), x)))
    return node.emit("mul", node.emit("mul", x, half), node.emit("add", bell, scalar(node, 1, x)))


@converter("Cast")
def _cast(node: Node) -> Value:
    dtype = dtype_name(node.importer.model, node.attr("to"), f"the result of node {node.label!r}")
    return node.emit("cast", node.value(0), dtype=dtype)


@converter("CastLike")
def _cast_like(node: Node) -> Value:
    known = node.content(0)
    if known is not None and known.dtype != object:
        return node.constant(known, node.value(1).type.dtype)
    return node.emit("cast", node.value(0), dtype=node.value(1).type.dtype)


@converter("Where")
def _where(node: Node) -> Value:
    return node.emit("where", node.value(0), node.value(1), node.value(2))
