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

from kedge.compiler import pages
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

    data: memoryview
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
    places: list[WeightPlace] = []
    position = 0
    for name, array in arrays.items():
        if str(array.dtype) not in _DTYPES:
            raise CompileError(f"weight {name!r} has dtype {array.dtype}, which cannot be stored")
        gap = -position % ALIGNMENT
        if gap:
            header[f"kedge.pad.{len(header)}"] = _entry("U8", [gap], position, gap)
            position += gap
        header[name] = _entry(_DTYPES[str(array.dtype)], list(array.shape), position, array.nbytes)
        places.append(WeightPlace(name, position, array.nbytes))
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    large = [place for place in places if place.size >= LARGE_BYTES]
    cuts = {start + edge for place in large for edge in (place.offset, place.offset + place.size)}
    whole = pages.empty((start + position,), np.dtype(np.uint8))
    whole[:start] = np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
    end = start
    copies: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    for place, array in zip(places, arrays.values(), strict=True):
        begin = start + place.offset
        whole[end:begin] = 0
        end = begin + place.size
        target = whole[begin:end].view(array.dtype.newbyteorder("<")).reshape(array.shape)
        rows = 1 if array.ndim == 0 else max(1, len(array) * LARGE_BYTES // max(1, array.nbytes))
        spans = range(0, len(array), rows) if array.ndim else ()
        copies += [(target[at : at + rows], array[at : at + rows]) for at in spans] or [(target, array)]
    # The only copy, in whatever order the elements lie: transposed weights are views up to here.
    pages.spread(lambda copy: np.copyto(*copy), copies)
    return Weights(whole.data.toreadonly(), start, tuple(places), tuple(sorted(cuts)))


def _entry(dtype: str, shape: list[int], start: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
