"""What it costs to begin and end a parallel loop: kedge's pool beside OpenMP's, for two threads.

python benchmarks/fork_join.py          # by hand, on a quiet machine; writes benchmarks/results/fork-join-DATE.json
python benchmarks/fork_join.py --smoke  # a few loops without gaps, no result file

Each case is a process of its own (fork_join.c), so that no pool that still spins disturbs the next; the cases come in
random order, in several rounds. A row gives the best and the median of the rounds. OpenMP is gcc's, which waits for
about 10 ms before its threads sleep; with OMP_WAIT_POLICY=active they never do. Without gcc there is no peer.

    empty   the loop does nothing: a pool may let one thread do it all
    meet    each thread waits for the other: both have really come
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

from kedge.device_agent import runtime

SOURCE = Path(__file__).with_name("fork_join.c")
RESULTS = Path(__file__).with_name("results")
THREADS = 2
#: Idle nanoseconds before each loop -> loops in a round: enough for a 99th percentile, and few seconds.
LOOPS = {0: 20_000, 10_000: 2_000, 100_000: 500, 1_000_000: 300}
IDLE_MS = 100  # how long fork_join.c looks at the CPU time of a pool that has nothing to do


@dataclass
class Case:
    """One program with its arguments, and what each round of it gave."""

    pool: str
    program: Path
    environment: dict[str, str]
    schedule: str
    body: str
    gap_ns: int
    rounds: list[dict[str, int]] = field(default_factory=list)

    def run(self, loops: int) -> None:
        """One more round."""
        arguments = [self.schedule, self.body, THREADS, THREADS, self.gap_ns, loops]
        done = subprocess.run(
            [self.program, *map(str, arguments)],
            env={**os.environ, **self.environment}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        self.rounds.append(json.loads(done.stdout))

    def row(self) -> dict[str, Any]:
        """The case and its figures; times in nanoseconds of one loop."""
        row: dict[str, Any] = {"pool": self.pool, "schedule": self.schedule, "body": self.body, "gap_ns": self.gap_ns}
        for key in ("p50_ns", "p99_ns", "mean_ns"):
            values = [each[key] for each in self.rounds]
            row[key] = {"best": min(values), "median": statistics.median(values)}
        row["idle_cpu_share"] = statistics.median(each["idle_cpu_us"] for each in self.rounds) / (IDLE_MS * 1e3)
        return row


def build(folder: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    """The pools: a program for each, and the environment that it runs in."""
    common = ["-std=gnu11", "-O2", f"-I{runtime.SOURCE_DIR}", str(SOURCE)]
    library = [str(runtime.SOURCE_DIR / name) for name in runtime.LIBRARY_SOURCES]
    kedge = folder / "kedge"
    zig = [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=all"]
    subprocess.run([*zig, *common, *library, "-lpthread", "-ldl", "-lm", "-o", str(kedge)], check=True)
    pools: dict[str, tuple[Path, dict[str, str]]] = {"kedge": (kedge, {})}
    gcc = shutil.which("gcc")
    if gcc is None:
        print("no peer: gcc is not installed")
        return pools
    openmp = folder / "openmp"
    subprocess.run([gcc, *common, "-fopenmp", "-DOPENMP", "-o", str(openmp)], check=True)
    return pools | {"openmp": (openmp, {}), "openmp active": (openmp, {"OMP_WAIT_POLICY": "active"})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few loops without gaps, no result file")
    parser.add_argument("--rounds", type=int, default=7, help="how often each case is measured")
    parser.add_argument("--note", default="", help="about the machine, for the result file: what else it did")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as folder:
        gaps = [0] if options.smoke else LOOPS
        kinds = itertools.product(build(Path(folder)).items(), ("static", "dynamic"), ("empty", "meet"), gaps)
        cases = [Case(pool, *how, schedule, body, gap) for (pool, how), schedule, body, gap in kinds]
        order = random.Random(0)
        for _ in range(1 if options.smoke else options.rounds):
            for case in order.sample(cases, len(cases)):
                case.run(10 if options.smoke else LOOPS[case.gap_ns])
    rows = [case.row() for case in cases]
    print(f"{'':34} {'best round':>18} {'median round':>18}")
    print(f"{'gap µs':>34} {'p50 ns':>9}{'p99 ns':>9} {'p50 ns':>9}{'p99 ns':>9}")
    for row in sorted(rows, key=lambda row: (row["gap_ns"], row["body"], row["schedule"])):
        name = f"{row['pool']:<13} {row['schedule']:<7} {row['body']:<5}"
        times = " ".join(f"{row['p50_ns'][kind]:9.0f}{row['p99_ns'][kind]:9.0f}" for kind in ("best", "median"))
        print(f"{name}{row['gap_ns'] / 1e3:7.0f} {times}  idle CPU {row['idle_cpu_share']:.1%}")
    print("wanted: about 1000 ns with gap 0")
    if not options.smoke:
        date = datetime.date.today().isoformat()
        result = {"date": date, "machine": harness.machine(), "note": options.note, "threads": THREADS, "rows": rows}
        path = RESULTS / f"fork-join-{date}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
