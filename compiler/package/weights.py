"""Weights as one safetensors file in which every tensor starts at a 64-byte boundary, so that it is used in place.

The format: eight bytes of header length (little-endian), a JSON header with dtype, shape and byte range of each tensor,
then the data without holes. Gaps that alignment needs are therefore tensors, too, named `kedge.pad.N`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kedge.compiler.codegen.entry import WeightPlace
from kedge.compiler.errors import CompileError

ALIGNMENT: Final = 64
#: Tensors of at least this many bytes are blobs of their own on the wire.
LARGE_BYTES: Final = 1 << 20
_DTYPES: Final[Mapping[str, str]] = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "int16": "I16",
    "int32": "I32", "int64": "I64", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """A safetensors file: its bytes, where its data begins, the places of tensors in the data, and where to cut."""

    data: bytes
    data_offset: int
    places: tuple[WeightPlace, ...]
    cuts: tuple[int, ...]

    @property
    def data_size(self) -> int:
        """Bytes after the header."""
        return len(self.data) - self.data_offset


def pack_weights(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Weights:
    """The file of `arrays`, in their order.

    Raises:
        CompileError: an array's dtype is not one that safetensors has.
    """
    header: dict[str, Any] = {}
    pieces: list[bytes | memoryview] = []  # views, so that all is copied once
    places: list[WeightPlace] = []
    position = 0
    for name, array in arrays.items():
        if str(array.dtype) not in _DTYPES:
            raise CompileError(f"weight {name!r} has dtype {array.dtype}, which cannot be stored")
        gap = -position % ALIGNMENT
        if gap:
            header[f"kedge.pad.{len(pieces)}"] = _entry("U8", [gap], position, gap)
            pieces.append(bytes(gap))
            position += gap
        stored = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        data = stored.reshape(-1).view(np.uint8).data
        header[name] = _entry(_DTYPES[str(array.dtype)], list(array.shape), position, len(data))
        places.append(WeightPlace(name, position, len(data)))
        pieces.append(data)
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    large = [place for place in places if place.size >= LARGE_BYTES]
    cuts = {start + edge for place in large for edge in (place.offset, place.offset + place.size)}
    whole = b"".join([struct.pack("<Q", len(text)), text, *pieces])
    return Weights(whole, start, tuple(places), tuple(sorted(cuts)))


def _entry(dtype: str, shape: list[int], start: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
