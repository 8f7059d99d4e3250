"""What models and their users may hand over: NaN, infinities, denormals, nothing at all, many dims, odd memory.

Through machine code, against ONNX Runtime; where that differs from numpy, numpy counts, and the test says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

import kedge
from kedge.compiler import kernels
from kedge.compiler.errors import CodegenError, CompileError, FrontendError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.frontend.onnx.node import _CONVERTERS, Node
from kedge.compiler.graph import interp
from kedge.compiler.graph.ir import Value
from kedge.compiler.graph.passes import BlockChannels
from kedge.rpc.errors import InputError
from support.onnx_models import compiled, one_operator, onnxruntime_outputs

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


def number(value: float) -> Array:
    return np.array(value, np.float32)


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-42, 1e-38, 3e38, -3e38, 87.0, -104.0, 20.0, 1.5, -2.5, 0.5],
    np.float32,
)
X = np.resize(SPECIAL, 42).reshape(1, 3, 2, 7)  # vectors and tails
Y = np.resize(SPECIAL[::-1], 42).reshape(X.shape)

ELEMENTWISE: list[tuple[str, dict[str, Any]]] = [
    *((op, {}) for op in (
        "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Erf", "Softplus", "Softsign", "Elu", "Selu",
        "Celu", "Gelu", "HardSigmoid", "HardSwish", "Mish", "ThresholdedRelu", "Abs", "Neg", "Floor", "Ceil", "Round",
        "Reciprocal", "Sin", "Cos", "Softmax", "LogSoftmax",
    )),
    ("Gelu", {"approximate": "tanh"}),
    ("Softmax", {"axis": 1}),
    ("AveragePool", {"kernel_shape": [2, 2]}),
]  # fmt: skip


def agree(got: Array, want: Array, inputs: list[Array | None]) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, strict=True, err_msg=str(inputs))


def check(model: onnx.ModelProto, feeds: dict[str, Array], want: Array) -> None:
    """The compiled and the interpreted model give `want`."""
    with compiled(model) as loaded:
        agree(loaded.run(feeds)["y0"], want, list(feeds.values()))
    with np.errstate(all="ignore"):
        agree(interp.run(load_onnx(model), feeds)["y0"], want, list(feeds.values()))


@pytest.mark.parametrize(("op", "attrs"), ELEMENTWISE, ids=lambda part: part if isinstance(part, str) else None)
def test_special_values_come_out_as_in_onnx_runtime(op: str, attrs: dict[str, Any]) -> None:
    model, feeds = one_operator(op, [X], **attrs)
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((op, "float32") for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")),
     *((op, "bool") for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"))],
)  # fmt: skip
def test_pairs_of_special_values(op: str, dtype: str) -> None:
    model, feeds = one_operator(op, [X, Y], outputs=[dtype])
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (-1.0, 1.0, np.clip(X, -1, 1)),
        (None, 1.0, np.minimum(X, 1)),  # ONNX Runtime makes an infinity the largest number there is
        (0.0, None, np.maximum(X, 0)),
        (2.0, 1.0, np.clip(X, 2, 1)),
    ],
)
def test_clipping_keeps_nan(low: float | None, high: float | None, want: Array) -> None:
    bounds = [None if bound is None else number(bound) for bound in (low, high)]
    given = [index for index, bound in enumerate(bounds, 1) if bound is not None]
    for constant in (given, []):
        model, feeds = one_operator("Clip", [X, *bounds], constant=constant)
        check(model, feeds, want)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64"])
def test_numbers_that_an_integer_cannot_hold(dtype: str) -> None:
    """As in ONNX Runtime on x86-64; and what comes next has numbers that the integer can hold."""
    x = np.concatenate([SPECIAL, np.array([127.9, 128, 300, -300, 70000, -1, 2e9, 3e9, 1e10, 1e19], np.float32)])
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model, feeds = one_operator("Cast", [x], to=onnx.TensorProto.FLOAT)
    model.graph.node[0].input[0] = "narrow"
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["x0"], ["narrow"], to=to))
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize(
    ("op", "number", "compare", "other"),
    [("Add", 1, "Greater", None), ("Sub", 2**62 + 5, "Less", 0), ("Mul", 4, "GreaterOrEqual", 8)],
)
def test_sums_that_wrap_around_are_compared_as_they_are(op: str, number: int, compare: str, other: int | None) -> None:
    x = i64(0, 1, -1, 3, 2**62, -(2**62), 2**63 - 1, -(2**63), 3 * 2**61)
    model, feeds = one_operator(op, [x, i64(number)], constant=[1], outputs=["bool"])
    against = onnx.numpy_helper.from_array(i64(0 if other is None else other), "other")
    model.graph.initializer.append(against)
    model.graph.node[0].output[0] = "result"
    second = "x0" if other is None else "other"
    model.graph.node.append(onnx.helper.make_node(compare, ["result", second], ["y0"]))
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


def then(model: onnx.ModelProto, op: str, inputs: list[str], output: str, **constants: Array) -> None:
    model.graph.node.append(onnx.helper.make_node(op, inputs, [output]))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())


@pytest.mark.parametrize(
    ("dtype", "places"), [("uint64", [2**64 - 1, 2, 2**64 - 4]), ("uint32", [4_000_000_000, 1, 0])]
)
def test_indices_that_wrap_around_stay_inside_of_the_table(dtype: str, places: list[int]) -> None:
    table = np.arange(100, 104, dtype=np.float32)
    model, feeds = one_operator("Cast", [np.array(places, dtype)], to=onnx.TensorProto.INT64)
    model.graph.node[0].output[0] = "wide"
    then(model, "Mul", ["wide", "wide" if dtype == "uint32" else "one"], "index", one=i64(1))
    then(model, "Gather", ["table", "index"], "y0", table=table)
    check(model, feeds, np.array([103, 102, 100] if dtype == "uint64" else [100, 101, 100], np.float32))


def test_large_unsigned_numbers_are_negative_as_int64() -> None:
    x = np.array([2**63, 0, 2**64 - 1, 2**63 - 1], np.uint64)
    model, feeds = one_operator("Cast", [x], to=onnx.TensorProto.INT64, outputs=["bool"])
    model.graph.node[0].output[0] = "wide"
    then(model, "Less", ["wide", "zero"], "y0", zero=i64(0))
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize(
    "nodes",
    [
        [("Add", "x0", "number"), ("Max", "result", "x0")],
        [("Mul", "x0", "number"), ("Div", "result", "number")],
        [("Mul", "x0", "number"), ("Mod", "result", "number")],
    ],
)
def test_extremes_and_quotients_of_sums_that_wrap_around(nodes: list[tuple[str, str, str]]) -> None:
    x = i64(0, 1, -1, 3, 2**62, -(2**62), 2**63 - 1, -(2**63), 3 * 2**61)
    (first, *inputs), (second, *operands) = nodes
    model, feeds = one_operator(first, [x], outputs=["int64"])
    model.graph.node.pop()
    then(model, first, inputs, "result", number=i64(3))
    then(model, second, operands, "y0")
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


def test_the_sign_of_nan_is_nan() -> None:
    model, feeds = one_operator("Sign", [X])
    check(model, feeds, np.sign(X))


@pytest.mark.parametrize("op", ["IsNaN", "IsInf"])
def test_questions_about_special_values(op: str) -> None:
    model, feeds = one_operator(op, [X], outputs=["bool"])
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize("axes", [[3], [1], [2, 3]])
@pytest.mark.parametrize(("op", "function"), [("ReduceMax", np.max), ("ReduceMin", np.min), ("ReduceSum", np.sum)])
def test_a_reduction_that_meets_nan_gives_nan(op: str, function: Callable[..., Array], axes: list[int]) -> None:
    """As numpy and PyTorch have it; ONNX Runtime's ReduceMax gives NaN or not by where it stands."""
    model, feeds = one_operator(op, [X, i64(*axes)], constant=[1])
    with np.errstate(all="ignore"):
        check(model, feeds, function(X, axis=tuple(axes), keepdims=True))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_logarithm_of_sums_of_special_powers(keepdims: int) -> None:
    x = f(5, 6)
    x[1], x[2, 3], x[3, 2], x[4, :2] = -np.inf, np.inf, np.nan, (np.inf, -np.inf)
    model, feeds = one_operator("ReduceLogSumExp", [x, i64(1)], constant=[1], keepdims=keepdims)
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


