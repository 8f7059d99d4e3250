"""Comparing modules by structure."""

from __future__ import annotations

from kedge.compiler.graph.ir import Function, Module
from kedge.compiler.graph.printer import canonical


def equal(a: Module | Function, b: Module | Function) -> bool:
    """Whether two modules (or functions) are the same but for origins and the names of symbols.

    Data of parameters and constants is compared by digest, names of functions, inputs, outputs and parameters count.
    """
    return canonical(_module(a)) == canonical(_module(b))


def _module(of: Module | Function) -> Module:
    return of if isinstance(of, Module) else Module({of.name: of})
