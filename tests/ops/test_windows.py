"""Convolution and pooling against ONNX's reference evaluator, over the shapes that hypothesis finds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.builder import Builder
from kedge.compiler.graph.dims import format_type
from kedge.compiler.graph.ir import TensorType
from kedge.compiler.tir.expr import Var
from support.graphs import check_op


def onnx_op(op: str, arrays: list[np.ndarray[Any, Any]], **attrs: Any) -> np.ndarray[Any, Any]:
    names = [f"x{i}" for i in range(len(arrays))]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **attrs)], "g", infos, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    return ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))[0]


def _draw(data, low: int, high: int, count: int) -> list[int]:
    return [data.draw(st.integers(low, high)) for _ in range(count)]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_conv_is_onnx(data):
    rank = data.draw(st.sampled_from([1, 2, 2]))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    per_group, filters = data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 2))
    kernel, strides, dilations = _draw(data, 1, 3, rank), _draw(data, 1, 3, rank), _draw(data, 1, 2, rank)
    pads = _draw(data, 0, 2, 2 * rank)
    spatial = [
        data.draw(st.integers(max(1, (k - 1) * d + 1 - p - q), 7))
        for k, d, p, q in zip(kernel, dilations, pads[:rank], pads[rank:], strict=True)
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal((2, groups * per_group, *spatial)).astype(np.float32)
    arrays = [x, rng.standard_normal((filters, per_group, *kernel)).astype(np.float32)]
    if data.draw(st.booleans()):
        arrays.append(rng.standard_normal(filters).astype(np.float32))
    attrs = {"strides": strides, "pads": pads, "dilations": dilations}
    free = {0: [0, *range(2, 2 + rank)]} if data.draw(st.booleans()) else None
    (got,) = check_op("conv", *arrays, free=free, groups=groups, rtol=1e-4, atol=1e-5, **attrs)
    np.testing.assert_allclose(got, onnx_op("Conv", arrays, group=groups, **attrs), rtol=1e-4, atol=1e-5)


def pool_by_definition(x: np.ndarray[Any, Any], average: bool, counted: bool, ceil_mode: bool, **attrs: Any):
    """One window after the other, from the words of the standard: ONNX's own evaluator errs on asymmetric pads."""
    kernel, strides, dilations, pads = (attrs[name] for name in ("kernel", "strides", "dilations", "pads"))
    rank = len(kernel)
    sizes = []
    for axis, size in enumerate(x.shape[2:]):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        room = size + pads[axis] + pads[rank + axis] - reach
        count = (math.ceil if ceil_mode else math.floor)(room / strides[axis]) + 1
        while ceil_mode and (count - 1) * strides[axis] >= size + pads[axis]:
            count -= 1
        sizes.append(count)
    result = np.empty((*x.shape[:2], *sizes), x.dtype)
    for out in itertools.product(*map(range, sizes)):
        values, area = [], 0
        for tap in itertools.product(*map(range, kernel)):
            at = [o * s + t * d - p for o, s, t, d, p in zip(out, strides, tap, dilations, pads[:rank], strict=True)]
            inside = all(0 <= i < n for i, n in zip(at, x.shape[2:], strict=True))
            in_pads = all(i < n + p for i, n, p in zip(at, x.shape[2:], pads[rank:], strict=True))
            area += inside or (counted and in_pads)
            values += [x[(slice(None), slice(None), *at)]] if inside else []
        result[(slice(None), slice(None), *out)] = np.sum(values, 0) / area if average else np.max(values, 0)
    return result


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_pools_are_what_the_standard_says(data):
    rank = data.draw(st.sampled_from([1, 2]))
    kernel, strides, dilations = _draw(data, 1, 3, rank), _draw(data, 1, 3, rank), _draw(data, 1, 2, rank)
    average, counted, ceil_mode = (data.draw(st.booleans()) for _ in range(3))
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    spatial = [data.draw(st.integers((k - 1) * d + 1, 8)) for k, d in zip(kernel, dilations, strict=True)]
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((2, 2, *spatial)).astype(np.float32)
    attrs: dict[str, Any] = {"kernel": kernel, "strides": strides, "pads": pads, "dilations": dilations}
    free = {0: [0, *range(2, 2 + rank)]} if data.draw(st.booleans()) else None
    extra = {"count_include_pad": counted} if average else {}
    (got,) = check_op("avg_pool" if average else "max_pool", x, free=free, ceil_mode=ceil_mode, **extra, **attrs)
    wanted = pool_by_definition(x, average, counted, ceil_mode, **attrs)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_average_counts_what_ceil_mode_adds_as_neither_input_nor_padding():
    x = np.arange(1, 6, dtype=np.float32).reshape(1, 1, 5)
    attrs: dict[str, Any] = {"kernel": [3], "strides": [2], "pads": [1, 0], "ceil_mode": True}
    # Windows over [0, 1, 2], [2, 3, 4], [4, 5, beyond].
    np.testing.assert_allclose(check_op("avg_pool", x, **attrs)[0].ravel(), [1.5, 3, 4.5])
    np.testing.assert_allclose(check_op("avg_pool", x, count_include_pad=True, **attrs)[0].ravel(), [1, 3, 4.5])


