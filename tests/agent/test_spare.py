"""The runner that waits for the next job: for one job, of the same limits, and for nobody when its agent ends."""

from __future__ import annotations

import logging
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kedge.device_agent import jobs
from kedge.device_agent.jobs import Board, Job
from kedge.device_agent.runner import Limits
from kedge.device_agent.seats import Seat, Spare
from kedge.rpc.artifact import Artifact
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.types import Blob, Deadlines, JobResult, JobSpec
from support.agents import runs, wait_for
from support.handmade import artifact

from .conftest import FUNCTIONS, Remote
from .test_jobs import run_spec


@pytest.fixture
def manifest(remote: Remote, module: bytes) -> Blob:
    made: Artifact = artifact(module, FUNCTIONS)
    return remote.publish(made)


@pytest.fixture
def idle(board: Board, manifest: Blob) -> Iterator[Board]:
    """A board that has had a job, and has a runner wait for the next."""
    work(board, run_spec(manifest, "add"))
    yield board
    board.close()
    wait_for(lambda: not list(board.scratch.iterdir()), "the folder of a runner that nobody wanted to go")


def work(board: Board, spec: JobSpec) -> Seat:
    """One job as the agent runs it; the seat that it had."""
    job = Job(board, spec, lambda _: None)
    assert job.run().outcome.ok
    seat = job._seat
    assert seat is not None
    job.clean_up()
    assert not runs(seat.runner.pid) and not seat.folder.exists()
    job.make_ready()
    return seat


def waiting(board: Board) -> Seat:
    wait_for(lambda: board.spare._coming is None, "the spare to be there")
    seat = board.spare._seat
    assert seat is not None and runs(seat.runner.pid)
    assert list(board.scratch.iterdir()) == [seat.folder]
    return seat


def limit(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith(name)).removeprefix(name).split()[0]


def test_it_serves_the_next_job_and_no_other(idle: Board, manifest: Blob) -> None:
    first = waiting(idle)
    assert Path(f"/proc/{first.runner.hello.pid}/comm").read_text() == "kedge-runner\n", "it was asked nothing yet"
    assert work(idle, run_spec(manifest, "add")) is first
    second = waiting(idle)
    assert second.runner.pid != first.runner.pid
    assert work(idle, run_spec(manifest, "add")) is second


def test_its_limits_are_set_while_it_waits(idle: Board) -> None:
    seat = waiting(idle)
    pid = seat.runner.hello.pid
    assert seat.limits.cpu_s and seat.limits.sandbox
    assert limit(pid, "Max cpu time") == str(seat.limits.cpu_s)
    assert limit(pid, "Max open files") == str(seat.limits.open_files)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"


def test_a_job_with_other_limits_has_a_runner_of_its_own(idle: Board, manifest: Blob) -> None:
    before = waiting(idle)
    other = work(idle, run_spec(manifest, "add", Deadlines(run_ms=100_000)))
    assert other is not before and other.limits != before.limits
    assert not runs(before.runner.pid) and not before.folder.exists()
    assert waiting(idle).limits == other.limits


@pytest.mark.parametrize("session", [False, True])
def test_it_has_ended_before_the_code_of_a_job_that_it_does_not_fit_runs(idle: Board, session: bool) -> None:
    """As a GPU's driver needs processes and sockets, what runs there could stop it, or change its folder."""
    spare = waiting(idle)
    if session:
        folder = idle.new_folder("session-")
        runner = idle.start_runner(Limits(), folder, 1, timing=True)
    else:
        seat = idle.take_seat(Limits(), 60.0, threading.Event(), timing=False)
        folder, runner = seat.folder, seat.runner
    assert not runs(spare.runner.pid) and list(idle.scratch.iterdir()) == [folder]
    runner.close()
    idle.remove_folder(folder)


def test_jobs_on_other_cores_have_runners_of_their_own(idle: Board, manifest: Blob) -> None:
    before = waiting(idle)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    elsewhere = replace(idle, others=cores[:1])
    assert work(elsewhere, run_spec(manifest, "add")) is not before
    assert waiting(idle).cpus == cores[:1]


def test_one_that_was_killed_costs_no_job(idle: Board, manifest: Blob) -> None:
    """When memory runs out it is the first to go."""
    dead = waiting(idle)
    os.kill(dead.runner.pid, signal.SIGKILL)
    wait_for(lambda: dead.runner.exited, "it to end")
    assert work(idle, run_spec(manifest, "add")) is not dead
    assert not dead.folder.exists()


def test_after_the_agents_last_job_there_is_none(idle: Board, manifest: Blob) -> None:
    seat = waiting(idle)
    idle.close()
    assert not runs(seat.runner.pid)
    work(idle, run_spec(manifest, "add"))
    assert idle.spare.close() == (None, None) and list(idle.scratch.iterdir()) == []


def test_drivers_are_not_kept_waiting(board: Board) -> None:
    seat = board.take_seat(Limits(), 60.0, threading.Event(), timing=False)
    board.vacate(seat)
    board.make_ready(seat)
    assert board.spare.close() == (None, None)


