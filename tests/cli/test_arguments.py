from __future__ import annotations

import pytest

from kedge.cli.arguments import parse_bytes
from kedge.rpc.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GiB", 50 << 30), ("500MB", 500_000_000), ("1.5 k", 1_500), ("12", 12), ("2tib", 2 << 40), ("7 B", 7)],
)
def test_sizes_have_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "-1GB", "1 GiBs", "1e9", "i", "5i"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no number of bytes"):
        parse_bytes(text)
