"""Networks of bound parameters for tests of passes, their operators at a glance, and whether two mean the same."""

from __future__ import annotations

import numpy as np

from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Call, Fused, Module, Param, TensorType, Value
from kedge.compiler.graph.verify import verify
from kedge.compiler.tir.expr import Var
from support.graphs import compare

F32 = "float32"
N = Var("n", lower=1)
rng = np.random.default_rng(3)


class Net:
    """A builder of one function whose parameters are bound."""

    def __init__(self) -> None:
        self.b = Builder("main")
        self.params: dict[str, np.ndarray] = {}

    def input(self, name: str, *shape) -> Value:
        return self.b.input(name, TensorType(shape, F32))

    def param(self, name: str, *shape: int) -> Value:
        self.params[name] = np.abs(rng.standard_normal(shape)).astype(F32) + np.float32(0.1)
        return self.b.param(name, TensorType(shape, F32))

    def __getattr__(self, op: str):
        return lambda *inputs, **attrs: self.b.call(op, *inputs, **attrs)

    def module(self, *outputs: Value) -> Module:
        function = self.b.finish({f"y{i}": value for i, value in enumerate(outputs)})
        used = {value.name for value in function.values() if isinstance(value, Param)}
        return verify(Module({"main": function}).bind({name: self.params[name] for name in used}))


def ops(module: Module, function: str = "main") -> list[str]:
    """The operators of a function in order; a group in brackets."""
    result = []
    for value in module.functions[function].values():
        if isinstance(value, Call):
            result.append(value.op)
        elif isinstance(value, Fused):
            result.append(f"[{' '.join(v.op for v in value.body.values() if isinstance(v, Call))}]")
    return result


def same_meaning(before: Module, after: Module, size: int = 2, rtol: float = 1e-4) -> None:
    inputs = {}
    for value in before.functions["main"].inputs:
        shape = [dim if isinstance(dim, int) else size for dim in value.type.shape]
        inputs[value.name] = rng.standard_normal(shape).astype(value.type.dtype)
    verify(after)
    compare(interp.run(after, inputs), interp.run(before, inputs), rtol=rtol, atol=1e-5, of_largest=True)
