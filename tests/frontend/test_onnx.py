"""Imported models against onnx's reference evaluator: the digits model, windows of all kinds, shape arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from kedge.compiler.frontend.onnx import coverage, load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.ir import Call, Module, Param
from kedge.compiler.graph.verify import verify
from kedge.compiler.tir.expr import Var
from kedge.data import digits_model, digits_report, digits_test

RNG = np.random.default_rng(0)


def parsed(body: str, opset: int = 20) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{body}')


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def compare(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray[Any, Any]], **spec: Any) -> Module:
    """Import, verify, run both, compare every output; gives the module."""
    module = load_onnx(model, **spec)
    verify(module)
    results = interp.run(module, feeds)
    expected = ReferenceEvaluator(model).run(None, dict(feeds))
    for name, want in zip(module.functions["main"].output_names, expected, strict=True):
        want = np.asarray(want)
        assert (results[name].dtype, results[name].shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(results[name], want, rtol=1e-5, atol=1e-5)
    return module


def operators(module: Module) -> list[str]:
    return [value.op for value in module.functions["main"].values() if isinstance(value, Call)]


def test_digits_agrees_with_the_reference_evaluator_and_its_report() -> None:
    images, labels = digits_test()
    module = load_onnx(digits_model())
    verify(module)
    got = interp.run(module, {"image": images})["probabilities"]
    (want,) = ReferenceEvaluator(str(digits_model())).run(None, {"image": images})
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    correct = int((got.argmax(axis=1) == labels).sum())
    report = digits_report()
    assert correct == report["correct"]
    assert report["accuracy"] == correct / len(labels) >= 0.98
    assert len(images) == report["split"]["held_out"]


def test_digits_as_printed(golden: Any) -> None:
    golden("digits.txt", load_onnx(digits_model()).show())


def test_digits_report_lists_its_operators(golden: Any) -> None:
    text = str(coverage(digits_model())).replace(str(digits_model()), "digits.onnx")
    golden("digits_coverage.txt", text)


def test_a_named_dim_is_one_symbol_everywhere_and_can_be_set() -> None:
    model = parsed("g (float[batch, 3] a, float[batch, 3] b, float[?, 3] c) => (float[batch, 3] y, float[k, 3] z) "
                   "{ y = Add (a, b) z = Relu (c) }")  # fmt: skip
    module = load_onnx(model)
    a, b, c = (value.type.shape[0] for value in module.functions["main"].inputs)
    assert isinstance(a, Var) and a is b and a.name == "batch" and a.lower == 1
    assert isinstance(c, Var) and c is not a
    main = load_onnx(model, {"a": (4, 3)}).functions["main"]
    assert [value.type.shape for value in main.inputs[:2]] == [(4, 3), (4, 3)]
    renamed = load_onnx(model, {"a": ("rows", None), "c": ("rows", 3)}).functions["main"]
    rows = [value.type.shape[0] for value in renamed.inputs]
    assert isinstance(rows[0], Var) and rows[0].name == "rows" and rows[1] is rows[0] and rows[2] is rows[0]


def test_names_of_dims_become_identifiers() -> None:
    model = parsed("g (float[A, B] x) => (float[A, B] y) { y = Relu (x) }")
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "batch size/2"
        info.type.tensor_type.shape.dim[1].dim_param = "batch size*2"
    (value,) = load_onnx(model).functions["main"].inputs
    assert [dim.name for dim in value.type.shape if isinstance(dim, Var)] == ["batch_size_2", "batch_size_2_2"]


def test_weights_are_named_parameters_with_data() -> None:
    weight = random(4, 2)
    model = parsed("g (float[N, 4] x) => (float[N, 2] y) { y = MatMul (x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    module = compare(model, {"x": random(3, 4)})
    assert [value.name for value in module.functions["main"].values() if isinstance(value, Param)] == ["w"]
    np.testing.assert_array_equal(module.params["w"], weight)


def test_weights_nobody_reads_are_left_out() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    model.graph.initializer.append(numpy_helper.from_array(random(5), "unused"))
    assert load_onnx(model).params == {}


@pytest.mark.parametrize("batch", [1, 5])
def test_shape_arithmetic_folds_away(batch: int) -> None:
    """x.view(x.size(0), -1) as exporters write it, on a free batch size."""
    model = parsed(
        """
        g (float[N, 3, 4] x) => (float[N, M] y, float[N, 3, 4] z) {
            shape = Shape (x)
            zero = Constant <value = int64 {0}> ()
            n = Gather <axis = 0> (shape, zero)
            axes = Constant <value = int64[1] {0}> ()
            first = Unsqueeze (n, axes)
            rest = Constant <value = int64[1] {-1}> ()
            target = Concat <axis = 0> (first, rest)
            y = Reshape (x, target)
            one = Constant <value = int64[1] {1}> ()
            end = Constant <value = int64[1] {3}> ()
            tail = Slice (shape, one, end)
            again = Concat <axis = 0> (first, tail)
            minus = Constant <value = int64[3] {-1, -1, -1}> ()
            free = Equal (again, minus)
            chosen = Where (free, minus, again)
            z = Reshape (y, chosen)
        }
        """
    )
    module = compare(model, {"x": random(batch, 3, 4)})
    assert operators(module) == ["reshape", "reshape"]
    assert module.functions["main"].outputs[0].type.shape[1] == 12


def test_dims_may_merge_and_split_again() -> None:
    model = parsed(
        """
        g (float[N, 6, 4] x) => (float[N, 6, 2, 2] y) {
            flat = Constant <value = int64[2] {-1, 4}> ()
            rows = Reshape (x, flat)
            four = Constant <value = int64[4] {-1, 6, 2, 2}> ()
            y = Reshape (rows, four)
        }
        """
    )
    module = compare(model, {"x": random(3, 6, 4)})
    (output,) = module.functions["main"].outputs
    assert output.type.shape == (module.functions["main"].inputs[0].type.shape[0], 6, 2, 2)


@pytest.mark.parametrize("rows", ["2", "N"])
def test_a_shape_may_be_an_output(rows: str) -> None:
    text = "g (float[N, 3] x) => (int64[2] y, int64 z) { y = Shape (x) z = Size (x) }"
    compare(parsed(text.replace("N", rows)), {"x": random(2, 3)})


def test_outputs_that_are_inputs_weights_or_the_same_value() -> None:
    model = parsed(
        "g (float[2] x) => (float[2] a, float[2] b, float[2] c) { a = Identity (x) b = Relu (x) c = Identity (b) }"
    )
    module = compare(model, {"x": random(2)})
    outputs = module.functions["main"].outputs
    assert all(isinstance(value, Call) for value in outputs)
    assert len({id(value) for value in outputs}) == 3


def test_a_known_condition_picks_its_branch() -> None:
    model = parsed(
        """
        g (float[N] x) => (float[N] y) {
            yes = Constant <value = bool {1}> ()
            y = If (yes) <
                then_branch = a () => (float[N] p) { p = Relu (x) },
                else_branch = b () => (float[N] q) { q = Neg (x) }
            >
        }
        """
    )
    assert operators(compare(model, {"x": random(4)})) == ["relu"]


def test_functions_of_the_model_are_inlined() -> None:
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 20, "local" : 1]>
        g (float[N] x) => (float[N] y) { h = local.twice (x) y = local.twice (h) }
        <domain: "local", opset_import: ["" : 20]>
        twice (a) => (b) { b = Add (a, a) }
        """
    )
    assert operators(compare(model, {"x": random(4)})) == ["add", "add"]


