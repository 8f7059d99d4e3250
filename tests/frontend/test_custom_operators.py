"""Operators of custom domains that a user defines with te: one function gives import, kernels and oracle."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import kedge
from kedge.compiler.errors import CompileError, FrontendError, UnsupportedOperatorError
from kedge.compiler.frontend.onnx import coverage, load_onnx
from kedge.compiler.frontend.onnx.reference import reference_outputs
from kedge.compiler.graph import interp, parser, structural
from kedge.compiler.graph.ir import Call, Fused, Module, TensorType
from kedge.compiler.graph.verify import verify
from kedge.compiler.ops import custom, registry
from kedge.compiler.ops.registry import FusionKind
from kedge.validation import validate
from support.graphs import run_lowered

te = kedge.te
DOMAIN = "my.domain"
Array = np.ndarray[Any, Any]
Node = onnx.NodeProto


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Node:
    """A node of the custom domain, called `act`."""
    return helper.make_node(op, inputs, outputs, name="act", domain=DOMAIN, **attributes)


def model_of(
    nodes: Sequence[Node],
    inputs: dict[str, tuple[str, Sequence[int | str]]],
    outputs: Sequence[str] = ("y",),
    weights: dict[str, Array] | None = None,
    domain: str = DOMAIN,
    opset: int = 17,
) -> onnx.ModelProto:
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        for name, (dtype, shape) in inputs.items()
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    for info in results:
        info.type.tensor_type.elem_type = TensorProto.FLOAT
    initializers = [numpy_helper.from_array(data, name) for name, data in (weights or {}).items()]
    graph = helper.make_graph(nodes, "custom", infos, results, initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def agree(model: onnx.ModelProto, inputs: dict[str, Array], tmp_path: Path, rtol: float = 1e-5) -> dict[str, Array]:
    """What compiled code gives, after comparing it with every other way to run the model."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    expected = reference_outputs(path, inputs)
    module = verify(kedge.load(path))
    assert structural.equal(parser.parse(module.show(), module.params), module)
    with kedge.compile(module).open(threads=1) as m:
        got = m.run(inputs)
    for found in (got, interp.run(module, inputs), run_lowered(module, inputs)):
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, rtol=rtol, atol=1e-6, err_msg=name)
    return dict(got)


def calls(module: Module) -> list[str]:
    """The operators of a module, in order; those of a group are joined by spaces."""
    names = []
    for value in module.functions["main"].values():
        if isinstance(value, Call):
            names.append(value.op)
        elif isinstance(value, Fused):
            names.append(" ".join(inner.op for inner in value.body.values() if isinstance(inner, Call)))
    return names


def leaky_gelu(tensors, alpha=0.1):
    (x,) = tensors
    return te.compute(x.shape, lambda *i: te.select(x[i] > 0, x[i], x[i] * alpha) * te.sigmoid(x[i]), name="gelu")


def numpy_leaky_gelu(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, x * np.float32(alpha)) / (1 + np.exp(-x))


def moments(tensors):
    """The mean and the variance of each row."""
    (x,) = tensors
    n, m = x.shape
    a, b = te.reduce_axis(m, "a"), te.reduce_axis(m, "b")
    count = te.cast(m, "float32")
    total = te.compute((n,), lambda i: te.sum(x[i, a], a), name="total")
    mean = te.compute((n,), lambda i: total[i] / count, name="mean")
    squares = te.compute((n,), lambda i: te.sum((x[i, b] - mean[i]) * (x[i, b] - mean[i]), b), name="squares")
    return mean, te.compute((n,), lambda i: squares[i] / count, name="variance")


# A model that uses one ------------------------------------------------------------------------------------------------


