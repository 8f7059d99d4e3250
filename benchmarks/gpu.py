"""The schedules of docs/tutorials/gpu.md, and a model, on a GPU: right, and how fast beside PyTorch's own kernels.

python benchmarks/gpu.py --target opencl                       # on the machine with the GPU: checks and times
python benchmarks/gpu.py --target nvidia/h200 --pack FOLDER    # compile only, for a machine without a compiler
python benchmarks/gpu.py --run FOLDER --runtime libkedge_rt.so # what was packed; needs numpy, and PyTorch for the peer
python benchmarks/gpu.py --target opencl --smoke               # small sizes, checks outputs, judges no figure

Figures are medians of native timings with all tensors on the device; kedge and PyTorch (float32, no TF32) take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge.rpc.artifact import Artifact
from kedge.rpc.client.inprocess import LoadedModel, open_in_process

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorials" / "gpu.md"
DIGITS = ROOT / "kedge" / "data" / "digits.onnx"
ROUNDS = 5
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """One function at one size. `work` are floating-point operations, `moved` bytes that must cross the memory bus."""

    name: str
    make: str  # what compiles it: a schedule of the tutorial, or "digits"
    size: tuple[int, ...]
    work: float
    moved: float
    torch: str | None = None


def cases(*, smoke: bool) -> list[Case]:
    """Everything that is measured; small where only correctness counts."""
    found = []
    for n in (256,) if smoke else (1024, 2048, 4096):
        work, moved = 2.0 * n**3, 12.0 * n * n
        found += [Case(f"product {step} {n}", step, (n,), work, moved, "matmul") for step in ("naive", "tiles")]
    rows, columns = (64, 1024) if smoke else (8192, 8192)
    both = 4.0 * rows * columns
    found.append(Case(f"row sums {rows}x{columns}", "row_sums", (rows, columns), rows * columns, both, "sum"))
    found.append(
        Case(f"row sums by parts {rows}x{columns}", "row_sums_by_parts", (rows, columns), rows * columns, both, "sum")
    )
    found.append(
        Case(f"softmax {rows}x{columns}", "softmax", (rows, columns), 4.0 * rows * columns, 2 * both, "softmax")
    )
    found.append(
        Case(f"gelu by itself {rows}x{columns}", "gelu", (rows, columns), 8.0 * rows * columns, 2 * both, "gelu")
    )
    found.append(Case("digits, batch 64", "digits", (64,), 0.0, 0.0))
    return found


def inputs_of(case: Case) -> Arrays:
    """The same arrays wherever they are made."""
    rng = np.random.default_rng(7)
    if case.make in ("naive", "tiles"):
        (n,) = case.size
        return {name: rng.standard_normal((n, n), dtype=np.float32) for name in ("a", "b")}
    if case.make == "digits":
        return {"image": rng.random((case.size[0], 1, 8, 8), dtype=np.float32)}
    return {"x": rng.standard_normal(case.size, dtype=np.float32)}


def wanted(case: Case, arrays: Arrays, folder: Path) -> np.ndarray[Any, Any]:
    """The result by numpy in double precision, or as it was packed."""
    if case.make == "digits":
        return np.load(folder / "digits.npy")
    if case.make in ("naive", "tiles"):
        return arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64)
    x = arrays["x"].astype(np.float64)
    if case.make == "softmax":
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)
    if case.make == "gelu":
        erf = np.vectorize(__import__("math").erf, otypes=[np.float64])
        return 0.5 * x[:64] * (1 + erf(x[:64] / np.sqrt(2)))  # the first rows are enough
    return x.sum(1)


# Compiling ------------------------------------------------------------------------------------------------------


def pack(folder: Path, target: str, *, smoke: bool) -> None:
    """Compile every case for `target` into `folder`."""
    import kedge
    from kedge import te

    steps: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    exec("\n".join(block for block in blocks if "target=" not in block), steps)

    def gelu(rows: int, columns: int) -> Any:
        x = te.placeholder((rows, columns), "float32", "x")
        y = te.compute((rows, columns), lambda i, j: x[i, j] * 0.5 * (1.0 + te.erf(x[i, j] * 0.70710678)), name="y")
        return te.create_prim_func([x, y], "main")

    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"target": target, "smoke": smoke, "compile_s": {}}
    for case in cases(smoke=smoke):
        source: Any = DIGITS if case.make == "digits" else {**steps, "gelu": gelu}[case.make](*case.size)
        begin = time.perf_counter()
        kedge.compile(source, target=target).save(folder / f"{case.name}.kdg")
        facts["compile_s"][case.name] = round(time.perf_counter() - begin, 3)
        if case.make == "digits":
            with kedge.compile(DIGITS, target="native").open(threads=1) as m:
                np.save(folder / "digits.npy", next(iter(m.run(inputs_of(case)).values())))
    (folder / "pack.json").write_text(json.dumps(facts))


# Running --------------------------------------------------------------------------------------------------------


def check(case: Case, model: LoadedModel, arrays: Arrays, folder: Path) -> float:
    """The largest error, relative to the largest element; refuses a wrong result."""
    got = next(iter(model.run(arrays).values())).astype(np.float64)
    want = wanted(case, arrays, folder)
    error = float(np.abs(got[: len(want)] - want).max() / np.abs(want).max())
    if not error < 2e-5:
        raise SystemExit(f"{case.name}: wrong by {error:.2e} of the largest element")
    return error


def torch_timer(case: Case, arrays: Arrays) -> Callable[[], float] | None:
    """What measures PyTorch's own kernel for the case, in nanoseconds; None where there is no CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if case.torch is None or not torch.cuda.is_available():
        return None
    torch.backends.cuda.matmul.allow_tf32 = False
    given = [torch.from_numpy(array).cuda() for array in arrays.values()]
    call = {
        "matmul": lambda: torch.matmul(*given),
        "sum": lambda: given[0].sum(1),
        "softmax": lambda: torch.softmax(given[0], 1),
        "gelu": lambda: torch.nn.functional.gelu(given[0]),
    }[case.torch]

    def measure() -> float:
        for _ in range(3):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e6 / 20

    return measure


