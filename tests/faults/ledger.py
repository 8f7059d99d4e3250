"""What must hold once the dust has settled, whatever was done to a fleet."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import convert
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet
from kedge.rpc.errors import KedgeError
from kedge.rpc.types import Blob, DeviceState, Job, JobState, SessionTask, Tensor
from support.agents import wait_for

from .world import World

LIVE = (JobState.QUEUED, JobState.ASSIGNED, JobState.RUNNING)
#: How functions of module.c end when nothing is done to them; any other is "ok".
ENDS: Mapping[str, str] = {
    "segfault": "crash",
    "endless": "timeout",
    "hungry": "out_of_memory",
    "scribble": "crash",
}


@dataclass(frozen=True)
class Found:
    """What came of it all: jobs by outcome, those that ended otherwise than their function does, clients' errors.

    Sessions are counted apart: by outcome, as the tracker has it, and by what clients were told.
    """

    jobs: int
    outcomes: Counter[str]
    otherwise: Counter[str]
    errors: Counter[str]
    sessions: Counter[str]
    session_errors: Counter[str]


def settle(world: World) -> None:
    """Wait until nothing is under way, and every board is free and works."""
    with world.fleet() as fleet:
        wait_for(lambda: not fleet.jobs(states=LIVE, limit=10_000), "all jobs to end", 150)
        wait_for(lambda: _free(fleet, len(world.agents)), f"all boards to be free: {fleet.devices()}", 60)
        artifact = Artifact.load(world.artifact)
        for agent in world.agents:
            wait_for(lambda name=agent.name: _works(fleet, artifact, name), f"{agent.name} to work", 60)
    for agent in world.agents:
        wait_for(lambda agent=agent: not world.runners(agent), f"runners of {agent.name} to be gone")
        data = world.agent_data(agent)
        for place, most in (("jobs", 1), ("results", 0), ("cache/members", 0)):  # the one that waits has its folder
            wait_for(
                lambda place=data / place, most=most: len(_litter(place)) <= most,
                f"{data / place} to hold nothing unfinished",
            )


def _litter(folder: Any) -> list[str]:
    return [path.name for path in folder.iterdir() if folder.name != "members" or path.suffix]


def _free(fleet: Fleet, count: int) -> bool:
    devices = fleet.devices()
    return len(devices) == count and all(
        device.state is DeviceState.IDLE and not device.running_job_id for device in devices
    )


def _works(fleet: Fleet, artifact: Artifact, device: str) -> bool:
    """One more job there; where the tracker has found a blob damaged, the next attempt sends it again."""
    x = np.arange(5, dtype=np.float32)
    try:
        fleet._uploaded.clear()
        result = fleet.run(artifact, {"x": x}, function="add_one", device=device).wait(60, check=False)
    except KedgeError:
        return False
    return result.outcome.ok and np.array_equal(result["y"], x + 1)


def audit(world: World) -> Found:
    """Compare what clients know with what the tracker keeps, job by job."""
    with world.fleet() as fleet:
        jobs = {info.id: _job(fleet, info.id) for info in fleet.jobs(limit=10_000)}
    assert len(jobs) < 10_000, "more than can be listed"
    assert {job.state for job in jobs.values()} == {JobState.DONE}
    wanted = {said["x"]: said for said in world.lines if said["what"] == "submit"}
    of_number: dict[int, list[Job]] = defaultdict(list)
    outcomes: Counter[str] = Counter()
    sessions: Counter[str] = Counter()
    otherwise: Counter[str] = Counter()
    for job in jobs.values():
        assert job.result is not None
        outcome = job.result.outcome
        if isinstance(job.spec.task, SessionTask):
            sessions[outcome.kind.value] += 1
            continue
        outcomes[outcome.kind.value] += 1
        said = wanted.get(_digest(job.spec.task.inputs[0]))
        if said is not None:
            of_number[said["n"]].append(job)
        if outcome.kind.value != ENDS.get(job.spec.function, "ok"):
            otherwise[f"{job.spec.function}: {outcome.kind.value}"] += 1
        if outcome.ok:
            assert _digest(job.result.outputs[0]) == (said["y"] if said else _plus_one(job)), f"wrong: {job}"
    _check_clients(world, jobs, of_number)
    _check_log(world, jobs)
    wrong = [said for said in world.lines if said["what"] == "session-done" and not said["right"]]
    assert not wrong, f"sessions that computed something else: {wrong}"
    count = outcomes.total()
    return Found(count, outcomes, otherwise, _told(world, "error"), sessions, _told(world, "session-error"))


def _told(world: World, what: str) -> Counter[str]:
    """What clients were told, by class and first line."""
    lines = [said for said in world.lines if said["what"] == what]
    return Counter(f"{said['error']}: {said['text'].splitlines()[0][:90]}" for said in lines)


def _check_clients(world: World, jobs: Mapping[str, Job], of_number: Mapping[int, list[Job]]) -> None:
    doubled = {number: [job.id for job in found] for number, found in of_number.items() if len(found) > 1}
    assert not doubled, f"submitted once, accepted more often: {doubled}"
    for said in world.lines:
        if said["what"] == "accepted":
            assert said["id"] in jobs, f"an accepted job is lost: {said}"
            assert [job.id for job in of_number[said["n"]]] == [said["id"]], f"another job's inputs: {said}"
        elif said["what"] == "done":
            job = jobs[said["id"]]
            assert job.result is not None
            assert said["outcome"] == job.result.outcome.kind.value, f"two outcomes: {said}, {job.result.outcome}"
            assert said["right"] == job.result.outcome.ok, f"a wrong result: {said}"


def _check_log(world: World, jobs: Mapping[str, Job]) -> None:
    """The tracker tells of every end once, in all of its lives together; killed, it may not come to tell."""
    told: Counter[str] = Counter()
    logs = [tracker.log_path.read_text(errors="replace") for tracker in world.trackers]
    for line in "\n".join(logs).splitlines():
        if line.startswith("{"):
            record = json.loads(line)
            if "outcome" in record:
                told[record["job"]] += 1
    assert set(told) <= set(jobs)
    twice = [job_id for job_id, count in told.items() if count > 1]
    assert not twice, f"ended more than once: {twice}"


#: gRPC's own words for a message to a peer that has just gone: nobody's failure.
_NOBODY_THERE = "ExecuteBatchError raised in core"
_SPEAK_OF_A_BUG = ('"exception"', "in a way that has no name", "worker failed", "thread failed")


def complaints(world: World) -> list[str]:
    """Lines of the logs that speak of a bug: exceptions that nobody caught."""
    found = []
    for path in sorted((world.folder / "logs").iterdir()):
        lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            bug = line.startswith("Traceback") or any(words in line for words in _SPEAK_OF_A_BUG)
            if bug and _NOBODY_THERE not in line:
                found.append(f"{path.name}: " + "\n".join(lines[max(0, number - 2) : number + 60])[:6_000])
    return found[:5]


def close(world: World) -> None:
    """Stop everything in order: all of it ends, and leaves nothing."""
    for agent in world.agents:
        assert agent.end(30) == 0, agent.log_path.read_text()[-3000:]
    for tracker in world.trackers:
        assert tracker.end(30) == 0, tracker.log_path.read_text()[-3000:]
    wait_for(lambda: not world.left_over(), f"no process to be left: {world.left_over()}")
    left = list((world.folder / "tmp").iterdir())
    assert not left, f"temporary files: {left}"
    # What clients that were killed had begun to send is gone on with by whoever sends it again.
    for tracker in world.trackers:
        partial = [path.name for path in (world.folder / tracker.name / "blobs" / "partial").iterdir()]
        assert not [name for name in partial if "." in name], partial


def end(world: World) -> Found:
    """All of the above, in order."""
    world.stop_clients()
    settle(world)
    found = audit(world)
    close(world)
    assert not complaints(world), "\n".join(complaints(world))
    return found


def _job(fleet: Fleet, job_id: str) -> Job:
    request = fleet_pb2.GetJobRequest(job_id=job_id)
    return convert.job_from_pb(fleet._persist(fleet._stub.GetJob, request))


def _digest(tensor: Tensor) -> str:
    return tensor.data.digest if isinstance(tensor.data, Blob) else hashlib.sha256(tensor.data).hexdigest()


def _plus_one(job: Job) -> str:
    """The answer to a job that no client has written down; such jobs are small."""
    data = job.spec.task.inputs[0].data
    assert isinstance(data, bytes)
    return hashlib.sha256((np.frombuffer(data, np.float32) + np.float32(1)).tobytes()).hexdigest()
