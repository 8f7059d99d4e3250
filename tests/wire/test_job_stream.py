"""Small jobs share one stream: what each hears there, and what becomes of them and of it when something breaks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kedge.protos.v1 import fleet_pb2 as pb
from kedge.protos.v1 import fleet_pb2_grpc, types_pb2
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, connect
from kedge.rpc.client.job_stream import JobStream, StreamBroken
from kedge.rpc.client.plan import pack
from kedge.rpc.errors import ConnectError, KedgeError, UsageError
from kedge.rpc.pipe import Pipe
from kedge.rpc.selector import SelectorError
from kedge.rpc.status import QueueFullError, from_refusal, to_refusal
from kedge.rpc.tracker import job_stream
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import MAX_STREAM_JOBS, MAX_STREAMED_BYTES, Address, open_channel
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.ports import free_ports
from support.proxy import Proxy
from support.toys import QUICK, device_info, make_artifact, spec_message

X = np.arange(8, dtype=np.float32).reshape(2, 4)
#: With an agent that says nothing meanwhile.
PATIENT = replace(QUICK, lease_ms=60_000, silence_ms=60_000)


class Raw:
    """The stream as a client has it that keeps to no rules."""

    def __init__(self, fleet: Fleet, artifact: Artifact) -> None:
        fleet._ensure_uploaded(pack(artifact))
        self._spec = spec_message(artifact)
        self._requests: Pipe[pb.RunJobsRequest] = Pipe(10_000)
        self.call: Any = fleet._stub.RunJobs(iter(self._requests), timeout=60)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.abort()
        self.call.cancel()

    def run(self, number: int, forgotten: tuple[int, ...] = (), key: str = "", selector: str = "") -> None:
        job = pb.SubmitJobRequest(spec=self._spec, idempotency_key=key or f"key-{number}")
        job.spec.selector = selector
        self._requests.put(pb.RunJobsRequest(number=number, job=job, forgotten=forgotten))

    def end(self) -> None:
        self._requests.close()

    def hear(self, many: int) -> list[pb.RunJobsResponse]:
        return [next(self.call) for _ in range(many)]


@pytest.fixture
def raw(fleet: Fleet, artifact: Artifact) -> Iterator[Raw]:
    with Raw(fleet, artifact) as raw:
        yield raw


@pytest.fixture
def before() -> set[threading.Thread]:
    return streams()


def streams() -> set[threading.Thread]:
    """The threads that receive; those of streams that have ended take a moment to end."""
    return {thread for thread in threading.enumerate() if thread.name == "kedge-jobs"}


def test_jobs_of_many_threads_hear_of_themselves(
    before: set[threading.Thread], fleet: Fleet, tracker: RunningTracker, artifact: Artifact
) -> None:
    def one(number: int) -> None:
        with fleet.pin() as device:
            np.testing.assert_array_equal(device.load(artifact).run({"x": X + number})["x_out"], X + number)

    with FakeAgent(tracker.address, device_info(), work=echo), ThreadPoolExecutor(8) as pool:
        fleet.wait_for_device()
        list(pool.map(one, range(40)))
    assert len(fleet.jobs()) == 40 and len(streams() - before) == 1


def test_a_job_that_is_refused_says_why_and_the_others_go_on(
    fleet: Fleet, tracker: RunningTracker, artifact: Artifact
) -> None:
    with FakeAgent(tracker.address, device_info()) as agent:
        fleet.wait_for_device()
        job = fleet.run(artifact, {"x": X})
        stream, assigned = fleet._stream, agent.expect(m.AssignJob)
        assert stream is not None
        request = pb.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="k")
        request.spec.selector = "arch~"
        with pytest.raises(SelectorError) as refused:
            stream.begin(request, 60)
        with pytest.raises(grpc.RpcError) as alone:
            fleet._stub.SubmitJob(request)
        assert refused.value.message == alone.value.details()
        agent.finish(assigned)
        assert job.wait().outcome.ok and fleet._stream is stream and stream.alive
    assert len(fleet.jobs()) == 1


def test_every_refusal_arrives_as_what_it_is() -> None:
    for error in (QueueFullError("too many", hint="wait"), UsageError("no"), StopHere("new in a later version")):
        found = from_refusal(to_refusal(error))
        assert found.message == error.message and found.hint == error.hint
        assert type(found) is type(error) or type(found).__name__ == "RemoteError"


class StopHere(KedgeError):
    """One that no peer knows."""


def test_what_is_large_goes_by_itself(
    fleet: Fleet, tracker: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = np.arange(MAX_STREAMED_BYTES // 4, dtype=np.float32)
    with FakeAgent(tracker.address, device_info(), work=echo):
        fleet.wait_for_device()
        np.testing.assert_array_equal(fleet.run(artifact, {"x": big}, function="big").wait()["x_out"], big)
        assert fleet._stream is None, "its submission would hold up others'"
        monkeypatch.setattr("kedge.rpc.tracker.job_stream._is_large", lambda said: True)
        job = fleet.run(artifact, {"x": X})
        stream = fleet._stream
        np.testing.assert_array_equal(job.wait()["x_out"], X)
        assert stream is not None and stream.alive and stream is fleet._stream


def test_a_stream_has_room_for_so_many_jobs(fleet: Fleet, raw: Raw) -> None:
    for number in range(1, MAX_STREAM_JOBS + 3):
        raw.run(number)
    heard = raw.hear(MAX_STREAM_JOBS)
    assert {said.number for said in heard} == set(range(1, MAX_STREAM_JOBS + 1))
    assert len(fleet.jobs()) == MAX_STREAM_JOBS, "it is not listened to meanwhile"
    fleet.job(heard[0].job_id).cancel()
    result, accepted = raw.hear(2)
    assert (result.number, result.WhichOneof("said")) == (heard[0].number, "result")
    assert (accepted.number, accepted.WhichOneof("said")) == (MAX_STREAM_JOBS + 1, "job_id")


def test_a_job_that_is_forgotten_leaves_room_and_goes_on(fleet: Fleet, raw: Raw) -> None:
    for number in range(1, MAX_STREAM_JOBS + 1):
        raw.run(number)
    first, *_ = raw.hear(MAX_STREAM_JOBS)
    raw.run(MAX_STREAM_JOBS + 1, forgotten=(1, 2, 10_000))
    raw.run(MAX_STREAM_JOBS + 2)
    assert {said.number for said in raw.hear(2)} == {MAX_STREAM_JOBS + 1, MAX_STREAM_JOBS + 2}
    fleet.job(first.job_id).cancel()
    raw.run(MAX_STREAM_JOBS + 3, selector="arch~", forgotten=(3,))
    assert raw.hear(1)[0].refused.error == "SelectorError", "nothing was told of the first"


@pytest.mark.parametrize("when", ["accepted", "before its first step"])
def test_a_client_that_forgets_and_does_not_read_is_not_listened_to(when: str) -> None:
    asyncio.run(asyncio.wait_for(_forget_without_reading(when), 60))


async def _forget_without_reading(when: str) -> None:
    many = 4 * MAX_STREAM_JOBS
    asked, accepted, told = list[int](), asyncio.Event(), list[pb.RunJobsResponse]()

    async def ask() -> AsyncIterator[pb.RunJobsRequest]:
        for number in range(1, many + 1):
            job = pb.SubmitJobRequest(idempotency_key="last" if number == many else "")
            asked.append(number)
            yield pb.RunJobsRequest(number=number, job=job, forgotten=[number - 1])
            if when == "accepted":
                await accepted.wait()
                accepted.clear()

    async def run(request: pb.SubmitJobRequest) -> AsyncIterator[pb.RunJobResponse]:
        accepted.set()
        yield pb.RunJobResponse(job_id="id")
        if request.idempotency_key != "last":
            await asyncio.Event().wait()
        yield pb.RunJobResponse(result=types_pb2.JobResult())

    stream = job_stream.JobStream(run)
    saying = stream.serve(ask())
    if when == "accepted":
        told.append(await anext(saying))
        for _ in range(20 * many):  # turns of the loop, in which all would be asked that is listened to
            await asyncio.sleep(0)
        assert len(asked) <= MAX_STREAM_JOBS + 2, "of which one was told, and one waits for room"
        assert stream._to_say.qsize() <= 3 * MAX_STREAM_JOBS
    told.extend([said async for said in saying])
    assert asked == list(range(1, many + 1))
    expected = range(1, many + 1) if when == "accepted" else [many]
    assert [said.number for said in told] == [*expected, many]


def test_a_job_that_is_forgotten_while_it_is_stored_has_its_line_in_the_audit_log(
    fleet: Fleet, raw: Raw, tracker: RunningTracker
) -> None:
    raw.run(1)
    accepted = raw.hear(1)[0].job_id
    for number in range(2, 41):
        raw.run(number, forgotten=(number - 1,))
    raw.run(41, selector="arch~", forgotten=(40,))
    raw.end()
    assert list(raw.call)[-1].refused.error == "SelectorError"

    def submitted() -> list[str]:
        whole = (tracker.data_dir / "audit.jsonl").read_text().rpartition("\n")[0].splitlines()
        return sorted(line["job"] for line in map(json.loads, whole) if line["event"] == "job submitted")

    wait_for(lambda: submitted() == sorted(job.id for job in fleet.jobs()), "the lines of what is stored meanwhile")
    assert accepted in submitted()


def test_a_job_outlasts_the_time_in_which_its_stream_tells_of_it(
    tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = threading.Event()
    with (
        start(port=0, data_dir=tmp_path, settings=PATIENT, insecure_loopback=True) as tracker,
        connect(tracker.address) as fleet,
        FakeAgent(tracker.address, device_info()) as agent,
        ThreadPoolExecutor(1) as pool,
    ):
        fleet.wait_for_device()
        monkeypatch.setattr("kedge.rpc.client.fleet._CALL_S", 2.0)
        watch = fleet._stub.WatchJob

        def watch_job(*arguments: Any, **options: Any) -> Any:
            watched.set()
            return watch(*arguments, **options)

        monkeypatch.setattr(fleet._stub, "WatchJob", watch_job)
        job = fleet.run(artifact, {"x": X})
        stream, assigned = fleet._stream, agent.expect(m.AssignJob)
        waiting = pool.submit(job.wait)
        assert watched.wait(60)
        agent.finish(assigned)
        assert waiting.result(60).outcome.ok
        assert stream is not None and stream.alive and stream is fleet._stream


def test_a_client_with_more_jobs_than_that_makes_calls_for_the_others(
    fleet: Fleet, tracker: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedge.rpc.client.job_stream.MAX_STREAM_JOBS", 1)
    with FakeAgent(tracker.address, device_info()) as agent, ThreadPoolExecutor(2) as pool:
        fleet.wait_for_device()
        with fleet.pin() as device:
            model = device.load(artifact)
            first = pool.submit(model.run, {"x": X})
            assigned = agent.expect(m.AssignJob)
            second = pool.submit(model.run, {"x": X + 1})
            wait_for(lambda: len(fleet.jobs()) == 2, "the second job")
            agent.finish(assigned)
            agent.finish(agent.expect(m.AssignJob))
            assert [set(each.result(60)) for each in (first, second)] == [{"x_out"}] * 2


@pytest.mark.parametrize(
    ("numbers", "word"), [((1, 1), "after 1"), ((5, 4), "after 5"), ((0,), "number 0")], ids=["again", "back", "none"]
)
def test_a_number_that_was_used_ends_the_stream(raw: Raw, numbers: tuple[int, ...], word: str) -> None:
    for number in numbers:
        raw.run(number)
    with pytest.raises(grpc.RpcError) as caught:
        raw.hear(3)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION and word in caught.value.details()


def test_a_job_that_is_too_large_for_it_is_refused(raw: Raw) -> None:
    inline, raw._spec.run.inputs[0].inline = raw._spec.run.inputs[0].inline, bytes(MAX_STREAMED_BYTES)
    raw.run(1)
    assert raw.hear(1)[0].refused.error == "LimitError"
    raw._spec.run.inputs[0].inline = inline
    raw.run(2)
    assert raw.hear(1)[0].job_id


def test_a_stream_that_says_no_more_is_told_of_what_it_had(raw: Raw, tracker: RunningTracker) -> None:
    with FakeAgent(tracker.address, device_info(), work=echo):
        for number in (1, 2, 3):
            raw.run(number)
        raw.end()
        assert sorted(said.number for said in raw.call if said.WhichOneof("said") == "result") == [1, 2, 3]
    assert raw.call.code() is grpc.StatusCode.OK


def test_the_same_key_on_two_streams_is_one_job(fleet: Fleet, tracker: RunningTracker, artifact: Artifact) -> None:
    with Raw(fleet, artifact) as one, Raw(fleet, artifact) as other, FakeAgent(tracker.address, device_info()) as agent:
        one.run(1, key="once")
        other.run(1, key="once")
        assert one.hear(1)[0].job_id == other.hear(1)[0].job_id
        agent.finish(agent.expect(m.AssignJob))
        assert one.hear(1) == other.hear(1)
    assert len(fleet.jobs()) == 1


@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_breaks_loses_no_job_and_runs_none_twice(tmp_path: Path, reset: bool) -> None:
    artifact = make_artifact()
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, insecure_loopback=True) as tracker,
        Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy,
        FakeAgent(tracker.address, device_info()) as agent,
        Fleet(Address("127.0.0.1", proxy.port), None) as fleet,
        ThreadPoolExecutor(1) as pool,
    ):
        fleet.wait_for_device()
        waiting = pool.submit(lambda: fleet.run(artifact, {"x": X}).wait())
        assigned = agent.expect(m.AssignJob)
        first = fleet._stream
        assert proxy.cut_all(reset=reset) >= 1
        wait_for(lambda: first is not None and not first.alive, "the stream to end")
        agent.finish(assigned)
        np.testing.assert_array_equal(waiting.result(60)["x_out"], X)
        again = pool.submit(lambda: fleet.run(artifact, {"x": X + 1}).wait())
        agent.finish(agent.expect(m.AssignJob))
        np.testing.assert_array_equal(again.result(60)["x_out"], X + 1)
        assert len(fleet.jobs()) == 2 and fleet._stream is not first and fleet._stream is not None


def test_a_job_whose_acceptance_was_lost_is_the_one_that_is_waited_for(tmp_path: Path) -> None:
    artifact = make_artifact()
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, insecure_loopback=True) as tracker,
        Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy,
        connect(tracker.address) as direct,
        Fleet(Address("127.0.0.1", proxy.port), None) as fleet,
        ThreadPoolExecutor(1) as pool,
    ):
        with FakeAgent(tracker.address, device_info(), work=echo):
            fleet.wait_for_device()
            assert fleet.run(artifact, {"x": X}).wait().outcome.ok
        with FakeAgent(tracker.address, device_info()) as agent:
            wait_for(direct.devices, "the device")
            stub, held = fleet._stub, threading.Event()
            fleet._stream = HeldBack(stub, held)
            waiting = pool.submit(lambda: fleet.run(artifact, {"x": X}).wait())
            assigned = agent.expect(m.AssignJob)  # it has arrived, and nothing was heard of it
            proxy.cut_all(reset=True)
            held.set()
            agent.finish(assigned)
            assert waiting.result(60).job_id == assigned.lease.job_id
            assert len(direct.jobs()) == 2


class HeldBack(JobStream):
    """What is said to it is heard only when it is too late: once its connection is gone."""

    def __init__(self, stub: Any, held: threading.Event) -> None:
        class Late:
            def RunJobs(self, requests: Any) -> Any:
                call = stub.RunJobs(requests)

                class Call:
                    def __iter__(self) -> Any:
                        held.wait(60)
                        for said in call:
                            if said.WhichOneof("said") != "job_id":
                                yield said

                    def cancel(self) -> None:
                        call.cancel()

                return Call()

        super().__init__(Late())


def test_a_tracker_that_stops_is_not_held_up_by_an_idle_stream_and_a_new_one_is_opened(tmp_path: Path) -> None:
    port, artifact = free_ports(), make_artifact()
    with start(port=port, data_dir=tmp_path, settings=QUICK, insecure_loopback=True) as tracker:
        fleet = connect(tracker.address)
        with FakeAgent(tracker.address, device_info(), work=echo):
            fleet.wait_for_device()
            assert fleet.run(artifact, {"x": X}).wait().outcome.ok
        first = fleet._stream
        assert first is not None and first.alive
    with (
        fleet,
        start(port=port, data_dir=tmp_path, settings=QUICK, insecure_loopback=True) as tracker,
        FakeAgent(tracker.address, device_info(), work=echo),
    ):
        fleet.wait_for_device()
        assert not first.alive
        assert fleet.run(artifact, {"x": X}).wait().outcome.ok
        assert fleet.run(artifact, {"x": X}).wait().outcome.ok
        assert fleet._stream is not None and fleet._stream.alive


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_stream_ends_with_its_fleet(
    before: set[threading.Thread], tracker: RunningTracker, artifact: Artifact, how: str
) -> None:
    fleet: Fleet | None = connect(tracker.address)
    assert fleet is not None
    job = fleet.run(artifact, {"x": X})
    (receives,) = streams() - before
    if how == "closed":
        fleet.close()
        fleet.close()
        with pytest.raises(ConnectError, match="was closed"):
            job.wait()
    del fleet, job
    gc.collect()
    receives.join(60)
    assert not receives.is_alive()


def test_a_stream_that_was_closed_takes_no_job(fleet: Fleet, artifact: Artifact) -> None:
    fleet.run(artifact, {"x": X})
    stream = fleet._stream
    assert stream is not None
    stream.close()
    with pytest.raises(StreamBroken):
        stream.begin(pb.SubmitJobRequest(spec=spec_message(artifact)), 60)


def test_a_tracker_that_says_nothing_is_not_waited_for_for_ever(
    tracker: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy,
        Fleet(Address("127.0.0.1", proxy.port), None) as fleet,
    ):
        fleet.run(artifact, {"x": X})
        monkeypatch.setattr("kedge.rpc.client.fleet._CALL_S", 0.3)
        fleet._last_run = None
        proxy.stall()
        with pytest.raises(ConnectError, match="did not answer in time"):
            fleet._stream_job(pb.SubmitJobRequest(spec=spec_message(artifact)))
        proxy.flow()


ENDING = """
import os, sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kedge.rpc.client import connect
from support.toys import make_artifact
fleet = connect(sys.argv[1])
job = fleet.run(make_artifact(), {"x": np.zeros((1, 4), np.float32)})
stream = fleet._stream
assert stream.alive
if sys.argv[3] == "fork":
    child = os.fork()
    if child == 0:
        alive = stream.alive
        stream.close()  # which is the parent's to do
        try:
            next(job._run)
        except StopIteration:  # the parent hears of it: here it would be watched
            job._run.cancel()
            os._exit(alive)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0 and stream.alive
