"""A command whose job waits says what for."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import kedge as product
from kedge.cli.waiting import ours, state_text
from kedge.demo import processes
from kedge.rpc.blobs import blob_of
from kedge.rpc.outcome import Stage
from kedge.rpc.types import DeviceState, Job, JobSpec, JobState, RunTask
from support.agents import wait_for
from support.commands import kedge_command

JOB = Job("b", JobSpec(blob_of(b""), "main", RunTask(()), "w1"), JobState.QUEUED, submitted_unix_ms=2)


BUSY = replace(JOB, detail="1 matching device is busy", position=3)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (None, None),
        (JOB, "queued for w1"),
        (BUSY, "queued for w1: 1 matching device is busy, number 3 in line"),
        (replace(JOB, state=JobState.ASSIGNED), "sent to w1"),
        (replace(JOB, state=JobState.ASSIGNED, stage=Stage.RUN), "w1: run"),
    ],
)
def test_where_a_job_is(job: Job | None, text: str | None) -> None:
    assert state_text("w1", job) == text


def test_a_job_of_somebody_else_is_not_taken_for_ours() -> None:
    earlier, later = replace(JOB, id="a", submitted_unix_ms=1), replace(JOB, id="c", submitted_unix_ms=3)
    elsewhere = replace(JOB, id="d", submitted_unix_ms=1, spec=replace(JOB.spec, selector="arch=aarch64"))
    assert ours([later, JOB, elsewhere, earlier], {"a"}, "w1") is JOB
    assert ours([elsewhere], set(), "w1") is None


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(kedge_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_busy_device_is_waited_for_in_words(digits: Path, tmp_path: Path) -> None:
    with (
        processes.tracker(tmp_path / "tracker") as address,
        processes.agent(address, "w1", tmp_path / "agent"),
        product.connect(address) as fleet,
    ):
        there = ("--device", "w1", "--tracker", address)
        with start("bench", digits, "--repeat", "1000", "--min-repeat-ms", "100", *there) as long:
            wait_for(lambda: fleet.devices("w1")[0].state is DeviceState.BUSY, "the device to be busy")
            with start("run", digits, *there) as waiting:
                assert waiting.stderr is not None
                for line in waiting.stderr:
                    if "queued for w1: 1 matching device is busy" in line:
                        break
                os.kill(long.pid, signal.SIGINT)
                long.communicate(timeout=60)
                out, errors = waiting.communicate(timeout=60)
                assert waiting.returncode == 0 and "probabilities" in out, errors
