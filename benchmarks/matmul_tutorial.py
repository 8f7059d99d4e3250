"""What each step of docs/tutorials/matmul.md gives on one core, against the measured peak of that core.

python benchmarks/matmul_tutorial.py            # by hand, on a quiet machine; writes a file in benchmarks/results
python benchmarks/matmul_tutorial.py --smoke    # one call of each step, checks outputs, judges no figure
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
from limits import Limits

import kedge
from kedge.compiler.target import parse

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorials" / "matmul.md"
STEPS = ("naive", "vectors", "registers", "panels")


def code_of(page: Path) -> str:
    """The Python of a page, all its blocks in order."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def compile_seconds(make: Callable[[], kedge.Schedule]) -> dict[str, float]:
    """What a schedule costs in Python (median of 20), and what LLVM and the linker take for it (once, uncached)."""
    samples = []
    for _ in range(20):
        begin = time.perf_counter()
        make().show()
        samples.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        from kedge.compiler.cache import KernelCache
        from kedge.compiler.pipeline import compile_prim_func

        begin = time.perf_counter()
        compile_prim_func(make(), parse("native"), cache=KernelCache(Path(folder)))
        whole = time.perf_counter() - begin
    return {"lower_schedule_print_ms": statistics.median(samples) * 1e3, "compile_ms": whole * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one call of each step, no result file")
    options = parser.parse_args()
    page: dict[str, Any] = {}
    exec(compile(code_of(TUTORIAL), str(TUTORIAL), "exec"), page)
    a, b, n = page["a"], page["b"], page["N"]
    expected = a.astype(np.float64) @ b
    models = {}
    for step in STEPS:
        models[step] = kedge.compile(page[step](), target="native").open(threads=1)
        error = float(np.abs(models[step].run({"a": a, "b": b})["c"] - expected).max())
        if error > 1e-3:
            raise SystemExit(f"step {step} is wrong: largest error {error:g}")
    peaks: list[float] = []
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(Path(folder))
        for _ in range(1 if options.smoke else 15):  # interleaved: what slows the machine slows all of them
            peaks.append(limits.peak_gflops())
            for step in STEPS:
                timing = models[step].time({"a": a, "b": b}, repeat=1 if options.smoke else 5, min_repeat_ms=20)
                seconds[step].append(min(timing.samples_ns) / 1e9)
    peak = statistics.median(peaks)
    rows = [
        {"step": step, "gflops": (rate := 2 * n**3 / statistics.median(seconds[step]) / 1e9), "of_peak": rate / peak}
        for step in STEPS
    ]
    cost = compile_seconds(page["panels"])
    print(f"peak of one core: {peak:.1f} GFLOP/s")
    for row in rows:
        print(f"{row['step']:10} {row['gflops']:8.2f} GFLOP/s  {row['of_peak']:6.1%} of the peak")
    print(f"lowering, scheduling and printing the last: {cost['lower_schedule_print_ms']:.1f} ms")
    print(f"the same with LLVM and the link: {cost['compile_ms']:.0f} ms")
    if not options.smoke:
        result = {"machine": harness.machine(), "peak_gflops": peak, "steps": rows, **cost}
        path = ROOT / "benchmarks" / "results" / f"matmul-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
