"""Whole models through machine code, against ONNX's own evaluator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import kedge
from kedge.compiler.frontend.onnx import load_onnx


def residual_network() -> onnx.ModelProto:
    """Three layers of stride 2, the last in a residual block, over images of any size."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.normal(size=(8, 3, 5, 5)), "left": rng.normal(size=(8, 8, 3, 3)),
        "right": rng.normal(size=(8, 8, 1, 1)), "head": rng.normal(size=(10, 8)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], strides=[2, 2], pads=[2] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Conv", ["c", "left"], ["d"], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Conv", ["c", "right"], ["e"], strides=[2, 2]),
        helper.make_node("Add", ["d", "e"], ["f"]),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", "head"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array((data * 0.1).astype(np.float32), name) for name, data in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("target", ["native", "llvm -mtriple=x86_64-linux-gnu"])
def test_images_of_any_size(target):
    model = residual_network()
    reference = ReferenceEvaluator(model)
    artifact = kedge.compile(load_onnx(model), target=target)
    with artifact.open(threads=2) as network:
        for shape in ((1, 3, 32, 40), (2, 3, 33, 31), (3, 3, 5, 64)):
            x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
            (expected,) = reference.run(None, {"x": x})
            np.testing.assert_allclose(network.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-5)
