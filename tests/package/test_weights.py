"""Weights files: what safetensors' own reader makes of them, alignment, cuts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load

from kedge.compiler.errors import CompileError
from kedge.compiler.package import pack_weights
from kedge.compiler.package.weights import ALIGNMENT, LARGE_BYTES

DTYPES = ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint32", "bool"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=3)), max_size=6))
def test_another_reader_sees_the_same_tensors(specs: list[tuple[str, list[int]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.integers(0, 2, shape).astype(dtype) for i, (dtype, shape) in enumerate(specs)}
    packed = pack_weights(arrays)
    assert packed.data_offset % ALIGNMENT == 0
    read = load(bytes(packed.data))
    assert {name for name in read if not name.startswith("kedge.pad.")} == set(arrays)
    for place in packed.places:
        array = arrays[place.name]
        assert place.offset % ALIGNMENT == 0 and place.size == array.nbytes
        start = packed.data_offset + place.offset
        assert packed.data[start : start + place.size] == array.tobytes()
        np.testing.assert_array_equal(read[place.name], array)


def test_another_reader_sees_bfloat16() -> None:
    array = np.arange(6).astype("bfloat16")
    ((name, tensor),) = deserialize(bytes(pack_weights({"w": array}).data))
    assert (name, tensor["dtype"], tensor["shape"], bytes(tensor["data"])) == ("w", "BF16", [6], array.tobytes())


def test_a_transposed_array_is_stored_in_row_major_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    large = np.arange(5 * LARGE_BYTES // 8, dtype=np.float32).reshape(5, -1, 16).transpose(2, 0, 1)  # several copies
    packed = pack_weights({"w": array, "large": large, "scalar": np.array(3.0)})
    read = load(bytes(packed.data))
    np.testing.assert_array_equal(read["w"], array)
    np.testing.assert_array_equal(read["large"], large)
    assert read["scalar"] == 3


def test_large_tensors_are_cut_out_and_small_ones_stay_together() -> None:
    big = np.zeros(LARGE_BYTES // 4, np.float32)
    packed = pack_weights({"a": np.zeros(3, np.float32), "big": big, "c": np.zeros(3, np.float32)})
    place = packed.places[1]
    start = packed.data_offset + place.offset
    assert packed.cuts == (start, start + big.nbytes)


def test_equal_arrays_give_equal_bytes(tmp_path: Path) -> None:
    arrays = {"a": np.ones(5, np.float32), "b": np.ones((2, 2), np.int64)}
    assert pack_weights(arrays).data == pack_weights(dict(arrays)).data
    (size,) = struct.unpack_from("<Q", pack_weights(arrays).data)
    assert list(json.loads(bytes(pack_weights(arrays).data[8 : 8 + size]))) == ["a", "kedge.pad.1", "b"]


def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(CompileError, match="complex64"):
        pack_weights({"w": np.zeros(2, np.complex64)})
