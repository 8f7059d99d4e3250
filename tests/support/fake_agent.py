"""An agent in Python that speaks the real protocol and computes nothing: every output is the input of its place.

Tests decide when it does what. For tests of the tracker and of clients; the real agent has tests of its own.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, TypeVar, cast

import grpc

from kedge.protos.v1 import agent_pb2, agent_pb2_grpc
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import blob_of
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.transport import Address, Tls, open_channel
from kedge.rpc.types import (
    BenchTask,
    Blob,
    DeviceInfo,
    Health,
    JobResult,
    JobSpec,
    Lease,
    Measurement,
    StageTime,
    StepSamples,
    Tensor,
    Verdict,
    plan_inline,
)

B = TypeVar("B", bound=m.TrackerBody)
#: Before a test fails; whoever is waited for may have to start a process first.
PATIENCE_S = 60.0
#: Between heartbeats of an agent at work: leases of tests are short.
BEAT_S = 0.1


class FakeAgent:
    """One connection at a time. `work` answers each assignment; without it the test does, with `expect` and `say`."""

    def __init__(
        self,
        address: Address,
        info: DeviceInfo,
        *,
        work: Callable[[FakeAgent, m.AssignJob], None] | None = None,
        instance_id: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.tls = tls
        self.info = info
        self.instance_id = instance_id or secrets.token_hex(4)
        self._work = work
        self._inbox: queue.Queue[m.TrackerBody | None] = queue.Queue()
        self._aside: list[m.TrackerBody] = []
        self._outbox: queue.SimpleQueue[agent_pb2.AgentMessage | None] = queue.SimpleQueue()
        self._channel: Any = None
        self._call: Any = None
        self._reader: threading.Thread | None = None
        self._number = 0
        self._saying = threading.Lock()
        self.status: Any = None

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.drop()

    # ---- The connection ----

    def connect(self, *running: Lease, hello: m.Hello | None = None) -> m.TrackerBody | None:
        """Dial and say hello; returns the tracker's answer."""
        self._channel = open_channel(self.address, self.tls)
        self._outbox = queue.SimpleQueue()
        self._inbox, self._aside = queue.Queue(), []
        self._number = 0
        stub: Any = cast(Any, agent_pb2_grpc.AgentsStub)(self._channel)
        self._call = stub.Connect(self._requests(self._outbox))
        self.say(hello or m.Hello(local_protocol(), self.info, self.instance_id, running, Health()))
        answer: queue.Queue[m.TrackerBody | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(self._call, answer, self._inbox), daemon=True)
        self._reader.start()
        return answer.get(timeout=PATIENCE_S)

    def drop(self) -> None:
        """Break the connection without a word."""
        self._call.cancel()
        self._outbox.put(None)
        assert self._reader is not None
        self._reader.join(PATIENCE_S)
        self._channel.close()

    def ended(self) -> None:
        """Wait until the tracker ends the stream."""
        assert self._reader is not None
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), "the tracker has not ended the stream"

    def say(self, body: m.AgentBody) -> None:
        """Send a message."""
        with self._saying:
            self._number += 1
            self._outbox.put(convert.agent_message_to_pb(body, self._number))

    def expect(self, kind: type[B]) -> B:
        """The next message, which is of this kind; only an assignment and the receipt of a result may change places."""
        for body in self._aside:
            if isinstance(body, kind):
                self._aside.remove(body)
                return body
        while True:
            body = self._inbox.get(timeout=PATIENCE_S)
            if isinstance(body, kind):
                return body
            assert {kind, type(body)} == {m.AssignJob, m.ResultAccepted}, f"expected {kind.__name__}, got {body}"
            assert body is not None
            self._aside.append(body)

    def heard_nothing(self) -> bool:
        """True when no message is waiting."""
        return self._inbox.empty() and not self._aside

    # ---- Work ----

    def blobs(self) -> BlobClient:
        """The tracker's blobs."""
        return BlobClient(self._channel, self.address)

    def result(self, spec: JobSpec) -> JobResult:
        """What echoing the inputs gives; outputs are named after the artifact's."""
        client = self.blobs()
        datas = [client.read(t.data) if isinstance(t.data, Blob) else t.data for t in spec.task.inputs]
        measurement = None
        if isinstance(spec.task, BenchTask):
            options = replace(spec.task.options, number=7)
            samples = tuple(1000.0 + i for i in range(options.repeat))
            measurement = Measurement(options, samples, 20, 1, verdict=Verdict.VALID)
            if options.profile:
                steps = StepSamples((samples, samples[::-1]), 1e9, (4e9, 3e9, 2e9, 1e9))
                measurement = replace(measurement, profile=steps)
            if not spec.task.return_outputs:
                datas = []
        outputs = []
        for tensor, data, inline in zip(spec.task.inputs, datas, plan_inline(map(len, datas)), strict=False):
            held: bytes | Blob = bytes(data)
            if not inline:
                held = blob_of(bytes(data))
                client.upload_missing([(held, bytes(data))])
            outputs.append(Tensor(f"{tensor.name}_out", tensor.dtype, tensor.shape, held))
        times = (StageTime(Stage.TRANSFER, 10), StageTime(Stage.RUN, 20))
        return JobResult(Outcome(OutcomeKind.OK), tuple(outputs), measurement, times, self.info.name)

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Renew a lease, as an agent at work does, for as long as this lasts."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                self.say(m.Heartbeat(running=(lease,)))

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()

    def finish(self, assigned: m.AssignJob) -> None:
        """Do a job from its start to its end."""
        self.say(m.JobStarted(assigned.lease))
        self.say(m.JobProgress(assigned.lease, Stage.RUN))
        self.say(m.JobFinished(assigned.lease, self.result(assigned.spec)))

    # ---- Threads ----

    def _requests(self, outbox: queue.SimpleQueue[agent_pb2.AgentMessage | None]) -> Iterator[agent_pb2.AgentMessage]:
        while (message := outbox.get()) is not None:
            yield message

    def _read(
        self, call: Any, answer: queue.Queue[m.TrackerBody | None], inbox: queue.Queue[m.TrackerBody | None]
    ) -> None:
        first = True
        try:
            for pb in call:
                body = convert.tracker_message_from_pb(pb)
                if first:
                    first = False
                    answer.put(body)
                elif isinstance(body, m.AssignJob) and self._work is not None:
                    with self.holding(body.lease):
                        self._work(self, body)
                else:
                    inbox.put(body)
        except grpc.RpcError as error:
            self.status = error
        finally:
            if first:
                answer.put(None)


def echo(agent: FakeAgent, assigned: m.AssignJob) -> None:
    """`work` that does every job at once."""
    agent.finish(assigned)
