"""What the manifest tells of a variant's code: its kernels, how they were scheduled, and what each step costs.

{"target": …, "flops_per_cycle": …, "load_bytes_per_cycle": …,
 "kernels": [{"name", "rule", "decisions", "origin"}, …], "functions": {NAME: [{"kernel", "flops", "bytes"}, …]}}

Costs of steps are numbers, or postfix programs over the function's symbols (see `kedge_expr`); what a machine does in
a cycle is that of one core with float32, and None on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedge.compiler.cache import KernelObject
from kedge.compiler.codegen.shapes import encode
from kedge.compiler.external_code import ExternalObjects
from kedge.compiler.graph.cost import nbytes
from kedge.compiler.graph.dims import total
from kedge.compiler.graph.external import EXTERNAL_RULE
from kedge.compiler.lower.program import Draft, ExternalKernel, Kernel, Program, Recalled, Step
from kedge.compiler.target import AnyTarget, Target
from kedge.compiler.tir.expr import Dim, Var

_FLOAT_BITS = 32


def report_variant(
    program: Program, kernels: Mapping[str, KernelObject], target: AnyTarget, externals: Mapping[str, ExternalObjects]
) -> dict[str, object]:
    """The facts of a compiled program, as plain JSON; `kernels` by their names in the program."""
    rows = [_kernel(name, kernel, kernels[name]) for name, kernel in program.kernels.items()]
    rows += [_external(name, call, externals) for name, call in program.externals.items()]
    cpu = target if isinstance(target, Target) else None
    return {
        "target": str(target),
        "flops_per_cycle": None if cpu is None else 2 * cpu.fma_per_cycle * cpu.vector_bits / _FLOAT_BITS,
        "load_bytes_per_cycle": None if cpu is None else cpu.loads_per_cycle * cpu.vector_bits / 8,
        "kernels": rows,
        "functions": {entry.name: [_step(step, entry.symbols) for step in entry.steps] for entry in program.entries},
    }


def _kernel(name: str, kernel: Kernel | Draft | Recalled, made: KernelObject) -> dict[str, object]:
    how = kernel if isinstance(kernel, Kernel) else made
    return {
        "name": name,
        "rule": how.rule,
        "decisions": dict(how.decisions),
        "origin": list(kernel.origin),
    }


def _external(name: str, call: ExternalKernel, externals: Mapping[str, ExternalObjects]) -> dict[str, object]:
    code = externals[call.code.function]
    rule = f"{EXTERNAL_RULE}{code.function}"
    return {"name": name, "rule": rule, "decisions": {}, "origin": list(call.call.origin), "sha256": code.digest}


def _step(step: Step, symbols: Sequence[Var]) -> dict[str, object]:
    touched = {(slot.kind, slot.index, slot.offset): slot.type for slot in step.args}
    return {
        "kernel": step.kernel,
        "flops": None if step.flops is None else _cost(step.flops, symbols),
        "bytes": _cost(total(map(nbytes, touched.values())), symbols),
    }


def _cost(dim: Dim, symbols: Sequence[Var]) -> Any:
    return dim if isinstance(dim, int) else [list(operation) for operation in encode(dim, symbols)]
