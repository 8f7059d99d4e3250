"""Small graphs for tests: one operator, or the digits network, and running them in every way short of machine code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph import interp, parser, structural
from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.ir import Module, TensorType
from kedge.compiler.graph.passes import default_passes, for_target
from kedge.compiler.graph.verify import verify
from kedge.compiler.lower.interp import run_program
from kedge.compiler.lower.lower import lower
from kedge.compiler.target import Target, parse
from kedge.compiler.tir.expr import Dim, Var

Array = np.ndarray[Any, Any]
X86 = parse("llvm -mtriple=x86_64-linux-gnu -mcpu=x86-64-v3")


def module_of(op: str, shapes: Sequence[Sequence[Dim]], dtypes: Sequence[str], **attrs: Any) -> Module:
    """A module whose `main` applies one operator to inputs x0, x1, …; results are y0, y1, …."""
    b = Builder("main")
    inputs = [
        b.input(f"x{i}", TensorType(tuple(shape), dtype))
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    results = b.call(op, *inputs, origin=("node",), **attrs)
    results = results if isinstance(results, tuple) else (results,)
    return Module({"main": b.finish({f"y{i}": value for i, value in enumerate(results)})})


def check_op(
    op: str,
    *arrays: Array,
    free: Mapping[int, Sequence[int]] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    target: Target = X86,
    **attrs: Any,
) -> list[Array]:
    """The reference's results for `arrays`, after comparing them with the lowered and scheduled operator's.

    `free` says which dims of which input are symbolic while compiling.
    """
    shapes: list[list[Dim]] = [list(array.shape) for array in arrays]
    for index, axes in (free or {}).items():
        for axis in axes:
            shapes[index][axis] = Var(f"d{index}_{axis}", lower=1)
    module = verify(module_of(op, shapes, [str(array.dtype) for array in arrays], **attrs))
    inputs = {f"x{i}": array for i, array in enumerate(arrays)}
    expected = interp.run(module, inputs)
    assert structural.equal(parser.parse(module.show()), module)
    compare(run_lowered(module, inputs, target), expected, rtol=rtol, atol=atol)
    return list(expected.values())


def run_lowered(module: Module, inputs: Mapping[str, Array], target: Target = X86, **options: Any) -> dict[str, Array]:
    """The outputs of the lowered program; every pass is given and must give a valid module that means the same."""
    expected = interp.run(module, inputs)
    for step in for_target(default_passes(), target):
        after = verify(step(module))
        assert step(after) is after or structural.equal(step(after), after), f"{step.name} has more to do"
        module = after
        compare(interp.run(module, inputs), expected, rtol=1e-4, atol=1e-5)
    return run_program(lower(module, target), inputs, **options)


def compare(
    got: Mapping[str, Array], expected: Mapping[str, Array], *, rtol: float, atol: float, of_largest: bool = False
) -> None:
    """Assert that outputs agree in name, dtype, shape and value.

    `of_largest`: `atol` is of a tensor's largest element, where that is above 1. What is left of sums whose terms
    cancel each other is as wrong as these are.
    """
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        if str(array.dtype) in FLOATS:
            loose = {"float16": 4e-3, "bfloat16": 2**-7}.get(str(array.dtype), 0.0)
            have, array = (each.astype(np.float64) for each in (got[name], array))
            finite = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array))
            least = max(atol, loose) * (max(1.0, finite.max(initial=0.0)) if of_largest else 1.0)
            np.testing.assert_allclose(have, array, rtol=max(rtol, loose), atol=least, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def digits_network(seed: int = 0) -> tuple[Module, dict[str, Array]]:
    """The shape of the digits classifier with random weights: an unbound module and the data of its parameters."""
    rng = np.random.default_rng(seed)
    params: dict[str, Array] = {}
    b = Builder("main")

    def param(name: str, *shape: int, low: float = -0.5, high: float = 0.5) -> Any:
        params[name] = frozen(rng.uniform(low, high, shape).astype(np.float32))
        return b.param(name, TensorType(shape, "float32"))

    def block(x: Any, index: int, channels: int, filters: int) -> Any:
        weight = param(f"conv{index}.weight", filters, channels, 3, 3)
        x = b.call("conv", x, weight, param(f"conv{index}.bias", filters), pads=[1] * 4, origin=(f"conv{index}",))
        statistics = [param(f"bn{index}.{name}", filters) for name in ("scale", "bias", "mean")]
        statistics.append(param(f"bn{index}.var", filters, low=0.5, high=1.5))
        x = b.call("batch_norm", x, *statistics, origin=(f"bn{index}",))
        x = b.call("relu", x, origin=(f"relu{index}",))
        return b.call("max_pool", x, kernel=[2, 2], strides=[2, 2], origin=(f"pool{index}",))

    x = block(b.input("image", TensorType((Var("n", lower=1), 1, 8, 8), "float32")), 1, 1, 16)
    x = b.call("flatten", block(x, 2, 16, 32), origin=("flatten",))
    x = b.call("gemm", x, param("fc.weight", 10, 128), param("fc.bias", 10), trans_b=True, origin=("fc",))
    return Module({"main": b.finish({"probabilities": b.call("softmax", x, origin=("softmax",))})}), params
