"""The tutorials run as they stand, and each of their steps computes the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge.compiler.cache import KernelCache
from kedge.compiler.lower.lower import lower_prim_func
from support.emulated import emulated, run_program

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorials" / "matmul.md"
STEPS = ("naive", "vectors", "registers", "panels", "parallel")


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the tutorial's code defines, after it ran."""
    names: dict[str, Any] = {}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_product_is_right(page: dict[str, Any]) -> None:
    assert page["error"] < 1e-3


@pytest.mark.parametrize("step", STEPS)
def test_each_step_computes_the_product(page: dict[str, Any], step: str) -> None:
    a, b = page["a"], page["b"]
    with kedge.compile(page[step](), target="native").open(threads=2) as m:
        np.testing.assert_allclose(m.run({"a": a, "b": b})["c"], a @ b, atol=1e-3)


def test_the_printed_loops_are_the_present_ones(page: dict[str, Any]) -> None:
    assert page["naive"]().show() in PAGE.read_text()


@pytest.mark.parametrize("text", ["raspberry-pi/4b", "beaglebone/black"])
def test_the_last_schedule_serves_arm(page: dict[str, Any], text: str, tmp_path: Path) -> None:
    target = emulated(text)
    a, b = page["a"], page["b"]
    program = lower_prim_func(page["panels"](), target)
    (got,) = run_program(program, target, [a, b], tmp_path, KernelCache(tmp_path / "kernels"))
    np.testing.assert_allclose(got, a @ b, atol=1e-3)


def test_the_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "matmul_tutorial.py"), "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^{step} +[0-9.]+ GFLOP/s", done.stdout, re.MULTILINE) for step in STEPS[:-1])
