from __future__ import annotations

from datetime import datetime

import pytest

from kedge.cli.arguments import parse_bytes, parse_moment
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


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("14:00", datetime(2026, 11, 27, 14, 0)),
        ("13:59", datetime(2026, 11, 28, 13, 59)),
        (" 9:05", datetime(2026, 11, 28, 9, 5)),
        ("2026-12-24 18:00", datetime(2026, 12, 24, 18, 0)),
        ("2026-12-24", datetime(2026, 12, 24)),
    ],
)
def test_a_moment_without_a_date_is_the_next_one(text: str, moment: datetime) -> None:
    assert parse_moment(text, datetime(2026, 11, 27, 14, 0)) == moment.timestamp()


@pytest.mark.parametrize("text", ["", "noon", "25:00", "14", "2026-13-01 10:00"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no moment"):
        parse_moment(text, datetime(2026, 11, 27, 14, 0))