def run(folder: Path, runtime: Path, device: str) -> dict[str, Any]:
    """Check and time everything in `folder`."""
    packed = json.loads((folder / "pack.json").read_text())
    rows: list[dict[str, Any]] = []
    name = ""
    for case in cases(smoke=packed["smoke"]):
        artifact = Artifact.load(folder / f"{case.name}.kdg")
        arrays = inputs_of(case)
        with open_in_process(artifact, runtime, device=device) as model:
            error = check(case, model, arrays, folder)
            name = model.device
            peer = torch_timer(case, arrays)
            ours: list[float] = []
            theirs: list[float] = []
            for _ in range(1 if packed["smoke"] else ROUNDS):
                timing = model.time(arrays, repeat=5, min_repeat_ms=1 if packed["smoke"] else 20)
                ours += list(timing.samples_ns)
                if peer is not None:
                    theirs.append(peer())
        median = statistics.median(ours)
        row = {"case": case.name, "error": error, "us": median / 1e3}
        row |= {"gflops": case.work / median, "gb_s": case.moved / median}
        row |= {"torch_us": statistics.median(theirs) / 1e3} if theirs else {}
        rows.append(row)
        ratio = f"   {median / 1e3 / row['torch_us']:.2f} of PyTorch's time" if theirs else ""
        print(
            f"{case.name:32} {row['us']:11.1f} us {row['gflops']:9.0f} GFLOP/s {row['gb_s']:7.0f} GB/s"
            f"   error {error:.1e}{ratio}",
            flush=True,
        )
    return {"device": name, "target": packed["target"], "compile_s": packed["compile_s"], "cases": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="opencl", help="what to compile for (default: opencl)")
    parser.add_argument("--pack", type=Path, help="only compile, into this folder")
    parser.add_argument("--run", type=Path, help="run what is in this folder")
    parser.add_argument("--runtime", type=Path, help="with --run: a libkedge_rt.so for this machine")
    parser.add_argument("--device", default="", help='with --run: for instance "cuda:0"')
    parser.add_argument("--out", type=Path, help="write the figures as JSON into this file")
    parser.add_argument("--smoke", action="store_true", help="small sizes; checks outputs, judges no figure")
    options = parser.parse_args()
    if options.pack is not None:
        pack(options.pack, options.target, smoke=options.smoke)
        return
    if options.run is not None:
        if options.runtime is None:
            parser.error("--run needs --runtime")
        figures = run(options.run, options.runtime, options.device)
    else:
        from kedge.compiler.target import parse_cpu
        from kedge.compiler.toolchain import build_runtime

        with tempfile.TemporaryDirectory() as folder:
            pack(Path(folder), options.target, smoke=options.smoke)
            figures = run(Path(folder), build_runtime(parse_cpu("native")).lib, options.device)
    figures |= {
        "date": datetime.date.today().isoformat(),
        "machine": platform.platform(),
        "python": sys.version.split()[0],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
