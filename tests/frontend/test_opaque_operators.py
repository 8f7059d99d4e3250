"""Operators of which only types, a reference and a C function are known."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kedge
from kedge import patterns as p
from kedge.artifact import external_functions
from kedge.compiler.errors import CompileError, CompileWarning, FrontendError, ShapeError
from kedge.compiler.frontend.onnx import coverage
from kedge.compiler.graph import interp, parser, structural
from kedge.compiler.ops import registry
from kedge.validation import validate

DECAY = """
#include "kedge_external.h"
int32_t decay(const kedge_external_call *call) {
  float rate = (float)kedge_external_float(call, "rate", 0);
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  int64_t columns = call->inputs[0].shape[1];
  for (int64_t i = 0; i < call->inputs[0].shape[0]; i++) {
    float state = 0;
    for (int64_t j = 0; j < columns; j++) y[i * columns + j] = state = rate * state + x[i * columns + j];
  }
  return KEDGE_OK;
}
"""


def decay(arrays: list[np.ndarray], rate: float) -> np.ndarray:
    """A recurrence, which no tensor expression says."""
    (x,) = arrays
    result = np.zeros_like(x)
    for column in range(x.shape[1]):
        result[:, column] = x[:, column] + (np.float32(rate) * result[:, column - 1] if column else 0)
    return result


@pytest.fixture
def registered() -> Iterator[None]:
    with kedge.register_onnx(
        "my.domain", "Decay", infer=lambda types, rate: (types[0].shape, types[0].dtype), reference=decay
    ):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [
            helper.make_node("Decay", ["x"], ["h"], name="smooth", domain="my.domain", rate=0.5),
            helper.make_node("Relu", ["h"], ["y"], name="act"),
        ],
        "decay",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 9])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.domain", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "decay.onnx")
    return tmp_path / "decay.onnx"


def external(source: str = DECAY, **options: Any) -> kedge.External:
    pattern = p.op("my.domain.Decay", p.wildcard("x"), name="decay")
    return kedge.External("decay", pattern, source, attributes=lambda match: match.attrs("decay"), **options)


def x_of(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 9)).astype("float32")}


@pytest.mark.usefixtures("registered")
def test_a_model_compiles_with_its_code(model: Path) -> None:
    assert coverage(model).supported
    module = kedge.load(model)
    assert structural.equal(parser.parse(module.show()), module)
    artifact = kedge.compile(model, externals=[external()])
    with artifact.open() as m:
        for batch in (1, 7):
            expected = np.maximum(decay([x_of(batch)["x"]], 0.5), 0)
            np.testing.assert_allclose(m.run(x_of(batch))["y"], expected, rtol=1e-6)
            np.testing.assert_array_equal(interp.run(module, x_of(batch))["y"], expected)


@pytest.mark.usefixtures("registered")
def test_the_reference_checks_the_code(model: Path) -> None:
    right, wrong = external(), external(DECAY.replace("rate * state", "rate + state"))
    with kedge.local(threads=1) as device:
        for code in (right, wrong):
            report = validate(model, kedge.compile(model, externals=[code]), x_of(3), device, externals=[code])
            assert report.ok == (code is right)
            assert [layer.name for layer in report.layers if not layer.ok] == ([] if code is right else ["smooth"])


@pytest.mark.usefixtures("registered")
def test_without_code_it_is_refused_with_the_remedy(model: Path) -> None:
    with pytest.raises(CompileError, match=r"my\.domain\.Decay \(node smooth\) has no lowering") as caught:
        kedge.compile(model)
    assert 'kedge.External(…, pattern=p.op("my.domain.Decay"' in str(caught.value)


@pytest.mark.parametrize(("rate", "taken"), [(0.5, True), (0.25, False)])
def test_code_may_take_an_operator_that_te_defines(model: Path, rate: float, taken: bool) -> None:
    """Graphs name it with how it fuses; patterns need not. The pattern asks for a rate."""

    def scaled(tensors: Any, rate: float) -> Any:
        return kedge.te.compute(tensors[0].shape, lambda i, j: tensors[0][i, j] * rate, name="scaled")

    source = """
#include "kedge_external.h"
int32_t scaled(const kedge_external_call *call) {
  const float *x = kedge_data(&call->inputs[0]);
  float *y = kedge_data(&call->outputs[0]);
  for (int64_t i = 0; i < kedge_size(&call->inputs[0]); i++) y[i] = x[i] * 0.5f;
  return KEDGE_OK;
}
"""
    pattern = p.op("my.domain.Decay", p.wildcard("x"), attrs={"rate": rate})
    with kedge.te.register_onnx("my.domain", "Decay", scaled), warnings.catch_warnings():
        warnings.simplefilter("ignore" if not taken else "error", CompileWarning)
        artifact = kedge.compile(model, externals=[kedge.External("scaled", pattern, source)])
    assert external_functions(artifact.manifest) == (("scaled",) if taken else ())
    with artifact.open() as m:
        np.testing.assert_array_equal(m.run(x_of(2))["y"], np.maximum(x_of(2)["x"] * np.float32(0.5), 0))


def test_a_registration_is_taken_back(model: Path) -> None:
    with pytest.raises(FrontendError, match="Decay"):
        kedge.load(model)
    registration = kedge.register_onnx("my.domain", "Decay", infer=lambda types, rate: None, reference=decay)
    try:
        with pytest.raises(CompileError, match="registered already"):
            kedge.register_onnx("my.domain", "Decay", infer=lambda types: None, reference=decay)
    finally:
        registration.unregister()
    assert "my.domain.Decay" not in registry.names()
    with pytest.raises(CompileError, match="own domain"):
        kedge.register_onnx("", "Decay", infer=lambda types: None, reference=decay)


@pytest.mark.parametrize(
    ("infer", "reason"),
    [
        (lambda types, rate: None, "gives None, which is no shape and dtype"),
        (lambda types, rate: (types[0].shape, "float31"), "no shape and dtype"),
        (lambda types: (types[0].shape, "float32"), "infer fails: TypeError"),
        (lambda types, rate: (types[1].shape, "float32"), "infer fails: IndexError"),
    ],
)
def test_mistakes_of_infer_are_named(model: Path, infer: Any, reason: str) -> None:
    with (
        kedge.register_onnx("my.domain", "Decay", infer=infer, reference=decay),
        pytest.raises(CompileError, match=reason),
    ):
        kedge.load(model)


def test_mistakes_of_the_reference_are_named(model: Path) -> None:
    def infer(types: Any, rate: float) -> Any:
        return types[0].shape, "float32"

    def reference(arrays: Any, rate: float) -> Any:
        return arrays[0][:, 1:]

    with (
        kedge.register_onnx("my.domain", "Decay", infer=infer, reference=reference),
        pytest.raises(ShapeError, match=r"reference gives float32\[2, 8\], its type is float32\[2, 9\]"),
    ):
        interp.run(kedge.load(model), x_of(2))
