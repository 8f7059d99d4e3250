"""How large symbolic dims must be so that no tensor of a function has fewer than one element where it needs one.

A convolution of 5 x 5 without padding takes images of 5 x 5 or more: over free spatial dims it is the caller's shapes
that decide. Entries state such least sizes, so that smaller inputs are refused by name before anything runs. Without
them intermediate sizes would be negative, and the arena smaller than what lives in it.

Sizes that must be equal, and are for some shapes only, are stated as equalities (see `graph.agree`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.dims import evaluate, plain, same_shape, substitute
from kedge.compiler.graph.ir import Call, ExternalCall, Function, Fused, Item, TensorType, Value, same_dim
from kedge.compiler.lower.program import Entry, Equality, Port, Slot, Step
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Dim, Expr, Var, as_expr, const
from kedge.compiler.tir.simplify import prove, simplify_dim
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, substitute_expr

#: Larger least sizes are not looked for.
_LARGEST = 1 << 40
#: Sizes up to which what cannot be proved is tried out.
_TRIED = 4096


def least_sizes(function: Function) -> Mapping[Var, Var]:
    """For symbols that must be larger than they say: the same symbol with that lower bound.

    Looks at every dim of one symbol that its declared bounds do not keep from being negative, and asks for at least 1
    there. Dims that no size makes positive, or that combine several symbols, are left alone.
    """
    found: dict[Var, Var] = {}
    for dim in _dims(function):
        used = tuple(dict.fromkeys(free_vars(dim)))
        if len(used) != 1:
            continue
        (symbol,) = used
        if prove(dim >= 0):
            continue  # a slice, say, which may well be empty
        current = found.get(symbol, symbol)
        least = _least(dim, symbol, current.lower or 0)
        if least is not None:
            found[symbol] = replace(symbol, lower=least)
    return found


def right_at_zero(function: Function) -> tuple[Var, ...]:
    """Symbols of at least 1 with which, as 0, each output has the shape that it says, and no elements.

    Dims are worked out for sizes of 1 and more: rows but the first are N - 1, of none they are none. So the operators
    are asked once more. A roll of no rows has none; what is padded to N rows again has one.
    """
    return tuple(symbol for symbol in function.symbols if symbol.lower == 1 and _is_right_at_zero(function, symbol))


def _is_right_at_zero(function: Function, symbol: Var) -> bool:
    zero = {symbol: const(0)}
    found: dict[int, tuple[TensorType, ...]] = {}
    try:
        _infer(function, found, zero)
    except (ShapeError, _UnknownError):
        return False
    for value in function.outputs:
        shape = substitute(value.type.shape, zero)
        if not any(isinstance(dim, int) and dim == 0 for dim in shape):
            return False
        if not same_shape(found[id(value)][0].shape, shape):
            return False
    return True


class _UnknownError(Exception):
    """What there is of an operator's result is known to nobody, or what is asked of it makes no sense."""


def _infer(function: Function, found: dict[int, tuple[TensorType, ...]], mapping: Mapping[Var, Expr]) -> None:
    """The types of all values where symbols are what `mapping` says; raises ShapeError, _UnknownError."""
    for value in function.values():
        if id(value) in found:
            continue
        if isinstance(value, Item):
            found[id(value)] = (found[id(value.source)][value.index],)
        elif isinstance(value, ExternalCall):
            raise _UnknownError
        elif isinstance(value, Fused):
            for inner, given in zip(value.body.inputs, value.inputs, strict=True):
                found[id(inner)] = found[id(given)]
            _infer(value.body, found, mapping)
            found[id(value)] = tuple(found[id(result)][0] for result in value.body.outputs)
        elif isinstance(value, Call):
            attrs = {name: substitute(attr, mapping) for name, attr in value.attrs.items()}
            types = [found[id(each)][0] for each in value.inputs]
            found[id(value)] = registry.get(value.op).infer(types, attrs)
            # Fewer than none: a pad, say, that crops more than there is.
            if any(isinstance(dim, int) and dim < 0 for type_ in found[id(value)] for dim in type_.shape):
                raise _UnknownError
        else:
            found[id(value)] = (replace(value.type, shape=substitute(value.type.shape, mapping)),)


