"""Running a lowered program with the tensor IR's interpreter: proves plan and lowering without machine code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.errors import VerifyError
from kedge.compiler.graph.dims import evaluate, evaluate_shape
from kedge.compiler.graph.interp import check_inputs, evaluate_body
from kedge.compiler.lower.memory import ALIGNMENT
from kedge.compiler.lower.program import Entry, ExternalKernel, Program, Slot, Step
from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import Var
from kedge.rpc.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]


def run_program(program: Program, inputs: Mapping[str, Any], entry: str = "main") -> dict[str, Array]:
    """The outputs of an entry by name.

    Raises:
        InputError: no such entry; an input is missing, unknown, or has another dtype or shape than declared.
        VerifyError: an argument lies outside of the arena or off its alignment, or a kernel goes out of bounds.
    """
    found = next((one for one in program.entries if one.name == entry), None)
    if found is None:
        raise InputError(f"no entry {entry!r}", hint=f"there is: {', '.join(one.name for one in program.entries)}")
    arrays, symbols = check_inputs({port.name: port.type for port in found.inputs}, inputs)
    machine = _Machine(program, found, [arrays[port.name] for port in found.inputs], symbols)
    for step in found.steps:
        machine.step(step)
    return {port.name: machine.outputs[index] for index, port in enumerate(found.outputs)}


class _Machine:
    def __init__(self, program: Program, entry: Entry, inputs: list[Array], symbols: Mapping[Var, int]) -> None:
        self._program = program
        self._symbols = symbols
        self._inputs = inputs
        self._weights = list(program.weights.values())
        # Old contents of the arena must not look like results.
        self._arena = np.full(evaluate(entry.arena_size, symbols), 0xA5, np.uint8)
        self.outputs = [
            np.empty(evaluate_shape(port.type.shape, symbols), port.type.dtype) for port in entry.outputs
        ]  # fmt: skip

    def step(self, step: Step) -> None:
        if step.kernel in self._program.externals:
            self._external(self._program.externals[step.kernel], step)
            return
        func = self._program.kernels[step.kernel].func
        values = {
            var.name: evaluate(symbol, self._symbols) for var, symbol in zip(func.sizes, step.symbols, strict=True)
        }
        views = [self._view(slot) for slot in step.args]
        split = len(views) - func.n_outputs
        results = interp.run(func, [np.array(view) for view in views[:split]], values)
        for view, result in zip(views[split:], results, strict=True):
            view[...] = result

    def _external(self, kernel: ExternalKernel, step: Step) -> None:
        """What the C function must compute, operator by operator."""
        values = {
            var: evaluate(symbol, self._symbols) for var, symbol in zip(kernel.symbols, step.symbols, strict=True)
        }
        *arguments, result = [self._view(slot) for slot in step.args]
        (result[...],) = evaluate_body(kernel.call.body, [np.array(view) for view in arguments], values)

    def _view(self, slot: Slot) -> Array:
        shape = evaluate_shape(slot.type.shape, self._symbols)
        if slot.kind != "arena":
            source = {"input": self._inputs, "output": self.outputs, "weight": self._weights}[slot.kind][slot.index]
            return source.reshape(shape)
        offset = evaluate(slot.offset, self._symbols)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(slot.type.dtype).itemsize
        if offset % ALIGNMENT or offset < 0 or offset + size > self._arena.size:
            raise VerifyError(f"{size} bytes at {offset} do not lie in an arena of {self._arena.size}, or not aligned")
        return self._arena[offset : offset + size].view(slot.type.dtype).reshape(shape)
