"""Resizing against ONNX Runtime: every coordinate mode, rounding and interpolation, at known and at free sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.errors import FrontendError, ShapeError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.dims import format_type
from kedge.compiler.graph.ir import Call, Fused, Module, TensorType
from kedge.compiler.graph.passes import Legalize, default_passes, run_passes
from kedge.compiler.ops.sampling import COORDINATES, ROUNDINGS
from kedge.compiler.tir.expr import Var
from support.graphs import check_op, compare
from support.onnx_models import check_compiled, one_operator, onnxruntime_outputs

RNG = np.random.default_rng(0)
Feeds = dict[str, np.ndarray[Any, Any]]


def random(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def resize(
    x: np.ndarray[Any, Any], *, scales: list[float] | None = None, sizes: list[int] | None = None,
    free: dict[int, list[int]] | None = None, opset: int = 19, **attributes: Any,
) -> tuple[onnx.ModelProto, Feeds]:  # fmt: skip
    given: list[np.ndarray[Any, Any] | None] = [x, None]
    given.append(None if scales is None else np.array(scales, np.float32))
    given += [] if sizes is None else [np.array(sizes, np.int64)]
    constant = [2] if sizes is None else [3]
    names = {"coordinates": "coordinate_transformation_mode", "rounding": "nearest_mode", "cubic_a": "cubic_coeff_a"}
    attributes = {names.get(name, name): value for name, value in attributes.items()}
    return one_operator(
        "Resize", given, constant=constant, free=free, opset=opset, outputs=[str(x.dtype)], **attributes
    )


def agree(model: onnx.ModelProto, feeds: Feeds) -> None:
    """As imported and as optimized the model means what ONNX Runtime computes."""
    want = onnxruntime_outputs(model, feeds)
    module = load_onnx(model)
    for meant in (module, run_passes(module, default_passes())):
        compare(interp.run(meant, feeds), want, rtol=1e-4, atol=1e-5)


SCALES = st.sampled_from([0.3, 0.5, 0.6, 0.75, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_it_is_onnx_runtimes(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    # Of half_pixel_symmetric no scale is free of it.
    modes = [name for name in COORDINATES if (mode, name) != ("nearest", "half_pixel_symmetric")]
    coordinates = data.draw(st.sampled_from(modes))
    attributes: dict[str, Any] = {"mode": mode, "coordinates": coordinates}
    if mode == "nearest":
        attributes["rounding"] = data.draw(st.sampled_from(ROUNDINGS))
    if mode == "cubic":
        attributes["cubic_a"] = data.draw(st.sampled_from([-0.75, -0.5]))
        attributes["exclude_outside"] = int(data.draw(st.booleans()))
    shape = [data.draw(st.integers(4, 9)) for _ in range(2)]
    x = random(1, 2, *shape)
    # What is half-way in theory falls on either side by the last digit; powers of two have no such digit.
    scales = st.sampled_from([0.5, 1.0, 2.0, 4.0]) if mode == "nearest" else SCALES
    if mode == "nearest" or data.draw(st.booleans()):
        factors = [data.draw(scales.filter(lambda scale, size=size: scale * size >= 1)) for size in shape]
        model, feeds = resize(x, scales=[1, 1, *factors], **attributes)
    else:
        sizes = [data.draw(st.integers(1, 20)) for _ in range(2)]
        model, feeds = resize(x, sizes=[1, 2, *sizes], **attributes)
    agree(model, feeds)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_other_numbers_of_spatial_axes(shape: tuple[int, ...], mode: str) -> None:
    agree(*resize(random(*shape), scales=[1, 1, *[2.0] * (len(shape) - 2)], mode=mode))


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_keeping_the_aspect(policy: str) -> None:
    x = random(1, 1, 4, 6)
    agree(*resize(x, sizes=[7, 8], axes=[2, 3], mode="linear", keep_aspect_ratio_policy=policy))


def test_axes_in_any_order() -> None:
    model, feeds = resize(random(1, 2, 3, 5), scales=[2, 0.5], axes=[3, 1], mode="nearest")
    assert interp.run(load_onnx(model), feeds)["y0"].shape == (1, 1, 3, 10)
    agree(*resize(random(1, 2, 3, 5), sizes=[6, 9], axes=[-2, -1], mode="nearest"))


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integers(dtype: str) -> None:
    x = RNG.integers(0, 200, (1, 2, 4, 5)).astype(dtype)
    agree(*resize(x, scales=[1, 1, 2, 2], mode="nearest"))
    agree(*resize(x, scales=[1, 1, 2, 2], mode="linear"))


def test_upsample_of_older_opsets() -> None:
    x = random(1, 2, 3, 4)
    scales = np.array([1, 1, 2, 3], np.float32)
    model, feeds = one_operator("Upsample", [x, scales], constant=[1], opset=9, mode="nearest")
    got = interp.run(load_onnx(model), feeds)["y0"]
    np.testing.assert_array_equal(got, x.repeat(2, 2).repeat(3, 3))


MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "nearest", "coordinates": "asymmetric", "rounding": "floor"},
    {"mode": "nearest", "coordinates": "tf_half_pixel_for_nn", "rounding": "ceil"},
    {"mode": "linear"},
    {"mode": "linear", "coordinates": "align_corners"},
    {"mode": "linear", "coordinates": "half_pixel_symmetric"},
    {"mode": "cubic", "coordinates": "pytorch_half_pixel"},
    {"mode": "cubic", "coordinates": "asymmetric", "exclude_outside": 1},
]


@pytest.mark.parametrize("attributes", MODES, ids=lambda given: "-".join(map(str, given.values())))
def test_machine_code(attributes: dict[str, Any]) -> None:
    """Sizes that are known, free ones, and those that a smaller result has."""
    x = random(2, 3, 6, 17)
    check_compiled(*resize(x, scales=[1, 1, 2, 1.5], **attributes))
    check_compiled(*resize(x, sizes=[2, 3, 4, 9], **attributes))
    model, feeds = resize(x, scales=[1, 1, 2, 1.5], free={0: [0, 2, 3]}, **attributes)
    check_compiled(model, feeds, {"x0": random(1, 3, 5, 4)}, {"x0": random(3, 3, 7, 33)})


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_free_sizes_become_known_ones(mode: str) -> None:
    model, feeds = resize(random(1, 2, 5, 6), sizes=[7, 9], axes=[2, 3], free={0: [2, 3]}, mode=mode)
    check_compiled(model, feeds, {"x0": random(1, 2, 9, 4)})


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats(mode: str, dtype: str) -> None:
    x = random(1, 2, 3, 4).astype(dtype)
    check_op("resize", x, sizes=[1, 2, 6, 5], mode=mode)
    check_op("resize", x, sizes=[1, 2, 6, 5], mode=mode, free={0: [3]})


def test_a_result_without_elements() -> None:
    (got,) = check_op("resize", random(1, 2, 3, 4), sizes=[1, 2, 0, 8], mode="linear")
    assert got.shape == (1, 2, 0, 8)


def steps(module: Module) -> list[tuple[str, Any]]:
    return [
        (value.op, value.attrs.get("axis")) for value in module.functions["main"].values() if isinstance(value, Call)
    ]


@pytest.mark.parametrize(("sizes", "axes"), [((8, 8), [3, 2]), ((2, 2), [2, 3]), ((8, 2), [3, 2]), ((4, 8), [3])])
def test_each_axis_is_a_pass_over_as_little_as_can_be(sizes: tuple[int, int], axes: list[int]) -> None:
    b = Builder("main")
    x = b.input("x", TensorType((1, 2, 4, 4), "float32"))
    module = Module({"main": b.finish({"y": b.call("resize", x, sizes=(1, 2, *sizes), mode="linear")})})
    assert steps(Legalize()(module)) == [("resample", axis) for axis in axes]


def test_what_is_dear_is_not_computed_again_for_each_reading() -> None:
    b = Builder("main")
    x = b.input("x", TensorType((1, 2, 4, 4), "float32"))
    up = b.call("resize", b.call("sigmoid", x), sizes=(1, 2, 4, 8), mode="nearest")
    module = Module({"main": b.finish({"y": b.call("relu", up)})})
    after = run_passes(module, default_passes()).functions["main"]
    assert [value.op for value in after.values() if isinstance(value, Call)] == ["sigmoid"]
    (group,) = (value for value in after.values() if isinstance(value, Fused))
    assert [value.op for value in group.body.values() if isinstance(value, Call)] == ["resample", "relu"]


def test_symbolic_shapes_come_out_simple() -> None:
    model, _ = resize(random(1, 3, 8, 8), scales=[1, 1, 2, 0.5], free={0: [0, 2, 3]})
    (output,) = load_onnx(model).functions["main"].outputs
    assert format_type(output.type) == "float32[x0_0, 3, x0_2 * 2, x0_3 // 2]"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": [1, 1, 2, 2], "antialias": 1, "mode": "linear"}, "antialias is not supported"),
        ({"scales": [1, 1, 2, 2], "coordinates": "tf_crop_and_resize"}, "'tf_crop_and_resize' is not supported"),
        ({"scales": [1, 1, 2, 0.7], "free": {0: [3]}}, r"the free dim x0_3 is scaled by 0\.7"),
        ({"scales": [2, 2]}, "scales has 2 entries for 4 axes"),
        ({"scales": [1, 1, 2, -1]}, r"the scale -1 of axis 3 is not positive"),
        ({"scales": [2], "axes": [7]}, r"axes \[7\] are outside of rank 4"),
        (
            {"sizes": [7, 9], "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger", "free": {0: [3]}},
            "depends on a free or empty dim",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    model, _ = resize(random(1, 2, 4, 4), **options)
    with pytest.raises(FrontendError, match=rf"node 'node' \(Resize\).*{words}"):
        load_onnx(model)


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"sizes": [4]}, "1 entries for an input of rank 2"),
        ({"sizes": [3, 8], "mode": "quintic"}, "'quintic' is none of nearest, linear, cubic"),
        ({"sizes": [3, 8], "scales": [1.0, 0.0]}, "must be positive"),
        ({"sizes": [3, -8]}, "the size -8 is negative"),
    ],
)
def test_the_operator_refuses(attrs: dict[str, Any], reason: str) -> None:
    b = Builder("f")
    with pytest.raises(ShapeError, match=reason):
        b.call("resize", b.input("x", TensorType((3, 4), "float32")), **attrs)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ([("int64", (5,))], r"must have shape \(size, taps\)"),
        ([("float32", (5, 1))], "not int32 or int64"),
        ([("int64", (5, 2))], "2 taps want weights"),
        ([("int64", (5, 2)), ("float32", (5, 3))], "the shape of the indices"),
    ],
)
def test_resampling_refuses(types: list[tuple[str, tuple[int, ...]]], reason: str) -> None:
    b = Builder("f")
    x = b.input("x", TensorType((Var("n", lower=1), 4), "float32"))
    tables = [b.input(f"t{index}", TensorType(shape, dtype)) for index, (dtype, shape) in enumerate(types)]
    with pytest.raises(ShapeError, match=reason):
        b.call("resample", x, *tables, axis=1)


def test_resampling_stays_inside_whatever_the_indices_are() -> None:
    x = np.arange(3, dtype=np.float32)
    (got,) = check_op("resample", x, np.array([[99], [-99], [1]]), axis=0)
    np.testing.assert_array_equal(got, [2, 0, 1])
