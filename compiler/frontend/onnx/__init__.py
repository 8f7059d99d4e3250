"""The ONNX front end: `load_onnx` turns a model into a kedge module, `coverage` says beforehand whether it can.

`model` reads and checks files, `inputs` types the inputs and names the symbolic dims, `importer` walks the nodes,
`fold` and `symbolic` evaluate shape arithmetic, `functions` takes composite operators apart. The converters stand in
the modules of `FAMILIES`, one file per family.
"""

from __future__ import annotations

from collections.abc import Mapping

from kedge.compiler.frontend.onnx import (
    control,
    counting,
    einsum,
    elementwise,
    linear,
    normalize,
    reduce,
    resize,
    shape,
    window,
)
from kedge.compiler.frontend.onnx.coverage import Coverage, OperatorUse, survey
from kedge.compiler.frontend.onnx.importer import Importer
from kedge.compiler.frontend.onnx.inputs import ShapeSpec
from kedge.compiler.frontend.onnx.model import (
    NEWEST_OPSET,
    OLDEST_OPSET,
    Model,
    Source,
    external_files,
    read_model,
    uses_own_domains,
)
from kedge.compiler.frontend.onnx.node import converted_ops
from kedge.compiler.graph.ir import Module

#: Importing these files declares their converters.
FAMILIES = (control, counting, einsum, elementwise, linear, normalize, reduce, resize, shape, window)


def load_onnx(model: Source, shapes: Mapping[str, ShapeSpec] | None = None) -> Module:
    """Import an ONNX model as a module with the function "main".

    Opsets from 13 on are read as they are; ONNX's own converter brings older ones up to 13 first.

    Weights become `Param`s with their data bound. A named dim of the model becomes one symbolic dim of at least 1
    wherever the name occurs, an unnamed one a symbol of its own. Where no output has elements without it, as for a
    batch, a call may give 0, too.

    Args:
        model: a path, the bytes of a file, or an `onnx.ModelProto`. External data is looked for beside the path.
        shapes: for inputs whose dims are to be set: `{"x": (1, 3, 224, 224)}`. An entry may also be the name of a
            symbolic dim, or None to keep what the model says.

    Raises:
        UnsupportedOperatorError: naming every operator of the model that kedge does not know, with its nodes.
        FrontendError: a file that is missing, truncated, corrupt or not ONNX; shapes that do not fit the model; a
            node outside of what its operator allows.
    """
    return import_model(read_model(model), shapes)


def import_model(model: Model, shapes: Mapping[str, ShapeSpec] | None = None) -> Module:
    """The module of a model that `read_model` has read; see `load_onnx`."""
    return Importer(model).run(shapes or {})


def coverage(model: Source) -> Coverage:
    """Which operators a model uses, which of them kedge has, and what goes in and out; `str()` of it is a table.

    Raises:
        FrontendError: as `load_onnx`, for a file that cannot be read.
    """
    return survey(read_model(model))


__all__ = [
    "NEWEST_OPSET", "OLDEST_OPSET", "Coverage", "Model", "OperatorUse", "ShapeSpec", "converted_ops", "coverage",
    "external_files", "import_model", "load_onnx", "read_model", "uses_own_domains",
]  # fmt: skip
