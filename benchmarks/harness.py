"""Fair comparisons: each runtime in its own process, stopped while another is measured, in randomly ordered blocks.

The pools of most runtimes spin for a while after a call and slow down whoever comes next; a stopped process cannot.
Ratios of medians taken in one run are what counts; absolute times of a shared machine are not.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Contender:
    """A runtime with a model loaded, in its own process."""

    runtime: str
    process: subprocess.Popen[str]
    samples_ns: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, runtime: str, model: Path, inputs: Path, threads: int) -> Contender:
        command = [sys.executable, str(WORKER), "--runtime", runtime, "--model", str(model), "--inputs", str(inputs)]
        process = subprocess.Popen(
            [*command, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        contender = cls(runtime, process)
        contender._read()
        contender.stop()
        return contender

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.runtime} worker ended with status {self.process.wait()}")
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

    def outputs(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        self.ask(output=str(path))
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


def compare(contenders: Sequence[Contender], blocks: int, calls: int, warmup: int, seed: int = 0) -> None:
    """Measure all contenders in `blocks` rounds of random order; samples are appended to each."""
    order = random.Random(seed)
    for _ in range(blocks):
        for contender in order.sample(contenders, len(contenders)):
            contender.samples_ns += contender.ask(calls=calls, warmup=warmup)["samples_ns"]


def median_us(contender: Contender) -> float:
    return statistics.median(contender.samples_ns) / 1e3


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
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
    }
