"""Memory for weights while compiling."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

#: numpy asks for huge pages from here on.
_LARGE_BYTES: Final = 1 << 22


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """As `numpy.empty`, but in pages of the usual size.

    Huge pages gain little where memory is written once, and cost much in virtual machines that give free memory back to
    their host: on one, 160 MB took 350 ms to be had again instead of 80.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_BYTES or sys.platform == "win32":
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
