"""A command whose job waits says what for."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import kedge as product
from kedge.cli.waiting import state_text, watching
from kedge.demo import processes
from kedge.rpc.blobs import blob_of
from kedge.rpc.outcome import Stage
from kedge.rpc.types import DeviceState, Job, JobSpec, JobState, RunTask
from support.agents import wait_for
from support.commands import interruptible_command

JOB = Job("b", JobSpec(blob_of(b""), "main", RunTask(()), "w1"), JobState.QUEUED, submitted_unix_ms=2)


BUSY = replace(JOB, detail="1 matching device is busy", position=3)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (JOB, "queued for w1"),
        (BUSY, "queued for w1: 1 matching device is busy, number 3 in line"),
        (replace(JOB, state=JobState.ASSIGNED), "sent to w1"),
        (replace(JOB, state=JobState.ASSIGNED, stage=Stage.RUN), "w1: run"),
    ],
)
def test_where_a_job_is(job: Job, text: str) -> None:
    assert state_text(job) == text


def test_what_is_waited_for_is_said_of_the_last_job_that_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedge.cli.waiting.INTERVAL_S", 0.01)
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with watching(lambda what, done=0, total=0: said.put(what)) as tell:
        tell(replace(JOB, state=JobState.DONE))
        tell(BUSY)
        assert said.get(timeout=60) == state_text(BUSY), "nothing of a job that is done"
        tell(replace(JOB, state=JobState.RUNNING, stage=Stage.RUN))
        while (text := said.get(timeout=60)) == state_text(BUSY):
            pass
        assert text == "w1: run"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        interruptible_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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
