"""The tutorial's schedules, and one folder of compiled kernels for all tests of GPUs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "tutorials" / "gpu.md"


@pytest.fixture(scope="session")
def tutorial() -> dict[str, Any]:
    """What the code of docs/tutorials/gpu.md defines, but for the part that runs it."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(block for block in blocks if "target=" not in block), str(PAGE), "exec"), names)
    return names
