"""Models of one operator, and what ONNX Runtime and kedge's machine code make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import kedge
from kedge.compiler.frontend.onnx import load_onnx

Array = np.ndarray[Any, Any]


def one_operator(
    op: str,
    inputs: Sequence[Array | None],
    *,
    constant: Sequence[int] = (),
    free: Mapping[int, Sequence[int]] | None = None,
    outputs: Sequence[str] = ("float32",),
    opset: int = 20,
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of the node `node` with inputs x0, x1, … and outputs y0, y1, …, and what to feed it with.

    Args:
        inputs: the inputs; None for one that is left out.
        constant: which of them are initializers instead.
        free: which dims of which input are symbolic.
        outputs: the dtypes of the outputs.
    """
    names = ["" if array is None else f"x{index}" for index, array in enumerate(inputs)]
    given = {name: array for name, array in zip(names, inputs, strict=True) if array is not None}
    fixed = {f"x{index}" for index in constant}
    infos = []
    for name, array in given.items():
        symbols = (free or {}).get(int(name[1:]), ())
        shape = [f"{name}_{axis}" if axis in symbols else size for axis, size in enumerate(array.shape)]
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    results = {f"y{index}": helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for index, dtype in enumerate(outputs)}
    graph = helper.make_graph(
        [helper.make_node(op, names, list(results), name="node", **attributes)],
        "g",
        [info for info in infos if info.name not in fixed],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in results.items()],
        [numpy_helper.from_array(array, name) for name, array in given.items() if name in fixed],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model, {name: array for name, array in given.items() if name not in fixed}


def onnxruntime_outputs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs by name that ONNX Runtime computes, unoptimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


@contextmanager
def compiled(model: onnx.ModelProto, target: str = "native") -> Iterator[Any]:
    """The model as machine code, opened in this process."""
    with kedge.compile(load_onnx(model), target=target).open(threads=1) as loaded:
        yield loaded


def check_compiled(
    model: onnx.ModelProto, *feeds: Mapping[str, Array], rtol: float = 1e-4, atol: float = 1e-5
) -> list[dict[str, Array]]:
    """Machine code, compiled once, gives what ONNX Runtime gives for each of `feeds`; returns what it gave."""
    results = []
    with compiled(model) as loaded:
        for feed in feeds:
            want = onnxruntime_outputs(model, feed)
            got = dict(loaded.run(feed))
            for name, array in want.items():
                assert got[name].dtype == array.dtype, name
                np.testing.assert_allclose(got[name], array, rtol=rtol, atol=atol, strict=True, err_msg=name)
            results.append(got)
    return results
