"""The tutorial on custom operators runs as it stands, and what it computes is right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler.ops import custom

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "custom_operator.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the tutorial's code defines, after it ran in a folder of its own."""
    names: dict[str, Any] = {}
    text = PAGE.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        try:
            for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
                line = text.count("\n", 0, block.start(1))
                exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
            yield names
        finally:
            for operator in custom.registered():
                operator.unregister()


def leaky_gelu(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    gelu = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return np.where(x < 0, gelu + 0.25 * x, gelu)


def test_the_function_by_itself(page: dict[str, Any]) -> None:
    np.testing.assert_allclose(page["alone"], leaky_gelu(page["data"]), rtol=1e-5, atol=1e-6)


def test_the_model_that_uses_it(page: dict[str, Any]) -> None:
    expected = leaky_gelu(page["data"] @ page["weight"]) + page["bias"]
    np.testing.assert_allclose(page["in_model"], expected, rtol=1e-4, atol=1e-5)


def shown() -> list[str]:
    """What the page says its code prints."""
    return re.findall(r"\n\n```\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_printed_group_is_the_present_one(page: dict[str, Any]) -> None:
    assert shown()[0] in page["shown"]


def test_several_results(page: dict[str, Any]) -> None:
    x, scores = page["data"].astype("float64"), page["scores"]
    likely = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(scores["best"], x.argmax(axis=1))
    np.testing.assert_allclose(scores["score"], likely.max(axis=1), rtol=1e-5)


def test_the_mistake_reads_as_promised(page: dict[str, Any]) -> None:
    promised = re.sub(r"line \d+ of [\w.]+", "a line", " ".join(shown()[1].split()))
    assert promised == re.sub(r"line \d+ of [\w.]+", "a line", page["mistake"])


def test_the_entry_point_is_the_one_that_is_looked_up() -> None:
    assert f'[project.entry-points."{custom.ENTRY_POINTS}"]' in PAGE.read_text()
