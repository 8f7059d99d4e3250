"""The page about GPUs runs as it stands, on a CPU's OpenCL; so does its benchmark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from kedge.compiler.target import parse_cpu
from kedge.compiler.toolchain import build_runtime
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


def test_cases_that_were_packed_run_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    """On this CPU: where they run makes no difference to the script."""
    archive = tmp_path / "cases.tar.xz"
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_conformance.py")]
    packing = [*script, "pack", str(archive), "--target", "native", "--only", "test_cumsum_1d*"]
    done = subprocess.run(packing, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "cases", filter="data")
    index = json.loads((tmp_path / "cases" / "index.json").read_text())
    other = next(number for number, case in enumerate(index["cases"]) if case["name"] == "test_cumsum_1d_reverse")
    shutil.copy(tmp_path / "cases" / f"{other}.kdg", tmp_path / "cases" / "0.kdg")
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(tmp_path / "cases", ".")
    runtime = build_runtime(parse_cpu("native")).lib
    running = [*script, "run", str(archive), "--runtime", str(runtime), "--device", ""]
    done = subprocess.run(running, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    report = json.loads(done.stdout)
    assert (done.returncode, list(report["wrong"])) == (1, [index["cases"][0]["name"]])
    assert report["right"] == report["run"] - 1 >= 3