def test_a_last_window_in_the_padding_is_left_out():
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    (got,) = check_op("max_pool", x, kernel=[2], strides=[3], pads=[1, 1], ceil_mode=True, free={0: [2]})
    np.testing.assert_array_equal(got.ravel(), [0, 3])


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_other_dtypes(dtype):
    rng = np.random.default_rng(0)
    x, w = rng.integers(-4, 5, (1, 2, 5, 5)).astype(dtype), rng.integers(-4, 5, (3, 2, 3, 3)).astype(dtype)
    check_op("conv", x, w, pads=[1, 1, 1, 1])
    check_op("max_pool", x, kernel=[2, 2], pads=[1, 1, 0, 0])
    if dtype != "int32":
        check_op("avg_pool", x, kernel=[2, 2], pads=[1, 1, 0, 0])
        check_op("conv", x, w, rng.integers(-4, 5, 3).astype(dtype))


def test_symbolic_shapes_come_out_simple():
    n, h = Var("n", lower=1), Var("h", lower=8)
    b = Builder("f")
    x, w = b.input("x", TensorType((n, 3, h, 32), "float32")), b.param("w", TensorType((8, 3, 3, 3), "float32"))
    same = b.call("conv", x, w, pads=[1, 1, 1, 1])
    assert format_type(same.type) == "float32[n, 8, h, 32]"
    half = b.call("max_pool", same, kernel=[2, 2], strides=[2, 2])
    assert format_type(half.type) == "float32[n, 8, h // 2, 16]"


@pytest.mark.parametrize(
    ("weight", "attrs", "reason"),
    [
        ((8, 4, 3, 3), {}, "want 4 input channels"),
        ((8, 3, 3), {}, "the weight has rank 3, the input 4"),
        ((8, 3, 9, 9), {}, "larger than the padded input"),
        ((8, 3, 3, 3), {"pads": [1, 1]}, "must have 4 numbers"),
        ((8, 3, 3, 3), {"strides": [0, 1]}, "must be 2 positive numbers"),
        ((9, 3, 3, 3), {"groups": 2}, "want 6 input channels"),
    ],
)
def test_conv_refuses(weight, attrs, reason):
    b = Builder("f")
    x, w = b.input("x", TensorType((1, 3, 6, 6), "float32")), b.param("w", TensorType(weight, "float32"))
    with pytest.raises(ShapeError, match=reason):
        b.call("conv", x, w, **attrs)


def test_pools_refuse_windows_of_padding_only():
    b = Builder("f")
    x = b.input("x", TensorType((1, 3, 6, 6), "float32"))
    with pytest.raises(ShapeError, match="padding only"):
        b.call("max_pool", x, kernel=[2, 2], pads=[2, 0, 0, 0])
