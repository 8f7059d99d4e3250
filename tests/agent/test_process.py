"""The agent as a process, against a tracker that a test plays word by word."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from kedge.deploy.boot import FINAL_STATUSES
from kedge.protos.v1 import agent_pb2_grpc, blobs_pb2, blobs_pb2_grpc
from kedge.rpc import abi, convert
from kedge.rpc import messages as m
from kedge.rpc.outcome import OutcomeKind, Stage
from kedge.rpc.transport import MAX_MESSAGE_BYTES
from kedge.rpc.types import Blob, JobSpec, Lease, Protocol, RunTask, Tensor
from support.agents import AgentProcess, at_work, descendants, runs, wait_for
from support.handmade import artifact

from .conftest import FUNCTIONS


class Script(agent_pb2_grpc.AgentsServicer, blobs_pb2_grpc.BlobsServicer):  # type: ignore[misc]
    """A tracker without a will of its own: `heard` is what the agent said, `say` answers."""

    def __init__(self) -> None:
        self.heard: queue.Queue[m.AgentBody] = queue.Queue()
        self.blobs: dict[str, bytes] = {}
        self._out: queue.Queue[m.TrackerBody | None] = queue.Queue()

    def Connect(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        self._out = out = queue.Queue()

        def listen() -> None:
            try:
                for pb in requests:
                    message = convert.agent_message_from_pb(pb)
                    assert message is not None
                    self.heard.put(message)
            except grpc.RpcError:
                pass  # the test tore the connection
            out.put(None)

        listener.submit(listen)
        for number, message in enumerate(iter(out.get, None)):
            yield convert.tracker_message_to_pb(message, number)

    def Download(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        data = self.blobs[request.blob.digest]
        for start in range(request.offset_bytes, len(data), 1 << 20):
            yield blobs_pb2.DownloadResponse(data=data[start : start + (1 << 20)])

    def say(self, message: m.TrackerBody) -> None:
        self._out.put(message)

    def hang_up(self) -> None:
        self._out.put(None)

    def hear(self, kind: type[Any], timeout_s: float = 60.0, besides: tuple[type[Any], ...] = ()) -> Any:
        """The next message of that kind; heartbeats, and what may come `besides`, are skipped."""
        moment = time.monotonic() + timeout_s
        while True:
            message = self.heard.get(timeout=max(0.0, moment - time.monotonic()))
            if isinstance(message, kind):
                return message
            assert isinstance(message, (m.Heartbeat, *besides)), f"{message} came instead of {kind.__name__}"

    def hear_stage(self, stage: Stage) -> None:
        """Wait until the job is said to be in a stage."""
        while self.hear(m.JobProgress).stage is not stage:
            pass

    def greet(self) -> m.Hello:
        hello: m.Hello = self.hear(m.Hello)
        self.say(m.Welcome(Protocol(1), "script", 200))
        return hello

    def publish(self, module: bytes) -> Blob:
        made = artifact(module, FUNCTIONS)
        manifest = made.manifest.to_json()
        for blob, data in made.blobs():
            self.blobs[blob.digest] = bytes(data)
        self.blobs[made.digest] = manifest
        return Blob(made.digest, len(manifest))


listener = futures.ThreadPoolExecutor(8, "listener")


class Tracker:
    """The script behind a real server on a port of its own."""

    def __init__(self) -> None:
        self.script = Script()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
        agent_pb2_grpc.add_AgentsServicer_to_server(self.script, self._server)
        blobs_pb2_grpc.add_BlobsServicer_to_server(self.script, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    made = Tracker()
    yield made
    made.script.hang_up()
    made.stop()


@pytest.fixture
def script(tracker: Tracker) -> Script:
    return tracker.script


@pytest.fixture
def agent(tracker: Tracker, runner: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(tracker.address, runner, tmp_path / "data", "--label", "rack=a", "--threads", "1") as started:
        yield started


def spec(manifest: Blob, function: str, count: int = 3) -> JobSpec:
    data = struct.pack(f"<{count}f", *range(count))
    return JobSpec(manifest, function, RunTask((Tensor("x", "float32", (count,), data),)))


def test_it_introduces_itself_and_keeps_saying_that_it_lives(agent: AgentProcess, script: Script) -> None:
    hello = script.greet()
    assert hello.device.name == "here"
    assert hello.device.labels["rack"] == "a"
    assert hello.device.abi_version == abi.ABI_VERSION
    assert hello.device.cpu_features
    assert hello.device.target.startswith("llvm -mtriple=")
    assert hello.running == ()
    assert hello.health is not None and hello.health.disk_free_bytes
    agent.wait_ready()
    for _ in range(3):
        beat = script.heard.get(timeout=60)
        assert isinstance(beat, m.Heartbeat)
        assert beat.health.disk_free_bytes
        assert beat.running == ()
    assert agent.log.count("ready: ") == 1


def test_nothing_has_to_reach_a_device(agent: AgentProcess, script: Script, module: bytes) -> None:
    """Neither the agent nor a runner of its listens anywhere: it dials out, from behind whatever router."""
    script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "spin")))
    script.hear(m.JobStarted)
    wait_for(lambda: descendants(agent.process.pid), "a runner")
    pids = [agent.process.pid, *descendants(agent.process.pid)]
    held = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # gRPC's threads close some meanwhile
                held.add(str(path.readlink()))
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/{agent.process.pid}/net/{table}").read_text().splitlines()[1:]
    ]
    own = [row for row in rows if f"socket:[{row[9]}]" in held]
    listening = "0A"
    assert own and [row for row in own if row[3] == listening] == []


def test_a_job_its_result_and_its_end(agent: AgentProcess, script: Script, module: bytes) -> None:
    script.greet()
    lease = Lease("job-1", 3, 10_000)
    script.say(m.AssignJob(lease, spec(script.publish(module), "add")))
    assert script.hear(m.JobStarted) == m.JobStarted(lease)
    finished: m.JobFinished = script.hear(m.JobFinished, besides=(m.JobProgress,))
    assert finished.lease == lease
    assert finished.result.outcome.ok
    assert finished.result.outputs[0].data == struct.pack("<3f", 1, 2, 3)
    script.say(m.ResultAccepted("job-1"))
    wait_for(lambda: script.hear(m.Heartbeat).running == (), "a heartbeat without leases")


def test_a_result_is_sent_until_it_is_accepted(
    agent: AgentProcess, tracker: Tracker, script: Script, module: bytes
) -> None:
    script.greet()
    lease = Lease("job-1", 1, 10_000)
    script.say(m.AssignJob(lease, spec(script.publish(module), "add")))
    first: m.JobFinished = _after_job(script)
    for end in (script.hang_up, tracker.stop):
        end()
        if end == tracker.stop:
            agent.wait_log("no tracker answers|trying again")
            tracker.start()
        assert script.greet().running == (lease,)
        assert script.hear(m.JobFinished) == first
    script.say(m.ResultAccepted("job-1"))
    script.hang_up()
    assert script.greet().running == ()


def _waiting(agent: AgentProcess) -> list[int]:
    """The processes of the runner that waits for the next job, once nothing else is left of the last."""

    def settled() -> list[int]:
        below = descendants(agent.process.pid)
        return below if below and not at_work(agent.process.pid) else []

    wait_for(settled, "a runner to wait for the next job")
    return settled()


def _after_job(script: Script) -> m.JobFinished:
    """What came of a job so short that its stages may not have been told."""
    script.hear(m.JobStarted)
    finished: m.JobFinished = script.hear(m.JobFinished, besides=(m.JobProgress,))
    return finished


def test_running_work_goes_on_without_a_tracker(
    agent: AgentProcess, tracker: Tracker, script: Script, module: bytes
) -> None:
    script.greet()
    lease = Lease("job-1", 1, 10_000)
    script.say(m.AssignJob(lease, spec(script.publish(module), "spin")))
    script.hear(m.JobStarted)
    script.hear_stage(Stage.RUN)
    (runner_pid,) = descendants(agent.process.pid)
    tracker.stop()
    tracker.start()
    hello = script.greet()
    assert hello.running == (lease,)
    assert script.hear(m.JobStarted) == m.JobStarted(lease)
    assert script.hear(m.JobProgress) == m.JobProgress(lease, Stage.RUN)
    assert runs(runner_pid)
    script.say(m.AbortJob(lease, "enough"))
    finished: m.JobFinished = script.hear(m.JobFinished)
    assert finished.result.outcome.kind is OutcomeKind.CANCELLED
    assert finished.result.outcome.message == "enough"
    wait_for(lambda: not runs(runner_pid), "the runner to be gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_of_a_job_it_leaves_nothing(
    agent: AgentProcess, script: Script, module: bytes, number: signal.Signals
) -> None:
    script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "spin")))
    script.hear(m.JobStarted)
    script.hear_stage(Stage.RUN)
    below = descendants(agent.process.pid)
    assert below
    assert agent.stop(number) == 0, agent.log
    assert script.hear(m.Goodbye) == m.Goodbye(number.name)
    assert not any(runs(pid) for pid in below)
    assert list((agent.data_dir / "jobs").iterdir()) == []


def test_stopped_while_a_runner_waits_for_a_job_it_leaves_nothing(
    agent: AgentProcess, script: Script, module: bytes
) -> None:
    script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "add")))
    _after_job(script)
    waiting = _waiting(agent)
    assert agent.stop() == 0, agent.log
    assert not any(runs(pid) for pid in waiting)
    assert list((agent.data_dir / "jobs").iterdir()) == []


def test_killed_it_takes_the_runner_along_that_waits_for_a_job(
    agent: AgentProcess, tracker: Tracker, script: Script, module: bytes, runner: Path
) -> None:
    script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "add")))
    _after_job(script)
    script.say(m.ResultAccepted("job-1"))
    waiting = _waiting(agent)
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not any(runs(pid) for pid in waiting), "the runner to end with its agent")
    with AgentProcess(tracker.address, runner, agent.data_dir) as successor:
        script.greet()
        successor.wait_ready()
        assert list((agent.data_dir / "jobs").iterdir()) == []


def test_killed_it_takes_the_runner_along_and_the_next_one_cleans_up(
    agent: AgentProcess, tracker: Tracker, script: Script, module: bytes, runner: Path
) -> None:
    hello = script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "spin")))
    script.hear(m.JobStarted)
    script.hear_stage(Stage.RUN)
    below = descendants(agent.process.pid)
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not any(runs(pid) for pid in below), "the runner to end with its agent")
    assert list((agent.data_dir / "jobs").iterdir()) != []
    with AgentProcess(tracker.address, runner, agent.data_dir) as successor:
        again = script.greet()
        assert again.running == ()
        assert again.instance_id != hello.instance_id
        successor.wait_ready()
        assert list((agent.data_dir / "jobs").iterdir()) == []


def test_a_refusal_ends_it_with_the_trackers_reason(agent: AgentProcess, script: Script) -> None:
    script.hear(m.Hello)
    script.say(m.Refused("the name 'here' is in use", retry=False))
    script.hang_up()
    assert agent.process.wait(60) in FINAL_STATUSES, "who starts it again is told that this would end alike"
    wait_for(lambda: "the tracker refused this agent: the name 'here' is in use" in agent.log, "the reason")


def test_an_idle_agent_is_small(agent: AgentProcess, script: Script, module: bytes) -> None:
    """Proportional set size of the whole agent after a job, when it is idle again."""
    script.greet()
    script.say(m.AssignJob(Lease("job-1", 1, 10_000), spec(script.publish(module), "add")))
    _after_job(script)
    script.say(m.ResultAccepted("job-1"))
    waiting = _waiting(agent)
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (agent.process.pid, *waiting)]
    pss_kb = sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:"))
    assert pss_kb < 45_000_000 / 1024, rollups


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kedge.device_agent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_no_tracker_is_said_once_and_tried_again(runner: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with AgentProcess(f"127.0.0.1:{taken.getsockname()[1]}", runner, tmp_path / "data") as agent:
            agent.wait_log("no tracker answers at 127.0.0.1")
            time.sleep(1.0)  # several attempts
            assert agent.stop() == 0
            assert agent.log.count("no tracker answers") == 1


def test_bad_arguments_have_clear_errors(runner: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a runner")
    good = [
        "--tracker",
        "127.0.0.1:1",
        "--insecure-loopback",
        "--runner",
        str(runner),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    cases: list[tuple[list[str], str]] = [
        (["--tracker", "http://x"], "is not a tracker's address: it has a scheme"),
        (["--runner", str(tmp_path / "absent")], "there is no runner at"),
        (["--runner", str(file)], "is not executable"),
        (["--data-dir", str(file)], "cannot use the data folder"),
        (["--name", "a b"], "'a b' cannot be a device's name"),
        (["--label", "rack"], "'rack' is not KEY=VALUE"),
        (["--label", "arch=riscv64"], "'arch' is what every device tells about itself"),
        (["--threads", "1000"], "this process may use"),
    ]
    for arguments, words in cases:
        done = start(*good, *arguments)
        assert done.returncode != 0, arguments
        assert words in done.stderr, done.stderr
        assert "hint:" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_runner_for_another_machine_is_refused_at_the_start(tmp_path: Path) -> None:
    foreign = tmp_path / "kedge-runner"
    foreign.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 100)
    foreign.chmod(0o755)
    local = ("--tracker", "127.0.0.1:1", "--insecure-loopback")
    done = start(*local, "--runner", str(foreign), "--data-dir", str(tmp_path / "data"))
    assert done.returncode != 0
    assert "cannot start" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_agent_per_data_folder(agent: AgentProcess, script: Script, runner: Path) -> None:
    script.greet()
    agent.wait_ready()
    local = ("--tracker", "127.0.0.1:1", "--insecure-loopback")
    done = start(*local, "--runner", str(runner), "--data-dir", str(agent.data_dir))
    assert done.returncode != 0
    assert "another agent uses the data folder" in done.stderr


def test_help_shows_examples() -> None:
    done = start("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
