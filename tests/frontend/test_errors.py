"""Bad input: each gets one error that names what is wrong and says what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from kedge.compiler.errors import FrontendError, UnsupportedOperatorError
from kedge.compiler.frontend.onnx import NEWEST_OPSET, coverage, load_onnx
from kedge.data import digits_model
from kedge.rpc.errors import KedgeError

DIGITS = digits_model().read_bytes()


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def one_node(body: str, opset: int = 20) -> onnx.ModelProto:
    return parsed(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{body}')


@pytest.mark.parametrize(
    ("data", "words", "remedy"),
    [
        (b"", "empty file", "export the model again"),
        (b"PK\x03\x04rest", "a zip", "torch.onnx.export"),
        (b"PK\x03\x04manifest.json", "artifact", "kedge run"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer", "git lfs pull"),
        (b"hello, this is no model", "not an ONNX model", "export the model again"),
        (b"\x00" * 100, "not an ONNX model", "export the model again"),
        (DIGITS[: len(DIGITS) // 2], "truncated or corrupt", "checksum"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, data: bytes, words: str, remedy: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(FrontendError, match=words) as caught:
        load_onnx(path)
    assert str(path) in caught.value.message
    assert caught.value.hint is not None and remedy in caught.value.hint


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FrontendError, match="no file"):
        load_onnx(tmp_path / "absent.onnx")
    with pytest.raises(FrontendError, match="is a folder"):
        load_onnx(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(DIGITS) - 1))
@example(len(DIGITS) - 1)
@example(1)
def test_truncation_anywhere_is_an_error_of_kedge(length: int) -> None:
    with pytest.raises(FrontendError):
        load_onnx(DIGITS[:length])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DIGITS) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_load_or_are_an_error_of_kedge(changes: list[tuple[int, int]]) -> None:
    data = bytearray(DIGITS)
    # Most bytes are weights, where any value is fine; the structure stands at both ends.
    for position, value in changes:
        data[position if position % 2 else position % 1200] = value
    try:
        load_onnx(bytes(data))
    except KedgeError as error:
        assert error.message


def test_every_unsupported_operator_at_once() -> None:
    model = parsed(
        """
        <ir_version: 9, opset_import: ["" : 20, "com.acme" : 2]>
        g (float[N, 4] x) => (float y, float z) {
            [unique] u, i, j, k = Unique (x)
            n = Cast <to = 7> (x)
            b = Reshape (x, n)
            r = Relu (x)
            [scan_one] c = CumProd (r, r)
            [scan_two] d = CumProd (c, r)
            [magic] e = com.acme.Magic (d)
            y = Add (e, r)
            [nz] z = NonZero (u)
        }
        """
    )
    with pytest.raises(UnsupportedOperatorError) as caught:
        load_onnx(model)
    assert caught.value.message.splitlines()[1:] == [
        "  ai.onnx.CumProd (opset 20): scan_one, scan_two",
        "  ai.onnx.NonZero (opset 20): nz",
        "  ai.onnx.Unique (opset 20): unique",
        "  com.acme.Magic (opset 2): magic",
    ]
    assert "4 operators" in caught.value.message
    assert caught.value.hint is not None and "kedge inspect" in caught.value.hint
    report = coverage(model)
    assert [use.title for use in report.unsupported] == [
        "ai.onnx.CumProd", "ai.onnx.NonZero", "ai.onnx.Unique", "com.acme.Magic",
    ]  # fmt: skip
    assert not report.supported
    assert "com.acme.Magic" in str(report) and "NO  (scan_one, scan_two)" in str(report)


def test_an_operator_that_onnx_does_not_know_either() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"ai\.onnx\.Frobnicate .* y"):
        load_onnx(one_node("g (float[2] x) => (float[2] y) { y = Frobnicate (x) }"))


def test_operators_inside_of_composite_ones_blame_the_composite() -> None:
    model = one_node("g (float[2, 3] x) => (float[2, 3] y) { [s] y = Shrink (x) }")
    model.graph.node[0].op_type = "Bernoulli"
    with pytest.raises(UnsupportedOperatorError, match=r"ai\.onnx\.Bernoulli \(opset 20\): s") as caught:
        load_onnx(model)
    assert "RandomUniformLike" not in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "words", "remedy"),
    [
        ({"images": (1, 1, 8, 8)}, "has no input 'images'", "did you mean 'image'"),
        ({"image": (1, 8, 8)}, r"has 4 dims \(N, 1, 8, 8\), but shapes= gives 3", "(1, 1, 8, 8)"),
        ({"image": (1, 3, 8, 8)}, "dim 1 of input 'image' is 1, but shapes= gives 3", "dynamic axes"),
        ({"image": (0, 1, 8, 8)}, "0 is not a dim", "positive integer"),
        ({"image": (-1, 1, 8, 8)}, "-1 is not a dim", "positive integer"),
        ({"image": (1, "C", 8, 8)}, "cannot become the symbol 'C'", "dynamic axes"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int | str, ...]], words: str, remedy: str) -> None:
    with pytest.raises(FrontendError, match=words) as caught:
        load_onnx(digits_model(), shapes)
    assert caught.value.hint is not None and remedy in caught.value.hint


def test_a_named_dim_has_one_size() -> None:
    model = one_node("g (float[N] a, float[N] b) => (float[N] c) { c = Add (a, b) }")
    with pytest.raises(FrontendError, match="dim 'N' two sizes, 2 and 3"):
        load_onnx(model, {"a": (2,), "b": (3,)})


def test_an_input_without_a_rank() -> None:
    model = one_node("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(FrontendError, match="no shape") as caught:
        load_onnx(model)
    assert caught.value.hint is not None and "--shape x=" in caught.value.hint
    assert load_onnx(model, {"x": (4,)}).functions["main"].outputs[0].type.shape == (4,)


def test_inputs_that_are_not_tensors_or_not_numbers() -> None:
    model = one_node("g (seq(float[4]) x) => (int64 y) { y = SequenceLength (x) }")
    with pytest.raises(FrontendError, match="input 'x' has type sequence"):
        load_onnx(model)
    with pytest.raises(FrontendError, match="element type STRING"):
        load_onnx(one_node("g (string[4] x) => (string[4] y) { y = Identity (x) }"))


def test_opsets_out_of_range() -> None:
    model = one_node("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    model.opset_import[0].version = NEWEST_OPSET + 1
    with pytest.raises(FrontendError, match=f"knows up to {NEWEST_OPSET}") as caught:
        load_onnx(model)
    assert caught.value.hint is not None and "pip install --upgrade onnx" in caught.value.hint


def test_a_node_whose_shapes_do_not_fit_is_named() -> None:
    with pytest.raises(FrontendError, match=r"node 'sum' \(Add\).*3 and 4 do not broadcast"):
        load_onnx(one_node("g (float[3] a, float[4] b) => (float c) { [sum] c = Add (a, b) }"))


def test_sizes_that_depend_on_data() -> None:
    model = one_node("g (float[3] x, int64[1] s) => (float y) { [r] y = Reshape (x, s) }")
    with pytest.raises(FrontendError, match=r"node 'r' .* shape .*computed while running"):
        load_onnx(model)


def test_an_invalid_attribute() -> None:
    model = one_node("g (float[1, 1, 4] x, float[1, 1, 3] w) => (float y) { [c] y = Conv <group = 1> (x, w) }")
    model.graph.node[0].attribute[0].f = 1.0
    model.graph.node[0].attribute[0].type = onnx.AttributeProto.FLOAT
    with pytest.raises(FrontendError, match="not a valid ONNX model"):
        load_onnx(model)


def external_model(tmp_path: Path) -> tuple[Path, np.ndarray]:
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path, weight


def test_external_data(tmp_path: Path) -> None:
    path, weight = external_model(tmp_path)
    np.testing.assert_array_equal(load_onnx(path).params["w"], weight)
    assert coverage(path).parameters == weight.size


def test_external_data_that_is_missing_short_or_elsewhere(tmp_path: Path) -> None:
    path, _ = external_model(tmp_path)
    data = tmp_path / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(FrontendError, match="truncated"):
        load_onnx(path)
    data.unlink()
    with pytest.raises(
        FrontendError, match=r"tensor 'w' needs the external data file .*weights\.bin, which is missing"
    ):
        load_onnx(path)
    model = onnx.load(path, load_external_data=False)
    with pytest.raises(FrontendError, match="was not loaded from a file"):
        load_onnx(model)
    model.graph.initializer[0].external_data[0].value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    (tmp_path.parent / "weights.bin").write_bytes(whole)
    with pytest.raises(FrontendError, match="outside of the model's folder"):
        load_onnx(path)
