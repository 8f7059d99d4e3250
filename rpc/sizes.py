"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Mapping, Optional

#: The most bytes that a size may be: what files, disks and the wire count with 64 bits.
MAX_BYTES = 2**63 - 1
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
    """`50GiB`, `500 MB`, `1.5T` or `0` in bytes, rounded to the nearest; None for what is no size.

    None, too, for more than `MAX_BYTES`, and for more than 40 decimals.
    """
    pattern = r"0*(\d{1,19})(?:\.(\d{1,40}))?\s*([kmgt]i?)?b?"
    match = re.fullmatch(pattern, text.strip().lower(), re.ASCII)
    if match is None:
        return None
    # In whole numbers: those of floats are exact up to 2^53 only.
    whole, decimals, unit = match[1], match[2] or "", match[3] or ""
    scale = 10 ** len(decimals)
    size = (2 * int(whole + decimals) * _UNIT_BYTES[unit] + scale) // (2 * scale)
    return size if size <= MAX_BYTES else None
