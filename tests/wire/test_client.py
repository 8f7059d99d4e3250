from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact, Function, Port, Symbol
from kedge.rpc.client import Fleet, Timing, WaitTimeoutError, aio, connect, plan
from kedge.rpc.client.profile import Profile
from kedge.rpc.errors import ConnectError, IncompatibleTargetError, InputError, JobError, LimitError, NoDeviceError
from kedge.rpc.limits import check_number
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.protocol import ProtocolError
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.types import Deadlines, DeviceState, DeviceStatus, Job, JobState, Reservation
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.ports import free_ports
from support.toys import QUICK, device_info, make_artifact

X = np.arange(8, dtype=np.float32).reshape(2, 4)
BIG = np.arange(3 << 19, dtype=np.float32)


@pytest.fixture
def worker(tracker: RunningTracker) -> Iterator[FakeAgent]:
    with FakeAgent(tracker.address, device_info(), work=echo) as agent:
        yield agent


class OnlyDlpack:
    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("value", [X, OnlyDlpack(X), np.asfortranarray(X), X.tolist()], ids=type)
def test_inputs_are_anything_that_is_an_array(fleet: Fleet, worker: FakeAgent, artifact: Artifact, value: Any) -> None:
    if isinstance(value, list):
        with pytest.raises(InputError, match="dtype float64"):
            fleet.run(artifact, {"x": value})
    else:
        np.testing.assert_array_equal(fleet.run(artifact, {"x": value}).wait()["x_out"], X)


@pytest.mark.parametrize("size", [8, 3 << 19], ids=["inline", "blob"])
def test_bfloat16_travels(fleet: Fleet, worker: FakeAgent, size: int) -> None:
    ports = (Port("x", "bfloat16", ("N",)),), (Port("x_out", "bfloat16", ("N",)),)
    toy = make_artifact()
    manifest = replace(toy.manifest, functions=(Function("main", *ports, (Symbol("N"),)),))
    half = Artifact(manifest, {member.name: toy.member(member.name) for member in manifest.members})
    x = np.arange(size).astype("bfloat16")
    got = fleet.run(half, {"x": x}).wait()["x_out"]
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.view(np.uint16), x.view(np.uint16))


