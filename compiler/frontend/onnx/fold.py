"""Evaluating nodes while importing: shape arithmetic on known numbers and on symbolic dims."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import onnx

from kedge.compiler.frontend.onnx.functions import schema_of
from kedge.compiler.frontend.onnx.model import dtype_name
from kedge.compiler.frontend.onnx.node import Array, Entry, Node
from kedge.compiler.frontend.onnx.symbolic import (
    FLOAT_FOLDERS,
    FOLDERS,
    Dims,
    Quotient,
    Ratio,
    UndecidableError,
    nesting,
)
from kedge.compiler.graph.ir import Constant
from kedge.compiler.tir.expr import Expr

#: Larger constants stay operators: they are not shape arithmetic, and the graph's own folding sees them later.
_LARGEST = 1 << 16
#: What shapes are scaled by, as floats; and how many floats that takes at most.
_SCALING = frozenset({"Add", "Sub", "Mul", "Div", "Concat"})
_FEW = 64
#: Numerators of larger floats, of infinities and NaN are no int64.
_LARGEST_FLOAT = 2.0**53
#: Of more divisions inside of each other nobody makes sizes, and each takes longer to simplify than the one before.
_DEEPEST = 32
#: Nor of as many operations, which entries compute in each call.
_LONGEST = 512
#: These may make a large tensor of a few numbers.
_GROWING = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "Pad", "Resize", "OneHot"})


def fold(node: Node) -> Sequence[Entry | None] | None:
    """The results of a node whose inputs are all known, or None where it has to run with the model."""
    if not node.proto.input or node.proto.domain not in ("", "ai.onnx"):
        return None
    places = range(len(node.proto.input))
    contents = [node.content(index) for index in places]
    if node.proto.op_type in _SCALING and any(isinstance(node.entry(index), (Dims, Constant)) for index in places):
        contents = [_factors(node, index) if content is None else content for index, content in enumerate(contents)]
    if any(content is None and node.has(index) for index, content in enumerate(contents)):
        return None
    given = [content for content in contents if content is not None]
    if any(content.dtype == object for content in given):
        return _fold_symbolic(node, contents)
    if node.proto.op_type in _GROWING and _grown(node.proto.op_type, given) > _LARGEST:
        return None
    if sum(content.size for content in given) > _LARGEST or not _is_foldable(node.proto, node.opset):
        return None
    return _fold_known(node, contents)


def _factors(node: Node, index: int) -> Array | None:
    """A few floats that an input holds."""
    data = node.literal(index)
    return data if data is not None and data.dtype.kind == "f" and data.size <= _FEW else None


def literal(items: Array, dtype: str) -> Entry:
    """Folded shape arithmetic: a constant where every element is known."""
    if any(isinstance(item, (Expr, Ratio, Quotient)) for item in items.reshape(-1)):
        return Dims(items, dtype)
    return Constant(items.astype(np.dtype(dtype)))


def _grown(op: str, given: Sequence[Array]) -> float:
    """Roughly how many elements the result may have."""
    if op == "ConstantOfShape":
        return float(np.prod(given[0], dtype=np.float64))
    if op in ("Expand", "Tile"):
        return float(given[0].size * np.prod(given[1], dtype=np.float64))
    if op == "Range":
        start, limit, delta = (float(content.reshape(())) for content in given)
        return abs((limit - start) / delta) if delta else 0.0
    return 0.0 if sum(content.size for content in given) <= 64 and op != "OneHot" else float(_LARGEST + 1)


def _is_foldable(proto: onnx.NodeProto, opset: int) -> bool:
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in proto.attribute):
        return False
    schema = schema_of(proto.op_type, opset)
    return schema is not None and bool(schema.node_determinism != onnx.defs.OpSchema.NodeDeterminism.NonDeterministic)


def _fold_symbolic(node: Node, contents: Sequence[Array | None]) -> Sequence[Entry] | None:
    dtype = _folded_dtype(node)
    folders = FLOAT_FOLDERS if dtype in ("float32", "float64") else FOLDERS
    evaluate = folders.get(node.proto.op_type)
    if evaluate is None or not dtype.startswith(("int", "bool", "float32", "float64")):
        return None
    floats = [content for content in contents if content is not None and content.dtype.kind == "f"]
    if not all((np.abs(each) < _LARGEST_FLOAT).all() for each in floats):
        return None
    try:
        # An input that is left out before others is empty.
        operands = [np.empty(0, object) if content is None else content.astype(object) for content in contents]
        while contents[len(operands) - 1] is None:
            operands.pop()
        items = evaluate(operands, node.attributes)
    except UndecidableError:
        return None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise node.error(f"shape arithmetic fails: {error}") from error
    for item in np.asarray(items, dtype=object).reshape(-1):
        depth, length = nesting(item)
        if depth <= _DEEPEST and length <= _LONGEST:
            continue
        what = f"{_DEEPEST} divisions, minima or maxima of free dims inside of each other"
        raise node.error(
            f"it makes a size of more than {what if depth > _DEEPEST else f'{_LONGEST} operations on free dims'}",
            hint="fix the dims: shapes={...} or --shape NAME=1,3,224,224",
        )
    return (literal(np.asarray(items, dtype=object), dtype),)


def _folded_dtype(node: Node) -> str:
    """The dtype of the result of an operator of `FOLDERS`."""
    op = node.proto.op_type
    if op == "Equal":
        return "bool"
    if op == "Cast":
        return dtype_name(node.importer.model, node.attr("to"), f"node {node.label!r}")
    return node.dtype(1 if op == "Where" else 0)


def _fold_known(node: Node, contents: Sequence[Array | None]) -> Sequence[Entry | None] | None:
    from onnx.reference import ReferenceEvaluator  # here, since few models need it and it takes long to import

    proto = node.proto
    feeds = {name: content for name, content in zip(proto.input, contents, strict=True) if content is not None}
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(data.dtype), data.shape)
        for name, data in feeds.items()
    ]
    names = [name for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "fold", infos, [onnx.ValueInfoProto(name=name) for name in names])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", node.opset)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overflow and division by zero are values like any other here
            results = ReferenceEvaluator(model).run(None, feeds)
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError, ArithmeticError) as error:
        raise node.error(f"cannot be evaluated on its constant inputs: {error}") from error
    if not all(isinstance(result, (np.ndarray, np.generic)) for result in results):
        return None  # a sequence or an optional
    found = {name: Constant(np.asarray(result)) for name, result in zip(names, results, strict=True)}
    return [found.get(name) for name in proto.output]
