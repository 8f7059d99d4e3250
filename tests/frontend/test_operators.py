"""Operators of vision networks, imported and compiled, against ONNX Runtime: one node each, with free dims."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler import te
from kedge.compiler.errors import FrontendError, UnsupportedOperatorError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.dims import evaluate
from kedge.compiler.graph.ir import Call, TensorType
from kedge.compiler.ops import registry
from kedge.compiler.tir.expr import Var
from kedge.compiler.tir.stmt import For, Stmt
from kedge.compiler.tir.visitor import stmt_children
from support.graphs import check_op, compare
from support.onnx_models import check_compiled, one_operator, onnxruntime_outputs

RNG = np.random.default_rng(0)
Array = np.ndarray[Any, Any]


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


#: An operator, its inputs after the image x (N, 4, 5, 6), and its attributes.
IMAGES: list[tuple[str, list[Array | None], dict[str, Any]]] = [
    ("LayerNormalization", [f(6), f(6)], {}),
    ("LayerNormalization", [f(4, 5, 6)], {"axis": 1, "epsilon": 1e-3}),
    ("InstanceNormalization", [f(4), f(4)], {}),
    ("LpNormalization", [], {"axis": 1, "p": 1}),
    ("LpNormalization", [], {"axis": -1}),
    ("MeanVarianceNormalization", [], {}),
    ("LRN", [], {"size": 3}),
    ("LRN", [], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 2.0}),
    ("Gelu", [], {}),
    ("Gelu", [], {"approximate": "tanh"}),
    ("HardSwish", [], {}),
    ("HardSigmoid", [], {"alpha": 0.3}),
    ("Elu", [], {"alpha": 0.7}),
    ("Selu", [], {}),
    ("Celu", [], {"alpha": 2.0}),
    ("PRelu", [f(4, 1, 1)], {}),
    ("Softplus", [], {}),
    ("Softsign", [], {}),
    ("Mish", [], {}),
    ("ThresholdedRelu", [], {"alpha": 0.5}),
    ("Shrink", [], {"lambd": 0.4, "bias": 0.1}),
    ("Hardmax", [], {"axis": 1}),
    ("GlobalAveragePool", [], {}),
    ("GlobalMaxPool", [], {}),
    ("GlobalLpPool", [], {"p": 2}),
    ("LpPool", [], {"kernel_shape": [2, 3], "p": 3, "pads": [1, 1, 0, 1], "strides": [2, 1]}),
    ("DepthToSpace", [], {"blocksize": 2}),
    ("DepthToSpace", [], {"blocksize": 2, "mode": "CRD"}),
    ("Dropout", [], {}),
    ("IsInf", [], {"detect_negative": 0}),
    ("Clip", [None, np.array(0.5, np.float32)], {}),
    ("Clip", [np.array(-0.5, np.float32)], {}),
    ("Pad", [i64(0, 0, 2, 1, 0, 0, 3, 4)], {"mode": "reflect"}),
    ("Pad", [i64(0, 0, 2, 1, 0, 0, 3, 4)], {"mode": "edge"}),
    ("Pad", [i64(0, 1, 2, 7, 0, 0, 3, 4)], {"mode": "wrap"}),
    ("Tile", [i64(1, 2, 1, 3)], {}),
    ("Expand", [i64(2, 1, 1, 1, 1)], {}),
    ("CumSum", [np.array(3, np.int64)], {}),
    ("CumSum", [np.array(-2, np.int64)], {"exclusive": 1, "reverse": 1}),
    ("Trilu", [], {}),
    ("Trilu", [np.array(-2, np.int64)], {"upper": 0}),
    ("Einsum", [f(6, 7)], {"equation": "nchw,wk->nkch"}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "others", "attrs"), IMAGES, ids=lambda part: part if isinstance(part, str) else None)
def test_of_an_image(op: str, others: list[Array | None], attrs: dict[str, Any]) -> None:
    x = f(2, 4, 5, 6)
    whole = op == "Einsum" or (op == "LayerNormalization" and attrs.get("axis") == 1)
    model, feeds = one_operator(
        op, [x, *others], constant=[at for at, other in enumerate(others, 1) if other is not None],
        free={0: [0] if whole else [0, 2]}, outputs=["bool" if op == "IsInf" else "float32"],
        **attrs,
    )  # fmt: skip
    check_compiled(model, feeds, {"x0": f(1, 4, 5 if whole else 9, 6)})


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_normalization(groups: int) -> None:
    model, feeds = one_operator(
        "GroupNormalization", [f(2, 6, 3, 4), f(6), f(6)], constant=[1, 2], free={0: [0, 2, 3]}, opset=21,
        num_groups=groups,
    )  # fmt: skip
    check_compiled(model, feeds, {"x0": f(1, 6, 5, 2)})


def test_layer_normalization_gives_its_statistics() -> None:
    model, feeds = one_operator(
        "LayerNormalization", [f(3, 4, 8), f(8), f(8)], constant=[1, 2], outputs=["float32"] * 3, axis=-1
    )
    check_compiled(model, feeds)


def test_halves_are_normalised_in_float32() -> None:
    x = (f(3, 64) * 100 + 500).astype(np.float16)
    model, feeds = one_operator("LayerNormalization", [x, np.ones(64, np.float16)], constant=[1], outputs=["float16"])
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(interp.run(load_onnx(model), feeds)["y0"].astype(np.float64), want, rtol=1e-2, atol=1e-2)


def test_rows_of_zeros_have_no_direction() -> None:
    x = np.zeros((2, 3), np.float32)
    x[1] = [3, 0, 4]
    model, feeds = one_operator("LpNormalization", [x])
    np.testing.assert_allclose(interp.run(load_onnx(model), feeds)["y0"], [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)


def test_space_to_depth_and_split() -> None:
    check_compiled(*one_operator("SpaceToDepth", [f(2, 3, 4, 6)], free={0: [0]}, blocksize=2))
    check_compiled(
        *one_operator("Split", [f(2, 7), i64(2, 5)], constant=[1], free={0: [0]}, outputs=["float32"] * 2, axis=1)
    )
    check_compiled(*one_operator("Where", [f(3, 1) > 0, f(3, 4), f(4)]))


EQUATIONS = [
    "ij,jk->ik", "bij,bjk->bik", "bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd", "ij->ji", "ij->i", "ij,ij->", "i,j->ij",
    "bij,kj->bik", "ij,jk", "nctkv,kvw->nctw", "ijk,ijk->ik", "b...d,...d->b...", "...ij,...jk->...ik", "ij,jk,kl->il",
    "i,i->i", "abc,cd,def->abef",
]  # fmt: skip


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str) -> None:
    sizes = {label: 2 + index % 4 for index, label in enumerate("abcdefghijklnqtvw")}
    arrays = []
    for term in equation.partition("->")[0].split(","):
        before, dots, after = term.partition("...")
        hidden = [3, 2] if dots else []
        arrays.append(f(*(sizes[label] for label in before), *hidden, *(sizes[label] for label in after)))
    model, feeds = one_operator("Einsum", arrays, equation=equation)
    compare(interp.run(load_onnx(model), feeds), onnxruntime_outputs(model, feeds), rtol=1e-4, atol=1e-5)
    free = {0: [0]} if equation[0].isalpha() and equation.partition("->")[0].count(equation[0]) == 1 else None
    check_compiled(*one_operator("Einsum", arrays, free=free, equation=equation))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,kj->ik", [(3, 1), (5, 4)]),
        ("ij,kj->ik", [(3, 4), (5, 1)]),
        ("ij,ij->", [(3, 1), (1, 4)]),
        ("ij,ij->i", [(1, 4), (3, 1)]),
        ("ij,ij->ij", [(3, 1), (1, 4)]),
        ("ij,jk,jl->il", [(3, 1), (1, 2), (4, 5)]),
        ("bij,bjk->ik", [(1, 3, 4), (2, 4, 5)]),
        ("...ij,...jk->...ik", [(1, 3, 4), (2, 1, 5)]),
    ],
)
def test_einsum_repeats_dims_of_one(equation: str, shapes: list[tuple[int, ...]]) -> None:
    model, feeds = one_operator("Einsum", [f(*shape) for shape in shapes], equation=equation)
    compare(interp.run(load_onnx(model), feeds), onnxruntime_outputs(model, feeds), rtol=1e-4, atol=1e-5)
    check_compiled(model, feeds)
    free = {len(shapes) - 1: [axis for axis, size in enumerate(shapes[-1]) if size != 1]}
    check_compiled(*one_operator("Einsum", list(feeds.values()), free=free, equation=equation))


@pytest.mark.parametrize(
    ("equation", "words"),
    [
        ("ii->i", "takes a diagonal"),
        ("ij,jk->ik", "2 terms for 1 inputs"),
        ("ijk->i", "does not fit rank 2"),
        ("ij->iz", "one of its own"),
    ],
)
def test_einsum_refuses(equation: str, words: str) -> None:
    model, _ = one_operator("Einsum", [f(3, 3)], equation=equation)
    with pytest.raises(FrontendError, match=rf"node 'node' \(Einsum\).*{words}"):
        load_onnx(model)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_running_sums(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(1, 3)))]
    x = RNG.integers(-9, 9, shape).astype(data.draw(st.sampled_from(["float32", "int64", "float16"])))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    exclusive, reverse = data.draw(st.booleans()), data.draw(st.booleans())
    free = {0: list(range(len(shape)))} if data.draw(st.booleans()) else None
    (got,) = check_op("cumsum", x, axis=axis, exclusive=exclusive, reverse=reverse, free=free)
    turned = np.flip(x, axis) if reverse else x
    sums = np.cumsum(turned, axis, dtype=x.dtype)
    sums = sums - turned if exclusive else sums
    np.testing.assert_array_equal(got, np.flip(sums, axis) if reverse else sums)


@pytest.mark.parametrize(
    ("shape", "axis", "exclusive", "reverse"),
    [
        *(((2, 200, 3), 1, exclusive, reverse) for exclusive in (0, 1) for reverse in (0, 1)),
        *((shape, axis, both, both) for shape, axis in (((129,), 0), ((2, 3, 1100), 2)) for both in (0, 1)),
    ],
)
def test_long_running_sums(shape: tuple[int, ...], axis: int, exclusive: int, reverse: int) -> None:
    x = RNG.integers(-9, 9, shape).astype(np.float32)
    given = {"constant": [1], "exclusive": exclusive, "reverse": reverse}
    check_compiled(*one_operator("CumSum", [x, np.array(axis)], **given))
    model, feeds = one_operator("CumSum", [x, np.array(axis)], free={0: [axis]}, **given)
    check_compiled(model, feeds, {"x0": x.take(range(5), axis)})


@pytest.mark.parametrize("free", [False, True])
def test_the_steps_of_a_running_sum_grow_with_its_length(free: bool) -> None:
    def steps_for(size: int) -> int:
        n = Var("n", lower=1) if free else size
        x, attrs = te.placeholder((n,), "float32", "x"), {"axis": 0, "exclusive": False, "reverse": False}
        (y,) = registry.get("cumsum").lower([x], attrs, (TensorType((n,), "float32"),))

        def steps(stmt: Stmt) -> int:
            if isinstance(stmt, For):
                return evaluate(stmt.extent, {n: size}) * steps(stmt.body)
            return max(1, sum(map(steps, stmt_children(stmt))))

        return steps(te.create_prim_func([x, y], "f").body)

    assert steps_for(10_000_000) < 1.1 * 1000 * steps_for(10_000) < 80 * 10_000_000


def test_an_infinity_is_in_no_sum_before_it() -> None:
    (got,) = check_op("cumsum", np.array([1, np.inf, 2, np.nan], np.float32), axis=0)
    np.testing.assert_array_equal(got, np.array([1, np.inf, np.inf, np.nan], np.float32))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis: int) -> None:
    arrays = [np.array([[1, -1, 0], [2, 4, 3]]), i64(4), np.array([2, 5], np.float32)]
    check_compiled(*one_operator("OneHot", arrays, constant=[1, 2], free={0: [0]}, axis=axis))


def test_ranges_of_known_and_of_free_size() -> None:
    for numbers, dtype in (((1, 9, 3), "int32"), ((5, -4, -2), "int64"), ((0.5, 3.1, 0.25), "float32")):
        model, feeds = one_operator(
            "Range", [np.array(number, dtype) for number in numbers], constant=[0, 1, 2], outputs=[dtype]
        )
        assert feeds == {}
        np.testing.assert_allclose(
            interp.run(load_onnx(model), {})["y0"], onnxruntime_outputs(model, {})["y0"], rtol=1e-6, strict=True
        )
    body = "g (float[N] x) => (int64[M] y) { s=Size(x) y=Range(two,s,three) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]>\n{body}')
    for name, value in (("two", 5), ("three", 3)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    with pytest.raises(FrontendError, match="not known to have"):
        load_onnx(model)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int64), "two"))
    check_compiled(model, {"x": f(7)}, {"x": f(1)}, {"x": f(6)})


@pytest.mark.parametrize("k", [0, 1, -2])
def test_eye_like(k: int) -> None:
    check_compiled(*one_operator("EyeLike", [f(3, 5)], free={0: [0, 1]}, outputs=["int64"], k=k, dtype=7))


def test_batch_and_channels_free_in_a_mask() -> None:
    check_compiled(*one_operator("Trilu", [f(2, 3, 4)], free={0: [0, 1, 2]}))


@pytest.mark.parametrize(
    ("op", "attrs", "words"),
    [
        ("GroupNormalization", {"num_groups": 4, "opset": 21}, "6 channels are not a multiple of num_groups 4"),
        ("LayerNormalization", {"axis": 4}, "axis 4 is outside of rank 4"),
        ("LpPool", {"kernel_shape": [2, 2], "ceil_mode": 1}, "ceil_mode is not supported"),
        ("OneHot", {"axis": 9}, "axis 9 is outside of rank 5"),
        ("DepthToSpace", {"blocksize": 4}, "6 channels are not a multiple"),
        ("Pad", {"mode": "mirror"}, "mode 'mirror' is not supported"),
    ],
)
def test_what_is_refused_names_the_node(op: str, attrs: dict[str, Any], words: str) -> None:
    others: dict[str, list[Array]] = {
        "GroupNormalization": [f(6), f(6)], "LayerNormalization": [f(4)], "OneHot": [i64(3), f(2)],
        "Pad": [i64(0, 0, 0, 0, 0, 0, 0, 1)],
    }  # fmt: skip
    more = others.get(op, [])
    model, _ = one_operator(op, [f(2, 6, 3, 4), *more], constant=list(range(1, 1 + len(more))), **attrs)
    with pytest.raises(FrontendError, match=rf"node 'node' \({op}\).*{words}"):
        load_onnx(model)


@pytest.mark.parametrize("op", ["TopK", "NonMaxSuppression", "GridSample", "RoiAlign", "NonZero", "Unique"])
def test_what_is_not_supported_is_named(op: str) -> None:
    count = onnx.defs.get_schema(op, 20, "").min_input
    results = max(onnx.defs.get_schema(op, 20, "").min_output, 1)
    model, _ = one_operator(op, [f(1, 2, 3, 3)] * count, outputs=["float32"] * results, opset=20)
    with pytest.raises(UnsupportedOperatorError, match=rf"ai\.onnx\.{op} \(opset 20\): node"):
        load_onnx(model)


def test_composites_come_out_as_few_operators() -> None:
    model, _ = one_operator("LayerNormalization", [f(2, 8), f(8), f(8)], constant=[1, 2])
    ops = [value.op for value in load_onnx(model).functions["main"].values() if isinstance(value, Call)]
    assert ops == ["reduce_mean", "sub", "mul", "reduce_mean", "add", "rsqrt", "mul", "mul", "add"]
