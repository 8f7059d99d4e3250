"""The `kedge` command as users start it: in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Kedge = Callable[..., "subprocess.CompletedProcess[str]"]


def kedge_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "kedge", *map(str, arguments)]


def interruptible_command(*arguments: str | Path) -> list[str]:
    """The command where the test ends it by a signal: `KeyboardInterrupt` may come between the opening of a file and
    the first line that could close it, anywhere in Python's library, so files left open say nothing of kedge."""
    return [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-m", "kedge", *map(str, arguments)]


def check_digits_profile(report: Mapping[str, Any]) -> None:
    """What `kedge bench --profile --json` says of the digits model."""
    kernels = report["kernels"]
    assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
    assert [kernel["time_ns"] for kernel in kernels] == sorted((k["time_ns"] for k in kernels), reverse=True)
    assert {"conv1", "conv2", "fc", "softmax"} <= {name for kernel in kernels for name in kernel["origin"]}
    assert all(kernel["rule"] and kernel["calls"] == 1 and kernel["bytes"] > 0 for kernel in kernels)
    (conv,) = (kernel for kernel in kernels if "conv2" in kernel["origin"])
    assert conv["decisions"] and conv["gflops_per_s"] == pytest.approx(conv["flops"] / conv["time_ns"])
    assert conv["roof_share"] > 0
    roof = report["roofline"]
    assert roof["flops_per_s"] > 0 and roof["clock_hz"] > 1e6 and len(roof["read_bytes_per_s"]) == 5
    assert report["protocol"]["profile"] is True