def test_a_window_that_meets_nan_gives_nan() -> None:
    """As numpy and PyTorch have it; ONNX Runtime leaves NaN out. Windows without one are alike."""
    model, feeds = one_operator("MaxPool", [X], kernel_shape=[2, 2], pads=[1, 1, 0, 0])
    padded = np.pad(X, [(0, 0), (0, 0), (1, 0), (1, 0)], constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 2), axis=(2, 3))
    want = windows.max(axis=(4, 5))
    check(model, feeds, want)
    clean = ~np.isnan(want)
    np.testing.assert_array_equal(onnxruntime_outputs(model, feeds)["y0"][clean], want[clean])


@pytest.mark.parametrize(("op", "function"), [("ArgMax", np.argmax), ("ArgMin", np.argmin)])
def test_the_position_of_nan(op: str, function: Callable[..., Array]) -> None:
    model, feeds = one_operator(op, [X], outputs=["int64"], axis=3)
    check(model, feeds, function(X, axis=3, keepdims=True))


def test_denormals_are_kept() -> None:
    tiny = np.array([1e-45, -1e-42, 5e-39, 1e-38], np.float32)
    model, feeds = one_operator("Add", [tiny, tiny[::-1].copy()])
    with compiled(model) as loaded:
        np.testing.assert_array_equal(loaded.run(feeds)["y0"], tiny + tiny[::-1])
    model, feeds = one_operator("Mul", [tiny, number(0.5)])
    with compiled(model) as loaded:
        np.testing.assert_array_equal(loaded.run(feeds)["y0"], tiny * np.float32(0.5))


