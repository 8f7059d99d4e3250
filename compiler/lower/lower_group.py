"""A fused group, or an operator that stands alone, as one kernel: each operator's te lowering, put together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from kedge.compiler import te
from kedge.compiler.errors import CompileError
from kedge.compiler.graph.cost import flops
from kedge.compiler.graph.ir import Call, Constant, Fused, Value
from kedge.compiler.graph.passes.fuse import make_group
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Expr, Var, const
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.tir.structural import numbered_key


def as_group(value: Call | Fused) -> Fused:
    """The value as a group: a lone call becomes a group of one."""
    return value if isinstance(value, Fused) else make_group([value])


def lower_group(group: Fused, name: str) -> PrimFunc:
    """The kernel of a group: its parameters are the group's inputs and then its results, one block per te tensor.

    `attrs` say where it comes from and what it does: `origin` (nodes of the user's model), `ops`, `kind` (the largest
    fusion kind among them) and `flops` (a dim).

    Raises:
        CompileError: an operator has no lowering: the module was not legalized.
    """
    tensors: dict[int, te.Tensor] = {}
    placeholders = [te.placeholder(own.type.shape, own.type.dtype, own.name) for own in group.body.inputs]
    tensors.update((id(own), tensor) for own, tensor in zip(group.body.inputs, placeholders, strict=True))
    calls: list[Call] = []
    for value in group.body.values():
        if isinstance(value, Constant):
            tensors[id(value)] = _literal(value)
        elif isinstance(value, Call):
            calls.append(value)
            tensors[id(value)] = _lower_call(value, tensors)
    outputs = [tensors[id(value)] for value in group.body.outputs]
    return te.create_prim_func([*placeholders, *outputs], name, _attrs(group, calls))


def group_key(group: Fused) -> object | None:
    """A hashable value that groups share only if they lower to equal functions; None where a dim is symbolic.

    Deep networks repeat their blocks, and comparing groups takes a small part of the time that lowering them does.
    """
    try:
        return _plain(_rows(group))
    except TypeError:
        return None


def group_digest(group: Fused) -> tuple[str, tuple[Var, ...]] | None:
    """SHA-256 of all that lowering a group sees, the same in every process, and its variables in order of appearance.

    None where an operator is not the compiler's own, since nothing tells when what users define has changed, and where
    an attribute is no plain value.
    """
    if not all(registry.is_own(value.op) for value in group.body.values() if isinstance(value, Call)):
        return None
    names = tuple(value.name for value in group.body.inputs)
    numbers: dict[Var, int] = {}
    try:
        key = _plain((names, _rows(group)), numbers)
    except TypeError:
        return None
    return hashlib.sha256(repr(key).encode()).hexdigest(), tuple(numbers)


def _rows(group: Fused) -> tuple[object, ...]:
    numbers: dict[int, int] = {}
    rows: list[object] = []
    for value in (*group.body.inputs, *group.body.values()):
        if id(value) in numbers:
            continue
        numbers[id(value)] = len(numbers)
        types = value.types if isinstance(value, Call) else (value.type,)
        rows.append(tuple((type_.shape, type_.dtype) for type_ in types))
        if isinstance(value, Call):
            rows.append((value.op, tuple(sorted(value.attrs.items())), tuple(numbers[id(one)] for one in value.inputs)))
        elif isinstance(value, Constant):
            rows.append(value.data.tobytes())
    rows.append(tuple(numbers[id(value)] for value in group.body.outputs))
    return tuple(rows)


def _plain(key: object, symbols: dict[Var, int] | None = None) -> object:
    """`key` with numbers as text, which tells -0.0 from 0.0, and 1 from True; with `symbols`, expressions over them.

    Raises:
        TypeError: something else is in it.
    """
    if isinstance(key, tuple):
        return tuple(_plain(one, symbols) for one in key)
    if key is None or isinstance(key, (bytes, str)):
        return key
    if isinstance(key, (int, float)):
        return type(key).__name__, repr(key)
    if isinstance(key, Expr) and symbols is not None:
        return "expr", numbered_key(key, symbols)
    raise TypeError(f"{type(key).__name__} has no key")


def _lower_call(call: Call, tensors: Mapping[int, te.Tensor]) -> te.Tensor:
    lower = registry.get(call.op).lower
    if lower is None:
        external = f'compile with externals=[kedge.External(…, pattern=p.op("{call.op}", …))], which computes it'
        raise CompileError(
            f"{call.op} (node {', '.join(call.origin) or 'without a name'}) has no lowering",
            hint=external if "." in call.op else "run kedge.compiler.graph.passes.Legalize first",
        )
    return lower([tensors[id(operand)] for operand in call.inputs], call.attrs, call.types)[0]


def _literal(value: Constant) -> te.Tensor:
    """A tensor whose only element is a literal, which operators read without a buffer (see `ops.common.read`)."""
    number = const(value.data.reshape(-1)[0].item(), value.type.dtype)
    return te.compute(value.type.shape, lambda *_: number, name="literal")


def _attrs(group: Fused, calls: list[Call]) -> Mapping[str, Any]:
    kind = max(registry.get(call.op).kind for call in calls)
    return {
        "origin": group.origin,
        "ops": tuple(call.op for call in calls),
        "kind": kind.name.lower(),
        "flops": flops(group),
    }


def kernel_name(value: Value) -> str:
    """What the kernel of a value is called, before names are made unique: `fused_conv_add_relu`, `softmax`."""
    if isinstance(value, Fused):
        return f"fused_{value.body.name}"
    assert isinstance(value, Call)  # nothing else is computed
    return value.op
