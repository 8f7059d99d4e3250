"""ONNX's own conformance data: every test whose operators kedge claims has to pass, or stand in `conformance.toml`."""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

import kedge
from kedge.compiler.errors import FrontendError, UnsupportedOperatorError
from kedge.compiler.frontend.onnx import converted_ops, coverage, load_onnx
from kedge.compiler.graph import interp
from kedge.compiler.graph.ir import Module
from kedge.rpc.errors import KedgeError
from support import opencl

DataSet = tuple[Sequence[Any], Sequence[Any]]
Evaluate = Callable[[Module, dict[str, Any]], dict[str, Any]]


@dataclass
class Outcome:
    passed: list[str] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    excused: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)


SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("conformance.toml").read_text())


def exclusions(kind: str) -> dict[str, str]:
    table: dict[str, str] = SETTINGS[kind]
    return table


def to_array(value: Any) -> Any:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def data_sets(case: TestCase, model: onnx.ModelProto) -> Iterator[DataSet]:
    for inputs, outputs in case.data_sets or ():
        yield [to_array(value) for value in inputs], [to_array(value) for value in outputs]
    folders = sorted(Path(case.model_dir).glob("test_data_set_*")) if case.model_dir else []
    for folder in folders:
        arrays = []
        for kind, infos in (("input", model.graph.input), ("output", model.graph.output)):
            files = [folder / f"{kind}_{index}.pb" for index in range(len(infos))]
            protos = [onnx.TensorProto.FromString(path.read_bytes()) for path in files if path.exists()]
            arrays.append([numpy_helper.to_array(proto) for proto in protos])
        yield arrays[0], arrays[1]


