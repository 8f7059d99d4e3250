"""Constant second operands of products come in panels, where nothing else reads them."""

from types import MappingProxyType

import numpy as np
import pytest

from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.interp import run
from kedge.compiler.graph.ir import Call, Module, TensorType, Value
from kedge.compiler.graph.passes import FoldConstants, PackWeights
from kedge.compiler.graph.verify import verify
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Dim, Var

N = Var("n", lower=1)
AVX512 = parse("llvm -mcpu=znver4")


def product(x: tuple[Dim, ...], w: tuple[int, ...], dtype: str = "float32", *, shared: bool = False) -> Module:
    """`x @ w`; with `shared`, `w` is an output too."""
    b = Builder("main")
    weight = b.param("w", TensorType(w, dtype))
    outputs: dict[str, Value] = {"y": b.call("matmul", b.input("x", TensorType(x, dtype)), weight, origin=("mm",))}
    if shared:
        outputs["w2"] = b.call("neg", weight)
    data = np.arange(np.prod(w)).reshape(w) % 7 - 3
    return Module(MappingProxyType({"main": b.finish(outputs)}), MappingProxyType({"w": data.astype(dtype)}))


def packed(module: Module, target: str | None = None) -> Module:
    step = PackWeights().for_target(parse(target) if target else AVX512)
    result = FoldConstants()(step(module))
    verify(result)
    return result


def operators(module: Module) -> list[str]:
    return [v.op for f in module.functions.values() for v in f.values() if isinstance(v, Call)]


@pytest.mark.parametrize(
    ("x", "w", "panels"),
    [
        ((1, 20), (20, 1000), (16, 20, 64)),
        ((3136, 30), (30, 64), None),  # one panel as it is
        ((49, 20), (20, 100), (2, 20, 64)),
        ((N, 9), (9, 10), (1, 9, 16)),
        ((2, 40, 5), (5, 200), None),
        ((3, 8, 5), (3, 5, 70), None),
        ((7, 20), (20, 1), (20, 1)),  # one column
    ],
)
def test_products_by_constants(x, w, panels):
    module = product(x, w)
    result = packed(module)
    (data,) = result.params.values()
    if panels is not None:
        assert data.shape == panels
    numbers = tuple(4 if dim is N else dim for dim in x)
    array = (np.arange(np.prod(numbers)).reshape(numbers) % 5).astype("float32")
    np.testing.assert_array_equal(run(result, {"x": array})["y"], run(module, {"x": array})["y"])


def test_the_panels_hold_the_columns():
    module = product((49, 6), (6, 50))
    (data,) = packed(module).params.values()
    panels, _, width = data.shape
    whole = np.zeros((6, panels * width), "float32")
    whole[:, :50] = module.params["w"]
    for number in range(panels):
        np.testing.assert_array_equal(data[number], whole[:, number * width : (number + 1) * width])
    (call,) = [v for v in packed(module).functions["main"].values() if isinstance(v, Call)]
    assert call.op == "packed_matmul"
    assert call.origin == ("mm",)


@pytest.mark.parametrize(
    "module",
    [
        product((4, 8), (8, 100), "int32"),
        product((4, 8), (8, 100), shared=True),
        Module(product((4, 8), (8, 100)).functions),
    ],
    ids=["integers", "read_elsewhere", "unbound"],
)
def test_left_alone(module):
    assert operators(PackWeights().for_target(AVX512)(module)).count("matmul") == 1


def test_only_for_a_cpu():
    module = product((4, 8), (8, 100))
    assert PackWeights()(module) is module
    assert PackWeights().for_target(parse("opencl"))(module) is module


def test_targets_differ():
    module = product((64, 8), (8, 1000))
    shapes = {next(iter(packed(module, t).params.values())).shape for t in ("llvm -mcpu=znver4", "raspberry-pi/4b")}
    assert len(shapes) == 2
