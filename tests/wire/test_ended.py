"""What came of jobs that have just ended is told without the store, and nothing that is not stored is told."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wire.test_refused_facts import NEVER
from wire.test_store import NEEDS, RESULT, SPEC

from kedge.rpc import messages as m
from kedge.rpc.protocol import local_protocol
from kedge.rpc.status import UnknownJobError
from kedge.rpc.tracker.ended import Ended
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import (
    DeviceFault,
    Health,
    Job,
    JobResult,
    JobState,
    Lease,
    Measurement,
    StepSamples,
    Tensor,
    TimeOptions,
)
from support.toys import device_info


class Watched(Store):
    """A store that tells which jobs were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[str] = []

    def job(self, job_id: str) -> Any:
        self.asked.append(job_id)
        return super().job(job_id)


class Device:
    """An agent of the shell's that has said hello."""

    def __init__(self, shell: Shell) -> None:
        self.shell, self.heard = shell, asyncio.Queue[m.TrackerBody | None]()
        hello = m.Hello(local_protocol(), device_info("a"), "one", health=Health())
        self.connection = shell.agent_connected(hello, self.heard.put_nowait)

    async def assigned(self) -> Lease:
        while not isinstance(said := await asyncio.wait_for(self.heard.get(), 60), m.AssignJob):
            pass
        return said.lease

    def ends(self, lease: Lease, result: JobResult = RESULT) -> None:
        self.shell.agent_said(self.connection, m.JobFinished(lease, result))


def test_a_job_that_has_just_ended_is_told_as_it_is_stored(tmp_path: Path) -> None:
    async def main() -> None:
        shell = Shell(store)
        device = Device(shell)
        told = replace(RESULT, outputs=(Tensor("y", "int8", (3,), b"xyz"),))
        for result in (RESULT, told):
            job_id, _ = await shell.submit(replace(SPEC, selector=""), NEEDS[:1], "", "ann")
            device.ends(await device.assigned(), result)
            while (await shell.job(job_id)).state is not JobState.DONE:
                await shell._durable(shell._barrier())
            store.asked.clear()
            now = await shell.job(job_id)
            assert store.asked == [] and now.result == replace(result, device="a")
            assert now == await asyncio.wrap_future(store.job(job_id)), "as the store has it"
            assert await shell.result(job_id) == now.result
        shell.close()

    store = Watched(tmp_path)
    asyncio.run(main())
    store.close()


def test_a_job_that_ended_while_the_store_refused_it_is_no_job(tmp_path: Path) -> None:
    async def main() -> None:
        shell = Shell(store)
        device = Device(shell)
        await shell._durable(shell._barrier())  # nothing waits for the disk: the next job is begun at once
        store.append([], hold_up)
        assert await asyncio.to_thread(held.wait, 60)
        submitting = asyncio.ensure_future(shell.submit(replace(SPEC, selector=""), NEEDS[:1], NEVER, "ann"))
        lease = await device.assigned()
        device.ends(lease)
        hold.set()
        with pytest.raises(StoreError):
            await submitting
        await shell._durable(shell._barrier())
        with pytest.raises(UnknownJobError):
            await shell.job(lease.job_id)
        assert [page async for page in shell.jobs(10, ())] == [[]]
        shell.close()

    hold, held = threading.Event(), threading.Event()

    def hold_up() -> None:
        held.set()
        assert hold.wait(60)

    store = Store(tmp_path)
    asyncio.run(main())
    store.close()


def test_only_the_newest_are_remembered_and_none_that_is_large() -> None:
    def job(name: str, data: bytes) -> Job:
        result = replace(RESULT, outputs=(Tensor("y", "int8", (len(data),), data),))
        return Job(name, SPEC, JobState.DONE, result=result, faults=(DeviceFault("b", "it was lost"),))

    ended = Ended()
    for number in range(300):
        ended.put(job(f"j{number}", b"x"))
    assert [name for name in (f"j{number}" for number in range(300)) if ended.get(name)] == [
        f"j{number}" for number in range(44, 300)
    ]
    ended.put(job("large", bytes(1 << 16)))
    assert ended.get("large") is None and ended.get("j299") is not None
    ended.forget(["j299", "never"])
    assert ended.get("j299") is None


LONG = 8 << 10  # so many numbers are as large as a job here may be


@pytest.mark.parametrize(
    "result",
    [
        replace(RESULT, measurement=Measurement(TimeOptions(), (1.5,) * LONG)),
        replace(RESULT, measurement=Measurement(TimeOptions(), (), profile=StepSamples(((1.5,) * 100,) * 82, 1e9, ()))),
        replace(RESULT, measurement=Measurement(TimeOptions(), (), reasons=("x" * 1000,) * 66)),
        replace(RESULT, measurement=Measurement(TimeOptions(), (), after=Health(problems=("x" * 1000,) * 66))),
        replace(RESULT, outcome=replace(RESULT.outcome, message="x" * (64 << 10))),
        replace(RESULT, outputs=tuple(Tensor("y", "int8", (0,), b"") for _ in range(1000))),
    ],
    ids=["samples", "profile", "reasons", "health", "message", "outputs"],
)
def test_nothing_of_a_job_is_remembered_where_it_is_large_in_all(result: JobResult) -> None:
    ended = Ended()
    ended.put(Job("j", SPEC, JobState.DONE, result=RESULT))
    ended.put(Job("j", SPEC, JobState.DONE, result=result))
    assert ended.get("j") is None


def test_all_together_are_not_large() -> None:
    """256 of the largest would be 16 MiB, and 64 as objects."""
    ended = Ended()
    result = replace(RESULT, measurement=Measurement(TimeOptions(), (1.5,) * (LONG - 128)))
    for number in range(100):
        ended.put(Job(f"j{number}", SPEC, JobState.DONE, result=result))
    kept = [number for number in range(100) if ended.get(f"j{number}") is not None]
    assert kept == [*range(100 - len(kept), 100)] and 60 <= len(kept) <= 70
    ended.forget([f"j{number}" for number in kept])
    for number in range(256):
        ended.put(Job(f"k{number}", SPEC, JobState.DONE, result=RESULT))
    assert ended.get("k0") is not None, "what is forgotten takes no room"