def test_it_imports_fuses_with_its_neighbours_and_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((8, 5)).astype("float32"), "b": rng.standard_normal(5).astype("float32")}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        node("LeakyGelu", ["h"], ["g"], alpha=0.25),
        helper.make_node("Add", ["g", "b"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("float32", ["n", 8])}, weights=weights)
    x = rng.standard_normal((3, 8)).astype("float32")
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        got = agree(model, {"x": x}, tmp_path)
        optimized = kedge.pipeline().run(load_onnx(model))
    assert calls(optimized) == ["matmul my.domain.LeakyGelu.elementwise add"]
    expected = numpy_leaky_gelu(x @ weights["w"], 0.25) + weights["b"]
    np.testing.assert_allclose(got["y"], expected, rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rank_and_any_size(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), max_size=4))
    free = [f"d{at}" if data.draw(st.booleans()) else size for at, size in enumerate(shape)]
    alpha = data.draw(st.floats(-2, 2, width=32))
    x = np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")
    model = model_of([node("LeakyGelu", ["x"], ["y"], alpha=alpha)], {"x": ("float32", free)})
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        got = agree(model, {"x": x}, tmp_path)
    np.testing.assert_allclose(got["y"], numpy_leaky_gelu(x, alpha), rtol=1e-5, atol=1e-6)


def test_several_results_with_free_dims(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        node("Moments", ["r"], ["mean", "variance"]),
        helper.make_node("Sqrt", ["variance"], ["deviation"]),
    ]
    model = model_of(nodes, {"x": ("float32", ["n", "m"])}, ["mean", "deviation"])
    x = np.random.default_rng(0).standard_normal((4, 33)).astype("float32")
    with te.register_onnx(DOMAIN, "Moments", moments):
        got = agree(model, {"x": x}, tmp_path)
    np.testing.assert_allclose(got["mean"], np.maximum(x, 0).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(got["deviation"], np.maximum(x, 0).std(axis=1), rtol=1e-5)


def test_a_result_that_nobody_asks_for_may_be_left_out(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 7)).astype("float32")
    for outputs, wanted in ((["y"], x.mean(axis=1)), (["", "y"], x.var(axis=1))):
        model = model_of([node("Moments", ["x"], outputs)], {"x": ("float32", [4, 7])})
        with te.register_onnx(DOMAIN, "Moments", moments):
            np.testing.assert_allclose(agree(model, {"x": x}, tmp_path)["y"], wanted, rtol=1e-4, atol=1e-6)