def test_a_runner_that_does_not_start_is_the_next_jobs_to_report(
    idle: Board, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    seat = waiting(idle)
    with caplog.at_level(logging.WARNING):
        replace(idle, runner=tmp_path / "absent").make_ready(replace(seat, limits=Limits(sandbox=True)))
        wait_for(lambda: "no runner waits for the next job" in caplog.text, "the warning")
    assert waiting(idle) is seat


@pytest.fixture
def hangs(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A runner's program that says nothing, and the file in which it leaves the id of its process."""
    program, said = tmp_path / "hangs", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {said}.new; mv {said}.new {said}; exec sleep 600\n")
    program.chmod(0o755)
    yield program, said
    wait_for(lambda: not runs(int(said.read_text())), "it to end")


def test_a_job_that_is_cancelled_while_its_own_runner_hangs_at_start_ends_at_once(
    board: Board, manifest: Blob, hangs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, said = hangs
    monkeypatch.setattr(jobs, "_START_S", 600.0)  # it would wait for longer than this test does
    spec = run_spec(manifest, "add", Deadlines(load_ms=600_000))
    job, results = Job(replace(board, runner=program), spec, lambda _: None), queue.SimpleQueue[JobResult]()
    threading.Thread(target=lambda: results.put(job.run()), daemon=True).start()
    wait_for(said.exists, "its runner to begin")
    job.cancel("not needed")
    outcome = results.get(timeout=60).outcome
    job.clean_up()
    assert (outcome.kind, outcome.message) == (OutcomeKind.CANCELLED, "not needed")
    assert list(board.scratch.iterdir()) == []


def test_a_cancel_between_the_last_look_and_the_process_ends_it_too(
    board: Board, manifest: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(jobs, "_START_S", 600.0)
    job = Job(replace(board, runner=program), run_spec(manifest, "add", Deadlines(load_ms=600_000)), lambda _: None)

    def cancelled_meanwhile(_: Board, prefix: str) -> Path:
        job.cancel("not needed")
        return Path(tempfile.mkdtemp(prefix=prefix, dir=board.scratch))

    monkeypatch.setattr(Board, "new_folder", cancelled_meanwhile)
    results = queue.SimpleQueue[JobResult]()
    threading.Thread(target=lambda: results.put(job.run()), daemon=True).start()
    assert results.get(timeout=60).outcome.kind is OutcomeKind.CANCELLED
    job.clean_up()
    assert list(board.scratch.iterdir()) == []


# ---- while it is being started ------------------------------------------------------------------------------------


@pytest.fixture
def hanging(idle: Board, hangs: tuple[Path, Path]) -> int:
    """The board's spare is being started, and says nothing; the id of its process."""
    program, said = hangs
    like = waiting(idle)
    there = idle.spare.drop()
    assert there is not None
    idle.vacate(there)
    replace(idle, runner=program).make_ready(like)
    wait_for(said.exists, "it to begin")
    return int(said.read_text())


def test_a_job_waits_for_none_that_it_does_not_fit(
    idle: Board, manifest: Blob, hanging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_COMING_SHARE", 1.0)  # one that waits has no time left for a runner of its own
    work(idle, run_spec(manifest, "add", Deadlines(run_ms=100_000)))
    wait_for(lambda: not runs(hanging), "the one that nobody wants to end")
    waiting(idle)  # for the next job like this one, and no folder is left of the one before


def test_nor_does_a_session(idle: Board, hanging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: object) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(idle.spare._changed, "wait", wait)
    folder = idle.new_folder("session-")
    idle.start_runner(Limits(), folder, 1, timing=True).close()
    idle.remove_folder(folder)


def test_a_job_that_it_would_fit_has_time_left_for_a_runner_of_its_own(
    idle: Board, manifest: Blob, hanging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_COMING_SHARE", 2.0 / jobs._START_S)
    began = time.monotonic()
    work(idle, run_spec(manifest, "add"))
    assert time.monotonic() - began > 1.9
    waiting(idle)


def test_a_job_that_is_cancelled_waits_for_none(
    idle: Board, manifest: Blob, hanging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare, waits = idle.spare, threading.Event()
    monkeypatch.setattr(jobs, "_COMING_SHARE", 100.0)  # it would wait for longer than this test does
    wait = spare._changed.wait
    # The lock is held until it waits.
    monkeypatch.setattr(spare._changed, "wait", lambda patience_s: (waits.set(), wait(patience_s))[1])
    job, results = Job(idle, run_spec(manifest, "add"), lambda _: None), queue.SimpleQueue[JobResult]()
    threading.Thread(target=lambda: results.put(job.run()), daemon=True).start()
    assert waits.wait(60)
    coming = spare._coming
    job.cancel("not needed")
    outcome = results.get(timeout=60).outcome
    job.clean_up()
    assert (outcome.kind, outcome.message) == (OutcomeKind.CANCELLED, "not needed")
    assert spare._coming is coming and runs(hanging), "it is left to the next job"
    idle.close()


def test_one_that_is_about_to_be_there_is_waited_for_on_a_slow_board_too(idle: Board, manifest: Blob) -> None:
    seat = waiting(idle)
    assert idle.spare.drop() is seat
    coming = idle.spare.expect(seat.limits, seat.cpus)
    assert coming is not None
    threading.Timer(1.5, idle.spare.put, (coming, seat)).start()
    assert work(idle, run_spec(manifest, "add")) is seat


@pytest.mark.parametrize("end", [Spare.close, Spare.drop, lambda spare: spare.expect(Limits(cpu_s=1), None)])
def test_a_job_that_waits_for_one_hears_when_it_is_given_up(
    end: Callable[[Spare], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    spare, waits, taken = Spare(), threading.Event(), threading.Event()
    wait = spare._changed.wait
    # The lock is held until it waits.
    monkeypatch.setattr(spare._changed, "wait", lambda patience_s: (waits.set(), wait(patience_s))[1])
    assert spare.expect(Limits(), None) is not None

    def take() -> None:
        assert spare.take(Limits(), None, 600.0, threading.Event()) is None
        taken.set()

    threading.Thread(target=take, daemon=True).start()
    assert waits.wait(60)
    end(spare)
    assert taken.wait(60)


def test_an_agent_that_ends_leaves_none_behind(idle: Board, hanging: int) -> None:
    idle.close()
    assert not runs(hanging) and list(idle.scratch.iterdir()) == []
