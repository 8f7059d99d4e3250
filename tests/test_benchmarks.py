"""The benchmarks still run and still check their outputs; figures are judged by people, on a quiet machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_walking_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "walking.py"), "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"kedge +[0-9.]+ µs, ONNX Runtime +[0-9.]+ µs", done.stdout)) == 6
    for figure in ("overhead of a job", "idle agent", "upload", "digits compile"):
        assert f"{figure}: " in done.stdout or f"{figure}, " in done.stdout, done.stdout
    assert "written to" not in done.stdout


def test_the_fleet_benchmark_runs() -> None:
    parts = "session,throughput,crowd,restart"
    command = [sys.executable, str(ROOT / "benchmarks" / "fleet.py"), "--smoke", "--only", parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+): (\{.*\})$", done.stdout, re.MULTILINE))
    rows = {part: json.loads(row) for part, row in found.items()}
    assert rows["throughput"]["simulated_jobs_s"] > 0 and rows["throughput"]["real_jobs_s"] > 0
    assert rows["session"]["call_keeping_p50_ms"] > 0 and rows["session"]["calls"] > 10
    assert rows["crowd"]["resident_mb"] > 10
    # Each agent has one job when all are back, and no job is lost.
    assert rows["restart"]["queued_then"] == rows["restart"]["jobs"] - rows["restart"]["agents"]


def test_the_fork_join_benchmark_runs() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fork_join.py"), "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for schedule in ("static", "dynamic"):
        for body in ("empty", "meet"):
            assert re.search(rf"kedge +{schedule} +{body} +0 +[0-9]+", done.stdout), done.stdout
    assert "written to" not in done.stdout
