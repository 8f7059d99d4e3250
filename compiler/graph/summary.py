"""A module at a glance, as a plain table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from kedge.compiler.graph.bind import parameters
from kedge.compiler.graph.cost import flops, nbytes, traffic
from kedge.compiler.graph.dims import format_dim, format_type, product, total
from kedge.compiler.graph.ir import Call, Function, Fused, Module
from kedge.compiler.tir.expr import Dim


def summarize(module: Module) -> str:
    """Inputs, outputs, operators, parameters, arithmetic and memory traffic of every function.

    FLOPs count a multiply-add as two; traffic is what each operator reads and writes if nothing stays in a cache.
    """
    return "\n".join(_lines(module))


def _lines(module: Module) -> Iterator[str]:
    types = parameters(module)
    count = total(product(type_.shape) for type_ in types.values())
    size = total(nbytes(type_) for type_ in types.values())
    unbound = [name for name in types if name not in module.params]
    for function in module.functions.values():
        yield from _function(function)
        yield ""
    yield f"parameters  {_amount(count)} in {len(types)} tensors, {_amount(size, 'B')}"
    if unbound:
        yield f"            not bound: {', '.join(unbound)}"


def _function(function: Function) -> Iterator[str]:
    yield f"function {function.name}"
    for value in function.inputs:
        yield f"  input     {value.name}: {format_type(value.type)}"
    for name, output in zip(function.output_names, function.outputs, strict=True):
        yield f"  output    {name}: {format_type(output.type)}"
    calls = [value for value in function.values() if isinstance(value, (Call, Fused))]
    counts = Counter(_kind(value) for value in calls)
    yield f"  operators {len(calls)}: " + ", ".join(f"{op} {n}" for op, n in sorted(counts.items()))
    yield f"  FLOPs     {_amount(total(map(flops, calls)))}"
    yield f"  traffic   {_amount(total(map(traffic, calls)), 'B')}"


def _kind(value: Call | Fused) -> str:
    return value.op if isinstance(value, Call) else value.body.name


def _amount(value: Dim, unit: str = "") -> str:
    """A count with a decimal prefix and its unit, or a formula."""
    if not isinstance(value, int):
        return f"{format_dim(value)} {unit}".rstrip()
    if value < 10_000:
        return f"{value} {unit}".rstrip()
    power = min(int(np.log10(value)) // 3, 4)
    return f"{value / 1000**power:.2f} {'kMGT'[power - 1]}{unit}"
