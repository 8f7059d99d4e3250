"""Reading ONNX files: everything that can be wrong with a file is refused here, before the import begins."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import inliner, numpy_helper, version_converter

from kedge.compiler.dtypes import DTYPES
from kedge.compiler.errors import FrontendError
from kedge.compiler.frontend.onnx.apart import read_apart

Array: TypeAlias = np.ndarray[Any, Any]
Source: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto"

OLDEST_OPSET = 13
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()
DEFAULT_DOMAINS = ("", "ai.onnx")
_SMALL_BYTES = 1 << 12
_WIDEST_BYTES = 16  # of an element: complex128
_MAX_CHECKED_BYTES = 1 << 30  # the checker serializes the model: protobuf ends at 2 GiB
_EXPORT_AGAIN = "export the model again, or copy it again and compare its size and checksum with the original"


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A parsed and checked model. `source` names it in messages; `folder` is where its external data lies.

    `apart` is the data of initializers that were read apart from the message, by location (see `apart.read_apart`).
    """

    proto: onnx.ModelProto
    source: str
    folder: Path | None
    apart: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def opsets(self) -> Mapping[str, int]:
        """The opset version of every domain that the model imports; the default domain is ""."""
        return {_domain(entry.domain): entry.version for entry in self.proto.opset_import}

    @property
    def opset(self) -> int:
        """The version of the default domain."""
        return self.opsets.get("", NEWEST_OPSET)


def read_model(source: Source) -> Model:
    """Parse `source` (a path, a file's bytes, or a `ModelProto`) and check that it is whole.

    External data stays in its files until `tensor_data` maps it. Model-local functions are inlined, and opsets older
    than `OLDEST_OPSET` are brought up to it by ONNX's own converter.

    Raises:
        FrontendError: no such file; not ONNX; truncated or corrupt; an opset that onnx does not know or cannot convert.
    """
    if isinstance(source, onnx.ModelProto):
        model = Model(source, source.graph.name or "model", None)
    elif isinstance(source, bytes):
        model = Model(_parse(source, "model"), "model", None)
    else:
        model = _read_file(Path(source))
    _check_complete(model)
    model = _at_known_opset(model)
    if model.proto.functions:
        model = replace(model, proto=_inline(model))
    return model


def _read_file(path: Path) -> Model:
    """The parsed file, with large weights apart unless ONNX's converter will want them in their places."""
    source = str(path)
    try:
        split = read_apart(path) if path.is_file() else None
    except OSError as error:
        raise _unreadable(path, error) from error
    if split is not None:
        rest, data = split
        model = Model(_parse(rest, source), source, path.parent, data)
        if not data or model.opset >= OLDEST_OPSET:
            return model
    return Model(_parse(_read(path), source), source, path.parent)


def check(model: Model) -> None:
    """Run ONNX's own checker (types, attributes, order of nodes).

    The checker stops at the first operator that ONNX does not know. Where there is one, the import will name all of
    those, and only the other nodes are checked here.

    Raises:
        FrontendError: with the checker's own words.
    """
    nodes = all_nodes(model)
    known = [node for node in nodes if _is_known(node, model.opset)]
    try:
        if len(known) == len(nodes):
            bare = _checkable(model)
            if bare.ByteSize() <= _MAX_CHECKED_BYTES:
                onnx.checker.check_model(bare)
        else:
            _check_nodes(model, known)
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise FrontendError(f"{model.source} is not a valid ONNX model: {error}", hint=_EXPORT_AGAIN) from error


def _is_known(node: onnx.NodeProto, opset: int) -> bool:
    return _domain(node.domain) != "" or onnx.defs.has(node.op_type, max_inclusive_version=opset, domain="")


def _check_nodes(model: Model, nodes: Iterable[onnx.NodeProto]) -> None:
    context = onnx.checker.DEFAULT_CONTEXT.__class__()
    context.ir_version = model.proto.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.proto.opset_import}
    for node in nodes:
        if not any(subgraphs(node)):
            onnx.checker.check_node(node, context)


def _checkable(model: Model) -> onnx.ModelProto:
    """A copy without data, and without what the checker would stumble over although it is in order."""
    bare, graph = onnx.ModelProto(), model.proto.graph
    _copy_fields(model.proto, bare, but="graph")
    _copy_fields(graph, bare.graph, but="initializer")
    for tensor in _tensors(bare.graph):
        if _is_bulky(tensor):
            tensor.CopyFrom(_hollow(tensor))
    bare.graph.initializer.extend(_hollow(tensor) if _is_bulky(tensor) else tensor for tensor in graph.initializer)
    for info in (*bare.graph.input, *bare.graph.output, *bare.graph.value_info):
        # A rank may be unknown: `shapes=` gives those of inputs, and the import works out the others.
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    return bare


def _copy_fields(source: Any, copy: Any, *, but: str) -> None:
    """Copy the fields of a message but for one: nothing as large as weights is copied to be dropped again."""
    for known, value in source.ListFields():
        if known.name == but:
            continue
        own = getattr(copy, known.name)
        if hasattr(own, "MergeFrom"):  # a message, or several of anything
            own.MergeFrom(value)
        else:
            setattr(copy, known.name, value)


