"""What `kedge top` shows of more jobs than it looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kedge.cli import top
from kedge.rpc import messages as m
from kedge.rpc.client import connect
from kedge.rpc.tracker.server import start
from support.fake_agent import FakeAgent
from support.toys import device_info, make_artifact

X = np.zeros((1, 4), np.float32)


def test_of_many_jobs_those_that_run_and_the_first_in_line_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "_MOST_JOBS", 2)
    artifact = make_artifact()
    with (
        start(port=0, data_dir=tmp_path, insecure_loopback=True) as tracker,
        connect(tracker.address) as fleet,
        FakeAgent(tracker.address, device_info()) as agent,
    ):
        submitted = [fleet.run(artifact, {"x": X}).id for _ in range(5)]
        agent.expect(m.AssignJob)
        devices, jobs = top._look(fleet, "")
        assert [job.id for job in jobs] == submitted[:3]
        console = Console(width=200, file=(tmp_path / "seen").open("w"))
        console.print(top._picture("here", devices, jobs, None))
        console.file.close()
    assert "jobs: 1 running, 2+ waiting" in (tmp_path / "seen").read_text()
