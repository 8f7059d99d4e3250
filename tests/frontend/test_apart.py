"""Large weights of a file are read apart from the rest, and nobody can tell by what is imported."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx import apart, load_onnx, model
from kedge.compiler.graph.structural import equal

RNG = np.random.default_rng(0)
DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool"]


def weight(dtype: str, size: int = 40) -> np.ndarray:  # type: ignore[type-arg]
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return (RNG.standard_normal((3, size)) * 9).astype(kind)


def model_of(weights: dict[str, onnx.TensorProto], opset: int = 18) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights]
    nodes.insert(1, helper.make_node("Constant", [], ["literal"], value=numpy_helper.from_array(weight("float32"))))
    nodes.append(helper.make_node("Identity", ["literal"], ["literal_out"]))
    types = {name: tensor.data_type for name, tensor in weights.items()} | {"literal": TensorProto.FLOAT}
    outputs = [helper.make_tensor_value_info(f"{name}_out", type_, None) for name, type_ in types.items()]
    graph = helper.make_graph(nodes, "g", [], outputs, list(weights.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LEAST_BYTES", 64)


def test_every_dtype(tmp_path: Path) -> None:
    arrays = {dtype: weight(dtype) for dtype in DTYPES}
    arrays["tiny"] = weight("float32", 2)
    proto = model_of({name: numpy_helper.from_array(array, name) for name, array in arrays.items()})
    path = written(tmp_path, proto)
    split = apart.read_apart(path)
    assert split is not None and len(split[1]) == len(DTYPES)
    assert all(array.tobytes() not in split[0] for name, array in arrays.items() if name != "tiny")
    loaded = load_onnx(path)
    assert equal(loaded, load_onnx(proto))
    for name, data in loaded.params.items():
        assert data.dtype == arrays[name].dtype and data.tobytes() == arrays[name].tobytes()
    assert loaded.params.keys() >= {"float32", "float64", "float16", "bfloat16"}


def test_what_is_not_plain_stays_where_it_is(tmp_path: Path) -> None:
    floats = helper.make_tensor("floats", TensorProto.FLOAT, (40,), list(map(float, range(40))))
    int4 = helper.make_tensor("int4", TensorProto.INT4, (400,), bytes(200), raw=True)
    split = apart.read_apart(written(tmp_path, model_of({"floats": floats, "int4": int4})))
    assert split is not None and not split[1]


def test_old_opsets_and_functions(tmp_path: Path) -> None:
    array = weight("float32")
    tensors = {"w": numpy_helper.from_array(array, "w")}
    old = load_onnx(written(tmp_path, model_of(tensors, opset=9)))
    assert old.params["w"].tobytes() == array.tobytes()
    own = helper.make_function(
        "my", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 18)]
    )
    proto = model_of(tensors)
    proto.functions.append(own)
    proto.opset_import.append(helper.make_opsetid("my", 1))
    proto.graph.node.insert(0, helper.make_node("Twice", ["w"], ["twice"], domain="my"))
    proto.graph.output.append(helper.make_tensor_value_info("twice", TensorProto.FLOAT, None))
    assert equal(load_onnx(written(tmp_path, proto)), load_onnx(proto))


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = model_of({"w": numpy_helper.from_array(weight("float32"), "w")}).SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(FrontendError) as caught:
            load_onnx(path)
        with pytest.raises(FrontendError) as whole:
            load_onnx(data[:size])
        assert caught.value.message == whole.value.message.replace("model ", f"{path} ", 1), size


def test_data_of_another_size_than_the_shape_is_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(weight("float32"), "w")
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(FrontendError, match=r"'w' of shape \[3, 40\] is corrupt"):
        load_onnx(written(tmp_path, model_of({"w": tensor})))


def test_a_reference_of_the_file_s_own_is_no_data(tmp_path: Path) -> None:
    """Nor is one that an earlier read of the file has made."""
    tensor = numpy_helper.from_array(weight("float32"), "w")
    split = apart.read_apart(written(tmp_path, model_of({"w": tensor})))
    assert split is not None
    (earlier,) = split[1]
    for location in ("\0apart 0", earlier):
        other = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[3, 40], data_location=TensorProto.EXTERNAL)
        other.external_data.add(key="location", value=location)
        with pytest.raises(FrontendError, match=r"'v' refers to external data at .* outside"):
            load_onnx(written(tmp_path, model_of({"w": tensor, "v": other})))


def test_an_unusual_layout_is_parsed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model_of({"w": numpy_helper.from_array(weight("float32"), "w")})
    again = onnx.ModelProto(graph=onnx.GraphProto(doc_string="a second piece of the graph"))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString() + again.SerializeToString())
    assert apart.read_apart(path) is None and equal(load_onnx(path), load_onnx(proto))
    monkeypatch.setattr(model, "read_apart", lambda _: pytest.fail("bytes have no path"))
    assert equal(load_onnx(path.read_bytes()), load_onnx(proto))
