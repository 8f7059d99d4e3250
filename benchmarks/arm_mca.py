"""How well kedge's inner loops for ARM use the multiply-add units: a static estimate by llvm-mca, no measurement.

python benchmarks/arm_mca.py                                    # all cases on all cores; writes a result file
python benchmarks/arm_mca.py --cases matmul,conv3x3 --cpus neoverse-n1 --show
python benchmarks/arm_mca.py --shapes matmul:33x77x129,conv:58x28x28:k1:f96,depthwise:24x113x65:k5:s2
python benchmarks/arm_mca.py --smoke                            # one case on two cores, judges no figure

Shapes are KIND:SIZES, then options:
    matmul:MxKxN               (M, K) times constant (K, N); `:inputs`: the second operand is an input as well
    conv:CxHxW:kN              C channels of H x W, kernels of N x N, padded by N // 2, bias and relu; `:sN`: stride 1
                               unless given; `:fN`: filters, as many as channels unless given; `:gN`: groups
    depthwise:CxHxW:kN         the same with as many groups as channels

It needs llvm-mca of LLVM 19: on Debian `apt-get install llvm-19` has it as llvm-mca-19; --mca names another program.

Each case is compiled for each core as a user would. Of the assembly, the innermost loop without branches inside that
has the most multiply-adds of float32 is given to llvm-mca; one with branches where there is no other, as the table then
says. llvm-mca knows how many instructions of each kind that core issues, and how long they take, but takes every load
as one that hits the first cache, and no branch as mispredicted. The model of the Cortex-A9 knows no multiple loads and
stores: what they stand for is put in their place, vld1 or single loads. The share is the loop's multiply-adds per cycle
over those of a loop of independent vector multiply-adds alone, by the same model. The limit is the share of the loop's
loads and multiply-adds alone, where none waits for another.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from models import Net
from rich.console import Console
from rich.table import Table

import kedge

RESULTS = Path(__file__).with_name("results")
ITERATIONS = 100
LANES = 4  # float32 in a vector register of NEON
Row = dict[str, Any]


@dataclass(frozen=True)
class Cpu:
    """A core that is modelled, the share that is wanted of it (None: reported only), and its loop of multiply-adds."""

    name: str
    triple: str
    wanted: float | None

    @property
    def target(self) -> str:
        return f"llvm -mtriple={self.triple} -mcpu={self.name}"

    @property
    def label(self) -> str:
        return f"{self.name} ({self.triple.partition('-')[0]})"

    def peak_loop(self) -> str:
        """Independent multiply-adds: more than the units have in flight, and as many as there are registers."""
        if self.triple.startswith("aarch64"):
            return "\n".join(f"fmla v{n}.4s, v30.4s, v31.4s" for n in range(24))
        return "\n".join(f"vmla.f32 q{n}, q14, q15" for n in range(12))


CPUS = (
    Cpu("neoverse-n1", "aarch64-linux-gnu", 0.9),
    Cpu("cortex-a72", "aarch64-linux-gnu", 0.9),
    Cpu("cortex-a53", "aarch64-linux-gnu", None),
    Cpu("cortex-a9", "armv7-linux-gnueabihf", 0.75),
)


# Cases --------------------------------------------------------------------------------------------------------------

_MATMUL = re.compile(r"matmul:(?P<m>\d+)x(?P<k>\d+)x(?P<n>\d+)(?P<inputs>:inputs)?")
_CONV = re.compile(
    r"(?P<kind>conv|depthwise):(?P<c>\d+)x(?P<h>\d+)x(?P<w>\d+):k(?P<k>\d+)(?::s(?P<s>\d+))?(?::f(?P<f>\d+))?"
    r"(?::g(?P<g>\d+))?"
)


def network(shape: str) -> Net:
    """The model of one operator that a shape stands for; raises ValueError where it stands for none."""
    product = _MATMUL.fullmatch(shape)
    if product:
        m, k, n = (int(product[name]) for name in "mkn")
        net = Net("matmul")
        second = net.input("b", (k, n)) if product["inputs"] else net.normal("b", (k, n), 1.0)
        net.finish(net.node("MatMul", "y", [net.input("a", (m, k)), second], (m, n), float(k)))
        return net
    found = _CONV.fullmatch(shape)
    if not found:
        raise ValueError(f"{shape!r} is no shape; they look like matmul:33x77x129 and conv:58x28x28:k3:s2:f96")
    channels, height, width, kernel = (int(found[name]) for name in "chwk")
    stride, filters = int(found["s"] or 1), int(found["f"] or channels)
    groups = channels if found["kind"] == "depthwise" else int(found["g"] or 1)
    if channels % groups or filters % groups:
        raise ValueError(
            f"{shape!r}: {groups} groups divide {channels} channels and {filters} filters in no equal parts"
        )
    net = Net("conv")
    x = net.input("x", (1, channels, height, width))
    net.finish(net.relu("y", net.conv("conv", x, filters, kernel, stride, groups=groups, bias=True)))
    return net


#: Common layers.
NAMED: dict[str, str] = {
    "matmul": "matmul:256x256x256",
    "matmul-inputs": "matmul:256x256x256:inputs",
    "conv1x1": "conv:128x28x28:k1",
    "conv3x3": "conv:64x56x56:k3",
    "conv3x3-stride2": "conv:64x56x56:k3:s2:f128",
    "conv7x7-stem": "conv:3x224x224:k7:s2:f64",
    "depthwise3x3": "depthwise:144x56x56:k3",
    "depthwise5x5": "depthwise:240x28x28:k5",
}
#: Tails of rows, of sums and of blocks, few rows, small and oblong images.
ODD = (
    "matmul:100x100x100",
    "matmul:100x100x100:inputs",
    "matmul:33x77x129",
    "matmul:33x77x129:inputs",
    "matmul:1x512x512",
    "matmul:1x512x512:inputs",
    "matmul:7x64x1000",
    "conv:24x56x56:k1:f58",
    "conv:58x28x28:k1",
    "conv:96x14x14:k1:f24",
    "conv:128x7x7:k1",
    "conv:96x113x65:k1:f58",
    "conv:24x56x56:k3",
    "conv:58x28x28:k3:s2",
    "conv:96x14x14:k3",
    "conv:128x7x7:k3",
    "conv:128x14x14:k3:s2",
    "conv:24x113x65:k3:f58",
    "conv:3x113x65:k3:s2:f24",
    "conv:24x28x28:k5",
    "conv:58x14x14:k5:f96",
    "conv:96x7x7:k5",
    "conv:3x113x65:k7:s2:f96",
    "conv:24x56x56:k7:s2",
    "conv:64x28x28:k3:g4",
    "depthwise:24x56x56:k3:s2",
    "depthwise:58x28x28:k3",
    "depthwise:96x14x14:k3",
    "depthwise:128x7x7:k3",
    "depthwise:96x113x65:k3:s2",
    "depthwise:128x14x14:k3:s2",
    "depthwise:58x28x28:k5:s2",
    "depthwise:96x7x7:k5",
    "depthwise:128x14x14:k5",
    "depthwise:24x113x65:k5:s2",
)
CASES = NAMED | {shape: shape for shape in ODD}


# Reading assembly ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """Instructions from a label to the last branch back to it, and whether each iteration runs all of them."""

    instructions: tuple[str, ...]
    is_straight: bool

    @property
    def multiply_adds(self) -> int:
        """Of float32 in one iteration: each lane counts. A multiplication beside an addition counts as well."""
        counts = self.counts
        return counts["fused"] + min(counts["product"], counts["sum"])

    @property
    def counts(self) -> dict[str, int]:
        """The lanes of each kind of arithmetic."""
        counts = {"fused": 0, "product": 0, "sum": 0}
        for instruction in self.instructions:
            kind, lanes = arithmetic(instruction)
            if kind:
                counts[kind] += lanes
        return counts


_KINDS = {
    "fmla": "fused", "fmadd": "fused", "vmla.f32": "fused", "vfma.f32": "fused", "fmul": "product", "fadd": "sum",
    "vmul.f32": "product", "vadd.f32": "sum",
}  # fmt: skip
_REGISTER_LANES = {"s": 1, "d": 2, "q": 4}  # by the first letter of ARMv7's; of AArch64's scalars only s is float32
_LABEL = re.compile(r"^([\w.$]+):")
_BRANCH = re.compile(
    r"^(?:b|b\.\w+|b(?:eq|ne|lt|le|gt|ge|lo|ls|hi|hs|mi|pl|cc|cs)|cbn?z|tbn?z)\s+(?:.*,\s*)?([\w.$]+)$"
)


def arithmetic(instruction: str) -> tuple[str, int]:
    """Whether an instruction is of multiply-adds of float32, and in how many lanes; ("", 0) for any other."""
    name, _, operands = instruction.partition(" ")
    kind = _KINDS.get(name, "")
    if not kind:
        return "", 0
    if name.startswith("v"):
        return kind, _REGISTER_LANES[operands[0]]
    vector = re.match(r"v\d+\.(\d)s\b", operands)
    if vector:
        return kind, int(vector[1])
    return (kind, 1) if operands.startswith("s") else ("", 0)


def loops(assembly: str) -> list[Loop]:
    """The innermost loops: from a label to the last branch back to it, with no other such pair inside."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        text = re.split(r"//|@|;", line)[0].strip()
        label = _LABEL.match(text)
        if label:
            labels[label[1]] = len(instructions)
        elif text and not text.startswith("."):
            instructions.append(re.sub(r"\s+", " ", text))
    # A loop may go on from several places: where an iteration does nothing, and at its end.
    ends: dict[int, int] = {}
    for at, instruction in enumerate(instructions):
        branch = _BRANCH.match(instruction)
        if branch and labels.get(branch[1], at + 1) <= at:
            ends[labels[branch[1]]] = at
    inner = [
        (begin, end)
        for begin, end in ends.items()
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in ends.items())
    ]
    return [
        Loop(tuple(instructions[begin : end + 1]), _is_straight(instructions, labels, begin, end))
        for begin, end in inner
    ]


