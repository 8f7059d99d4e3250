"""The page about GPUs runs as it stands, on a CPU's OpenCL; so does its benchmark."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import opencl

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorials" / "gpu.md"


def test_the_page_runs() -> None:
    opencl.require()
    names: dict[str, Any] = {}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["error"] < 1e-3


def test_the_printed_kernel_is_the_present_one() -> None:
    """What the page shows of it stands in the golden of tests/codegen/gpu, which the code is compared with."""
    path = ROOT / "tests" / "codegen" / "gpu" / "goldens" / "naive.cl"
    present = path.read_text().replace("void k(", "void main(")
    shown = re.findall(r"```c\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    for part in shown.split("  …\n"):
        assert part in present


def test_the_benchmark_runs() -> None:
    opencl.require()
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--smoke", "--target", "opencl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    cases = re.findall(r"^(.+?) +[0-9.]+ us +[0-9]+ GFLOP/s +[0-9]+ GB/s +error ", done.stdout, re.MULTILINE)
    assert len(cases) == 7, done.stdout