def test_attributes_arrive_as_the_node_has_them(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def scale(tensors, *, factor, **others):
        seen.append({"factor": factor, **others})
        return te.compute(tensors[0].shape, lambda *i: tensors[0][i] * factor, name="scaled")

    attributes = {"factor": 3, "bias": -0.5, "mode": "wärm\"'", "axes": [1, -2], "shares": [0.5, 2.0], "names": ["a"]}
    model = model_of([node("Scale", ["x"], ["y"], **attributes)], {"x": ("float32", [2])})
    with te.register_onnx(DOMAIN, "Scale", scale):
        got = agree(model, {"x": np.array([1, 2], "float32")}, tmp_path)
    np.testing.assert_array_equal(got["y"], [3, 6])
    plain = {**attributes, "axes": (1, -2), "shares": (0.5, 2.0), "names": ("a",)}
    assert all(given == plain for given in seen)


def one_hot_of_the_best(tensors, depth):
    x, table = tensors
    k = te.reduce_axis(x.shape[1], "k")
    best = te.compute(x.shape[:1], lambda i: te.argmax(x[i, k], k), name="best")
    return best, te.compute((x.shape[0], depth), lambda i, j: table[best[i], j], name="row")


def test_positions_and_gathers_in_one_operator(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((6, 5)).astype("float32"), rng.standard_normal((5, 3)).astype("float32")
    x[2, 3] = math.nan
    nodes = [node("Best", ["x", "table"], ["at", "y"], depth=3)]
    model = model_of(nodes, {"x": ("float32", ["n", 5])}, ["at", "y"], {"table": table})
    with te.register_onnx(DOMAIN, "Best", one_hot_of_the_best):
        got = agree(model, {"x": x}, tmp_path)
    np.testing.assert_array_equal(got["at"], x.argmax(axis=1))
    np.testing.assert_array_equal(got["y"], table[x.argmax(axis=1)])


def upsample(tensors, times=2):
    (x,) = tensors
    return te.compute((x.shape[0] * times,), lambda i: x[i // times], name="up")


def test_a_shape_may_be_computed_from_the_inputs(tmp_path: Path) -> None:
    nodes = [node("Up", ["x"], ["h"], times=3), helper.make_node("Neg", ["h"], ["y"])]
    with te.register_onnx(DOMAIN, "Up", upsample):
        got = agree(model_of(nodes, {"x": ("float32", ["n"])}), {"x": np.arange(5, dtype="float32")}, tmp_path)
    np.testing.assert_array_equal(got["y"], -np.repeat(np.arange(5), 3))


def valid_sum(tensors):
    """Three neighbours, where there are three."""
    (x,) = tensors
    return te.compute((x.shape[0] - 2,), lambda i: x[i] + x[i + 1] + x[i + 2], name="sum")


def test_a_chain_of_them_with_literals_and_shapes_of_shapes(tmp_path: Path) -> None:
    def scaled_tanh(tensors):
        x, factor = tensors
        return te.compute(x.shape, lambda i: te.tanh(x[i]) * factor.at(()), name="scaled")

    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(2.5, "float32"))),
        node("Tanh", ["x", "c"], ["h"]),
        node("Up", ["h"], ["u"], times=2),
        node("LeakyGelu", ["u"], ["l"]),
        node("Up", ["l"], ["w"], times=3),
        node("Sum", ["w"], ["v"]),
        helper.make_node("Relu", ["v"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("float32", ["n"])})
    with (
        te.register_onnx(DOMAIN, "Tanh", scaled_tanh),
        te.register_onnx(DOMAIN, "Up", upsample),
        te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu),
        te.register_onnx(DOMAIN, "Sum", valid_sum),
    ):
        assert [name.count("my.domain") for name in calls(kedge.pipeline().run(load_onnx(model)))] == [4, 1]
        for n in (1, 5):
            agree(model, {"x": np.random.default_rng(n).standard_normal(n).astype("float32")}, tmp_path)


def test_sizes_that_leave_nothing_are_refused_when_they_come() -> None:
    model = model_of([node("Sum", ["x"], ["y"])], {"x": ("float32", ["n"])})
    with te.register_onnx(DOMAIN, "Sum", valid_sum), kedge.compile(load_onnx(model)).open(threads=1) as m:
        assert m.run({"x": np.ones(3, "float32")})["y"] == [3]
        with pytest.raises(kedge.KedgeError, match="expected at least 3"):
            m.run({"x": np.ones(1, "float32")})


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8", "bool"])
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    def keep(tensors):
        x, y = tensors
        return te.compute(x.shape, lambda i: te.select(te.ne(x[i], y[i]), x[i], y[0]), name="kept")

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 3, 20).astype(dtype), rng.integers(0, 3, 20).astype(dtype)
    model = model_of([node("Keep", ["x", "y"], ["z"])], {"x": (dtype, ["n"]), "y": (dtype, ["n"])}, ["z"])
    with te.register_onnx(DOMAIN, "Keep", keep):
        got = agree(model, {"x": x, "y": y}, tmp_path)
    np.testing.assert_array_equal(got["z"], np.where(x != y, x, y[0]))