def _is_straight(instructions: Sequence[str], labels: Mapping[str, int], begin: int, end: int) -> bool:
    """Whether the loop has no branch but the one back and, if that is taken always, the one that leaves the loop."""
    branches = [found for found in map(_BRANCH.match, instructions[begin:end]) if found]
    if not instructions[end].startswith("b "):
        return not branches
    targets = [labels.get(branch[1], end + 1) for branch in branches]
    return len(targets) == 1 and not begin <= targets[0] <= end


def hottest(assemblies: Sequence[str]) -> Loop | None:
    """The innermost loop with the most multiply-adds in an iteration; None where no loop has any.

    One that branches inside, as at the borders of images, counts only where there is no other; one that multiplies and
    adds in different instructions, as transforms do, only where none does both in one.
    """
    found = [loop for text in assemblies for loop in loops(text) if loop.multiply_adds]
    return max(found, key=lambda loop: (loop.is_straight, loop.counts["fused"], loop.multiply_adds), default=None)


# Compiling and asking llvm-mca --------------------------------------------------------------------------------------


@contextmanager
def dumping(folder: Path) -> Iterator[None]:
    """Let the compiler write its stages to a folder."""
    before = os.environ.get("KEDGE_DUMP_DIR")
    os.environ["KEDGE_DUMP_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["KEDGE_DUMP_DIR"]
        else:
            os.environ["KEDGE_DUMP_DIR"] = before


def assemblies(net: Net, cpu: Cpu) -> tuple[list[str], list[str]]:
    """Of all kernels of a model: their assembly, and the rules that scheduled them."""
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as name:
        folder = Path(name)
        with dumping(folder / "stages"):
            artifact = kedge.compile(net.save(folder / "model.onnx"), target=cpu.target)
        variants: Any = artifact.manifest.info["variants"]
        rules = [str(kernel["rule"]) for kernel in variants[0]["kernels"]]
        return [path.read_text() for path in sorted((folder / "stages").glob("kernel-*.s"))], rules


_MULTIPLE = re.compile(r"^(v?)(ld|st)m(?:ia)? (\w+)(!?), \{(.*)\}$")


def without_multiples(instruction: str) -> list[str]:
    """A load or store of several registers as instructions that every model knows; all others as they are."""
    found = _MULTIPLE.match(instruction)
    if found is None:
        return [instruction]
    vector, way, base, written, registers = found.groups()
    names = registers.split(", ")
    if vector:
        parts = [names[at : at + 4] for at in range(0, len(names), 4)]
        return [f"v{way}1.64 {{{', '.join(part)}}}, [{base}]{written}" for part in parts]
    return [f"{way}r {name}, [{base}]{', #4' if written else ''}" for name in names if name != base]


class Crash(Exception):
    """llvm-mca died by a signal: version 19 does on some loops for the Cortex-A9."""


def cycles(mca: str, cpu: Cpu, block: str) -> float:
    """Of one iteration of a block, once its loop is under way; raises Crash."""
    totals = []
    for iterations in (ITERATIONS, 2 * ITERATIONS):
        command = [mca, f"-mtriple={cpu.triple}", f"-mcpu={cpu.name}", f"-iterations={iterations}", "-json"]
        command += [] if cpu.triple.startswith("aarch64") else ["-mattr=+neon"]  # not of every Cortex-A9
        done = subprocess.run(command, input=block + "\n", capture_output=True, text=True, check=False)
        if done.returncode < 0:  # of its own defects, no fault of the loop
            raise Crash
        if done.returncode:
            raise SystemExit(f"{mca} refuses a loop for {cpu.name}:\n{done.stderr}\n{block}")
        totals.append(json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]["TotalCycles"])
    return (totals[1] - totals[0]) / ITERATIONS