def _is_bulky(tensor: onnx.TensorProto) -> bool:
    """Whether the checker should not see the data, which `tensor_data` checks.

    It would look for external data in the current folder, and serializing large weights for it takes longer than all
    the rest. Their length is worked out, since reading it copies them.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True
    return bool(tensor.HasField("raw_data")) and math.prod(tensor.dims) * _WIDEST_BYTES > _SMALL_BYTES


def _hollow(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0], raw_data=b"")


def tensor_data(model: Model, tensor: onnx.TensorProto) -> Array:
    """The array that `tensor` holds; external data is mapped read-only, not copied.

    Raises:
        FrontendError: missing external file, too few bytes, a path that leaves the model's folder, a text tensor.
    """
    if tensor.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        raise FrontendError(
            f"{model.source}: tensor {tensor.name!r} holds {onnx.TensorProto.DataType.Name(tensor.data_type)} data",
            hint="kedge compiles numeric tensors only; do text processing outside of the model",
        )
    apart = _apart_data(model, tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL and apart is None:
        return _external_data(model, tensor)
    try:
        if apart is not None:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            return np.frombuffer(apart, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(tensor.dims)
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise FrontendError(
            f"{model.source}: tensor {tensor.name!r} of shape {list(tensor.dims)} is corrupt: {error}",
            hint=_EXPORT_AGAIN,
        ) from error


def dtype_name(model: Model, elem_type: int, what: str) -> str:
    """The numpy dtype name of an ONNX element type; `what` names the value in the message.

    Raises:
        FrontendError: a type that no kernel can compute with (string, complex, 4-bit, …).
    """
    try:
        name = str(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    except (KeyError, ValueError, TypeError):
        name = "unknown"
    if name not in DTYPES:
        label = element_type_label(elem_type)
        raise FrontendError(
            f"{model.source}: {what} has element type {label}, which kedge cannot compute with",
            hint="use a float, integer or bool tensor",
        )
    return name


def element_type_label(elem_type: int) -> str:
    """ONNX's name of an element type, or its number where it has none."""
    known = elem_type in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(elem_type)) if known else f"number {elem_type}"


def _domain(domain: str) -> str:
    return "" if domain in DEFAULT_DOMAINS else domain


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise FrontendError(f"{path} is a folder, not a model", hint="name the .onnx file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FrontendError(
            f"there is no file {path}", hint="check the path; relative paths start at the current folder"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> FrontendError:
    return FrontendError(f"{path} cannot be read: {error.strerror}", hint="check its permissions")


def _parse(data: bytes, source: str) -> onnx.ModelProto:
    foreign = _foreign_format(data)
    if foreign:
        raise FrontendError(f"{source} is not an ONNX model but {foreign[0]}", hint=foreign[1])
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except MemoryError:
        raise
    except Exception as error:
        # onnx lets protobuf's DecodeError through, and protobuf is not this floor's to import.
        raise FrontendError(
            f"{source} is not an ONNX model, or is truncated or corrupt ({len(data)} bytes)", hint=_EXPORT_AGAIN
        ) from error
    return proto


def _foreign_format(data: bytes) -> tuple[str, str] | None:
    if not data:
        return "an empty file", _EXPORT_AGAIN
    if data.startswith(b"PK\x03\x04"):
        if b"manifest.json" in data[:4096]:
            return "a zip (a .kdg artifact?)", "an artifact is already compiled: use kedge run, bench or inspect"
        return "a zip (a PyTorch checkpoint or an archive?)", "export PyTorch models with torch.onnx.export"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "fetch the file itself with: git lfs pull"
    if data[4:8] == b"TFL3":
        return "a TensorFlow Lite model", "convert it with tf2onnx"
    if data.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras?)", "convert it with tf2onnx"
    return None


def _check_complete(model: Model) -> None:
    proto = model.proto
    whole = proto.HasField("graph") and proto.ir_version > 0 and len(proto.graph.output) > 0
    if not whole or not all(node.op_type for node in _nodes(proto.graph)):
        raise FrontendError(f"{model.source} is not an ONNX model, or is truncated or corrupt", hint=_EXPORT_AGAIN)
    # protobuf hands out names that are not UTF-8 as bytes.
    garbled = next((name for name in _names(proto) if isinstance(name, bytes)), None)
    if garbled is not None:
        raise FrontendError(f"{model.source} is corrupt: {garbled!r} is not a name", hint=_EXPORT_AGAIN)
    if not proto.opset_import:
        raise FrontendError(f"{model.source} names no opset: it is truncated or corrupt", hint=_EXPORT_AGAIN)


