"""Numpy archives, written as numpy.savez does."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write arrays by name, uncompressed, without pickles.

    numpy.savez of older versions leaves the archive open where the disk is full, and that complains once more when the
    garbage collector comes by.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array holds objects.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