@pytest.mark.parametrize("body", [
    "y = LayerNormalization <axis = -1> (x, w)",
    "y = Mish (x)",
    "y = Softsign (x)",
    "y = Celu <alpha = 2.0> (x)",
    "y = GroupNormalization <num_groups = 2> (x, w, w)",
])  # fmt: skip
def test_operators_that_onnx_defines_by_others(body: str) -> None:
    opset = 21 if "Group" in body else 22
    model = parsed(f"g (float[2, 4, 4] x, float[4] w) => (float[2, 4, 4] y) {{ {body} }}", opset)
    used = {"x": random(2, 4, 4), "w": random(4)}
    if "w" not in body.partition("(")[2]:
        del model.graph.input[1], used["w"]
    compare(model, used)
    assert coverage(model).supported


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_older_opsets_are_brought_up_to_date(opset: int) -> None:
    model = parsed("g (float[N, 3, 8, 8] x) => (float[N, 3] y) "
                   "{ p = GlobalAveragePool (x) f = Flatten (p) y = Softmax <axis = 1> (f) }", opset)  # fmt: skip
    compare(model, {"x": random(2, 3, 8, 8)})


def test_gathering_counts_from_the_end() -> None:
    model = parsed(
        """
        g (float[N, 4] x, int64[2] i) => (float[N, 2] y, float[4] z) {
            y = Gather <axis = 1> (x, i)
            last = Constant <value = int64 {-1}> ()
            z = Gather (x, last)
        }
        """
    )
    compare(model, {"x": random(3, 4), "i": np.array([-1, 0])})


def images(model_shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, model_shape)


