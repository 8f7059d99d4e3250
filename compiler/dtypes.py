"""The element types of tensors, by their numpy names.

numpy has no bfloat16 of its own: ml_dtypes gives it one under that name, and importing this module is what does so.
"""

from __future__ import annotations

from typing import Final

import ml_dtypes  # noqa: F401  # for np.dtype("bfloat16")

#: The floating-point types of 16 bits. Each operation on them is computed in float32, and its result rounded.
HALVES: Final = frozenset({"float16", "bfloat16"})
FLOATS: Final = HALVES | {"float32", "float64"}
SIGNED_INTEGERS: Final = frozenset({"int8", "int16", "int32", "int64"})
INTEGERS: Final = SIGNED_INTEGERS | {"uint8", "uint16", "uint32", "uint64"}
#: Everything that kernels compute with or store.
DTYPES: Final = FLOATS | INTEGERS | {"bool"}
