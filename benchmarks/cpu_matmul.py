"""Matrix products of float32 on this CPU: kedge beside numpy's OpenBLAS, OpenVINO's oneDNN and the machine's limits.

python benchmarks/cpu_matmul.py                               # all shapes, on a quiet machine: about ten minutes
python benchmarks/cpu_matmul.py --shapes 512x512x512,1x2048x2048 --threads 1
python benchmarks/cpu_matmul.py --smoke                       # two small shapes, checks outputs, judges no figure

A shape MxKxN is [M, K] times [K, N]. "constant": the second matrix is a weight, known when the model is compiled, and
may be packed then; "inputs": both come with the call. numpy has no constants: its time stands in both. Each contender
is in a process of its own, stopped while another is measured, in random order.

Ratios are kedge's time over the better peer's, medians of calls from Python. The share is kedge's own, of calls timed
in C: the time that the limits allow over the least time. The limits are measured in the same run: multiply-adds in
registers (peak.c), and reading as many bytes as the product touches (stream.c), so from the cache that holds them.
The limit that takes longer says whether a shape is bound by "compute" or "memory".

A run of all shapes writes benchmarks/results/cpu-matmul-DATE.json. The exit status is 1 where a product is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cpu_models import named, parse_threads, say, time_text
from limits import Limits
from models import Net
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results")
SQUARES = [(n, n, n) for n in (64, 96, 128, 192, 256, 384, 512, 768, 1000, 1024, 2048)]
#: The last one is larger than most caches.
ROWS = [(1, n, n) for n in (64, 256, 512, 1024, 2048, 4096)]
SKINNY = [
    (8, 512, 512), (16, 2048, 2048), (64, 2048, 64), (64, 64, 2048), (2048, 64, 64), (2048, 2048, 16), (197, 768, 3072),
]  # fmt: skip
SMOKE = [(64, 64, 64), (1, 256, 192)]
#: A contender's runtime, and whether its second matrix is a constant.
CONTENDERS = {
    "kedge constant": ("kedge", True), "kedge inputs": ("kedge", False), "numpy": ("numpy", False),
    "OpenVINO constant": ("openvino", True), "OpenVINO inputs": ("openvino", False),
}  # fmt: skip
KINDS = {
    "constant": ("kedge constant", ("numpy", "OpenVINO constant")),
    "inputs": ("kedge inputs", ("numpy", "OpenVINO inputs")),
}
LARGEST_ERROR = 1e-4
WANTED = {"compute": 0.95, "memory": 0.9}
BLOCKS, BLOCK_S = 8, 0.05
Shape = tuple[int, int, int]
Row = dict[str, Any]


def build(shape: Shape, folder: Path) -> tuple[dict[bool, Path], dict[bool, Path], harness.Arrays]:
    """The models with a constant and without, their inputs, and the product in double precision."""
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(size, np.float32) for size in ((m, k), (k, n)))
    models, inputs = {}, {}
    for constant in (True, False):
        net = Net("matmul")
        second = net.constant("b", b) if constant else net.input("b", (k, n))
        net.finish(net.node("MatMul", "y", [net.input("a", (m, k)), second], (m, n), float(k)))
        models[constant] = net.save(folder / f"{constant}.onnx")
        inputs[constant] = folder / f"{constant}.npz"
        np.savez(inputs[constant], allow_pickle=False, **({"a": a} if constant else {"a": a, "b": b}))
    return models, inputs, {"y": a.astype(np.float64) @ b}


def benchmark(shape: Shape, threads: int, folder: Path, *, smoke: bool, without: Sequence[str]) -> Row:
    """All figures of one shape, but of the runtimes named by `without`."""
    m, k, n = shape
    say(f"{m}x{k}x{n}, {named(threads)}")
    models, inputs, expected = build(shape, folder)
    limits = Limits(folder, harness.cores(threads))
    row: Row = {"shape": shape, "threads": threads, "contenders": {}}
    contenders: dict[str, harness.Contender] = {}
    native: dict[str, list[float]] = {ours: [] for ours, _ in KINDS.values()}
    touched, peaks, rates = 4 * (m * k + k * n + m * n), [], []
    try:
        for name, (runtime, constant) in CONTENDERS.items():
            if runtime in without:
                continue
            contenders[name] = harness.Contender.start(runtime, models[constant], inputs[constant], threads)
            error = harness.relative_error(contenders[name].outputs(folder / "outputs.npz"), expected)
            row["contenders"][name] = {"error": error}
        for block in range(1 if smoke else BLOCKS):
            harness.compare(list(contenders.values()), 1, seed=block, seconds=BLOCK_S, warmup_s=BLOCK_S / 4)
            for name, samples in native.items():
                samples += contenders[name].ask(native=BLOCK_S)["samples_ns"]
            peaks.append(limits.peak_gflops())
            rates.append(limits.read_gb_s(touched))
        for name, contender in contenders.items():
            times = {"median_us": harness.median_us(contender), "best_us": harness.best_us(contender)}
            row["contenders"][name] |= times
    finally:
        for contender in contenders.values():
            contender.close()
    row |= {"peak_gflops": max(peaks), "read_gb_s": max(rates), "bytes": touched}
    return row | judged(row, {name: min(samples) / 1e3 for name, samples in native.items()})


def judged(row: Row, native_us: dict[str, float]) -> Row:
    """What bounds a shape, and for each kind: the ratio to the better peer, GFLOP/s and the share of the bound."""
    m, k, n = row["shape"]
    compute_us, memory_us = 2 * m * k * n / row["peak_gflops"] / 1e3, row["bytes"] / row["read_gb_s"] / 1e3
    found: Row = {"bound": "compute" if compute_us >= memory_us else "memory"}
    for kind, (ours, peers) in KINDS.items():
        us, of = native_us[ours], row["contenders"]
        found[kind] = {
            "native_best_us": us,
            "gflops": 2 * m * k * n / us / 1e3,
            "gb_s": row["bytes"] / us / 1e3,
            "share": max(compute_us, memory_us) / us,
            "ratio": of[ours]["median_us"] / min(of[peer]["median_us"] for peer in peers if peer in of),
            "ratio_best": of[ours]["best_us"] / min(of[peer]["best_us"] for peer in peers if peer in of),
        }
    return found


def table(rows: Sequence[Row]) -> Table:
    made = Table(
        title="Median time of a call; ratios of medians (of least times); shares of the limit by calls timed in C"
    )
    for column in ("MxKxN", "threads", *CONTENDERS, "bound by", "limit"):
        made.add_column(column, justify="right")
    for kind in KINDS:
        made.add_column(f"{kind}: ratio", justify="right")
        made.add_column("share", justify="right")
    for row in rows:
        limit = f"{row['peak_gflops']:.0f} GFLOP/s" if row["bound"] == "compute" else f"{row['read_gb_s']:.0f} GB/s"
        cells = ["x".join(map(str, row["shape"])), str(row["threads"])]
        times = [row["contenders"].get(name) for name in CONTENDERS]
        cells += [time_text(of["median_us"]) if of else "-" for of in times]
        cells += [row["bound"], limit]
        for kind in KINDS:
            cells += [f"{row[kind]['ratio']:.2f} ({row[kind]['ratio_best']:.2f})", f"{row[kind]['share']:.0%}"]
        made.add_row(*cells)
    return made


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each kind: its geometric mean, and how many shapes reach the share that is wanted."""
    lines = []
    for kind in KINDS:
        mean = harness.geometric_mean(row[kind]["ratio"] for row in rows)
        best = harness.geometric_mean(row[kind]["ratio_best"] for row in rows)
        line = f"{kind}: geometric mean of ratios {mean:.2f} (of least times {best:.2f})"
        for bound, wanted in WANTED.items():
            shares = [row[kind]["share"] for row in rows if row["bound"] == bound]
            met = sum(share >= wanted for share in shares)
            line += f"; {bound}-bound: {met} of {len(shares)} shapes reach {wanted:.0%} of the limit"
        lines.append(line)
    return lines


