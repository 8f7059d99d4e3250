"""Whole networks on this CPU: kedge beside ONNX Runtime and OpenVINO, float32, without tuning.

python benchmarks/cpu_models.py                                    # everything, on a quiet machine: about half an hour
python benchmarks/cpu_models.py --models resnet18,mlp --threads 1  # some of it
python benchmarks/cpu_models.py --models unet --size 96x160 --batch 4 --no-compile
python benchmarks/cpu_models.py --smoke                            # narrow networks, checks outputs, judges no figure

A run of all networks writes benchmarks/results/cpu-models-DATE.json and a plot beside it; --output names another file,
for some of them too. Each runtime is in a process of its own, on its own cores, with inputs and outputs that are made
once, and is stopped (SIGSTOP) while another is measured. They come in random order, in blocks; each block begins with
calls that are not timed. Times are medians and the least; ratios are of medians in one run, kedge's over the better
peer's. For each network also: how long `kedge compile` takes with an empty cache, again right after, which finds the
artifact, and again with an empty cache of artifacts, which finds kernels alone; its memory; and the most memory that
each runtime's process has while called, and how much of that beyond the loaded model.

The exit status is 1 where an output is wrong (against ONNX Runtime) or where kedge refuses a model.
"""

from __future__ import annotations

import argparse
import compileall
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from models import MODELS, Model, parse_size
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("kedge", "compiler", "rpc", "protos", "device_agent", "deploy")
RESULTS = Path(__file__).with_name("results")
RUNTIMES = ("kedge", "onnxruntime", "openvino")
TITLES = {"kedge": "kedge", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
LARGEST_ERROR = 1e-3
#: What is wanted. Ratios are kedge / the better peer, seconds and bytes are of `kedge compile resnet50`.
WANTED_GEOMEAN, WANTED_WORST, WANTED_RESNET18 = 1.0, 1.3, 0.8
WANTED_COLD_S, WANTED_WARM_S, WANTED_COMPILE_BYTES = 15.0, 1.5, 2e9
SMOKE_SIZE, SMOKE_WIDTH = (64, 64), 1 / 8
BLOCKS, FEWEST_BLOCKS = 8, 3
SLOW_S = 1.0  # a call that takes longer is measured in fewer blocks
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How networks are built and measured."""

    threads: Sequence[int]
    size: tuple[int, int] | None
    batch: int | None
    width: float
    seconds: float
    compile: bool

    def blocks(self, slowest_s: float) -> int:
        return 2 if not self.seconds else BLOCKS if slowest_s < SLOW_S else FEWEST_BLOCKS


def named(threads: int) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def benchmark(model: Model, folder: Path, settings: Settings) -> Row:
    """All figures of one network; its files are in `folder`."""
    say(f"{model.name}: building the network")
    net = model.make(settings.size, settings.batch, settings.width)
    path, inputs = net.save(folder / "model.onnx"), folder / "inputs.npz"
    np.savez(inputs, allow_pickle=False, **model.inputs(settings.size, settings.batch))
    row: Row = {
        "model": model.name, "title": model.title, "input": model.shape(settings.size, settings.batch),
        "gflop": net.flops / 1e9, "parameters": net.parameters,
    }  # fmt: skip
    del net
    say(f"{model.name}: kedge compile")
    row["compile"] = compile_figures(path, folder, again=settings.compile)
    row["runs"] = [run(model.name, path, inputs, threads, row["compile"], settings) for threads in settings.threads]
    return row


def compile_bytecode() -> None:
    """What pip does where it installs kedge: else each start of `kedge compile` may compile kedge's own sources."""
    for package in PACKAGES:
        compileall.compile_dir(ROOT / package, quiet=1)


def compile_figures(model: Path, folder: Path, *, again: bool) -> Row:
    """`kedge compile` in fresh processes. {"error"} if refused.

    `cold`: with an empty cache; `warm`: with what that left; `kernels`: with the kernels of it, without the artifact.
    """
    kedge = [sys.executable, "-P", "-m", "kedge"]
    command = [*kedge, "compile", str(model), "-o", str(folder / "model.kdg")]
    environment = {**os.environ, "KEDGE_CACHE_DIR": str(folder / "cache")}
    cold = harness.run_measured(command, environment)
    if cold.status:
        return {"error": harness.last_words(cold.errors) or f"kedge compile ended with status {cold.status}"}
    figures: Row = {"cold_s": cold.seconds, "cold_peak_bytes": cold.peak_bytes}
    for state in ("warm", "kernels") if again else ():
        if state == "kernels":
            subprocess.run(
                [*kedge, "cache", "clear", "artifacts"], env=environment, stdout=subprocess.DEVNULL, check=True
            )
        done = harness.run_measured(command, environment)
        if done.status:
            raise RuntimeError(f"kedge compile failed the second time: {harness.last_words(done.errors)}")
        figures |= {f"{state}_s": done.seconds, f"{state}_peak_bytes": done.peak_bytes}
    return figures


def run(name: str, model: Path, inputs: Path, threads: int, compiled: Row, settings: Settings) -> Row:
    """One network at one number of threads, by every runtime that takes it."""
    row: Row = {"threads": threads, "runtimes": {}, "refused": {}}
    contenders: dict[str, harness.Contender] = {}
    try:
        for runtime in RUNTIMES:
            say(f"{name}, {named(threads)}: loading into {TITLES[runtime]}")
            if runtime == "kedge" and "error" in compiled:
                row["refused"][runtime] = compiled["error"]
                continue
            path = model.with_suffix(".kdg") if runtime == "kedge" else model
            try:
                contenders[runtime] = harness.Contender.start(runtime, path, inputs, threads)
                row["runtimes"][runtime] = contenders[runtime].ask(memory=True)
            except harness.WorkerFailed as error:
                row["refused"][runtime] = str(error)
        measure(name, contenders, row, model.with_name("outputs.npz"), settings)
    finally:
        for contender in contenders.values():
            contender.close()
    return row | ratios(row["runtimes"])


def measure(name: str, contenders: dict[str, harness.Contender], row: Row, outputs: Path, settings: Settings) -> None:
    """Outputs against ONNX Runtime's, then times, added to what `row` has of each runtime."""
    if "onnxruntime" not in contenders:
        raise RuntimeError(f"{name}: ONNX Runtime, which outputs are compared with, {row['refused']['onnxruntime']}")
    results = {runtime: contender.outputs(outputs) for runtime, contender in contenders.items()}
    for runtime, result in results.items():
        row["runtimes"][runtime]["error"] = harness.relative_error(result, results["onnxruntime"])
    first = [contender.ask(seconds=0, warmup_s=0)["samples_ns"][0] / 1e9 for contender in contenders.values()]
    blocks = settings.blocks(max(first))
    say(f"{name}, {named(row['threads'])}: measuring, {blocks} blocks, a call takes at most {max(first):.3g} s")
    seconds = settings.seconds / blocks
    harness.compare(list(contenders.values()), blocks, seconds=seconds, warmup_s=seconds / 4)
    for runtime, contender in contenders.items():
        times = {"median_us": harness.median_us(contender), "best_us": harness.best_us(contender)}
        row["runtimes"][runtime] |= times | {"calls": len(contender.samples_ns)}


def ratios(runtimes: Row) -> Row:
    """kedge's time over the better peer's, of medians and of the least times; none where kedge has no time."""
    peers = [figures for name, figures in runtimes.items() if name != "kedge"]
    if "kedge" not in runtimes or not peers:
        return {}
    found = {}
    for ratio, time in (("ratio", "median_us"), ("ratio_best", "best_us")):
        found[ratio] = runtimes["kedge"][time] / min(figures[time] for figures in peers)
    return found


def wrong(rows: Sequence[Row]) -> list[str]:
    """A line for each output that is wrong, and for each model that kedge refuses."""
    lines = []
    for row in rows:
        for at in row["runs"]:
            where = f"{row['model']}, {named(at['threads'])}"
            if "kedge" in at["refused"]:
                lines.append(f"{where}: kedge refuses it: {at['refused']['kedge']}")
            for runtime, figures in at["runtimes"].items():
                if not figures["error"] < LARGEST_ERROR:
                    lines.append(f"{where}: {TITLES[runtime]} is off by {figures['error']:.2g} of the largest output")
    return lines


def verdicts(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Each figure that is wanted: whether it was met, and what was found."""
    found = []
    for threads in dict.fromkeys(at["threads"] for row in rows for at in row["runs"]):
        of = {row["model"]: at for row in rows for at in row["runs"] if at["threads"] == threads}
        known = {name: at["ratio"] for name, at in of.items() if "ratio" in at}
        if len(known) < len(of):
            found.append((False, f"{named(threads)}: {len(of) - len(known)} of {len(of)} models have no ratio"))
        if not known:
            continue
        mean = harness.geometric_mean(known.values())
        best = harness.geometric_mean(at["ratio_best"] for at in of.values() if "ratio" in at)
        worst = max(known, key=lambda name: known[name])
        text = f"{named(threads)}: geometric mean of ratios {mean:.2f} (of least times {best:.2f})"
        found.append((mean <= WANTED_GEOMEAN, f"{text}, wanted <= {WANTED_GEOMEAN}"))
        found.append(
            (
                known[worst] <= WANTED_WORST,
                f"{named(threads)}: worst {worst} {known[worst]:.2f}, wanted <= {WANTED_WORST}",
            )
        )
        if "resnet18" in known:
            ratio = known["resnet18"]
            found.append(
                (ratio <= WANTED_RESNET18, f"{named(threads)}: resnet18 {ratio:.2f}, wanted <= {WANTED_RESNET18}")
            )
        found += memory_verdict(threads, of)
    return found + [
        verdict for row in rows if row["model"] == "resnet50" for verdict in compile_verdicts(row["compile"])
    ]


def memory_verdict(threads: int, of: Row) -> list[tuple[bool, str]]:
    """Whether no model needs more memory than in ONNX Runtime: beyond what is loaded, and in all.

    kedge's arena is part of what is loaded, as its contexts make it; the others take theirs when called.
    """
    both = {name: at["runtimes"] for name, at in of.items() if "kedge" in at["runtimes"]}
    more = [name for name, each in both.items() if added_bytes(each["kedge"]) > added_bytes(each["onnxruntime"])]
    text = f"{named(threads)}: {len(more)} of {len(both)} models add more memory to what is loaded than in ONNX Runtime"
    peaks = [name for name, each in both.items() if each["kedge"]["peak_bytes"] > each["onnxruntime"]["peak_bytes"]]
    in_all = f"{named(threads)}: {len(peaks)} of {len(both)} models have a higher peak of memory than in ONNX Runtime"
    return [
        (not names, f"{said}{': ' if names else ''}{', '.join(names)}")
        for names, said in ((more, text), (peaks, in_all))
    ]


def compile_verdicts(figures: Row) -> list[tuple[bool, str]]:
    found = []
    if "cold_s" in figures:
        cold, peak = figures["cold_s"], figures["cold_peak_bytes"]
        found.append((cold <= WANTED_COLD_S, f"resnet50 compiles in {cold:.1f} s, wanted <= {WANTED_COLD_S:g}"))
        wanted = WANTED_COMPILE_BYTES
        found.append((peak < wanted, f"resnet50 compiles in {peak / 1e6:.0f} MB, wanted < {wanted / 1e6:.0f}"))
    if "warm_s" in figures:
        warm, kernels = figures["warm_s"], figures["kernels_s"]
        text = f"resnet50 compiles again in {warm:.2f} s ({kernels:.2f} s with its kernels alone)"
        found.append((warm <= WANTED_WARM_S, f"{text}, wanted <= {WANTED_WARM_S:g}"))
    return found


def added_bytes(figures: Row) -> int:
    """What calls need beyond what is resident once the model is loaded."""
    return int(figures["peak_bytes"] - figures["loaded_bytes"])


def time_text(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.1f} µs"


def tables(rows: Sequence[Row]) -> list[Table]:
    times = Table(title="Median time of a call (least time)")
    memory = Table(title="Compile; peak of a process that calls the model (of which beyond the loaded one's)")
    for table in (times, memory):
        table.add_column("model")
    for column in ("threads", *TITLES.values(), "ratio", "of least", "error"):
        times.add_column(column, justify="right")
    for column in (
        "cold",
        "again",
        "kernels kept",
        "peak MB",
        "threads",
        *(f"{title} MB" for title in TITLES.values()),
    ):
        memory.add_column(column, justify="right")
    for row in rows:
        figures = row["compile"]
        compiled = [f"{figures[key]:.2f} s" if key in figures else "-" for key in ("cold_s", "warm_s", "kernels_s")]
        compiled.append(f"{figures['cold_peak_bytes'] / 1e6:.0f}" if "cold_s" in figures else "-")
        for at in row["runs"]:
            found = [at["runtimes"].get(runtime) for runtime in RUNTIMES]
            cells = [f"{time_text(f['median_us'])} ({time_text(f['best_us'])})" if f else "-" for f in found]
            cells += [f"{at[ratio]:.2f}" if ratio in at else "-" for ratio in ("ratio", "ratio_best")]
            cells.append(f"{found[0]['error']:.1e}" if found[0] else "-")
            times.add_row(row["title"], str(at["threads"]), *cells)
            peaks = [f"{f['peak_bytes'] / 1e6:.0f} ({added_bytes(f) / 1e6:.1f})" if f else "-" for f in found]
            memory.add_row(row["title"], *compiled, str(at["threads"]), *peaks)
    return [times, memory]


def plot(rows: Sequence[Row], machine: Row, path: Path) -> None:
    """The ratios as bars, one group for each model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    threads = list(dict.fromkeys(at["threads"] for row in rows for at in row["runs"]))
    thick = 0.8 / len(threads)
    for number, count in enumerate(threads):
        bars = [
            (x, at["ratio"])
            for x, row in enumerate(rows)
            for at in row["runs"]
            if at["threads"] == count and "ratio" in at
        ]
        places = [x + (number - (len(threads) - 1) / 2) * thick for x, _ in bars]
        drawn = axes.bar(places, [ratio - 1 for _, ratio in bars], thick, bottom=1, label=named(count))
        axes.bar_label(drawn, [f"{ratio:.2f}" for _, ratio in bars], fontsize=7, padding=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["title"] for row in rows], rotation=30, ha="right")
    axes.set_ylabel("time of kedge / better of\nONNX Runtime and OpenVINO")
    axes.set_title(f"{machine['cpu']}, float32; below 1 kedge is faster", fontsize=10)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def parse_models(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    return list(dict.fromkeys(names))


def parse_threads(text: str) -> list[int]:
    counts, most = text.split(","), len(os.sched_getaffinity(0))
    if not all(count.isdecimal() and 1 <= int(count) <= most for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1 to {most}, as many as there are cores, like 1,2")
    return list(dict.fromkeys(map(int, counts)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=parse_models, metavar="NAME,…", help=f"some of {', '.join(MODELS)}")
    parser.add_argument(
        "--threads", type=parse_threads, metavar="N,…", help="1,2 unless given, or what cores there are"
    )
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="of images, instead of each network's own")
    parser.add_argument("--batch", type=int, metavar="N", help="inputs at once, instead of each network's own")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured for each runtime and case (default: 4)")
    parser.add_argument("--no-compile", action="store_true", help="compile once only: no figures of a second compile")
    parser.add_argument("--smoke", action="store_true", help="narrow networks, small images, two calls, no result file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the result file; the plot is FILE.svg")
    parser.add_argument("--note", default="", help="about the machine, for the result file: what else it did")
    options = parser.parse_args()
    if options.batch is not None and options.batch < 1:
        parser.error("--batch is at least 1")
    return options


def main() -> int:
    options = arguments()
    date = datetime.date.today().isoformat()
    threads = options.threads or list(range(1, min(2, len(os.sched_getaffinity(0))) + 1))
    settings = Settings(
        threads=threads, size=options.size or (SMOKE_SIZE if options.smoke else None), batch=options.batch,
        width=SMOKE_WIDTH if options.smoke else 1.0, seconds=0.0 if options.smoke else options.seconds,
        compile=not options.no_compile,
    )  # fmt: skip
    whole = not (options.smoke or options.models or options.size or options.batch or options.threads)
    path = options.output or (RESULTS / f"cpu-models-{date}.json" if whole else None)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        say("the plot beside the result file needs matplotlib: pip install -e '.[bench]'")  # before measuring
        return 2
    compile_bytecode()
    result: Row = {"date": date, "note": options.note, "machine": harness.machine(), "models": []}
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="kedge-bench-") as folder:
            result["models"].append(benchmark(MODELS[name], Path(folder), settings))
    rows = result["models"]
    mistakes = wrong(rows)
    judged = [] if options.smoke else verdicts(rows)
    result["verdicts"] = [{"met": met, "text": text} for met, text in judged]
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
        for table in tables(rows):
            console.print(table)
        for met, text in judged:
            print(f"{'met    ' if met else 'NOT met'}  {text}")
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
        plot(rows, result["machine"], path.with_suffix(".svg"))
        say(f"written to {path} and {path.with_suffix('.svg')}")
    for line in mistakes:
        say(f"WRONG: {line}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