_LOAD = re.compile(r"^(v?ld\S* )(.*)(\[[^\]]*\])")
_FREE = 24  # the first register of those, d24 of ARMv7 and v24 of AArch64, that `Cpu.peak_loop` leaves free


def _moved(registers: str) -> str:
    """A load's vector registers as free ones."""
    number = itertools.count(_FREE)
    return re.sub(r"\b([dqsv])\d+", lambda each: f"{each[1]}{next(number)}", registers)


def unhindered(lines: Sequence[str], cpu: Cpu) -> list[str]:
    """The loads and the arithmetic of a loop, in registers apart and with pointers that stay, so that none waits."""
    sums, made = itertools.cycle(cpu.peak_loop().splitlines()), list[str]()
    for line in lines:
        load = _LOAD.match(line)
        if load:
            made.append(load[1] + _moved(load[2]) + load[3])
        elif arithmetic(line)[0]:
            made.append(next(sums))
    return made


def peak(mca: str, cpu: Cpu) -> float:
    """Multiply-adds of one cycle at most, in lanes."""
    block = cpu.peak_loop()
    return LANES * len(block.splitlines()) / cycles(mca, cpu, block)


def estimate(mca: str, name: str, cpu: Cpu, most: float) -> Row:
    """One case, or shape, on one core."""
    print(f"{name} for {cpu.label}", file=sys.stderr, flush=True)
    shape = CASES.get(name, name)
    texts, rules = assemblies(network(shape), cpu)
    row: Row = {
        "case": name, "shape": shape, "cpu": cpu.name, "triple": cpu.triple, "rules": rules, "peak_per_cycle": most
    }  # fmt: skip
    loop = hottest(texts)
    if loop is None:
        return row | {"share": 0.0, "multiply_adds": 0, "loop": []}
    row["straight"] = loop.is_straight
    lines = [line for instruction in loop.instructions for line in without_multiples(instruction)]
    try:
        spent = cycles(mca, cpu, "\n".join(lines))
        least = cycles(mca, cpu, "\n".join(unhindered(lines, cpu)))
    except Crash:
        return row | {"multiply_adds": loop.multiply_adds, "share": None, "loop": list(loop.instructions)}
    row["limit"] = loop.multiply_adds / least / most
    share = loop.multiply_adds / spent / most
    return row | {
        "multiply_adds": loop.multiply_adds, "cycles": spent, "share": share, "loop": list(loop.instructions)
    }  # fmt: skip