def wrong(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row['shape']}, {named(row['threads'])}: {name} is off by {figures['error']:.2g} of the largest value"
        for row in rows
        for name, figures in row["contenders"].items()
        if not figures["error"] < LARGEST_ERROR
    ]


def parse_shapes(text: str) -> list[Shape]:
    found = []
    for each in text.split(","):
        dims = each.split("x")
        if len(dims) != 3 or not all(dim.isdecimal() and int(dim) for dim in dims):
            raise argparse.ArgumentTypeError(f"{each!r} is no shape; give MxKxN, for instance 64x2048x64")
        m, k, n = map(int, dims)
        found.append((m, k, n))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, metavar="MxKxN,…", help="instead of those built in")
    parser.add_argument("--threads", type=parse_threads, default=[1], metavar="N,…", help="1 unless given")
    parser.add_argument(
        "--without", nargs="*", choices=["openvino"], default=[], help="a peer that this machine does not have"
    )
    parser.add_argument("--smoke", action="store_true", help="two small shapes, one block, no result file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--note", default="", help="about the machine, for the result file: what else it did")
    options = parser.parse_args()
    shapes = options.shapes or (SMOKE if options.smoke else [*SQUARES, *ROWS, *SKINNY])
    date = datetime.date.today().isoformat()
    result: Row = {"date": date, "note": options.note, "machine": harness.machine(), "products": []}
    rows = result["products"]
    for threads in options.threads:
        for shape in shapes:
            with tempfile.TemporaryDirectory(prefix="kedge-bench-") as folder:
                rows.append(benchmark(shape, threads, Path(folder), smoke=options.smoke, without=options.without))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table(rows))
        for line in [] if options.smoke else verdicts(rows):
            print(line)
    whole = not (options.smoke or options.shapes)
    path = options.output or (RESULTS / f"cpu-matmul-{date}.json" if whole else None)
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        say(f"written to {path}")
    mistakes = wrong(rows)
    for line in mistakes:
        say(f"WRONG: {line}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
