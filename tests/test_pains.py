"""docs/pains.md promises tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [line for line in (ROOT / "docs" / "pains.md").read_text().splitlines() if re.match(r"\| \S+#?\d*", line)][1:]


def test_every_pain_names_tests_that_exist() -> None:
    assert len(ROWS) >= 17
    for row in ROWS:
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row.split("|")[3])
        assert named, row
        for path, name in named:
            assert re.search(rf"(?m)^(async )?def {name}\(", (ROOT / path).read_text()), f"{path}::{name}"
