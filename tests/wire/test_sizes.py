"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest

from kedge.rpc.sizes import MAX_BYTES, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("007", 7), ("50GiB", 50 << 30), ("500 MB", 500_000_000), (" 1.5T ", 1_500_000_000_000),
        ("2kib", 2048), ("1.5", 2), ("0.4", 0), ("0.5KiB", 512), ("3b", 3),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_they_are_exact() -> None:
    for size in (2**53 + 1, 9_007_199_254_740_993_001, MAX_BYTES):
        assert parse_size(str(size)) == size
    assert parse_size("8388607.9999999TiB") == (83886079999999 * 2**41 + 10**7) // (2 * 10**7)
    assert parse_size("0" * 5000 + "1KiB") == 1024


@pytest.mark.parametrize(
    "text",
    [
        "", "much", "-1", "1.", ".5", "1e3", "5 apples", "1 2", "\u0663GiB", "inf", "nan", "0x10", str(MAX_BYTES + 1),
        "8388608TiB", "9" * 400, "9" * 5000, "1." + "0" * 41, "9" * 400 + "T",
    ],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    assert parse_size(text) is None
