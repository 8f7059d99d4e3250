"""The element types of tensors, by their numpy names.

numpy has no bfloat16 of its own: ml_dtypes gives it one under that name, and importing this module is what does so.
"""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes  # noqa: F401  # for np.dtype("bfloat16")
import numpy as np

#: The floating-point types of 16 bits. Each operation on them is computed in float32, and its result rounded.
HALVES: Final = frozenset({"float16", "bfloat16"})
FLOATS: Final = HALVES | {"float32", "float64"}
SIGNED_INTEGERS: Final = frozenset({"int8", "int16", "int32", "int64"})
INTEGERS: Final = SIGNED_INTEGERS | {"uint8", "uint16", "uint32", "uint64"}
#: Everything that kernels compute with or store.
DTYPES: Final = FLOATS | INTEGERS | {"bool"}


def converted(values: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Numbers, or an array of them, as `dtype`: as numpy has it, and floats that an integer cannot hold as kernels do.

    They are cut to int32, or to int64 for types of 64 bits and uint32, whose least number stands for what does not fit
    and for NaN; the lowest bits of that count (docs/numerics.md). numpy gives what the processor makes of them.
    """
    values = np.asarray(values)
    if str(values.dtype) not in FLOATS or dtype not in INTEGERS:
        return np.asarray(values.astype(dtype))
    bits, wide = 64 if dtype in ("int64", "uint64", "uint32") else 32, values.astype(np.float64)
    upper = wide >= 2.0**63 if dtype == "uint64" else np.zeros(wide.shape, bool)
    wide = np.where(upper, wide - 2.0**63, wide)
    fits = np.abs(wide) < 2.0 ** (bits - 1)
    low = np.where(fits, wide, -(2.0 ** (bits - 1))).astype(f"int{bits}").astype(dtype)
    return np.asarray(np.where(upper, low | np.asarray(2**63, "uint64"), low) if dtype == "uint64" else low)
