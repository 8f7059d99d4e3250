"""Fair comparisons: each runtime in its own process, stopped while another is measured, in randomly ordered blocks.

The pools of most runtimes spin for a while after a call and slow down whoever comes next; a stopped process cannot.
Ratios of medians taken in one run are what counts; absolute times of a shared machine are not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
SAMPLING_S = 0.05  # between two looks at the memory of a process
_ERROR = re.compile(r"(error|[\w.]*(Error|Exception)): ")  # a command's, or the end of a traceback
Arrays = dict[str, np.ndarray[Any, Any]]


class WorkerFailed(RuntimeError):
    """A runtime refuses the model, or crashed; the text has its last words."""


@dataclass
class Contender:
    """A runtime with a model loaded, in its own process."""

    runtime: str
    process: subprocess.Popen[str]
    errors: IO[str]
    samples_ns: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, runtime: str, model: Path, inputs: Path, threads: int) -> Contender:
        """Load a model; the process may use as many cores as it has threads.

        Raises:
            WorkerFailed: it cannot be loaded.
        """
        command = [sys.executable, str(WORKER), "--runtime", runtime, "--model", str(model), "--inputs", str(inputs)]
        command += ["--threads", str(threads), "--cores", ",".join(map(str, cores(threads)))]
        pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        process = subprocess.Popen(
            command, env=os.environ | pools, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        contender = cls(runtime, process, errors)
        try:
            contender._read()
        except BaseException:
            contender.close()
            raise
        contender.stop()
        return contender

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise WorkerFailed(f"{self.runtime}: {last_words(self.errors.read()) or f'ended with status {status}'}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, **command: Any) -> dict[str, Any]:
        """Wake the worker, let it do `command`, stop it again."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        reply = self._read()
        self.stop()
        return reply

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def outputs(self, path: Path) -> Arrays:
        self.ask(output=str(path))
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def compare(contenders: Sequence[Contender], blocks: int, seed: int = 0, **command: Any) -> None:
    """Measure all contenders in `blocks` rounds of random order, by a command of the worker's that gives samples.

    Samples are appended to each contender.
    """
    order = random.Random(seed)
    for _ in range(blocks):
        for contender in order.sample(contenders, len(contenders)):
            contender.samples_ns += contender.ask(**command)["samples_ns"]


def median_us(contender: Contender) -> float:
    return statistics.median(contender.samples_ns) / 1e3


def best_us(contender: Contender) -> float:
    """The least time: what is left when nobody disturbed."""
    return min(contender.samples_ns) / 1e3


def cores(threads: int) -> list[int]:
    """The cores for so many threads: the last ones, as the first has more to do for the system."""
    return sorted(os.sched_getaffinity(0))[-threads:]


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def relative_error(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest max|a-b| / max|b| of all outputs; infinite where a name, a shape or a NaN is in one alone."""
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in theirs):
        return math.inf
    worst = 0.0
    for name, b in theirs.items():
        a, b = ours[name].astype(np.float64), b.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return math.inf
        known = np.isfinite(b)
        if known.any():
            worst = max(
                worst, float(np.abs(a - b, where=known, out=np.zeros_like(b)).max() / (np.abs(b[known]).max() or 1))
            )
    return worst


@dataclass(frozen=True)
class Run:
    """A command that ran to its end: seconds, the most memory that it and its children had together, its status."""

    seconds: float
    peak_bytes: int
    status: int
    errors: str


def run_measured(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run a command in a session of its own, and look at its memory meanwhile.

    That is its PSS: what processes share counts once.
    """
    with tempfile.TemporaryFile("w+") as errors:
        begin, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        while True:
            try:
                status = process.wait(SAMPLING_S)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, session_bytes(process.pid))
        seconds = time.perf_counter() - begin
        errors.seek(0)
        return Run(seconds, peak, status, errors.read())


def session_bytes(session: int) -> int:
    """Memory of all processes of a session now; or the most that its first one had so far, if that is more."""
    total = highest = 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            # In stat(5) the session is the fourth field after the name, which may hold anything.
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            total += _kilobytes(process / "smaps_rollup", "Pss:")
            if int(process.name) == session:
                highest = _kilobytes(process / "status", "VmHWM:")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return max(total, highest) * 1024


def _kilobytes(path: Path, field: str) -> int:
    """0 where the field is missing: a process that has ended has no memory."""
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(field))


def last_words(text: str) -> str:
    """What went wrong, from what a program wrote on standard error: its error without a hint, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    begin = max((at for at, line in enumerate(lines) if _ERROR.match(line)), default=len(lines) - 1)
    end = next((at for at, line in enumerate(lines) if at > begin and line.startswith("hint: ")), len(lines))
    return " ".join(lines[begin:end])


def packages(*names: str) -> dict[str, str]:
    """The versions of packages; those not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def caches() -> dict[str, str]:
    """Sizes of a core's caches as Linux tells them: {"L1d": "32K", …}; empty where it does not."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = size
    return found


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    model = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "caches": caches(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages("kedge", "llvmlite", "numpy", "onnxruntime", "openvino"),
        "load_1min": os.getloadavg()[0],
    }