def test_inputs_that_are_handed_on_unread_constant_or_left_out(tmp_path: Path) -> None:
    def first(tensors):
        return tensors[0]

    def ramp(tensors, n):
        return te.compute((n,), lambda i: te.cast(i, "float32"), name="ramp")

    def add(tensors):
        x, s = tensors[:2]
        assert len(tensors) == 2
        return te.compute(x.shape, lambda i: x[i] + s.at(()), name="sum")

    nodes = [
        node("Ramp", [], ["r"], n=4),
        node("First", ["x", "r"], ["f"]),
        node("Add", ["f", "half", ""], ["g"]),
        node("Add", ["w", "half"], ["h"]),
        helper.make_node("Add", ["g", "h"], ["i"]),
        helper.make_node("Add", ["i", "r"], ["y"]),
    ]
    weights = {"half": np.array(0.5, "float32"), "w": np.arange(4, dtype="float32")}
    model = model_of(nodes, {"x": ("float32", [4])}, weights=weights)
    x = np.array([1, 2, 3, 4], "float32")
    with (
        te.register_onnx(DOMAIN, "Ramp", ramp),
        te.register_onnx(DOMAIN, "First", first),
        te.register_onnx(DOMAIN, "Add", add),
    ):
        got = agree(model, {"x": x}, tmp_path)
        optimized = kedge.pipeline().run(load_onnx(model))
    np.testing.assert_array_equal(got["y"], x + 1 + 2 * weights["w"])
    assert sum("Add" in name for name in calls(optimized)) == 1  # the one of constants is folded


def test_it_works_inside_of_control_flow(tmp_path: Path) -> None:
    branches = {}
    for name, alpha in (("then_branch", 0.5), ("else_branch", 2.0)):
        inner = [node("LeakyGelu", ["x"], ["z"], alpha=alpha)]
        out = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n"])
        branches[name] = helper.make_graph(inner, name, [], [out])
    nodes = [helper.make_node("If", ["c"], ["y"], **branches)]
    model = model_of(nodes, {"x": ("float32", ["n"])}, weights={"c": np.array(False)})
    x = np.array([-1, 1], "float32")
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        np.testing.assert_allclose(agree(model, {"x": x}, tmp_path)["y"], numpy_leaky_gelu(x, 2.0), rtol=1e-5)


