"""argmax and argmin: the graph operators, and ONNX's ArgMax and ArgMin, against numpy and ONNX's own evaluator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

import kedge
from kedge.compiler.cache import KernelCache
from kedge.compiler.errors import ShapeError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.lower.lower import lower
from support.emulated import emulated, run_program
from support.graphs import check_op, module_of

NAN, INF = math.nan, math.inf
VALUES = {
    "float32": [0.0, -0.0, 1.0, -2.5, NAN, INF, -INF],
    "float64": [0.0, 1.0, NAN, INF, -INF],
    "float16": [0.0, 1.0, 65504.0, NAN, -INF],
    "int8": [-128, 0, 1, 127],
    "int64": [-(1 << 63), 0, (1 << 63) - 1],
    "uint8": [0, 1, 255],
}


def model_of(op: str, dtype: str, shape: list[int | str], **attrs: int) -> onnx.ModelProto:
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", elem, shape)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], **attrs)], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def draw_array(data: st.DataObject) -> np.ndarray[Any, Any]:
    dtype = data.draw(st.sampled_from(sorted(VALUES)))
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    size = math.prod(shape)
    items = data.draw(st.lists(st.sampled_from(VALUES[dtype]), min_size=size, max_size=size))
    return np.array(items, dtype).reshape(shape)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_operators_are_numpys(data: st.DataObject) -> None:
    x = draw_array(data)
    axis, keepdims = data.draw(st.integers(-x.ndim, x.ndim - 1)), data.draw(st.booleans())
    last = data.draw(st.booleans())
    free = {0: [at for at in range(x.ndim) if data.draw(st.booleans())]}
    for op, function in (("argmax", np.argmax), ("argmin", np.argmin)):
        (got,) = check_op(op, x, free=free, axis=axis, keepdims=keepdims, select_last=last)
        seen = np.flip(x, axis) if last else x
        expected = function(seen, axis=axis, keepdims=keepdims)
        np.testing.assert_array_equal(got, x.shape[axis] - 1 - expected if last else expected)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_compiled_models_agree_with_onnx(data: st.DataObject) -> None:
    x = draw_array(data)
    op = data.draw(st.sampled_from(["ArgMax", "ArgMin"]))
    attrs = {"axis": data.draw(st.integers(-x.ndim, x.ndim - 1))} if data.draw(st.booleans()) else {}
    for name in ("keepdims", "select_last_index"):
        if data.draw(st.booleans()):
            attrs[name] = data.draw(st.integers(0, 1))
    model = model_of(op, str(x.dtype), [f"d{at}" if data.draw(st.booleans()) else n for at, n in enumerate(x.shape)])
    model.graph.node[0].attribute.extend(helper.make_attribute(name, value) for name, value in attrs.items())
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    with kedge.compile(load_onnx(model)).open(threads=1) as m:
        got = m.run({"x": x})["y"]
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_long_axes_in_every_place(axis: int) -> None:
    shape = [3, 5, 7]
    shape[axis] = 1000
    x = np.random.default_rng(0).integers(0, 50, shape).astype("float32")
    model = model_of("ArgMax", "float32", ["a", "b", "c"], axis=axis, keepdims=0)
    with kedge.compile(load_onnx(model)).open(threads=2) as m:
        np.testing.assert_array_equal(m.run({"x": x})["y"], x.argmax(axis=axis))


@pytest.mark.parametrize("board", ["raspberry-pi/4b", "beaglebone/black"])
def test_arm_finds_the_same(board: str, tmp_path: Path) -> None:
    """Even where vectors take the smallest numbers for 0."""
    x = np.random.default_rng(0).integers(0, 9, (40, 67)).astype("float32")
    x[1], x[2, 5:9], x[3, 7], x[4] = -INF, NAN, INF, 0
    x[4, 30:32] = 1e-40
    target = emulated(board)
    for op in ("argmax", "argmin"):
        for axis in (0, 1):
            program = lower(module_of(op, [x.shape], ["float32"], axis=axis), target)
            (got,) = run_program(program, target, [x], tmp_path, KernelCache(tmp_path / "kernels"))
            expected = getattr(np, op)(x, axis=axis)
            if axis == 1:
                assert got[4] in ((30, 0) if op == "argmax" else (0,))  # is 1e-40 more than 0?
                got, expected = np.delete(got, 4), np.delete(expected, 4)
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", ["argmax", "argmin"])
def test_an_axis_without_elements_is_refused(op: str) -> None:
    with pytest.raises(ShapeError, match=f"{op} over an axis without elements has no result"):
        module_of(op, [(2, 0)], ["float32"], axis=1)
    assert module_of(op, [(0, 2)], ["float32"], axis=1).functions["main"].outputs[0].type.shape == (0,)
