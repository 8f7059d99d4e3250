"""Logs for machines: one JSON object per line, whatever is logged."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet
from kedge.rpc.logs import JsonFormatter, TextFormatter
from kedge.rpc.printable import printable
from kedge.rpc.tracker.server import RunningTracker
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.toys import device_info


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("kedge.tracker", logging.WARNING, "file.py", 1, message, arguments, None)
    made.__dict__.update(more)
    return made


def test_a_record_is_one_line_with_its_fields() -> None:
    line = JsonFormatter().format(record("job %s:\nfailed \u2026", "a1", job="a1", user="ann", stage=None, secret="s"))
    assert "\n" not in line
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "warning",
        "logger": "kedge.tracker",
        "message": "job a1:\nfailed \u2026",
        "job": "a1",
        "user": "ann",
    }


def test_a_message_forges_no_line_and_moves_no_cursor() -> None:
    text = TextFormatter("%(levelname)s %(name)s: %(message)s").format(
        record("job a1: %s", "\x1b[2Joops\r\nINFO x: ok\x9b")
    )
    assert text == "WARNING kedge.tracker: job a1: \\x1b[2Joops\n    INFO x: ok\\x9b"


def test_a_traceback_forges_no_line_either() -> None:
    try:
        raise ValueError("x\x1b[2J\n2026 INFO forged")
    except ValueError:
        failed = record("it failed")
        failed.exc_info = sys.exc_info()
    lines = TextFormatter("%(message)s").format(failed).splitlines()
    assert lines[0] == "it failed" and all(line.startswith("    ") for line in lines[1:])
    assert lines[-2:] == [r"    ValueError: x\x1b[2J", "    2026 INFO forged"]


def test_only_what_a_terminal_would_obey_is_escaped() -> None:
    plain = "Größe 5 °C\t→ 日本\n"
    assert printable(plain) == plain
    assert printable("a\rb\x07\x7f\u202e\u2066") == r"a\x0db\x07\x7f\u202e\u2066"


def test_an_exception_is_within_the_line() -> None:
    try:
        raise ValueError("planted")
    except ValueError:
        failed = record("it failed")
        failed.exc_info = sys.exc_info()
    assert json.loads(JsonFormatter().format(failed))["exception"].endswith("ValueError: planted")


def test_a_tracker_says_what_became_of_a_job(
    tracker: RunningTracker, fleet: Fleet, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kedge.tracker"), FakeAgent(tracker.address, device_info(), work=echo):
        job = fleet.run(artifact, {"x": np.zeros((2, 4), np.float32)})
        job.wait()
        # Who waits for the job goes first, its line comes after.
        wait_for(lambda: any(hasattr(each, "job") for each in caplog.records), "the job's line")
    found = [json.loads(JsonFormatter().format(each)) for each in caplog.records]
    (ended,) = [each for each in found if "job" in each]
    assert ended["message"] == f"job {job.id} of local on bench-1: ok"
    about = {"job": job.id, "user": "local", "device": "bench-1", "kind": "run", "outcome": "ok"}
    assert about.items() <= ended.items()
    assert any(each.get("device") == "bench-1" and "says hello" in each["message"] for each in found)


def test_an_agent_that_cannot_start_says_so_in_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kedge.device_agent", "--runner", str(tmp_path / "none"), "--log-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode != 0 and json.loads(line)["level"] == "critical" and "no runner" in line