def one_operator(
    op: str, x: np.ndarray[Any, Any], weights: Sequence[np.ndarray[Any, Any]], attributes: Mapping[str, Any], opset: int
) -> onnx.ModelProto:
    names = [f"w{index}" for index in range(len(weights))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], **attributes)],
        "g",
        [images(["N", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, name) for weight, name in zip(weights, names, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Kernel, strides, dilations and padding of 1 or 2 spatial dims, and the size of the picture."""
    rank = draw(st.integers(1, 2))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]  # noqa: E731
    kernel, dilations = each(1, 3), each(1, 2)
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto != "NOTSET":
        dilations = [1] * rank  # the reference evaluator works out auto_pad for undilated kernels only
    attributes: dict[str, Any] = {"strides": each(1, 3), "dilations": dilations, "auto_pad": auto}
    if auto == "NOTSET":
        # Padding is narrower than the window: a window of nothing but padding has no defined result.
        attributes["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    return {"kernel": kernel, "size": each(5, 8), "attributes": attributes}


@settings(max_examples=60, deadline=None)
@given(windows(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_convolutions(window: dict[str, Any], batch: int, groups: int, per_group: int, biased: bool) -> None:
    channels, outputs = 2 * groups, groups * per_group
    weights = [random(outputs, 2, *window["kernel"])] + ([random(outputs)] if biased else [])
    x = random(batch, channels, *window["size"])
    compare(one_operator("Conv", x, weights, {"group": groups, **window["attributes"]}, 20), {"x": x})


def pool(x: np.ndarray[Any, Any], window: dict[str, Any], ceil_mode: bool, mean: bool, padded: bool) -> Any:
    """Pooling as the operator's text says, one element at a time.

    The reference evaluator is no oracle here: it drops windows where padding is not symmetric, and fails with SAME_*
    and one spatial dim.
    """
    kernel, size = window["kernel"], window["size"]
    strides, dilations = window["attributes"]["strides"], window["attributes"]["dilations"]
    auto, rank = window["attributes"]["auto_pad"], len(kernel)
    pads = window["attributes"].get("pads", [0] * (2 * rank))
    if auto.startswith("SAME"):
        total = [max((-(-s // t) - 1) * t + k - s, 0) for s, t, k in zip(size, strides, kernel, strict=True)]
        small, large = [n // 2 for n in total], [n - n // 2 for n in total]
        pads = small + large if auto == "SAME_UPPER" else large + small
    counts = []
    for axis in range(rank):
        room = size[axis] + pads[axis] + pads[axis + rank] - (kernel[axis] - 1) * dilations[axis] - 1
        count = (-(-room // strides[axis]) if ceil_mode else room // strides[axis]) + 1
        # A window has to start inside of the picture or its left padding.
        counts.append(count - ((count - 1) * strides[axis] >= size[axis] + pads[axis]))
    result = np.empty((*x.shape[:2], *counts), np.float32)
    for position in np.ndindex(*result.shape):
        inside, around = [], 0
        for offset in np.ndindex(*kernel):
            at = [
                p * s - q + o * d for p, s, q, o, d in zip(position[2:], strides, pads, offset, dilations, strict=False)
            ]
            if all(0 <= i < n for i, n in zip(at, size, strict=True)):
                inside.append(x[(*position[:2], *at)])
            around += all(-pads[i] <= at[i] < size[i] + pads[i + rank] for i in range(rank))
        result[position] = sum(inside) / (around if padded else len(inside)) if mean else max(inside)
    return result


def compare_pool(op: str, window: dict[str, Any], ceil_mode: bool, padded: bool = False) -> None:
    ceil_mode = ceil_mode and window["attributes"]["auto_pad"] == "NOTSET"
    attributes = {"kernel_shape": window["kernel"], "ceil_mode": int(ceil_mode), **window["attributes"]}
    if op == "AveragePool":
        attributes["count_include_pad"] = int(padded)
    x = random(2, 2, *window["size"])
    module = load_onnx(one_operator(op, x, [], attributes, 20), {"x": x.shape})
    verify(module)
    want = pool(x, window, ceil_mode, op == "AveragePool", padded)
    got = interp.run(module, {"x": x})["y"]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(windows(), st.booleans())
def test_max_pooling(window: dict[str, Any], ceil_mode: bool) -> None:
    compare_pool("MaxPool", window, ceil_mode)


@settings(max_examples=60, deadline=None)
@given(windows(), st.booleans(), st.booleans())
def test_average_pooling(window: dict[str, Any], ceil_mode: bool, count_include_pad: bool) -> None:
    compare_pool("AveragePool", window, ceil_mode, count_include_pad)
