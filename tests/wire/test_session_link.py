"""The client's end of a session's stream, with the stream in the hands of the test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, cast

import pytest

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc.client.session_link import SessionLink
from kedge.rpc.transport import Address
from support.agents import wait_for


class Stream:
    """A channel and its only call."""

    def __init__(self) -> None:
        self.events: SimpleQueue[pb.ClientEvent | None] = SimpleQueue()
        self.said: SimpleQueue[pb.ClientFrame] = SimpleQueue()
        #: How often the client has asked for the next event.
        self.taken = 0

    def stream_stream(
        self, method: str, request_serializer: object, response_deserializer: Callable[[bytes], pb.ClientEvent]
    ) -> Callable[[Iterator[pb.ClientFrame]], Stream]:
        assert method == "/kedge.v1.Sessions/Attach"
        self.hear = response_deserializer

        def call(frames: Iterator[pb.ClientFrame]) -> Stream:
            threading.Thread(target=lambda: [self.said.put(frame) for frame in frames], daemon=True).start()
            return self

        return call

    def __iter__(self) -> Iterator[pb.ClientEvent]:
        while True:
            self.taken += 1
            event = self.events.get()
            if event is None:
                return
            yield event

    def cancel(self) -> None:
        self.events.put(None)

    def reply(self, number: int) -> pb.ClientEvent:
        """A reply comes in; returns what is left of its event."""
        reply = pb.SessionReply(id=number, done=pb.Done())
        return self.hear(pb.ClientEvent(data=reply.SerializeToString()).SerializeToString())


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def link(stream: Stream) -> Iterator[SessionLink]:
    link = SessionLink(cast(Any, stream), Address("localhost", 1), "s", lease_s=600.0)
    assert stream.said.get(timeout=60).attach.job_id == "s"
    yield link
    link.abort()


def test_a_reply_reaches_who_asked_from_the_thread_that_takes_it_off_the_wire(
    stream: Stream, link: SessionLink
) -> None:
    """Not by way of the thread that receives, which is told of nothing here."""
    replies: list[pb.SessionReply] = []
    asking = threading.Thread(
        target=lambda: replies.append(link.ask(pb.SessionRequest(list_files=pb.ListFiles()))), daemon=True
    )
    asking.start()
    assert pb.SessionRequest.FromString(stream.said.get(timeout=60).data).id == 1
    assert stream.reply(1).WhichOneof("body") is None
    asking.join(60)
    assert [reply.id for reply in replies] == [1]


def test_replies_that_nobody_takes_stay_on_the_wire(stream: Stream, link: SessionLink) -> None:
    for number in range(1, 5):
        stream.events.put(stream.reply(number))
        wait_for(lambda taken=number + 1: stream.taken == taken, "the next one to be asked for")
    stream.events.put(stream.reply(5))
    stream.events.put(pb.ClientEvent())
    wait_for(lambda: link._answers._waiting == 1, "the client to hold back")
    assert stream.taken == 5
    link._answers.get()
    wait_for(lambda: stream.taken == 7, "both to be taken")
    assert link.alive
