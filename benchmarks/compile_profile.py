"""Where the Python time of a compile goes: cProfile's own time, summed by part of the compiler.

python benchmarks/compile_profile.py                    # the tutorial's last schedule, then whole models, uncached
python benchmarks/compile_profile.py MODEL.onnx …       # each in new processes: no cache, a full one, kernels alone
"""

from __future__ import annotations

import cProfile
import os
import pstats
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kedge
from kedge.compiler.cache import KernelCache
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.pipeline import compile_module
from kedge.compiler.quota import ARTIFACTS, Quota
from kedge.compiler.target import parse

ROOT = Path(__file__).parents[1]
#: Parts by what a file's path holds; the first that fits counts.
PARTS = (
    ("simplifier", ("tir/simplify", "tir/poly")),
    ("walking and rebuilding trees", ("tir/visitor", "tir/structural", "tir/expr", "tir/stmt", "dataclasses")),
    ("schedules", ("compiler/schedule",)),
    ("prepare", ("codegen/prepare", "codegen/versions", "codegen/coverage", "codegen/compact", "codegen/alloc")),
    ("writing LLVM IR", ("compiler/codegen",)),
    ("LLVM", ("llvmlite",)),
    ("graph, lowering, package", ("compiler/",)),
    ("linker (waiting)", ("subprocess", "selectors", "poll")),
)


def part_of(path: str, function: str) -> str:
    where = f"{path} {function}".replace("\\", "/")
    return next((name for name, marks in PARTS if any(mark in where for mark in marks)), "Python itself")


def profiled(run: Callable[[], object]) -> None:
    profile = cProfile.Profile()
    profile.runcall(run)
    stats: Any = pstats.Stats(profile)
    total = sum(own for _, _, own, _, _ in stats.stats.values())
    shares: Counter[str] = Counter()
    for (path, _, function), (_, _, own, _, callers) in stats.stats.items():
        # A built-in counts for whoever calls it.
        if path == "~" and callers:
            for (caller, _, name), (*_, spent, _) in callers.items():
                shares[part_of(caller, name)] += spent
        else:
            shares[part_of(path, function)] += own
    print(f"  under the profiler {total * 1e3:.0f} ms:", end=" ")
    print(", ".join(f"{name} {spent / total:.0%}" for name, spent in shares.most_common() if spent > total / 100))


def median_ms(run: Callable[[], object], repeat: int = 10) -> float:
    samples = []
    for _ in range(repeat):
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples) * 1e3


def tutorial() -> None:
    text = (ROOT / "docs" / "tutorials" / "matmul.md").read_text()
    page: dict[str, Any] = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), "matmul.md", "exec"), page)
    make, target = page["panels"], parse("native")
    func = make().func
    print("the tutorial's last matrix product:")
    print(f"  schedule {median_ms(make):.1f} ms, print {median_ms(func.show):.1f} ms, ", end="")
    print(f"prepare {median_ms(lambda: prepare(func)):.1f} ms, ", end="")
    print(f"prepare and LLVM IR {median_ms(lambda: emit_kernel(func, target, 'k')):.1f} ms")
    profiled(lambda: make().show())


def model(name: str) -> None:
    module = kedge.load(str(ROOT / "kedge" / "data" / name))

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            compile_module(module, "native", cache=KernelCache(Path(folder)))

    print(f"{name}: {median_ms(run, 3):.0f} ms")
    profiled(run)


#: What a new process does to compile a model, as `kedge compile` does it.
FRESH = """
import resource, sys, time
begin = time.perf_counter()
import kedge
kedge.compile(sys.argv[1]).save(sys.argv[2])
wall = time.perf_counter() - begin
cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{wall:.2f} s ({cpu:.2f} s of CPU with its workers), peak {peak:.0f} MiB")
"""


def fresh(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KEDGE_CACHE_DIR": str(Path(folder, "cache"))}
        for state in ("cold", "again", "with kernels alone", "with kernels alone"):
            if state == "with kernels alone":
                Quota(Path(folder, "cache")).clear((ARTIFACTS,))
            command = [sys.executable, "-c", FRESH, path, str(Path(folder, "out.kdg"))]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{path}, {state}: {done.stdout.strip()}")


if __name__ == "__main__":
    if sys.argv[1:]:
        for path in sys.argv[1:]:
            fresh(path)
        sys.exit()
    tutorial()
    for found in sorted((ROOT / "kedge" / "data").glob("*.onnx")):
        model(found.name)