def test_products_with_special_values() -> None:
    """0 · inf is NaN, and padding multiplies nothing: rows without a special value have none of it."""
    a, b = f(5, 9), f(9, 6)
    a[1, 2], a[3, 4], b[0, 3] = np.inf, np.nan, -np.inf
    with np.errstate(all="ignore"):
        check(*one_operator("MatMul", [a, b]), a @ b)
    x = f(1, 2, 6, 6)
    x[0, 0, 3, 3], x[0, 1, 0, 5] = np.nan, np.inf
    model, feeds = one_operator("Conv", [x, f(3, 2, 3, 3)], constant=[1], pads=[1] * 4)
    check(model, feeds, onnxruntime_outputs(model, feeds)["y0"])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_blocked_convolutions_with_special_values(kernel: int, value: float) -> None:
    """Of one place only the windows that reach it know; so it is without Winograd's algorithm."""
    x, weights = f(1, 32, 19, 19), f(32, 32, kernel, kernel)
    x[0, 3, 7, 8] = value
    model, feeds = one_operator("Conv", [x, weights], constant=[1], pads=[kernel // 2] * 4)
    want = onnxruntime_outputs(model, feeds)["y0"]
    direct = kedge.pipeline("default").replace("layout", BlockChannels(winograd=False))
    for attrs in ({}, {"group": 32}):
        if attrs:
            model, feeds = one_operator("Conv", [x, weights[:, :1]], constant=[1], pads=[kernel // 2] * 4, **attrs)
            want = onnxruntime_outputs(model, feeds)["y0"]
        with kedge.compile(load_onnx(model), target="native", pipeline=direct).open(threads=1) as loaded:
            np.testing.assert_allclose(loaded.run(feeds)["y0"], want, rtol=1e-3, atol=1e-3)


def test_winograd_spreads_special_values_over_their_tiles_only() -> None:
    x = f(1, 64, 56, 56)
    model, feeds = one_operator("Conv", [x, f(64, 64, 3, 3)], constant=[1], pads=[1] * 4)
    with compiled(model) as loaded:
        clean = loaded.run(feeds)["y0"]
        for value in (np.inf, np.nan):
            x[0, 3, 20, 21] = value
            got = loaded.run({"x0": x})["y0"]
            wrong = np.argwhere(~np.isfinite(got).all(axis=(0, 1)))
            assert len(wrong) >= 9
            assert (abs(wrong - [20, 21]) <= 5).all()
            rest = np.isfinite(got)
            np.testing.assert_allclose(got[rest], clean[rest], rtol=1e-3, atol=1e-3)


def test_refusals_of_code_generation_name_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels have names of their own, which say nothing to whoever wrote the model."""

    def refuse(*_: object) -> None:
        raise CodegenError("no such instruction", hint="take another")

    monkeypatch.setattr(kernels, "emit_kernel", refuse)
    model, _ = one_operator("Softmax", [f(3, 5 + 8 * 3)])
    with pytest.raises(CodegenError, match=r"^node node.*: no such instruction") as caught, compiled(model):
        pass
    assert caught.value.hint == "take another"


#: Operator, inputs, which of them are constants, attributes.
Case = tuple[str, list[Array | None], list[int], dict[str, Any]]
R8 = (2, 1, 2, 3, 1, 2, 2, 3)
SHAPES: list[Case] = [
    ("Relu", [f(0, 3)], [], {}),
    ("Add", [f(0, 3), f(3)], [], {}),
    ("Add", [f(), f()], [], {}),
    ("Exp", [f()], [], {}),
    ("Celu", [f()], [], {"alpha": 2.0}),
    ("MatMul", [f(0, 3), f(3, 4)], [], {}),
    ("MatMul", [f(0, 3), f(3, 40)], [1], {}),
    ("MatMul", [f(2, 3), f(3, 0)], [1], {}),
    ("MatMul", [f(2, 0), f(0, 4)], [], {}),
    ("MatMul", [f(3), f(3)], [], {}),
    ("Gemm", [f(2, 0), f(0, 4), f(4)], [1, 2], {}),
    ("Gemm", [f(0, 3), f(3, 4), f(4)], [1, 2], {}),
    ("Conv", [f(0, 3, 5, 5), f(4, 3, 3, 3)], [1], {}),
    ("ConvTranspose", [f(0, 3, 5, 5), f(3, 4, 3, 3)], [1], {}),
    ("MaxPool", [f(0, 3, 5, 5)], [], {"kernel_shape": [2, 2]}),
    ("GlobalAveragePool", [f(0, 3, 5, 5)], [], {}),
    ("ReduceSum", [f(2, 0, 3), i64(1)], [1], {}),
    ("ReduceProd", [f(2, 0), i64(1)], [1], {}),
    ("ReduceSum", [f()], [], {}),
    ("ReduceMax", [f()], [], {}),
    ("Softmax", [f(0, 3)], [], {}),
    ("Softmax", [f(2, 0)], [], {}),
    ("Concat", [f(0, 3), f(2, 3)], [], {"axis": 0}),
    ("Transpose", [f(0, 3)], [], {}),
    ("Reshape", [f(0, 4), i64(0, 2, 2)], [1], {}),
    ("Reshape", [f(), i64(1, 1)], [1], {}),
    ("Slice", [f(3, 4), i64(2), i64(1), i64(0)], [1, 2, 3], {}),
    ("Gather", [f(3, 4), np.zeros(0, np.int64)], [1], {}),
    ("Gather", [f(3), np.array(1)], [1], {}),
    ("Expand", [f(1, 3), i64(0, 3)], [1], {}),
    ("Tile", [f(2, 3), i64(0, 1)], [1], {}),
    ("Pad", [f(0, 3), i64(1, 0, 1, 0)], [1], {}),
    ("Resize", [f(0, 1, 2, 2), None, np.array([1, 1, 2, 2], np.float32)], [2], {}),
    ("LayerNormalization", [f(0, 4), f(4)], [1], {}),
    ("CumSum", [f(0, 3), np.array(0)], [1], {}),
    ("Einsum", [f(0, 3), f(3, 2)], [], {"equation": "ij,jk->ik"}),
    ("Relu", [f(*R8)], [], {}),
    ("Add", [f(*R8), f(1, 2, 2, 1, 2, 1, 2, 1)], [], {}),
    ("Transpose", [f(*R8)], [], {"perm": [7, 3, 1, 5, 0, 2, 6, 4]}),
    ("ReduceSum", [f(*R8), i64(1, 3, 6)], [1], {}),
    ("Softmax", [f(*R8)], [], {"axis": 3}),
    ("Concat", [f(*R8), f(*R8)], [], {"axis": 5}),
    ("MatMul", [f(2, 1, 2, 1, 1, 2, 2, 3), f(1, 2, 1, 2, 2, 1, 3, 4)], [], {}),
    ("Slice", [f(*R8), i64(1, 0), i64(3, 2), i64(3, 7)], [1, 2, 3], {}),
]


def named(part: Any) -> str:
    if isinstance(part, list) and part and isinstance(part[0], np.ndarray):
        return "x".join(map(str, part[0].shape)) or "scalar"
    return part if isinstance(part, str) else ""


@pytest.mark.parametrize(("op", "inputs", "constant", "attrs"), SHAPES, ids=named)
def test_shapes_without_elements_without_dims_and_with_eight(
    op: str, inputs: list[Array | None], constant: list[int], attrs: dict[str, Any]
) -> None:
    model, feeds = one_operator(op, inputs, constant=constant, **attrs)
    want = onnxruntime_outputs(model, feeds)["y0"]
    with compiled(model) as loaded:
        np.testing.assert_allclose(loaded.run(feeds)["y0"], want, rtol=1e-4, atol=1e-5, strict=True)


def test_a_free_dim_that_is_summed_has_at_least_one_element() -> None:
    model, _ = one_operator("ReduceSum", [f(2, 3)], constant=[], free={0: [0]}, keepdims=0)
    with compiled(model) as loaded, pytest.raises(InputError, match=r"x0_0.* is 0, expected at least 1"):
        loaded.run({"x0": f(0, 3)})


class Lent:
    """An array that is only known by DLPack."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _unaligned(x: Array) -> Array:
    room = np.zeros(x.nbytes + 1, np.uint8)
    view = room[1:].view(x.dtype).reshape(x.shape)
    view[:] = x
    return view


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


VIEWS: dict[str, Callable[[Array], Array]] = {
    "every second": lambda x: np.repeat(np.repeat(x, 2, 1), 2, 2)[:, ::2, ::2],
    "backwards": lambda x: x[:, ::-1],
    "all backwards": lambda x: x[::-1, ::-1, ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "column-major": np.asfortranarray,
    "repeated": lambda x: np.broadcast_to(x[:1, :1], x.shape),
    "a part": lambda x: np.pad(x, 3)[3:-3, 3:-3, 3:-3],
    "unaligned": _unaligned,
    "read-only": _read_only,
}


@pytest.fixture(scope="module")
def doubled() -> Any:
    model, _ = one_operator("Add", [f(3, 4, 5), f(3, 4, 5)])
    with compiled(model) as loaded:
        yield loaded


@pytest.mark.parametrize("lend", [lambda x: x, Lent], ids=["numpy", "dlpack"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_of_any_layout(doubled: Any, view: Callable[[Array], Array], lend: Callable[[Array], Any]) -> None:
    x = view(f(3, 4, 5))
    before = x.copy()
    np.testing.assert_array_equal(doubled.run({"x0": lend(x), "x1": lend(x)})["y0"], x + x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", [">f4", "float64", "int32", "float16"])
def test_other_element_types_are_refused_by_name(doubled: Any, dtype: str) -> None:
    with pytest.raises(InputError, match=r"input 'x0'.*float32\[3, 4, 5\]") as caught:
        doubled.run({"x0": f(3, 4, 5).astype(dtype), "x1": f(3, 4, 5)})
    assert caught.value.hint is not None and "astype('float32')" in caught.value.hint


#: Nodes that cannot be compiled, and what the message says of them beside their names.
REFUSED: list[tuple[str, list[Array | None], list[int], dict[str, Any], str]] = [
    ("Conv", [f(1, 3, 2, 2), f(4, 3, 5, 5)], [1], {}, "larger than the padded input"),
    ("Conv", [f(1, 3, 8, 8), f(4, 2, 3, 3)], [1], {}, "want 2 input channels"),
    ("Gemm", [f(2, 3), f(4, 5)], [1], {}, "inner dims 3 and 4"),
    ("MatMul", [f(2, 3), f(4, 5)], [], {}, "the last dim of a, 3, is not known to equal 4"),
    ("BatchNormalization", [f(1, 3, 4), f(3), f(3), f(3), f(2)], [], {}, "var must have one number per channel"),
    ("LayerNormalization", [f(2, 4), f(3)], [1], {}, "4 and 3 do not broadcast"),
    ("HardSwish", [i64(1, 2)], [], {}, "its input is int64; it takes floats"),
    ("Softmax", [f(2, 3)], [], {"axis": 2}, "axis 2 is outside of rank 2"),
    ("Reshape", [f(2, 3), i64(4, 2)], [1], {}, "as many elements"),
    ("Transpose", [f(2, 3)], [], {"perm": [0, 0]}, "does not permute 2 axes"),
    ("Concat", [f(2, 3), f(3, 4)], [], {"axis": 0}, "3 and 4 of axis 1"),
    ("Split", [f(2, 6), i64(2, 3)], [1], {"axis": 1}, "do not add up to 6"),
    ("Squeeze", [f(2, 3), i64(0)], [1], {}, "dim 0 is 2, not 1"),
    ("Pad", [f(2, 3), i64(2, 0, 0, 0)], [1], {"mode": "reflect"}, "cannot reflect 2 elements of an axis of 2"),
    ("Einsum", [f(2, 3), f(4, 5)], [], {"equation": "ij,jk->ik"}, "3, is not known to equal 4"),
    ("DepthToSpace", [f(1, 4, 3)], [], {"blocksize": 2}, "images of rank 4, not 3"),
    ("SpaceToDepth", [f(1, 4, 3)], [], {"blocksize": 2}, "images of rank 4, not 3"),
    ("LRN", [f(4)], [], {"size": 3}, "its second dim has the channels"),
    ("ReduceMean", [i64(1, 2), i64(3)], [1], {}, "axes [3] are outside of rank 1"),
    ("Split", [f(4)], [], {"num_outputs": 0}, "cannot be split into 0 parts"),
    ("Clip", [np.ones(4, np.int32), number(0.5)], [1], {}, "its bound (input 1) is float32, its input int32"),
    ("Clip", [np.ones(4, np.int32), None, number(0.5)], [], {}, "its bound (input 2) is float32, its input int32"),
    ("Mod", [f(4), f(4)], [], {}, "before opset 28 it takes them with fmod=1"),
    ("InstanceNormalization", [f(4, 6), f(6), f(6)], [1, 2], {}, "it needs (N, C, spatial dims…)"),
    ("Pad", [f(2, 4), i64(0, -3, 0, -2)], [1], {}, "cuts 5 elements off axis 1, which has 4"),
    ("Pad", [f(4), i64(3, -5)], [1], {}, "cuts 5 elements off axis 0, which has 4"),
]


@pytest.mark.parametrize(("op", "inputs", "constant", "attrs", "words"), REFUSED, ids=named)
def test_the_message_names_the_node_of_the_model(
    op: str, inputs: list[Array | None], constant: list[int], attrs: dict[str, Any], words: str
) -> None:
    model, _ = one_operator(op, inputs, constant=constant, **attrs)
    with pytest.raises(FrontendError) as caught:
        load_onnx(model)
    assert caught.value.message.startswith(f"g: node 'node' ({op}): "), caught.value.message
    assert words in caught.value.message
    assert caught.value.message.count("node") == 2, "once is enough"


def test_whatever_a_converter_stumbles_over_the_message_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(node: Node) -> Value:
        _one, _two = node.value(0).type.shape
        return node.value(0)

    monkeypatch.setitem(_CONVERTERS, ("", "Relu"), stumble)
    model, _ = one_operator("Relu", [f(1, 2, 3)])
    with pytest.raises(
        FrontendError, match=r"node 'node' \(Relu\): its inputs and attributes do not fit together: too many"
    ):
        load_onnx(model)


def test_bounds_of_old_opsets_are_of_any_float() -> None:
    model, feeds = one_operator("Clip", [f(3, 5).astype(np.float16)], outputs=["float16"], opset=10, min=0.0, max=0.5)
    np.testing.assert_array_equal(interp.run(load_onnx(model), feeds)["y0"], feeds["x0"].clip(0, 0.5))


def test_a_window_may_end_beyond_an_image_that_is_smaller() -> None:
    x = f(1, 2, 2, 2)
    for op, function in (("MaxPool", np.max), ("AveragePool", np.mean)):
        model, feeds = one_operator(op, [x], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        want = function(x, axis=(2, 3), keepdims=True)
        # A mean of numbers that cancel each other is as exact as these are.
        np.testing.assert_allclose(onnxruntime_outputs(model, feeds)["y0"], want, rtol=1e-6, atol=1e-6)
        check(model, feeds, want)


def test_an_error_behind_the_front_end_names_the_node() -> None:
    """Only external code can compute the operator, and there is none."""
    model, _ = one_operator("Odd", [f(3)])
    model.graph.node[0].domain = "my.domain"
    model.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))
    infer = lambda types: (types[0].shape, "float32")  # noqa: E731
    with (
        kedge.register_onnx("my.domain", "Odd", infer=infer, reference=lambda arrays: arrays[0]),
        pytest.raises(CompileError, match=r"my\.domain\.Odd \(node node\) has no lowering"),
    ):
        kedge.compile(load_onnx(model), target="native")
