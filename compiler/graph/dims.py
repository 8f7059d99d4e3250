"""Arithmetic on dims, which are ints or int64 expressions over symbolic dims: known values stay Python ints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.ir import TensorType, same_dim
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, Select, Var, as_expr
from kedge.compiler.tir.simplify import prove, simplify
from kedge.compiler.tir.visitor import free_vars, substitute_expr


def plain(dim: Dim) -> Dim:
    """`dim` in its simplest form: a Python int wherever its value is known."""
    if not isinstance(dim, Expr):
        return int(dim)
    if isinstance(dim, Var):
        return dim
    result = simplify(dim)
    return int(result.value) if isinstance(result, Const) else result


def plain_shape(shape: Iterable[Dim]) -> tuple[Dim, ...]:
    """Every dim in its simplest form."""
    return tuple(plain(dim) for dim in shape)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of dims, 1 where there are none."""
    known = 1
    symbolic: list[Expr] = []
    for dim in dims:
        if isinstance(dim, Expr):
            symbolic.append(dim)
        else:
            known *= int(dim)
    if not symbolic or known == 0:
        return known
    rest = reduce(lambda a, b: a * b, symbolic)
    return plain(rest if known == 1 else rest * known)


def total(dims: Iterable[Dim]) -> Dim:
    """The sum of dims."""
    known = 0
    symbolic: list[Expr] = []
    for dim in dims:
        if isinstance(dim, Expr):
            symbolic.append(dim)
        else:
            known += int(dim)
    if not symbolic:
        return known
    rest = reduce(lambda a, b: a + b, symbolic)
    return plain(rest if known == 0 else rest + known)


def divide(above: Sequence[Dim], below: Sequence[Dim]) -> Dim | None:
    """The product of `above` over that of `below`; None where it is not known to divide evenly.

    Symbolic factors on both sides cancel: (n, 32, 4) over (n, 16) is 8.
    """
    rest = [factor for dim in above for factor in factors(dim)]
    known = 1
    for factor in (factor for dim in below for factor in factors(dim)):
        if isinstance(factor, int):
            known *= factor
            continue
        match = next((i for i, dim in enumerate(rest) if isinstance(dim, Expr) and same_dim(dim, factor)), None)
        if match is None:
            return None
        del rest[match]
    numerator = 1
    for factor in rest:
        numerator *= factor if isinstance(factor, int) else 1
    if known == 0 or numerator % known:
        return None
    return product([numerator // known, *(factor for factor in rest if isinstance(factor, Expr))])


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are provably equal."""
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def same_type(a: TensorType, b: TensorType) -> bool:
    """Whether two types have the same dtype and memory space and provably the same shape."""
    return a.dtype == b.dtype and a.space == b.space and same_shape(a.shape, b.shape)


def broadcast_shape(*shapes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The shape that numpy broadcasting gives; raises `ShapeError` where dims differ or are not known to agree."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        dims = [shape[axis] for shape in shapes if len(shape) >= -axis]
        wide = [dim for dim in dims if not (isinstance(dim, int) and dim == 1)]
        for other in wide[1:]:
            if not same_dim(wide[0], other):
                known = isinstance(wide[0], int) and isinstance(other, int)
                raise ShapeError(
                    f"dims {format_dim(wide[0])} and {format_dim(other)} "
                    + ("do not broadcast" if known else "are not known to be equal")
                )
        # A known dim says more than a symbolic one that is proved to be equal to it.
        result.append(next((dim for dim in wide if isinstance(dim, int)), wide[0] if wide else 1))
    return tuple(result)


def at_least(dim: Dim, least: Dim) -> bool:
    """Whether `dim >= least` is known."""
    if isinstance(dim, int) and isinstance(least, int):
        return dim >= least
    return prove(as_expr(dim) >= as_expr(least))


def evaluate(dim: Dim, symbols: Mapping[Var, int]) -> int:
    """The value of `dim` where the symbolic dims have these values."""
    match dim:
        case int():
            return dim
        case Const(value=value):
            return int(value)
        case Var():
            return symbols[dim]
        case Binary():
            waiting: list[Binary] = []
            first: Expr = dim
            while isinstance(first, Binary):  # sums of sums stand on the left: no recursion is as deep
                waiting.append(first)
                first = first.a
            value = evaluate(first, symbols)
            for each in reversed(waiting):
                value = _apply(each.op, value, evaluate(each.b, symbols))
            return value
        case Select(condition=condition, a=a, b=b):
            return evaluate(a if evaluate(condition, symbols) else b, symbols)
    raise TypeError(f"not a dim: {dim!r}")


def evaluate_shape(shape: Iterable[Dim], symbols: Mapping[Var, int]) -> tuple[int, ...]:
    """The values of all dims."""
    return tuple(evaluate(dim, symbols) for dim in shape)


def substitute(value: Any, mapping: Mapping[Var, Expr]) -> Any:
    """An attribute, a dim or a tuple of them with symbolic dims replaced."""
    if isinstance(value, Expr):
        return plain(substitute_expr(value, mapping))
    if isinstance(value, tuple):
        return tuple(substitute(item, mapping) for item in value)
    return value


def concrete(value: Any, symbols: Mapping[Var, int]) -> Any:
    """An attribute with every symbolic dim in it evaluated."""
    if isinstance(value, Expr):
        return evaluate(value, symbols)
    if isinstance(value, tuple):
        return tuple(concrete(item, symbols) for item in value)
    return value


def attribute_symbols(value: Any) -> Iterator[Var]:
    """The symbolic dims in an attribute, a dim or a shape."""
    if isinstance(value, Expr):
        yield from free_vars(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from attribute_symbols(item)


def format_dim(dim: Dim) -> str:
    """A dim as text: Python's operators over the names of the symbols."""
    return _format(dim, 0)


def format_type(type_: TensorType) -> str:
    """A type as text: `float32[n, 3, 8]`."""
    space = "" if type_.space == "host" else f"@{type_.space}"
    return f"{type_.dtype}[{', '.join(map(format_dim, type_.shape))}]{space}"


_SYMBOLS = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "floordiv": ("//", 2), "floormod": ("%", 2)}


def _format(dim: Dim, outer: int) -> str:
    match dim:
        case Const(value=value):
            return str(value)
        case Var(name=name):
            return name
        case Binary(op=op, a=a, b=b) if op in _SYMBOLS:
            sign, level = _SYMBOLS[op]
            text = f"{_format(a, level)} {sign} {_format(b, level + 1)}"
            return f"({text})" if level < outer else text
        case Binary(op=op, a=a, b=b):
            return f"{op}({_format(a, 0)}, {_format(b, 0)})"
        case Select(condition=condition, a=a, b=b):
            return f"select({_format(condition, 0)}, {_format(a, 0)}, {_format(b, 0)})"
    return str(dim)


def factors(dim: Dim) -> list[Dim]:
    """What `dim` is the product of: numbers as ints, and expressions that are no products."""
    if isinstance(dim, Binary) and dim.op == "mul":
        return factors(dim.a) + factors(dim.b)
    return [int(dim.value) if isinstance(dim, Const) else dim]


def _apply(op: str, a: int, b: int) -> int:
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "floordiv":
            return a // b
        case "floormod":
            return a % b
        case "truncdiv":
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        case "truncmod":
            return abs(a) % abs(b) * (1 if a >= 0 else -1)
        case "min":
            return min(a, b)
        case "max":
            return max(a, b)
        case "and" | "or":
            return int(bool(a) and bool(b)) if op == "and" else int(bool(a) or bool(b))
    return int({"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[op])