def with_constants(model: onnx.ModelProto, inputs: Sequence[Any]) -> onnx.ModelProto:
    """The tests pass shapes, axes and the like as inputs; a model that kedge compiles has them as constants.

    So all inputs but the first whose rank is at most 1 become initializers, and the first where it is a number.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for position, (info, value) in enumerate(zip(model.graph.input, inputs, strict=False)):
        array = np.asarray(value)
        first = array.ndim == 0 or model.graph.node[0].op_type in ("ConstantOfShape", "If")
        if array.ndim <= 1 and (position > 0 or first):
            result.graph.initializer.append(numpy_helper.from_array(array, info.name))
    return result


def interpreted(module: Module, feeds: dict[str, Any]) -> dict[str, Any]:
    return interp.run(module, feeds)


def compiled(module: Module, feeds: dict[str, Any]) -> dict[str, Any]:
    with kedge.compile(module, target="native").open(threads=1) as loaded:
        return dict(loaded.run(feeds))


def check(case: TestCase, model: onnx.ModelProto, evaluate: Evaluate = interpreted) -> None:
    sets = list(data_sets(case, model))
    assert sets, "no data"
    for inputs, expected in sets:
        try:
            module = load_onnx(model)
            free = model
        except UnsupportedOperatorError:
            raise
        except FrontendError as error:
            if "computed while running" not in str(error):
                raise
            free = with_constants(model, inputs)
            module = load_onnx(free)
        bound = {tensor.name for tensor in free.graph.initializer}
        names = [info.name for info in free.graph.input]
        feeds = {name: value for name, value in zip(names, inputs, strict=False) if name not in bound}
        with np.errstate(all="ignore"):  # some cases are about infinities and NaNs
            results = evaluate(module, feeds)
        for name, want in zip(module.functions["main"].output_names, expected, strict=True):
            got = results[name]
            assert (str(got.dtype), got.shape) == (str(want.dtype), want.shape), name
            if want.dtype == "bfloat16":  # onnx's tolerance is float32's; these are two units in the last place
                wide = (got.astype(np.float32), want.astype(np.float32))
                np.testing.assert_allclose(*wide, rtol=2**-6, atol=case.atol)
            elif want.dtype.kind == "f":
                np.testing.assert_allclose(got, want, rtol=case.rtol, atol=case.atol)
            else:
                np.testing.assert_array_equal(got, want)


def run(cases: Sequence[TestCase], excluded: dict[str, str]) -> Outcome:
    outcome = Outcome()
    for case in cases:
        model = case.model or onnx.load(str(Path(case.model_dir) / "model.onnx"))
        patterns = [pattern for pattern in excluded if fnmatch(case.name, pattern)]
        try:
            check(case, model)
        except UnsupportedOperatorError as error:
            blamed = {line.split()[0].removeprefix("ai.onnx.") for line in str(error).splitlines()[1:-1]}
            assert blamed.isdisjoint(converted_ops()), case.name
            outcome.unclaimed.append(case.name)
        except (AssertionError, FrontendError, ValueError) as error:
            if not patterns and not is_outside(error):
                outcome.failed.append(f"{case.name}: {' '.join(str(error).split())[:300]}")
            outcome.excused.update(patterns)
        else:
            outcome.passed.append(case.name)
    return outcome


def is_outside(error: Exception) -> bool:
    """Element types and kinds of values that no operator of kedge is claimed for."""
    return isinstance(error, FrontendError) and any(words in str(error) for words in exclusions("refusals"))


def load(kind: str) -> list[TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes infinities and NaNs for its expectations
        return load_model_tests(kind=kind)


@pytest.fixture(scope="module")
def nodes() -> list[TestCase]:
    """The cases of single operators; onnx computes what it expects of them in four seconds."""
    return load("node")


@pytest.fixture(scope="module")
def interpreted_nodes(nodes: list[TestCase]) -> Outcome:
    """How they fare in the interpreter."""
    return run(nodes, exclusions("node"))


def assert_conforms(outcome: Outcome, excluded: dict[str, str], at_least: int) -> None:
    if onnx.__version__ == SETTINGS["onnx"]:
        assert not outcome.failed, "\n".join(outcome.failed)
        assert outcome.excused == set(excluded), f"excuse nothing: {set(excluded) - outcome.excused}"
    assert len(outcome.passed) >= at_least, "\n".join(outcome.failed)


def test_node_conformance(interpreted_nodes: Outcome) -> None:
    assert_conforms(interpreted_nodes, exclusions("node"), at_least=1190)


#: The operators of image classifiers and MLPs: their cases also go through machine code.
COMPILED = (
    "test_add*", "test_averagepool_2d_*", "test_basic_conv_*", "test_batchnorm_e*", "test_cast_FLOAT_to_DOUBLE",
    "test_clip*", "test_concat_*", "test_conv_*", "test_convtranspose*", "test_div*", "test_dropout_default",
    "test_flatten_*", "test_gemm_*", "test_globalaveragepool*", "test_identity", "test_matmul_*", "test_maxpool_2d_*",
    "test_mul*", "test_*_pad", "test_reduce_max_*", "test_reduce_mean_*", "test_reduce_sum_*", "test_relu",
    "test_reshape_*", "test_resize_*", "test_sigmoid*", "test_slice*", "test_softmax_*", "test_squeeze*", "test_sub*",
    "test_tanh*", "test_transpose_*", "test_unsqueeze_*",
)  # fmt: skip


def run_compiled(cases: Sequence[TestCase], interpreted: Outcome, evaluate: Evaluate) -> int:
    """How many cases that pass in the interpreter pass as compiled code, too; none may fail there."""
    failed, passed, names = [], 0, set(interpreted.passed)
    for case in cases:
        if case.name not in names:
            continue
        model = case.model or onnx.load(str(Path(case.model_dir) / "model.onnx"))
        try:
            check(case, model, evaluate)
        except (AssertionError, KedgeError) as error:
            failed.append(f"{case.name}: {' '.join(str(error).split())[:300]}")
        else:
            passed += 1
    assert not failed, "\n".join(failed)
    return passed


def test_node_conformance_of_compiled_code(nodes: list[TestCase], interpreted_nodes: Outcome) -> None:
    """Cases that pass in the interpreter pass as machine code; which those are, the test above says."""
    cases = [case for case in nodes if any(fnmatch(case.name, pattern) for pattern in COMPILED)]
    assert run_compiled(cases, interpreted_nodes, compiled) >= 190


#: One case for each way in which functions come to threads: OpenCL takes about a second for each kernel.
ON_OPENCL = (
    "test_argmax_default_axis_example", "test_attention_4d", "test_averagepool_2d_pads", "test_batchnorm_example",
    "test_cast_FLOAT_to_BFLOAT16", "test_cast_FLOAT16_to_DOUBLE", "test_concat_3d_axis_1",
    "test_conv_with_strides_padding", "test_gemm_all_attributes", "test_logsoftmax_large_number", "test_matmul_bcast",
    "test_maxpool_2d_ceil", "test_mod_mixed_sign_int8", "test_reduce_l2_do_not_keepdims_random",
    "test_softmax_large_number", "test_transpose_all_permutations_2", "test_where_long_example",
)  # fmt: skip


def on_opencl(module: Module, feeds: dict[str, Any]) -> dict[str, Any]:
    with kedge.compile(module, target="opencl").open(device="opencl") as loaded:
        return dict(loaded.run(feeds))


def test_node_conformance_on_opencl(nodes: list[TestCase], interpreted_nodes: Outcome) -> None:
    opencl.require()
    cases = [case for case in nodes if case.name in ON_OPENCL]
    assert run_compiled(cases, interpreted_nodes, on_opencl) == len(ON_OPENCL)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_all_of_node_conformance_on_opencl(nodes: list[TestCase], interpreted_nodes: Outcome, part: int) -> None:
    opencl.require()
    passed = run_compiled(nodes[part::20], interpreted_nodes, on_opencl)
    assert passed >= 20


def test_models_exported_from_pytorch() -> None:
    excluded = exclusions("converted")
    cases = [case for kind in ("pytorch-operator", "pytorch-converted", "simple") for case in load(kind)]
    assert_conforms(run(cases, excluded), excluded, at_least=110)


CLASSIFIERS = (
    "bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet", "vgg19",
    "zfnet512",
)  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_classifiers_import(name: str) -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    assert coverage(path).supported
    main = load_onnx(path).functions["main"]
    (output,) = main.outputs
    stated = onnx.load(path).graph.output[0].type.tensor_type.shape.dim
    assert output.type.shape == tuple(dim.dim_value for dim in stated)