def equalities(function: Function) -> tuple[Equality, ...]:
    """What `expect_shape` expects, each pair of dims once, with all the operators that need it."""
    found: dict[tuple[Key, Key], Equality] = {}
    for value in function.values():
        if not isinstance(value, Call) or value.op != "expect_shape":
            continue
        of = f"node {', '.join(value.origin)}" if value.origin else "an operator without a name"
        for a, b in zip(value.type.shape, value.inputs[0].type.shape, strict=True):
            if same_dim(a, b):
                continue
            key = (expr_key(as_expr(a)), expr_key(as_expr(b)))
            known = found.get(key)
            found[key] = Equality(a, b, of if known is None else f"{known.of} and {of}")
    return tuple(found.values())


def with_symbols(entry: Entry, mapping: Mapping[Var, Var]) -> Entry:
    """`entry` in terms of other symbols."""
    if not mapping:
        return entry

    def dim(old: Dim) -> Dim:
        return simplify_dim(substitute_expr(old, mapping)) if isinstance(old, Expr) else old

    def type_(old: TensorType) -> TensorType:
        return replace(old, shape=tuple(map(dim, old.shape)))

    def port(old: Port) -> Port:
        return replace(old, type=type_(old.type))

    def slot(old: Slot) -> Slot:
        return replace(old, type=type_(old.type), offset=dim(old.offset))

    def step(old: Step) -> Step:
        symbols = tuple(substitute_expr(symbol, mapping) for symbol in old.symbols)
        flops = None if old.flops is None else dim(old.flops)
        return replace(old, args=tuple(map(slot, old.args)), symbols=symbols, flops=flops)

    def equality(old: Equality) -> Equality:
        return replace(old, a=dim(old.a), b=dim(old.b))

    return replace(
        entry,
        inputs=tuple(map(port, entry.inputs)),
        outputs=tuple(map(port, entry.outputs)),
        symbols=tuple(mapping.get(symbol, symbol) for symbol in entry.symbols),
        steps=tuple(map(step, entry.steps)),
        arena_size=dim(entry.arena_size),
        equalities=tuple(equality(each) for each in entry.equalities),
        right_at_zero=tuple(mapping.get(symbol, symbol) for symbol in entry.right_at_zero),
    )


def _least(dim: Expr, symbol: Var, low: int) -> int | None:
    """The least size of `symbol` from which on `dim` is provably at least 1."""

    def enough(size: int) -> bool:
        return prove(substitute_expr(dim, {symbol: replace(symbol, lower=size)}) >= 1)

    floor = low
    high = max(low, 1)
    while not enough(high):
        if high > _LARGEST:
            return None
        high *= 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    # What cannot be proved may hold: sizes below the proved one are tried, largest first.
    while floor < high <= _TRIED and evaluate(dim, {symbol: high - 1}) >= 1:
        high -= 1
    return high


def _dims(function: Function) -> Iterator[Expr]:
    """The symbolic dims of all values, operands first, those inside of groups included."""
    for value in function.values():
        inner: Iterator[Value] = value.body.values() if isinstance(value, Fused) else iter(())
        for each in (*inner, value):
            yield from (dim for dim in each.type.shape if isinstance(dim, Expr))
            if isinstance(each, Call) and each.op == "pad" and each.attrs["mode"] == "reflect":
                yield from _reflected(each)


def _reflected(pad: Call) -> Iterator[Expr]:
    """What a reflection leaves of each axis: an axis is longer than what is reflected of it."""
    shape = pad.inputs[0].type.shape
    for size, *widths in zip(shape, pad.attrs["pads"][: len(shape)], pad.attrs["pads"][len(shape) :], strict=True):
        for width in widths:
            rest = plain(as_expr(size) - as_expr(width))
            if isinstance(rest, Expr):
                yield rest
