"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Mapping, Optional

_UNIT_BYTES: Mapping[str, int] = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(text: str) -> Optional[int]:
    """`50GiB`, `500 MB`, `1.5T` or `0` in bytes; None for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower(), re.ASCII)
    return None if match is None else round(float(match[1]) * _UNIT_BYTES[match[2] or ""])