def find_mca(given: str | None) -> str:
    """The program; exits with what to install where there is none."""
    for name in [given] if given else ["llvm-mca-19", "llvm-mca"]:
        path = shutil.which(name)
        if path is None:
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"LLVM version (\d+)", said)
        if given or (version and int(version[1]) >= 19):
            return path
    raise SystemExit(
        f"{given or 'llvm-mca'} of LLVM 19 or newer was not found: on Debian and Ubuntu 'apt-get install llvm-19' "
        "installs it, as llvm-mca-19; or name the program with --mca"
    )


def table(what: str, rows: Sequence[Row], cpus: Sequence[Cpu]) -> Table:
    made = Table(
        title=f"{what}: share of the core's multiply-adds per cycle in the hottest inner loop, static estimate"
    )
    for column in ("case", "core"):
        made.add_column(column)
    for column in ("loop", "instructions", "multiply-adds", "cycles", "share", "limit", "wanted"):
        made.add_column(column, justify="right")
    wanted = {(cpu.name, cpu.triple): cpu.wanted for cpu in cpus}
    for row in rows:
        least = wanted[row["cpu"], row["triple"]]
        spent = f"{row['cycles']:.1f}" if "cycles" in row else "-"
        share = "crash" if row["share"] is None else f"{row['share']:.0%}"
        limit = f"{row['limit']:.0%}" if "limit" in row else "-"
        kind = {True: "straight", False: "branches", None: "none"}[row.get("straight")]
        cells = [kind, str(len(row["loop"])), str(row["multiply_adds"]), spent, share, limit]
        made.add_row(row["case"], row["cpu"], *cells, f"{least:.0%}" if least else "-")
    return made


