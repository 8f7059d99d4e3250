"""External calls as steps of a program: which code they are, and over which symbols."""

from __future__ import annotations

from collections.abc import Mapping

from kedge.compiler.errors import CompileError
from kedge.compiler.graph.dims import attribute_symbols
from kedge.compiler.graph.external import External
from kedge.compiler.graph.ir import ExternalCall
from kedge.compiler.lower.program import ExternalKernel
from kedge.compiler.tir.expr import Var


def external_kernel(call: ExternalCall, codes: Mapping[str, External]) -> ExternalKernel:
    """The function that computes `call`.

    Raises:
        CompileError: there is no code of that name, or it has other inputs.
    """
    name = call.body.name
    code = codes.get(name)
    if code is None:
        raise CompileError(
            f"the graph calls the external function {name}, but there is no code for it",
            hint=f"give kedge.compile the external again: externals=[…]; there is: {', '.join(codes) or 'none'}",
        )
    places = {own.name: place for place, own in enumerate(call.body.inputs)}
    strange = [own for own in places if own not in code.inputs]
    if strange:
        raise CompileError(
            f"external {name} has the inputs {', '.join(code.inputs)}; the graph gives it {', '.join(strange)}",
            hint="the graph was partitioned with another pattern: partition it again",
        )
    return ExternalKernel(code, call, _symbols(call), tuple(places.get(own) for own in code.inputs))


def _symbols(call: ExternalCall) -> tuple[Var, ...]:
    """The symbolic dims that the C function can see."""
    dims = [dim for type_ in (*(own.type for own in call.body.inputs), *call.types) for dim in type_.shape]
    return tuple(dict.fromkeys(attribute_symbols((*dims, call.workspace))))