def _at_known_opset(model: Model) -> Model:
    """`model`, brought to `OLDEST_OPSET` by ONNX's own converter where it is older."""
    opset = model.opset
    if opset > NEWEST_OPSET:
        raise FrontendError(
            f"{model.source} uses opset {opset}; the installed onnx {onnx.__version__} knows up to {NEWEST_OPSET}",
            hint="pip install --upgrade onnx, or export with an older opset_version",
        )
    if opset >= OLDEST_OPSET:
        return model
    again = f"export it with opset_version={OLDEST_OPSET} or newer"
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.proto.graph)):
        raise FrontendError(
            f"{model.source} uses opset {opset} and external data; kedge reads {OLDEST_OPSET} to {NEWEST_OPSET}",
            hint=again,
        )
    try:
        converted = version_converter.convert_version(model.proto, OLDEST_OPSET)
    except (RuntimeError, ValueError) as error:
        raise FrontendError(
            f"{model.source} uses opset {opset}, which onnx cannot convert to {OLDEST_OPSET}: {error}", hint=again
        ) from error
    # Before IR version 4 weights had to be inputs as well; the converter adds some that are not.
    converted.ir_version = max(converted.ir_version, 4)
    return Model(converted, model.source, model.folder)


def _inline(model: Model) -> onnx.ModelProto:
    try:
        return inliner.inline_local_functions(model.proto)
    except (RuntimeError, ValueError) as error:
        raise FrontendError(
            f"{model.source}: its local functions cannot be inlined: {error}", hint=_EXPORT_AGAIN
        ) from error


def subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    """The graphs among a node's attributes (bodies of If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _names(proto: onnx.ModelProto) -> Iterable[str | bytes]:
    yield from (proto.producer_name, proto.producer_version, proto.graph.name)
    yield from (entry.domain for entry in proto.opset_import)
    graph = proto.graph
    for named in (*graph.input, *graph.output, *graph.initializer):
        yield named.name
    for info in (*graph.input, *graph.output):
        yield from (dim.dim_param for dim in info.type.tensor_type.shape.dim)
    for node in _nodes(graph):
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in subgraphs(node):
            yield from _nodes(body)


def all_nodes(model: Model) -> tuple[onnx.NodeProto, ...]:
    """Every node of a model, those in the bodies of control flow included."""
    return tuple(_nodes(model.proto.graph))


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    yield from graph.initializer
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            for body in subgraphs(node):
                yield from body.initializer


def external_files(model: Model) -> tuple[str, ...]:
    """The files that hold data of a model beside its own, as it names them: relative to its folder. They follow from
    the model's bytes alone, and may be missing."""
    tensors = (each for each in _tensors(model.proto.graph) if each.data_location == onnx.TensorProto.EXTERNAL)
    entries = (entry for tensor in tensors for entry in tensor.external_data if entry.key == "location")
    return tuple(sorted({str(entry.value) for entry in entries} - set(model.apart)))


def uses_own_domains(model: Model) -> bool:
    """Whether nodes are of other domains than ONNX's: what they mean is not in the model, but with who registers it."""
    return any(_domain(node.domain) for node in all_nodes(model))


def _apart_data(model: Model, tensor: onnx.TensorProto) -> bytes | None:
    """The data of a tensor that was read apart; None for any other."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return model.apart.get(location)


def _external_data(model: Model, tensor: onnx.TensorProto) -> Array:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    what = f"{model.source}: tensor {tensor.name!r}"
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    count = int(np.prod(shape, dtype=np.int64))
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", count * dtype.itemsize))
    except ValueError as error:
        raise FrontendError(f"{what} has a corrupt external reference: {error}", hint=_EXPORT_AGAIN) from error
    path = _external_path(model, entries.get("location", ""), what)
    try:
        available = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if length != count * dtype.itemsize or offset < 0 or offset + length > available:
        raise FrontendError(
            f"{what} of type {dtype} and shape {list(shape)} needs {count * dtype.itemsize} bytes at offset {offset} "
            f"of {path}, which has {available}; the reference says {length}: truncated, or another model's",
            hint=_EXPORT_AGAIN,
        )
    if count == 0:
        return np.zeros(shape, dtype)
    try:
        return np.asarray(np.memmap(path, dtype, "r", offset, shape))
    except OSError as error:
        raise _unreadable(path, error) from error


def _external_path(model: Model, location: str, what: str) -> Path:
    if model.folder is None:
        raise FrontendError(
            f"{what} lies in the external file {location!r}, but this model was not loaded from a file",
            hint="pass the path of the .onnx file, or load the data first: onnx.load(path)",
        )
    folder = model.folder.resolve()
    path = (folder / location.replace("\0", "")).resolve()
    if not location or "\0" in location or not path.is_relative_to(folder):
        raise FrontendError(
            f"{what} refers to external data at {location!r}, outside of the model's folder {folder}",
            hint="external data must lie beside or below the model; save it again with onnx.save_model",
        )
    try:
        there, whole = path.exists(), path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not whole:
        raise FrontendError(
            f"{what} needs the external data file {path}, which is {'no regular file' if there else 'missing'}",
            hint="copy the data file together with the .onnx file; they belong in one folder",
        )
    return path
