"""In how many pieces a weight is filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kedge.compiler import pages


def counted_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of pieces whenever work on weights is spread over threads."""
    found: list[int] = []
    spread = pages.spread

    def counted(work: Callable[[Any], object], items: Sequence[Any]) -> None:
        found.append(len(items))
        spread(work, items)

    monkeypatch.setattr(pages, "spread", counted)
    return found
