"""Reading an ONNX file with its large weights apart, each copied once, straight from the file.

Parsing a file whole has its weights in memory three times: in the file's bytes, in the message, and in the array that
the message hands out. The wire format says how long each field is, so the fields around weights are found without
reading these: what is parsed then has, instead of data, a reference with a token that is drawn for each
read: no file can name it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import onnx

#: Tensors of at least this many bytes are read apart.
LEAST_BYTES: Final = 1 << 16
_WINDOW: Final = 1 << 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH: Final = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER: Final = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_DATA: Final = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_TYPE: Final = onnx.TensorProto.DATA_TYPE_FIELD_NUMBER
_LOCATION: Final = onnx.TensorProto.DATA_LOCATION_FIELD_NUMBER
#: Types whose data is one little-endian number after the other.
_PLAIN: Final = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in (
        "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32",
        "UINT64", "BOOL",
    )
)  # fmt: skip


class _OddError(Exception):
    """The file is not laid out as any writer of ONNX models does it."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message: its number, and where it starts, has its value, and ends in the file."""

    number: int
    wire: int
    start: int
    value: int
    end: int


def read_apart(path: Path) -> tuple[bytes, Mapping[str, bytes]] | None:
    """A serialized model without the data of its large initializers, and that data by the locations it refers to.

    None for a file that is laid out in an unusual way or cut off: what parses it whole knows what it is worth.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        reader = _Reader(file, file.seek(0, os.SEEK_END))
        try:
            return reader.model(), reader.apart
        except _OddError:
            return None


class _Reader:
    def __init__(self, file: FileIO, size: int) -> None:
        self._file = file
        self._size = size
        self._window = b""
        self._window_start = 0
        self._token = secrets.token_hex(16)
        self.apart: dict[str, bytes] = {}

    def model(self) -> bytes:
        """The message of the whole file without large data."""
        fields = [field for field in self._fields(0, self._size) if field.number == _GRAPH]
        if len(fields) != 1 or fields[0].wire != _BYTES:
            raise _OddError
        (graph,) = fields
        inner = self._graph(graph)
        head = _varint(graph.number << 3 | _BYTES) + _varint(len(inner))
        return b"".join([self._bytes(0, graph.start), head, inner, self._bytes(graph.end, self._size)])

    def _graph(self, graph: _Field) -> bytes:
        pieces = []
        copied = graph.value
        for field in self._fields(graph.value, graph.end):
            if field.number != _INITIALIZER or field.wire != _BYTES or field.end - field.value < LEAST_BYTES:
                continue
            tensor = self._tensor(field)
            if tensor is not None:
                pieces += [self._bytes(copied, field.start), _varint(_INITIALIZER << 3 | _BYTES), _varint(len(tensor))]
                pieces.append(tensor)
                copied = field.end
        return b"".join([*pieces, self._bytes(copied, graph.end)])

    def _tensor(self, tensor: _Field) -> bytes | None:
        """A tensor with a reference instead of its data; None for one without large raw data."""
        fields = list(self._fields(tensor.value, tensor.end))
        data = [field for field in fields if field.number == _DATA]
        if len(data) != 1 or data[0].wire != _BYTES or data[0].end - data[0].value < LEAST_BYTES:
            return None
        types = [self._read_varint(field.value)[0] for field in fields if field.number == _TYPE]
        if len(types) != 1 or types[0] not in _PLAIN or any(field.number == _LOCATION for field in fields):
            return None
        location = f"\0apart {self._token} {len(self.apart)}"
        entry = onnx.StringStringEntryProto(key="location", value=location)
        reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL, external_data=[entry])
        self.apart[location] = self._bytes(data[0].value, data[0].end)
        kept = [self._bytes(tensor.value, data[0].start), self._bytes(data[0].end, tensor.end)]
        return b"".join([*kept, reference.SerializeToString()])

    def _fields(self, start: int, end: int) -> Iterator[_Field]:
        """The fields of the message that lies from `start` to `end`."""
        at = start
        while at < end:
            tag, value = self._read_varint(at)
            wire = tag & 7
            if wire == _BYTES:
                size, value = self._read_varint(value)
                after = value + size
            elif wire == _VARINT:
                _, after = self._read_varint(value)
            elif wire in (_FIXED64, _FIXED32):
                after = value + (8 if wire == _FIXED64 else 4)
            else:
                raise _OddError
            if after > end:
                raise _OddError
            yield _Field(tag >> 3, wire, at, value, after)
            at = after

    def _read_varint(self, at: int) -> tuple[int, int]:
        """A number of seven bits a byte, the lowest first, and where it ends."""
        result = 0
        for shift in range(0, 70, 7):
            index = at - self._window_start
            if not 0 <= index < len(self._window):
                self._window, self._window_start, index = self._read(at, _WINDOW), at, 0
                if not self._window:
                    raise _OddError
            byte = self._window[index]
            at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result, at
        raise _OddError

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)

    def _bytes(self, start: int, end: int) -> bytes:
        data = self._read(start, end - start)
        if len(data) != end - start:
            raise _OddError
        return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