def pick(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads "a,b" as names that are known."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return parse


def shapes(text: str) -> list[str]:
    """Reads "a,b" as shapes."""
    for shape in text.split(","):
        try:
            network(shape)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=pick(list(CASES)), metavar="NAME,…", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--shapes", type=shapes, metavar="SHAPE,…", help="other cases, as above; alone or with --cases")
    names = [cpu.name for cpu in CPUS]
    parser.add_argument("--cpus", type=pick(names), metavar="NAME,…", help=f"some of {', '.join(names)}")
    parser.add_argument("--mca", metavar="PROGRAM", help="llvm-mca-19 unless given")
    parser.add_argument("--show", action="store_true", help="print each loop")
    parser.add_argument("--smoke", action="store_true", help="matmul on two cores, no result file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    mca = find_mca(options.mca)
    cases = [*(options.cases or []), *(options.shapes or [])] or (["matmul"] if options.smoke else list(CASES))
    chosen = options.cpus or (["neoverse-n1", "cortex-a9"] if options.smoke else names)
    cpus = [cpu for cpu in CPUS if cpu.name in chosen]
    peaks = {cpu: peak(mca, cpu) for cpu in cpus}
    rows = [estimate(mca, name, cpu, peaks[cpu]) for name in cases for cpu in cpus]
    date = datetime.date.today().isoformat()
    made = {"date": date, "what": "static estimate by llvm-mca", "packages": harness.packages("kedge", "llvmlite")}
    result = {**made, "loops": rows}
    if options.show:
        for row in rows:
            text = "\n    ".join(row["loop"])
            share = "llvm-mca crashes" if row["share"] is None else f"{row['share']:.0%}"
            print(f"{row['case']}, {row['cpu']}: {share}\n    {text}")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
        for what, some in (("Common layers", True), ("Odd shapes", False)):
            chosen_rows = [row for row in rows if (row["case"] in NAMED) == some]
            if chosen_rows:
                console.print(table(what, chosen_rows, cpus))
        for cpu in cpus:
            print(f"{cpu.label}: {peaks[cpu]:.2f} multiply-adds of float32 in a cycle at most, by its model")
    if not (options.smoke or options.cases or options.shapes or options.cpus):
        path = RESULTS / f"arm-mca-{date}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