print(job.id)
"""


@pytest.mark.parametrize("how", ["end", "fork"])
def test_a_process_that_ends_with_its_stream_open_ends_in_order(
    tracker: RunningTracker, fleet: Fleet, how: str
) -> None:
    arguments = [str(tracker.address), str(Path(__file__).parents[1]), how]
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    # Newer Pythons warn of what is forked off a process with threads; grpc has some of its own.
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", ENDING, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fleet.job(ended.stdout.strip()).status()


INTERRUPTED = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kedge.rpc.client import connect
from support.toys import make_artifact
x = {"x": np.zeros((1, 4), np.float32)}
with connect(sys.argv[1]) as fleet:
    fleet.wait_for_device()
    job = fleet.run(make_artifact(), x)
    try:
        print(job.id, flush=True)
        job.wait()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    other = fleet.run(make_artifact(), x)
    print(other.id, flush=True)
    print(other.wait().outcome.kind.value, job.wait().outcome.kind.value, fleet._stream.alive, flush=True)
"""


def test_ctrl_c_in_wait_leaves_the_job_and_the_stream_alone(tmp_path: Path) -> None:
    with (
        start(port=0, data_dir=tmp_path, settings=PATIENT, insecure_loopback=True) as tracker,
        FakeAgent(tracker.address, device_info()) as agent,
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(tracker.address), str(Path(__file__).parents[1])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        assigned = agent.expect(m.AssignJob)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        second = process.stdout.readline().strip()
        agent.finish(assigned)
        later = agent.expect(m.AssignJob)
        agent.finish(later)
        output, errors = process.communicate(timeout=60)
    assert [assigned.lease.job_id, later.lease.job_id] == [first, second]
    assert (process.returncode, output, errors) == (0, "ok ok True\n", "")


BEFORE_ACCEPTANCE = """
import sys
sys.path.insert(0, sys.argv[2])
import numpy as np
from kedge.rpc.client import Fleet
from kedge.rpc.client.job_stream import StreamedJob
from kedge.rpc.transport import Address
from support.toys import make_artifact
x = {"x": np.zeros((1, 4), np.float32)}
with Fleet(Address("127.0.0.1", int(sys.argv[1])), None) as fleet:
    fleet.wait_for_device()
    fleet.run(make_artifact(), x).wait()
    stream, take = fleet._stream, StreamedJob._take_acceptance
    def said(job):
        print("waits", flush=True)
        take(job)
    StreamedJob._take_acceptance = said
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        fleet.run(make_artifact(), x)
    except KeyboardInterrupt:
        print("interrupted", len(stream._jobs), flush=True)
    sys.stdin.readline()
    other = fleet.run(make_artifact(), x)
    print(other.wait().outcome.kind.value, stream is fleet._stream and stream.alive, flush=True)
"""


def test_ctrl_c_before_a_job_is_accepted_leaves_the_stream_alone(tmp_path: Path) -> None:
    with (
        start(port=0, data_dir=tmp_path, settings=PATIENT, insecure_loopback=True) as tracker,
        Proxy("127.0.0.1", 0, ("127.0.0.1", tracker.port)) as proxy,
        FakeAgent(tracker.address, device_info(), work=echo),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", BEFORE_ACCEPTANCE, str(proxy.port), str(Path(__file__).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n", process.communicate(timeout=60)
        proxy.stall()
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted 0\n"
        proxy.flow()
        output, errors = process.communicate("\n", timeout=60)
    assert (process.returncode, output, errors) == (0, "waits\nok True\n", "")


def test_a_job_of_an_artifact_that_the_tracker_lost_is_sent_again_with_it(tmp_path: Path) -> None:
    artifact, port = make_artifact(), free_ports()
    with start(port=port, data_dir=tmp_path / "one", settings=QUICK, insecure_loopback=True) as first:
        fleet = connect(first.address)
        fleet.run(artifact, {"x": X}).cancel()
    with (
        fleet,
        start(port=port, data_dir=tmp_path / "two", settings=QUICK, insecure_loopback=True) as second,
        FakeAgent(second.address, device_info(), work=echo),
    ):
        fleet.wait_for_device()
        fleet._open_stream()  # it is there before the refusal
        np.testing.assert_array_equal(fleet.run(artifact, {"x": X}).wait(timeout=60)["x_out"], X)


def test_with_an_older_tracker_it_is_over_at_once(tracker: RunningTracker) -> None:
    with open_channel(tracker.address) as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        later = channel.stream_stream("/kedge.v1.Fleet/RunJobsOfAFarFuture", pb.RunJobsRequest.SerializeToString)
        stub.RunJobs = later
        stream = JobStream(stub)
        with pytest.raises(StreamBroken) as caught:
            stream.begin(pb.SubmitJobRequest(), 60)
        assert caught.value.error is not None and caught.value.error.code() is grpc.StatusCode.UNIMPLEMENTED