def test_large_tensors_travel_as_blobs(fleet: Fleet, worker: FakeAgent, artifact: Artifact) -> None:
    result = fleet.run(artifact, {"x": BIG}, function="big").wait()
    np.testing.assert_array_equal(result["x_out"], BIG)
    result["x_out"][0] = 1  # what the user gets is the user's
    assert fleet.jobs()[0].state is JobState.DONE


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"z": X}, ["has no input 'z'", "x: float32[N, 4]"]),
        ({"xx": X}, ["did you mean 'x'"]),
        ({}, ["lacks input 'x'"]),
        ({"x": X.astype(np.float64)}, ["float64", "expected x: float32[N, 4]"]),
        ({"x": X.reshape(4, 2)}, ["shape [4, 2]", "expected x: float32[N, 4]"]),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_sent(
    fleet: Fleet, artifact: Artifact, inputs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        fleet.run(artifact, inputs)
    assert all(word in str(caught.value) for word in words)
    assert fleet.jobs() == []


@pytest.mark.parametrize(
    ("artifact", "why"),
    [(make_artifact("aarch64"), "is for aarch64"), (make_artifact(features=("avx512f",)), "lacks: avx512f")],
)
def test_an_artifact_for_another_machine_is_refused_before_it_is_sent(
    fleet: Fleet, worker: FakeAgent, artifact: Artifact, why: str
) -> None:
    with pytest.raises(IncompatibleTargetError, match=f"device bench-1: .*{why}"):
        fleet.run(artifact, {"x": X})
    with fleet.pin() as device, pytest.raises(IncompatibleTargetError, match=why):
        device.load(artifact)
    assert fleet.jobs() == []


def test_a_bench_gives_a_timing(fleet: Fleet, worker: FakeAgent, artifact: Artifact) -> None:
    job = fleet.bench(artifact, {"x": X}, repeat=5, number=3, min_repeat_ms=1.5, warmup=2, threads=1)
    options = job.status().spec.task.options
    assert (options.repeat, options.number, options.min_repeat_ns, options.warmup) == (5, 3, 1_500_000, 2)
    result = job.wait()
    assert isinstance(result.timing, Timing) and len(result.timing.samples_ns) == 5
    assert str(result) == str(result.timing) and result.outputs == {}
    with_outputs = fleet.bench(artifact, {"x": X}, return_outputs=True).wait()
    np.testing.assert_array_equal(with_outputs["x_out"], X)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"threads": 3_000_000_000}, "threads is 3000000000"),
        ({"priority": 1 << 40}, "priority is 1099511627776"),
        ({"deadlines": Deadlines(run_ms=1 << 70)}, "run_ms is"),
        ({"deadlines": Deadlines(queue_ms=-5)}, "queue_ms is -5"),
        ({"repeat": 10**20}, "repeat is"),
        ({"repeat": 1_000_000}, "repeat is 1000000"),
        ({"min_repeat_ms": float("inf")}, "min_repeat_ms is inf"),
        ({"min_repeat_ms": 1e14}, "min_repeat_ms is"),
        ({"number": 0}, "number is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_sent(
    fleet: Fleet, worker: FakeAgent, artifact: Artifact, how: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        fleet.bench(artifact, {"x": X}, **how)
    if not {"repeat", "min_repeat_ms", "number"} & set(how):
        with pytest.raises(InputError, match=words):
            fleet.run(artifact, {"x": X}, **how)
    assert fleet.jobs() == []


def test_lists_are_chosen_by_the_tracker(
    fleet: Fleet, tracker: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (FakeAgent(tracker.address, device_info(name), work=echo) for name in ("one", "two"))
    with one, two:
        first = fleet.run(artifact, {"x": X}, device="one")
        first.wait()
        second = fleet.run(artifact, {"x": X}, device="two")
        second.wait()
        third = fleet.bench(artifact, {"x": X}, device="two", repeat=2)
        third.wait()
    waits = fleet.run(artifact, {"x": X})
    submitted = {job.id: job.submitted_unix_ms for job in fleet.jobs()}
    digest = plan.pack(artifact).blob.digest

    def listed(**wanted: Any) -> list[str]:
        found = [job.id for job in fleet.jobs(**wanted)]

        async def of_twin() -> list[str]:
            async with await aio.connect(tracker.address) as twin:
                return [job.id for job in await twin.jobs(**wanted)]

        assert asyncio.run(of_twin()) == found
        return found

    everything = [waits.id, third.id, second.id, first.id]
    assert listed() == listed(artifact=digest.upper()) == listed(artifact=digest[:6]) == everything
    assert listed(artifact="0" * 64) == listed(user="nobody") == listed(ids=("nope",)) == listed(device="three") == []
    assert listed(device="two") == [third.id, second.id] and listed(device="two", limit=1) == [third.id]
    assert listed(device="two", limit=1, artifact=digest, oldest_first=True) == [second.id]
    assert listed(states=(JobState.QUEUED,), artifact=digest) == [waits.id]
    assert listed(since_unix_s=(submitted[third.id] - 0.5) / 1000) == [waits.id, third.id]
    assert listed(ids=(first.id, waits.id, "nope"), states=(JobState.DONE,)) == [first.id]
    assert listed(user=fleet.status().user) == everything
    # One that is older answers with everything, and says nothing of having chosen.
    answer = fleet_pb2.ListJobsResponse(jobs=[convert.job_to_pb(job) for job in fleet.jobs()])
    monkeypatch.setattr(fleet, "_persist", lambda _method, _request: answer)
    assert len(fleet.jobs(states=(JobState.DONE,))) == 4
    with pytest.raises(ProtocolError, match="is older"):
        fleet.jobs(device="two")


def test_lists_have_a_limit(fleet: Fleet) -> None:
    for limit in (0, -1, 3_000_000_000):
        with pytest.raises(InputError, match=f"limit is {limit}"):
            fleet.jobs(limit=limit)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"since_unix_s": float("nan")}, "since_unix_s is nan"),
        ({"since_unix_s": float("-inf")}, "since_unix_s is -inf"),
        ({"ids": "3f2a9c0b1d22"}, "expected several ids"),
    ],
)
def test_a_list_of_what_no_job_can_have_is_refused(fleet: Fleet, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fleet.jobs(**wanted)


def test_as_many_ids_as_a_tracker_takes(fleet: Fleet) -> None:
    ids = [f"{number:012x}" for number in range(1001)]
    assert fleet.jobs(ids=ids[1:]) == []
    with pytest.raises(LimitError, match=r"job_ids has 1001 items, and at most 1000 are accepted"):
        fleet.jobs(ids=ids)


def check_profile(profile: Profile) -> None:
    """That of the toy's `main` by a fake agent: two steps of one kernel, whose samples add up to 2003 ns each."""
    (kernel,) = profile.kernels
    assert (kernel.kernel, kernel.calls, kernel.time_ns, kernel.n_bytes) == ("echo", 2, 2003.0, 2 * 32 * len(X))
    assert profile.timing.repeat == 4 and profile.timing.protocol.profile


def test_a_session_runs_and_times_on_one_device(tracker: RunningTracker, fleet: Fleet, artifact: Artifact) -> None:
    with (
        FakeAgent(tracker.address, device_info("one", rack="a"), work=echo),
        FakeAgent(tracker.address, device_info("two", rack="b"), work=echo),
        fleet.pin("rack=b", threads=3) as device,
    ):
        assert (device.name, device.target) == ("two", "llvm -mtriple=x86_64-linux-gnu")
        model = device.load(artifact)
        np.testing.assert_array_equal(model.run({"x": X})["x_out"], X)
        np.testing.assert_array_equal(model["big"]({"x": BIG[:7]})["x_out"], BIG[:7])
        assert model.time({"x": X}, repeat=4).repeat == 4
        check_profile(model.profile({"x": X}, repeat=4))
        assert {(job.device, job.spec.num_threads) for job in fleet.jobs()} == {("two", 3)}


def test_a_pinned_device_tells_of_its_own_jobs_alone(fleet: Fleet, worker: FakeAgent, artifact: Artifact) -> None:
    told: list[Job] = []
    with fleet.pin("bench-1", progress=told.append) as device:
        device.load(artifact).run({"x": X})
        (own,) = fleet.jobs()
        others = fleet.run(artifact, {"x": X}, device="bench-1")
        others.wait()
    assert {job.id for job in told} == {own.id} and told[-1].state is JobState.DONE


def test_so_does_one_of_the_asyncio_twin(tracker: RunningTracker, worker: FakeAgent, artifact: Artifact) -> None:
    told: list[Job] = []

    async def main() -> str:
        async with await aio.connect(str(tracker.address)) as fleet:
            async with fleet.pin("bench-1", progress=told.append) as device:
                await (await device.load(artifact)).run({"x": X})
            (own,) = await fleet.jobs()
            return own.id

    own = asyncio.run(main())
    assert {job.id for job in told} == {own} and told[-1].state is JobState.DONE


def test_a_session_without_a_device_names_those_there_are(fleet: Fleet, worker: FakeAgent) -> None:
    with pytest.raises(NoDeviceError, match="no connected device matches 'rack=z'") as caught, fleet.pin("rack=z"):
        pass
    assert "bench-1 (x86_64)" in str(caught.value.hint)


def test_devices_are_waited_for(tracker: RunningTracker, fleet: Fleet) -> None:
    with pytest.raises(NoDeviceError, match=r"within 0\.05 s"):
        fleet.wait_for_device("late", timeout=0.05)
    found: list[str] = []
    waiter = threading.Thread(target=lambda: found.append(fleet.wait_for_device("late", timeout=60).info.name))
    waiter.start()
    with FakeAgent(tracker.address, device_info("early")), FakeAgent(tracker.address, device_info("late")):
        waiter.join(60)
    assert found == ["late"]


def test_waiting_has_an_end_and_the_job_goes_on(tracker: RunningTracker, fleet: Fleet, artifact: Artifact) -> None:
    job = fleet.run(artifact, {"x": X})
    with pytest.raises(WaitTimeoutError, match=f"job {job.id} is not done after 0.05 s"):
        job.wait(timeout=0.05)
    with FakeAgent(tracker.address, device_info(), work=echo):
        assert fleet.job(job.id).wait(timeout=60).outcome.ok


def test_nobody_there(tmp_path: Path) -> None:
    with start(port=free_ports(), data_dir=tmp_path, insecure_loopback=True) as tracker:
        address = tracker.address
    with pytest.raises(ConnectError, match=f"no tracker answers at {address} .*Connection refused") as caught:
        connect(str(address))
    assert "kedge tracker start" in str(caught.value.hint)
    with pytest.raises(ConnectError, match="not a tracker's address"):
        connect("http://x")


def test_another_tracker_in_its_place_gets_everything_again(tmp_path: Path, artifact: Artifact) -> None:
    with start(port=free_ports(), data_dir=tmp_path / "one", settings=QUICK, insecure_loopback=True) as first:
        fleet = connect(first.address)
        fleet.run(artifact, {"x": BIG}, function="big").cancel()
    with (
        fleet,
        start(port=first.port, data_dir=tmp_path / "two", settings=QUICK, insecure_loopback=True) as second,
        FakeAgent(second.address, device_info(), work=echo),
    ):
        result = fleet.run(artifact, {"x": BIG}, function="big").wait(timeout=60)
        np.testing.assert_array_equal(result["x_out"], BIG)


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kedge.rpc.client import connect
from support.toys import make_artifact
x = {"x": np.zeros((1, 4), np.float32)}
with connect(sys.argv[1]) as fleet:
    try:
        if sys.argv[3] == "wait":
            job = fleet.run(make_artifact(), x, device="bench-1")
            print("submitted", flush=True)
            job.wait(progress=lambda job: print(job.state, flush=True))
        else:
            with fleet.pin("bench-1") as device:
                device.load(make_artifact()).run(x)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize(("how", "cancelled"), [("wait", False), ("session", True)])
def test_ctrl_c_is_clean(tmp_path: Path, how: str, cancelled: bool) -> None:
    patient = replace(QUICK, lease_ms=60_000, silence_ms=60_000)  # with an agent that says nothing meanwhile
    with (
        start(port=0, data_dir=tmp_path, settings=patient, insecure_loopback=True) as tracker,
        FakeAgent(tracker.address, device_info()) as agent,
        connect(tracker.address) as fleet,
    ):
        arguments = [str(tracker.address), str(Path(__file__).parents[1]), how]
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lease = agent.expect(m.AssignJob).lease
        if not cancelled:  # before that nobody had a handle to the job, and it would be
            assert process.stdout is not None and process.stdout.readline() == "submitted\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors, output.splitlines()[-1]) == (0, "", "interrupted")
        if cancelled:
            assert agent.expect(m.AbortJob).lease.job_id == lease.job_id
        else:
            assert agent.heard_nothing() and fleet.job(lease.job_id).status().state is JobState.ASSIGNED


def test_a_call_that_is_cancelled_while_it_submits_leaves_no_job(tracker: RunningTracker, fleet: Fleet) -> None:
    """Nobody has a handle to what was accepted."""

    async def cancelled(after_s: float) -> None:
        async with await aio.connect(tracker.address) as client:
            submitting = asyncio.create_task(client.run(artifact, {"x": X}, device="bench-1"))
            await asyncio.sleep(after_s)
            submitting.cancel()
            with pytest.raises(asyncio.CancelledError):
                job = await submitting
                await job.cancel()  # it was quicker
                raise asyncio.CancelledError

    artifact = make_artifact()
    for number in range(12):
        asyncio.run(cancelled(number / 1000))
    unfinished = tuple(state for state in JobState if state is not JobState.DONE)
    assert not fleet.jobs(states=unfinished)


def test_a_device_is_chosen_by_lot_of_those_that_can_begin() -> None:
    def status(
        name: str, state: DeviceState = DeviceState.IDLE, arch: str = "x86_64", user: str | None = None
    ) -> DeviceStatus:
        reservation = None if user is None else Reservation("r", name, user, 0, 1)
        return DeviceStatus(device_info(name, arch), state, reservation=reservation)

    idle = [status("a"), status("b")]
    others = [status("c", DeviceState.BUSY), status("d", arch="aarch64"), status("e", user="bob")]
    every = [*others, *idle]
    chosen = {plan.choose("", every, every, "ann", make_artifact()).info.name for _ in range(200)}
    assert chosen == {"a", "b"}
    assert plan.choose("", others[:2], every, "ann", make_artifact()).info.name == "c"
    assert plan.choose("", [status("e", user="bob"), status("g", user="ann")], every, "ann").info.name == "g"
    with pytest.raises(IncompatibleTargetError, match="device d"):
        plan.choose("d", [others[1]], every, "ann", make_artifact())


@pytest.mark.parametrize("streams", [True, False])
def test_nothing_is_torn_down_where_ctrl_c_would_be_lost(tracker: RunningTracker, fleet: Fleet, streams: bool) -> None:
    """Python can only report and forget what is raised in a destructor, or when a weak reference dies."""
    usual = signal.getsignal(signal.SIGINT)
    exposed, deferred = set[str](), set[str]()

    def watch(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        forgets = code.co_name == "__del__" or Path(code.co_filename).name in ("weakref.py", "_weakrefset.py")
        if event == "call" and forgets and code.co_name in ("__del__", "__call__", "remove", "_remove"):
            where = "" if frame.f_back is None else frame.f_back.f_code.co_qualname
            (exposed if signal.getsignal(signal.SIGINT) is usual else deferred).add(f"{code.co_qualname} in {where}")

    fleet._has_streams = streams
    artifacts = [make_artifact(), make_artifact()]
    with FakeAgent(tracker.address, device_info(), work=echo):
        fleet.wait_for_device(timeout=60)
        sys.setprofile(watch)
        try:
            fleet.run(artifacts.pop(), {"x": BIG}, function="big").wait()
            with fleet.pin() as device:
                device.load(artifacts.pop()).run({"x": X})
            fleet.devices()
        finally:
            sys.setprofile(None)
    needed = {"_Rendezvous.__del__ in _call"} | (set() if streams else {"_Rendezvous.__del__ in Job._told"})
    assert not exposed and deferred >= needed, exposed


class Calls:
    """In place of a client's stub: counts the calls that concern jobs."""

    def __init__(self, fleet: aio.Fleet | Fleet) -> None:
        self.made: list[str] = []
        self._stub: Any = fleet._stub
        fleet._stub = self

    def __getattr__(self, name: str) -> Any:
        if name == "RunJobs":
            return lambda requests: self._stub.RunJobs(self._each(requests))
        if name.endswith("Job"):
            self.made.append(name)
        return getattr(self._stub, name)

    def _each(self, requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            self.made.append("RunJobs")
            yield request

    def taken(self) -> list[str]:
        made, self.made = self.made, []
        return made


def without(fleet: aio.Fleet | Fleet, calls: Calls, *names: str) -> Calls:
    """The calls of a client whose tracker lacks some."""
    for name in names:
        make = fleet._channel.stream_stream if name == "RunJobs" else fleet._channel.unary_stream
        setattr(calls, name, make(f"/kedge.v1.Fleet/{name}OfAFarFuture", lambda message: b""))
    return calls


BY_STREAM = pytest.mark.parametrize("begins", ["RunJobs", "RunJob"])


def of_a_tracker_with(begins: str, fleet: Fleet) -> Calls:
    fleet._has_streams = begins == "RunJobs"
    return Calls(fleet)


@BY_STREAM
def test_a_job_that_is_waited_for_takes_one_call(
    fleet: Fleet, worker: FakeAgent, artifact: Artifact, begins: str
) -> None:
    calls = of_a_tracker_with(begins, fleet)
    for _ in range(2):
        np.testing.assert_array_equal(fleet.run(artifact, {"x": X}).wait()["x_out"], X)
    with fleet.pin() as device:
        device.load(artifact).run({"x": X})
    assert calls.taken() == [begins] * 3
    job, states = fleet.run(artifact, {"x": X}), list[JobState]()
    assert job.wait(progress=lambda now: states.append(now.state)).outcome.ok
    assert calls.taken() == [begins, "WatchJob"] and states[-1] is JobState.DONE
    assert job.wait().outcome.ok and calls.taken() == ["WatchJob"], "it was told once"
    assert fleet.run(artifact, {"x": X}).wait(timeout=60).outcome.ok
    assert calls.taken() == [begins, "WatchJob"], "who waits for so long only has a call that ends then"


@BY_STREAM
def test_jobs_that_pile_up_keep_one_call_open(fleet: Fleet, worker: FakeAgent, artifact: Artifact, begins: str) -> None:
    calls = of_a_tracker_with(begins, fleet)
    jobs = [fleet.run(artifact, {"x": X + number}) for number in range(3)]
    assert calls.taken() == [begins, "SubmitJob", "SubmitJob"]
    for number, job in enumerate(jobs):
        np.testing.assert_array_equal(job.wait()["x_out"], X + number)
    assert calls.taken() == ["WatchJob", "WatchJob"]
    for _ in range(2):
        fleet.run(artifact, {"x": X})  # whoever forgets a job is told nothing of it
    assert calls.taken() == [begins, begins]


def test_a_tracker_without_the_one_call_gets_two(fleet: Fleet, worker: FakeAgent, artifact: Artifact) -> None:
    calls = without(fleet, Calls(fleet), "RunJob", "RunJobs")
    for _ in range(3):
        assert fleet.run(artifact, {"x": X}).wait().outcome.ok
    assert calls.taken() == ["SubmitJob", "WatchJob"] * 3


def test_a_tracker_without_the_stream_gets_a_call_for_each(fleet: Fleet, worker: FakeAgent, artifact: Artifact) -> None:
    calls = without(fleet, Calls(fleet), "RunJobs")
    for _ in range(3):
        assert fleet.run(artifact, {"x": X}).wait().outcome.ok
    assert calls.taken() == ["SubmitJob", "WatchJob", "RunJob", "RunJob"]


def test_a_job_outlasts_the_call_that_began_it(
    tracker: RunningTracker, fleet: Fleet, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedge.rpc.client.fleet._CALL_S", 0.5)
    with FakeAgent(tracker.address, device_info()) as agent:
        fleet.wait_for_device()
        calls, found = of_a_tracker_with("RunJob", fleet), list[bool]()
        job = fleet.run(artifact, {"x": X})
        assigned = agent.expect(m.AssignJob)
        waiting = threading.Thread(target=lambda: found.append(job.wait().outcome.ok))
        waiting.start()
        wait_for(lambda: calls.made == ["RunJob", "WatchJob"], "the client to ask once more")
        agent.finish(assigned)
        waiting.join(60)
        assert found == [True]


@BY_STREAM
def test_one_call_tells_one_of_several_who_wait(
    tracker: RunningTracker, fleet: Fleet, artifact: Artifact, begins: str
) -> None:
    with FakeAgent(tracker.address, device_info()) as agent:
        fleet.wait_for_device()
        calls, found = of_a_tracker_with(begins, fleet), list[bool]()
        job = fleet.run(artifact, {"x": X})
        assigned = agent.expect(m.AssignJob)
        waiting = [threading.Thread(target=lambda: found.append(job.wait().outcome.ok)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        wait_for(lambda: calls.made == [begins, "WatchJob"], "the second to ask")
        agent.finish(assigned)
        for thread in waiting:
            thread.join(60)
        assert found == [True, True]


def test_with_asyncio_a_job_that_is_waited_for_takes_one_call(worker: FakeAgent, artifact: Artifact) -> None:
    async def main() -> None:
        async with await aio.connect(worker.address) as fleet:
            calls = Calls(fleet)
            for _ in range(2):
                np.testing.assert_array_equal((await (await fleet.run(artifact, {"x": X})).wait())["x_out"], X)
            assert calls.taken() == ["RunJob", "RunJob"]
            job = await fleet.run(artifact, {"x": X})
            states: list[JobState] = []
            assert (await job.wait(progress=lambda now: states.append(now.state))).outcome.ok
            assert calls.taken() == ["RunJob", "WatchJob"] and states[-1] is JobState.DONE
            assert (await job.wait()).outcome.ok and calls.taken() == ["WatchJob"], "it was told once"

    asyncio.run(main())


def test_with_asyncio_jobs_that_pile_up_keep_few_calls_open(
    worker: FakeAgent, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedge.rpc.client.aio._MOST_UNHEARD", 2)

    async def main() -> None:
        async with await aio.connect(worker.address) as fleet:
            calls = Calls(fleet)
            jobs = [await fleet.run(artifact, {"x": X + number}) for number in range(4)]
            assert calls.taken() == ["RunJob", "RunJob", "SubmitJob", "SubmitJob"]
            for number, job in enumerate(jobs):
                np.testing.assert_array_equal((await job.wait())["x_out"], X + number)
            assert calls.taken() == ["WatchJob", "WatchJob"]
            for _ in range(4):
                await fleet.run(artifact, {"x": X})  # whoever forgets a job is told nothing of it
            assert calls.taken() == ["RunJob"] * 4
            together = await asyncio.gather(*(fleet.run(artifact, {"x": X}) for _ in range(4)))
            assert sorted(calls.taken()) == ["RunJob", "RunJob", "SubmitJob", "SubmitJob"]
            assert len({job.id for job in together}) == 4
            # Who waits makes room for others.
            waiting = [asyncio.create_task(job.wait()) for job in together]
            await asyncio.gather(*waiting)
            calls.taken()
            assert (await (await fleet.run(artifact, {"x": X})).wait()).outcome.ok and calls.taken() == ["RunJob"]

    asyncio.run(main())


def test_with_asyncio_a_tracker_without_the_one_call_gets_two(worker: FakeAgent, artifact: Artifact) -> None:
    async def main() -> None:
        async with await aio.connect(worker.address) as fleet:
            calls = Calls(fleet)
            calls.RunJob = fleet._channel.unary_stream("/kedge.v1.Fleet/RunJobOfAFarFuture", lambda message: b"")
            for _ in range(2):
                assert (await (await fleet.run(artifact, {"x": X})).wait()).outcome.ok
            assert calls.taken() == ["SubmitJob", "WatchJob"] * 2

    asyncio.run(main())


def test_with_asyncio_a_job_outlasts_the_call_that_began_it(
    tracker: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(agent: FakeAgent) -> None:
        async with await aio.connect(agent.address) as fleet:
            calls = Calls(fleet)
            job = await fleet.run(artifact, {"x": X})
            assigned = await asyncio.to_thread(agent.expect, m.AssignJob)
            waiting = asyncio.create_task(job.wait())
            asked = partial(wait_for, lambda: calls.made == ["RunJob", "WatchJob"], "the client to ask once more")
            await asyncio.to_thread(asked)
            agent.finish(assigned)
            assert (await waiting).outcome.ok

    monkeypatch.setattr("kedge.rpc.client.aio._CALL_S", 0.5)
    with FakeAgent(tracker.address, device_info()) as agent:
        asyncio.run(main(agent))


def test_a_fleet_that_is_closed_under_a_waiter(tracker: RunningTracker, artifact: Artifact) -> None:
    fleet, watching, ends = connect(tracker.address), threading.Event(), []
    job = fleet.run(artifact, {"x": X})

    def wait() -> None:
        try:
            job.wait(progress=lambda _: watching.set())
        except (ConnectError, ValueError) as error:
            ends.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert watching.wait(60)
    fleet.close()
    waiter.join(60)
    assert [type(end) for end in ends] == [ConnectError] and "closed" in str(ends[0])
    with pytest.raises(ConnectError, match="closed"):
        job.status()


# ---- asyncio -------------------------------------------------------------------------------------------------------


def test_the_asyncio_twin(tracker: RunningTracker, artifact: Artifact) -> None:
    async def main() -> None:
        async with await aio.connect(str(tracker.address)) as fleet:
            assert (await fleet.wait_for_device(timeout=60)).info.name == "bench-1"
            jobs = [await fleet.run(artifact, {"x": X + number}) for number in range(5)]
            results = await asyncio.gather(*(job.wait(timeout=60) for job in jobs))
            for number, result in enumerate(results):
                np.testing.assert_array_equal(result["x_out"], X + number)
            async with fleet.pin("bench-1") as device:
                model = await device.load(artifact)
                np.testing.assert_array_equal((await model.run({"x": BIG}, function="big"))["x_out"], BIG)
                assert (await model.time({"x": X}, repeat=3)).repeat == 3
                check_profile(await model.profile({"x": X}, repeat=4))
            assert {job.state for job in await fleet.jobs()} == {JobState.DONE}
            assert (await (await fleet.job(jobs[0].id)).status()).id == jobs[0].id
            blob = await fleet.upload(b"bytes")
            assert blob.size == 5
            with pytest.raises(InputError):
                await fleet.run(artifact, {"y": X})
            with pytest.raises(NoDeviceError):
                await fleet.wait_for_device("other", timeout=0.05)

    with FakeAgent(tracker.address, device_info(), work=echo):
        asyncio.run(main())


def test_the_asyncio_twin_waits_and_gives_up_as_it_should(tracker: RunningTracker, artifact: Artifact) -> None:
    async def main(agent: FakeAgent) -> None:
        async with await aio.connect(tracker.address) as fleet:
            job = await fleet.run(artifact, {"x": X})
            with pytest.raises(WaitTimeoutError):
                await job.wait(timeout=0.05)
            await job.cancel()
            assigned = await asyncio.to_thread(agent.expect, m.AssignJob)
            await asyncio.to_thread(agent.expect, m.AbortJob)
            await asyncio.to_thread(agent.finish, assigned)
            assert (await job.wait()).outcome.kind is OutcomeKind.OK, "it had finished before it was stopped"
            waiting = await fleet.run(artifact, {"x": X}, device="nowhere")
            await waiting.cancel()
            with pytest.raises(JobError, match="cancelled"):
                await waiting.wait()
            async with fleet.pin("bench-1") as device:
                call = asyncio.create_task((await device.load(artifact)).run({"x": X}))
                await asyncio.to_thread(agent.expect, m.ResultAccepted)
                await asyncio.to_thread(agent.expect, m.AssignJob)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                await asyncio.to_thread(agent.expect, m.AbortJob)

    with FakeAgent(tracker.address, device_info()) as agent:
        asyncio.run(main(agent))


def test_the_asyncio_twin_survives_a_restart(tmp_path: Path, artifact: Artifact) -> None:
    restart = partial(start, settings=QUICK, insecure_loopback=True)

    async def main(tracker: RunningTracker) -> None:
        async with await aio.connect(tracker.address) as fleet:
            job = await fleet.run(artifact, {"x": X})
            watching = asyncio.Event()
            waiting = asyncio.create_task(job.wait(progress=lambda _: watching.set()))
            await watching.wait()
            await asyncio.to_thread(tracker.stop)
            again = await asyncio.to_thread(restart, port=tracker.port, data_dir=tmp_path)
            agent = FakeAgent(again.address, device_info(), work=echo)
            await asyncio.to_thread(agent.connect)
            assert (await asyncio.wait_for(waiting, 20)).outcome.ok
            await asyncio.to_thread(agent.drop)
            await asyncio.to_thread(again.stop)

    asyncio.run(main(restart(port=free_ports(), data_dir=tmp_path)))
    with pytest.raises(ConnectError, match="no tracker answers"):
        asyncio.run(aio.connect("127.0.0.1:1"))  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    check_number("threads", np.int64(2), 0, 8, "")
    assert plan.time_options(repeat=np.int32(3)).repeat == 3
    for wrong in (np.int64(9), True, 2.0, "2"):
        with pytest.raises(InputError, match="expected a whole number from 0 to 8"):
            check_number("threads", wrong, 0, 8, "")
