"""What this machine's cores can do at most, measured: multiply-adds of float32, and reading of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-ffast-math", "-fno-sanitize=all")


class Limits:
    """The programs that measure, built in a folder. `cores`: each runs one program, all at the same time."""

    def __init__(self, folder: Path, cores: Sequence[int] = ()) -> None:
        self._cores = cores or [max(os.sched_getaffinity(0))]
        self._programs = {name: _build(name, folder) for name in ("peak", "stream")}

    def peak_gflops(self) -> float:
        """Multiply-adds in registers, in GFLOP/s of all cores together."""
        return self._run("peak")

    def read_gb_s(self, size: int) -> float:
        """Reading `size` bytes again and again, shared out among the cores: from the cache that holds them."""
        return self._run("stream", str(max(1, size // len(self._cores))))

    def _run(self, name: str, *arguments: str) -> float:
        allowed = os.sched_getaffinity(0)
        running = []
        try:
            for core in self._cores:
                os.sched_setaffinity(0, {core})  # what is started inherits it
                command = [self._programs[name], *arguments]
                running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        finally:
            os.sched_setaffinity(0, allowed)
        total = 0.0
        for process in running:
            out, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{name}.c ended with status {process.returncode}")
            total += float(out)
        return total


def _build(name: str, folder: Path) -> Path:
    source, program = Path(__file__).with_name(f"{name}.c"), folder / name
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *FLAGS, str(source), "-o", str(program)], check=True)
    return program