def test_a_function_that_the_model_brings_along_is_the_model_s(tmp_path: Path) -> None:
    body = [helper.make_node("Neg", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    model = model_of([node("LeakyGelu", ["x"], ["y"])], {"x": ("float32", [3])})
    model.functions.append(helper.make_function(DOMAIN, "LeakyGelu", ["a"], ["b"], body, opsets))
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        module = load_onnx(model)
    assert calls(module) == ["neg"]


def test_validate_compares_outputs_and_layers(tmp_path: Path) -> None:
    nodes = [
        node("LeakyGelu", ["x"], ["h"], alpha=0.25),
        helper.make_node("Softmax", ["h"], ["s"]),
        node("Moments", ["s"], ["y"]),
    ]
    path = tmp_path / "model.onnx"
    onnx.save(model_of(nodes, {"x": ("float32", ["n", 6])}), path)
    x = np.random.default_rng(0).standard_normal((2, 6)).astype("float32")
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu), te.register_onnx(DOMAIN, "Moments", moments):
        artifact = kedge.compile(path)
        with kedge.local() as device:
            report = validate(path, artifact, {"x": x}, device)
    assert report.ok
    assert "act" in [layer.name for layer in report.layers]


def test_a_saved_module_is_read_back_where_the_operator_is_registered(tmp_path: Path) -> None:
    model = model_of([node("LeakyGelu", ["x"], ["y"], alpha=-0.1)], {"x": ("float32", ["n"])})
    path = tmp_path / "model.kmod"
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        module = load_onnx(model)
        module.save(path)
        assert structural.equal(kedge.load(path), module)
    with pytest.raises(CompileError, match=r"unknown graph operator 'my\.domain\.LeakyGelu\.elementwise'") as refused:
        kedge.load(path)
    assert "te.register_onnx" in str(refused.value.hint)


@pytest.mark.parametrize(
    "other",
    [
        lambda tensors: te.compute((4,), lambda i: te.cast(i, "float32"), name="y"),  # another shape
        lambda tensors: te.compute(tensors[0].shape, lambda i: te.cast(tensors[0][i], "int32"), name="y"),
        lambda tensors: te.compute(tensors[0].shape, lambda i: tensors[0][0], name="y"),  # fuses otherwise
    ],
)
def test_a_module_is_not_compiled_with_another_function_than_it_was_imported_with(other: Callable[..., Any]) -> None:
    with te.register_onnx(DOMAIN, "Op", leaky_gelu):
        module = load_onnx(model_of([node("Op", ["x"], ["y"])], {"x": ("float32", ["n"])}))
    with (
        te.register_onnx(DOMAIN, "Op", other),
        pytest.raises(CompileError, match=r"my\.domain\.Op: its function does not give what it gave"),
    ):
        kedge.compile(module, "native")


def test_older_opsets_are_converted_around_it() -> None:
    nodes = [node("LeakyGelu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = model_of(nodes, {"x": ("float32", [3])}, opset=11)
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        assert calls(load_onnx(model)) == ["my.domain.LeakyGelu.elementwise", "relu"]


# What it counts as ----------------------------------------------------------------------------------------------------


def test_reports_know_what_is_registered() -> None:
    model = model_of([node("LeakyGelu", ["x"], ["h"]), node("Other", ["h"], ["y"])], {"x": ("float32", [3])})
    assert [use.title for use in coverage(model).unsupported] == ["my.domain.LeakyGelu", "my.domain.Other"]
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu):
        assert [use.title for use in coverage(model).unsupported] == ["my.domain.Other"]
        with pytest.raises(UnsupportedOperatorError) as refused:
            load_onnx(model)
    assert "uses 1 operator that" in refused.value.message
    assert "my.domain.Other (opset 1): act" in refused.value.message
    assert "define those of other domains with kedge.te.register_onnx" in str(refused.value)


def square(*shape: int | str) -> list[TensorType]:
    return [TensorType(tuple(te.Var(dim, lower=1) if isinstance(dim, str) else dim for dim in shape), "float32")]


def unary(element: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose result has the shape of its first input."""
    return lambda tensors: te.compute(tensors[0].shape, lambda *i: element(*tensors, *i), name="y")


def softmax(tensors):
    (x,) = tensors
    k, p = te.reduce_axis(x.shape[1]), te.reduce_axis(x.shape[1], "p")
    top = te.compute(x.shape[:1], lambda i: te.max(x[i, k], k), name="top")
    total = te.compute(x.shape[:1], lambda i: te.sum(te.exp(x[i, p] - top[i]), p), name="total")
    return te.compute(x.shape, lambda i, j: te.exp(x[i, j] - top[i]) / total[i], name="y")


def norm(tensors):
    (x,) = tensors
    k = te.reduce_axis(x.shape[1])
    total = te.compute(x.shape[:1], lambda i: te.sum(x[i, k] * x[i, k], k), name="total")
    return te.compute(x.shape[:1], lambda i: te.sqrt(total[i]), name="y")


def product(tensors):
    x, w = tensors
    k = te.reduce_axis(x.shape[1])
    return te.compute((x.shape[0], w.shape[1]), lambda i, j: te.sum(x[i, k] * w[k, j], k), name="y")


@pytest.mark.parametrize(
    ("function", "types", "kind"),
    [
        (unary(lambda x, i, j: te.exp(x[i, j])), square("n", 4), FusionKind.ELEMENTWISE),
        (unary(lambda x, y, i, j: x[i, j] + y[i, j]), square(3, 4) * 2, FusionKind.ELEMENTWISE),
        (unary(lambda x, b, i, j: x[i, j] + b[j]), square("n", 4) + square(4), FusionKind.BROADCAST),
        (unary(lambda x, b, i, j: x[i, j] + b[i]), square(3, 4) + square(3), FusionKind.BROADCAST),
        (unary(lambda x, b, i, j: x[i, j] + b[0, j]), square(3, 4) + square(1, 4), FusionKind.BROADCAST),
        (unary(lambda x, i, j: x[j, i]), square(4, 4), FusionKind.INJECTIVE),
        (unary(lambda x, i, j: x[i, 3 - j]), square("n", 4), FusionKind.INJECTIVE),
        (unary(lambda x, i: x[0]), square(4), FusionKind.INJECTIVE),
        (upsample, square("n"), FusionKind.INJECTIVE),
        (unary(lambda x, i: x[i] + te.select(i > 0, x[te.maximum(i - 1, 0)], 0.0)), square("n"), FusionKind.REDUCTION),
        (norm, square("n", 4), FusionKind.REDUCTION),
        (lambda tensors: one_hot_of_the_best(tensors, 4)[0], square("n", 4) * 2, FusionKind.REDUCTION),
        (lambda tensors: one_hot_of_the_best(tensors, 4)[1], square(4, 4) * 2, FusionKind.OPAQUE),
        (product, square("n", 4) + square(4, 5), FusionKind.CONTRACTION),
        (softmax, square("n", 4), FusionKind.OPAQUE),
        (lambda tensors: te.compute((3,), lambda i: te.cast(i, "float32")), [], FusionKind.OPAQUE),
    ],
)
def test_the_fusion_kind_follows_from_the_expression(
    function: Callable[..., Any], types: list[TensorType], kind: FusionKind
) -> None:
    operator = custom.OnnxOperator(DOMAIN, "Op", function)
    assert operator.infer(types, {})[1] == (kind,)


def test_an_epilogue_joins_a_product_and_a_norm() -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 5)).astype("float32")}
    nodes = [
        node("Product", ["x", "w"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        node("Norm", ["q"], ["r"]),
        helper.make_node("Neg", ["r"], ["y"]),
    ]
    model = model_of(nodes, {"x": ("float32", ["n", 4])}, weights=weights)
    x = rng.standard_normal((7, 4)).astype("float32")
    with te.register_onnx(DOMAIN, "Product", product), te.register_onnx(DOMAIN, "Norm", norm):
        module = load_onnx(model)
        assert calls(kedge.pipeline().run(module)) == [
            "my.domain.Product.contraction relu",
            "my.domain.Norm.reduction neg",
        ]
        with kedge.compile(module).open(threads=1) as m:
            got = m.run({"x": x})["y"]
    np.testing.assert_allclose(got, -np.linalg.norm(np.maximum(x @ weights["w"], 0), axis=1), rtol=1e-4)


# What is refused ------------------------------------------------------------------------------------------------------


def test_registering_is_refused_twice_and_for_the_standard_domain() -> None:
    with te.register_onnx(DOMAIN, "Op", leaky_gelu):
        with pytest.raises(CompileError, match=r"my\.domain\.Op is registered already"):
            te.register_onnx(DOMAIN, "Op", leaky_gelu)
        with (
            te.register_onnx("my_domain", "Op", leaky_gelu),  # another operator, and so is its graph operator
            pytest.raises(CompileError, match=r"my-domain\.Op would be called my_domain\.Op in graphs, as my_d"),
        ):
            te.register_onnx("my-domain", "Op", leaky_gelu)  # this one's would be the same
    for domain in ("", "ai.onnx"):
        with pytest.raises(CompileError, match="'Relu' cannot be registered in ONNX's own domain"):
            te.register_onnx(domain, "Relu", leaky_gelu)
    assert custom.registered() == ()


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="named by two texts, its domain and its type, not 3 and 'Op'"):
        te.register_onnx(3, "Op", leaky_gelu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the function of my\.domain\.Op is a int, which cannot be called"):
        te.register_onnx(DOMAIN, "Op", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes \(\); it is called as function\(tensors, \*\*attributes\)"):
        te.register_onnx(DOMAIN, "Op", lambda: None)  # type: ignore[arg-type, misc, return-value]


def test_a_registration_ends() -> None:
    model = model_of([node("Op", ["x"], ["y"])], {"x": ("float32", [3])})
    before = registry.names()

    @te.onnx_operator(DOMAIN, "Op")
    def op(tensors):
        return leaky_gelu(tensors)

    load_onnx(model)
    te.unregister_onnx(DOMAIN, "Op")
    assert registry.names() == before
    with pytest.raises(UnsupportedOperatorError):
        load_onnx(model)
    with pytest.raises(CompileError, match=r"my\.domain\.Op is not registered"):
        te.unregister_onnx(DOMAIN, "Op")
    with pytest.raises(ValueError, match="stop"), te.register_onnx(DOMAIN, "Op", op) as registration:
        registration.unregister()
        with te.register_onnx(DOMAIN, "Op", leaky_gelu):
            registration.unregister()  # is not that one
            load_onnx(model)
        raise ValueError("stop")
    assert registry.names() == before


def test_a_domain_may_have_any_name(tmp_path: Path) -> None:
    for domain in ("com.my-company/ops v2", "2fast", "domäne"):
        nodes = [helper.make_node("LeakyGelu", ["x"], ["y"], domain=domain)]
        model = model_of(nodes, {"x": ("float32", ["n"])}, domain=domain)
        with te.register_onnx(domain, "LeakyGelu", leaky_gelu):
            x = np.array([-1, 1], "float32")
            np.testing.assert_allclose(agree(model, {"x": x}, tmp_path)["y"], numpy_leaky_gelu(x, 0.1), rtol=1e-5)


def broken(tensors):
    return te.compute((3,), lambda i, j: tensors[0][i], name="y")


def strange(tensors):
    return [1, 2]


def foreign(tensors):
    other = te.placeholder((3,), "float32", "other")
    return te.compute((3,), lambda i: other[i], name="y")


def unbound(tensors):
    return te.compute((te.Var("q", lower=1),), lambda i: tensors[0][0], name="y")


@pytest.mark.parametrize(
    ("function", "attributes", "message"),
    [
        (broken, {}, r"broken fails in line \d+ of test_custom_operators\.py: TypeError: y has 1 dims, but its func"),
        (lambda tensors: 1 // 0, {}, r"fails in line \d+ of .*: ZeroDivisionError"),
        (strange, {}, "strange gives a list\n  hint: return a te tensor, or a tuple of them"),
        (lambda tensors: (), {}, "gives no result"),
        (foreign, {}, "placeholder 'other' is read but missing from the parameters"),
        (unbound, {}, "q is no dim of its inputs\n  hint: take dims from the tensors' shapes"),
        (leaky_gelu, {"beta": 1.0}, r"unexpected keyword argument 'beta'\n  hint: it takes \(tensors, alpha=0.1\)"),
        (upsample, {"times": "x"}, "upsample fails in line"),
        (one_hot_of_the_best, {}, "missing a required argument: 'depth'"),
        (leaky_gelu, {"alpha": helper.make_tensor("t", 1, [1], [2.0])}, "its attribute 'alpha' is a tensor"),
    ],
)
def test_mistakes_name_the_node(function: Callable[..., Any], attributes: dict[str, Any], message: str) -> None:
    model = model_of([node("Op", ["x"], ["y"], **attributes)], {"x": ("float32", ["n"])})
    with te.register_onnx(DOMAIN, "Op", function), pytest.raises(FrontendError, match=message) as refused:
        load_onnx(model)
    assert "custom: node 'act' (Op): " in refused.value.message


def test_more_results_than_there_are_is_refused() -> None:
    model = model_of([node("LeakyGelu", ["x"], ["y", "z"])], {"x": ("float32", ["n"])}, ["y", "z"])
    refused = pytest.raises(FrontendError, match="wants 2 results, but its function gives 1")
    with te.register_onnx(DOMAIN, "LeakyGelu", leaky_gelu), refused:
        load_onnx(model)


# Installed operators --------------------------------------------------------------------------------------------------

PACKAGE = """
from kedge import te

@te.onnx_operator("my.domain", "LeakyGelu")
def leaky_gelu(tensors, alpha=0.1):
    (x,) = tensors
    return te.compute(x.shape, lambda *i: te.maximum(x[i], x[i] * alpha), name="gelu")
"""


def test_the_command_line_knows_the_operators_of_installed_packages(tmp_path: Path) -> None:
    (tmp_path / "my_operators.py").write_text(PACKAGE)
    info = tmp_path / "my_operators-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-operators\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedge.operators]\nmine = my_operators\n")
    onnx.save(model_of([node("LeakyGelu", ["x"], ["y"])], {"x": ("float32", ["n"])}), tmp_path / "model.onnx")

    def inspect(path: str) -> str:
        command = [sys.executable, "-m", "kedge", "inspect", str(tmp_path / "model.onnx")]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "every operator is supported" in inspect(str(tmp_path))
    assert "every operator is supported" not in inspect("")


def _scale_and_shift(tensors: Sequence[Any]) -> Any:
    x, scale, shift = tensors

    def element(*i: Any) -> Any:
        value = x[i] if scale is None else x[i] * scale[i[-1]]
        return value if shift is None else value + shift[i[-1]]

    return te.compute(x.shape, element, name="scale_and_shift")


@pytest.mark.parametrize(("names", "given"), [(["x", "", "b"], {"b"}), (["x", "a", "b"], {"a", "b"})])
def test_an_input_left_out_before_others_is_none(names: list[str], given: set[str]) -> None:
    data = {name: np.arange(1, 4, dtype=np.float32) for name in sorted(given)}
    model = model_of([node("Scale", names, ["y"])], {"x": ("float32", ("N", 3))}, weights=data)
    x = np.ones((2, 3), np.float32)
    with te.register_onnx(DOMAIN, "Scale", _scale_and_shift):
        module = verify(load_onnx(model))
        assert structural.equal(parser.parse(module.show()).bind(module.params), module)
        want = x * data.get("a", np.float32(1)) + data["b"]
        np.testing.assert_array_equal(interp.run(module, {"x": x})["y"], want)
        np.testing.assert_array_equal(run_lowered(module, {"x": x})["y"], want)


def test_external_code_never_takes_one_input_for_another() -> None:
    given = [np.ones(3, np.float32), np.ones(3, np.float32)]
    with kedge.register_onnx(DOMAIN, "Odd", infer=lambda types: (types[0].shape, "float32"), reference=lambda a: a[0]):
        model = model_of([node("Odd", ["x", "", "b"], ["y"])], {"x": ("float32", (3,))}, weights={"b": given[1]})
        with pytest.raises(FrontendError, match=r"node 'act' \(Odd\).*input 1 is left out before others"):
            load_onnx(model)


def _doubled(tensors: Sequence[Any]) -> Any:
    (x,) = tensors
    return te.compute(x.shape, lambda n, c, h, w: x[n, c, h, w] * 2.0)


def _plus_channel(tensors: Sequence[Any]) -> Any:
    (x,) = tensors
    return te.compute(x.shape, lambda *i: x[i] + te.cast(i[1], "float32"))


def _mixed(tensors: Sequence[Any]) -> Any:
    a, b = tensors
    return te.compute(a.shape, lambda *i: a[i] + b[i] * 2.0)


def _scaled_channels(tensors: Sequence[Any]) -> Any:
    x, by = tensors
    return te.compute(x.shape, lambda n, c, h, w: x[n, c, h, w] * by[c])


@pytest.mark.parametrize("conv", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    ("function", "more"), [(_doubled, []), (_plus_channel, []), (_mixed, ["c"]), (_scaled_channels, ["by"])]
)
def test_behind_a_convolution_it_sees_the_channels_of_the_model(
    tmp_path: Path, conv: str, function: Callable[..., Any], more: list[str]
) -> None:
    rng = np.random.default_rng(5)
    weights = {"w": rng.standard_normal((16, 16, 2, 2)), "by": rng.standard_normal(16)}
    nodes = [
        helper.make_node(conv, ["x", "w"], ["c"], strides=[2, 2]),
        node("Place", ["c", *more], ["y"]),
    ]
    model = model_of(
        nodes, {"x": ("float32", (1, 16, 4, 4))},
        weights={name: weights[name].astype(np.float32) for name in ("w", *({"by"} & {*more}))},
    )  # fmt: skip
    with te.register_onnx(DOMAIN, "Place", function):
        agree(model, {"x": rng.standard_normal((1, 16, 4, 4)).astype(np.float32)}, tmp_path, rtol=1e-4)
