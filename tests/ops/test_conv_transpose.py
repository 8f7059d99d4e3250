"""Transposed convolution: its meaning against ONNX Runtime, and the convolution that it becomes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import FrontendError, ShapeError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.dims import format_type
from kedge.compiler.graph.ir import Call, Fused, Module, TensorType
from kedge.compiler.graph.passes import FoldConstants, Legalize, default_passes, run_passes
from kedge.compiler.tir.expr import Var
from support.graphs import check_op, compare, module_of
from support.onnx_models import check_compiled, one_operator, onnxruntime_outputs

RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def draw(data: st.DataObject, low: int, high: int, count: int) -> list[int]:
    return [data.draw(st.integers(low, high)) for _ in range(count)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_it_is_onnx_runtimes(data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from([1, 2, 2, 3]))
    groups, per_group = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(st.integers(1, 2))
    kernel, strides, dilations = draw(data, 1, 4, rank), draw(data, 1, 3, rank), draw(data, 1, 2, rank)
    pads, spatial = draw(data, 0, 3, 2 * rank), draw(data, 1, 4, rank)
    added = [data.draw(st.integers(0, stride - 1)) for stride in strides]  # ONNX Runtime takes no more
    for axis in range(rank):
        whole = (spatial[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1 + added[axis]
        while whole - pads[axis] - pads[axis + rank] < 1:
            spatial[axis], whole = spatial[axis] + 1, whole + strides[axis]
    arrays = [random(2, 2 * groups, *spatial), random(2 * groups, per_group, *kernel)]
    if data.draw(st.booleans()):
        arrays.append(random(groups * per_group))
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "output_padding": added}
    free = {0: [0, *range(2, 2 + rank)]} if data.draw(st.booleans()) else None
    constant = [1, 2][: len(arrays) - 1] if data.draw(st.booleans()) else []
    model, feeds = one_operator("ConvTranspose", arrays, constant=constant, free=free, group=groups, **attrs)
    module = load_onnx(model)
    want = onnxruntime_outputs(model, feeds)
    for meant in (module, run_passes(module, default_passes())):
        compare(interp.run(meant, feeds), want, rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_shapes_asked_for(data: st.DataObject) -> None:
    """output_shape and auto_pad, whose padding is worked out."""
    kernel, strides, spatial = draw(data, 1, 4, 2), draw(data, 1, 3, 2), draw(data, 1, 5, 2)
    auto = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto.startswith("SAME"):
        # A kernel smaller than the stride does not reach size * stride, which ONNX asks for: ONNX Runtime gives less.
        kernel = [max(size, stride) for size, stride in zip(kernel, strides, strict=True)]
    attrs: dict[str, Any] = {"strides": strides, "auto_pad": auto}
    if auto == "NOTSET" or data.draw(st.booleans()):
        # ONNX Runtime takes no shape that another input would give, too.
        most = [(size - 1) * stride + k + stride - 1 for size, stride, k in zip(spatial, strides, kernel, strict=True)]
        attrs["output_shape"] = [data.draw(st.integers(1, size)) for size in most]
    model, feeds = one_operator("ConvTranspose", [random(1, 2, *spatial), random(2, 3, *kernel)], constant=[1], **attrs)
    got = interp.run(load_onnx(model), feeds)
    np.testing.assert_allclose(got["y0"], onnxruntime_outputs(model, feeds)["y0"], rtol=1e-4, atol=1e-5, strict=True)


def test_the_same_size_beyond_the_reach_of_the_kernel() -> None:
    model, feeds = one_operator("ConvTranspose", [random(1, 2, 3), random(2, 3, 1)], strides=[3], auto_pad="SAME_LOWER")
    got = interp.run(load_onnx(model), feeds)["y0"]
    assert got.shape == (1, 3, 9)
    np.testing.assert_array_equal(got[..., 7:], 0)


CASES: tuple[dict[str, Any], ...] = (
    {"strides": [2, 2]},
    {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    {"strides": [2, 3], "pads": [0, 2, 1, 1], "dilations": [1, 1]},
    {"dilations": [2, 2], "pads": [1, 0, 1, 3]},
    {"strides": [2, 2], "dilations": [2, 3], "pads": [1, 1, 0, 1]},
)


@pytest.mark.parametrize("strides", [[1, 2], [2, 3]])
def test_any_output_padding(strides: list[int]) -> None:
    x, w = random(1, 2, 3, 3), random(2, 2, 3, 3)
    (got,) = check_op("conv_transpose", x, w, strides=strides, output_padding=[5, 4], free={0: [2]})
    (plain,) = check_op("conv_transpose", x, w, strides=strides)
    np.testing.assert_array_equal(got, np.pad(plain, [(0, 0), (0, 0), (0, 5), (0, 4)]))


@pytest.mark.parametrize("free", [None, {0: [0, 2, 3]}], ids=["known", "free"])
@pytest.mark.parametrize("attrs", CASES, ids=str)
def test_lowered_it_means_the_same(attrs: dict[str, Any], free: dict[int, list[int]] | None) -> None:
    arrays = [random(2, 4, 3, 4), random(4, 2, 3, 3), random(4)]
    check_op("conv_transpose", *arrays, free=free, groups=2, rtol=1e-4, atol=1e-5, **attrs)


@pytest.mark.parametrize("constant", [[1, 2], []], ids=["weights", "inputs"])
@pytest.mark.parametrize("attrs", CASES, ids=str)
def test_machine_code_on_images_of_any_size(attrs: dict[str, Any], constant: list[int]) -> None:
    weights = [random(6, 2, 3, 3), random(4)]
    model, feeds = one_operator(
        "ConvTranspose", [random(1, 6, 5, 7), *weights], constant=constant, free={0: [0, 2, 3]}, group=2, **attrs
    )
    check_compiled(model, feeds, {**feeds, "x0": random(3, 6, 4, 17)})


@pytest.mark.parametrize(("kernel", "spatial"), [([3], [9]), ([2, 2, 2], [3, 4, 5])])
def test_machine_code_with_other_ranks(kernel: list[int], spatial: list[int]) -> None:
    strides = [2] * len(kernel)
    arrays = [random(2, 3, *spatial), random(3, 4, *kernel), random(4)]
    check_compiled(*one_operator("ConvTranspose", arrays, constant=[1, 2], strides=strides))


def operators(module: Module) -> list[str]:
    return [value.op for value in module.functions["main"].values() if isinstance(value, Call)]


def test_a_kernel_as_large_as_the_stride_is_a_1x1_convolution() -> None:
    module = module_of("conv_transpose", [(1, 8, 5, 5), (8, 4, 2, 2)], ["float32"] * 2, strides=[2, 2])
    (conv,) = (value for value in Legalize()(module).functions["main"].values()
               if isinstance(value, Call) and value.op == "conv")  # fmt: skip
    assert conv.inputs[1].type.shape == (16, 8, 1, 1)
    assert conv.type.shape == (1, 16, 5, 5)


@pytest.mark.parametrize(
    ("kernel", "pads", "extra", "taps", "size", "sliced"),
    [
        (3, 1, 1, 2, 5, False),  # twice the size: the phases start at the first output
        (4, 1, 0, 2, 6, True),  # 2 taps a phase, not 3, for the price of a slice
        (2, 0, 1, 1, 6, True),
        (1, 0, 0, 1, 5, True),
    ],
)
def test_phases_have_as_few_taps_as_they_can(
    kernel: int, pads: int, extra: int, taps: int, size: int, sliced: bool
) -> None:
    module = module_of(
        "conv_transpose", [(1, 8, 5), (8, 4, kernel)], ["float32"] * 2, strides=[2], pads=[pads, pads],
        output_padding=[extra],
    )  # fmt: skip
    calls = [value for value in Legalize()(module).functions["main"].values() if isinstance(value, Call)]
    (conv,) = (value for value in calls if value.op == "conv")
    assert conv.inputs[1].type.shape == (8, 8, taps)
    assert conv.type.shape == (1, 8, size)
    assert (calls[-1].op == "slice") == sliced


def test_weights_are_rearranged_while_compiling() -> None:
    b = Builder("main")
    x, w = b.input("x", TensorType((Var("n", lower=1), 256, 4, 4), "float32")), random(256, 256, 3, 3)
    shift = random(256)
    params = [b.param("w", TensorType(w.shape, "float32")), b.param("b", TensorType(shift.shape, "float32"))]
    up = b.call("conv_transpose", x, *params, strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])
    module = Module({"main": b.finish({"y": up})}).bind({"w": w, "b": shift})
    after = FoldConstants()(Legalize()(module))
    assert operators(after) == ["conv", "depth_to_space"]
    assert sorted(data.shape for data in after.params.values()) == [(1024,), (1024, 256, 2, 2)]
    image = random(2, 256, 4, 4)
    compare(interp.run(after, {"x": image}), interp.run(module, {"x": image}), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_an_activation_behind_it_joins_the_convolution(shared: bool) -> None:
    b = Builder("main")
    x, w = b.input("x", TensorType((1, 4, 3, 3), "float32")), random(4, 2, 4, 4)
    up = b.call("conv_transpose", x, b.param("w", TensorType(w.shape, "float32")), strides=[2, 2], pads=[1] * 4)
    outputs = {"y": b.call("leaky_relu", up, alpha=0.2)} | ({"z": b.call("neg", up)} if shared else {})
    module = Module({"main": b.finish(outputs)}).bind({"w": w})
    after = FoldConstants()(Legalize()(module))
    order = operators(after)
    assert (order.index("leaky_relu") == order.index("conv") + 1) != shared
    image = {"x": random(1, 4, 3, 3)}
    compare(interp.run(after, image), interp.run(module, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_behind_it_goes_into_its_weights(groups: int) -> None:
    b = Builder("main")
    x = b.input("x", TensorType((2, 4, 3, 3), "float32"))
    data = {"w": random(4, 6 // groups, 2, 2), "scale": random(6), "bias": random(6), "mean": random(6)}
    data["var"] = RNG.uniform(0.5, 1.5, 6).astype(np.float32)
    params = {name: b.param(name, TensorType(array.shape, "float32")) for name, array in data.items()}
    up = b.call("conv_transpose", x, params["w"], strides=[2, 2], groups=groups)
    norm = b.call("batch_norm", up, *(params[name] for name in ("scale", "bias", "mean", "var")))
    module = Module({"main": b.finish({"y": norm})}).bind(data)
    after = run_passes(module, default_passes())
    used = [value.op for value in after.functions["main"].values() if isinstance(value, Call)]
    used += [inner.op for group in after.functions["main"].values() if isinstance(group, Fused)
             for inner in group.body.values() if isinstance(inner, Call)]  # fmt: skip
    assert {"mul", "add", "batch_norm"}.isdisjoint(used)
    image = {"x": random(2, 4, 3, 3)}
    compare(interp.run(after, image), interp.run(module, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
@pytest.mark.parametrize("attrs", [{"strides": [2, 2]}, {"strides": [2, 2], "dilations": [2, 2]}], ids=str)
def test_other_dtypes(dtype: str, attrs: dict[str, Any]) -> None:
    arrays = [RNG.integers(-4, 5, shape).astype(dtype) for shape in ((1, 2, 3, 3), (2, 3, 3, 3), (3,))]
    check_op("conv_transpose", *arrays, **attrs)


@pytest.mark.parametrize("spatial", [(0, 3), (3, 0)])
def test_an_input_without_elements_leaves_the_bias(spatial: tuple[int, int]) -> None:
    arrays = [random(1, 2, *spatial), random(2, 3, 5, 5), random(3)]
    (got,) = check_op("conv_transpose", *arrays, strides=[2, 2])
    np.testing.assert_array_equal(got, np.broadcast_to(arrays[2].reshape(1, 3, 1, 1), got.shape))


def test_symbolic_shapes_come_out_simple() -> None:
    b = Builder("f")
    x = b.input("x", TensorType((Var("n", lower=1), 3, Var("h", lower=1), 8), "float32"))
    w = b.param("w", TensorType((3, 8, 2, 2), "float32"))
    assert format_type(b.call("conv_transpose", x, w, strides=[2, 2]).type) == "float32[n, 8, h * 2, 16]"


@pytest.mark.parametrize(
    ("weight", "attrs", "reason"),
    [
        ((4, 8, 3, 3), {}, "want 4 input channels, not 3"),
        ((3, 8, 3, 3), {"groups": 2}, "2 to divide"),
        ((3, 8, 3), {}, "the weight has rank 3, the input 4"),
        ((3, 8, 3, 3), {"pads": [9, 9, 0, 0]}, "cut off more than the result"),
        ((3, 8, 3, 3), {"output_padding": [1]}, "must be 2 numbers"),
        ((3, 8, 3, 3), {"output_padding": [-1, 0]}, "not negative"),
        ((3, 8, 3, 3), {"strides": [0, 1]}, "must be 2 positive numbers"),
    ],
)
def test_what_is_refused(weight: tuple[int, ...], attrs: dict[str, Any], reason: str) -> None:
    b = Builder("f")
    x, w = b.input("x", TensorType((1, 3, 6, 6), "float32")), b.param("w", TensorType(weight, "float32"))
    with pytest.raises(ShapeError, match=reason):
        b.call("conv_transpose", x, w, **attrs)


def test_a_shape_asked_for_needs_known_sizes() -> None:
    arrays = [random(1, 2, 4, 4), random(2, 3, 2, 2)]
    model, _ = one_operator("ConvTranspose", arrays, constant=[1], free={0: [2]}, strides=[2, 2], output_shape=[8, 8])
    with pytest.raises(FrontendError, match=r"node 'node' \(ConvTranspose\): output_shape \[8, 8\].*free.*x0_2"):
        load_onnx(model)
