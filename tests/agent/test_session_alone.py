"""A session's end on the device, with its stream in the hands of the test."""

from __future__ import annotations

import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from kedge.device_agent import jobs, session_files
from kedge.device_agent.jobs import Board
from kedge.device_agent.session_files import SessionFiles
from kedge.device_agent.sessions import _WAITING, Session
from kedge.protos.v1 import sessions_pb2 as pb
from kedge.protos.v1 import types_pb2
from kedge.rpc import convert
from kedge.rpc.errors import LimitError
from kedge.rpc.outcome import OutcomeKind
from kedge.rpc.types import NO_BLOB, Blob, Health, JobResult, JobSpec, Lease, SessionTask
from support.agents import runs, wait_for
from support.handmade import artifact

from .conftest import FUNCTIONS, Remote


class Stream:
    """The tracker's end of a session's stream. While `reads` is not set, the agent's frames are not taken."""

    def __init__(self) -> None:
        self.says: SimpleQueue[pb.DeviceEvent | None] = SimpleQueue()
        self.heard: SimpleQueue[pb.DeviceFrame] = SimpleQueue()
        self.reads = threading.Event()
        self.reads.set()
        self.closed = threading.Event()
        self._ended: Callable[[], None] = lambda: None

    def stream_stream(
        self, method: str, request_serializer: object, response_deserializer: Callable[[bytes], pb.DeviceEvent]
    ) -> Callable[[Iterator[pb.DeviceFrame]], Stream]:
        assert method == "/kedge.v1.Sessions/Serve"
        self.hear = response_deserializer

        def call(frames: Iterator[pb.DeviceFrame]) -> Stream:
            threading.Thread(target=self._take, args=(frames,), daemon=True).start()
            return self

        return call

    def _take(self, frames: Iterator[pb.DeviceFrame]) -> None:
        while self.reads.wait():
            frame = next(frames, None)
            if frame is None:
                break
            self.heard.put(frame)
        self._ended()
        self.says.put(None)

    def __iter__(self) -> Iterator[pb.DeviceEvent]:
        for event in iter(self.says.get, None):
            yield self.hear(event.SerializeToString())

    def add_callback(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def close(self) -> None:
        self.closed.set()

    def ask(self, **body: Any) -> None:
        self.says.put(pb.DeviceEvent(data=pb.SessionRequest(**body).SerializeToString()))

    def reply(self) -> pb.SessionReply:
        return pb.SessionReply.FromString(self.heard.get(timeout=60).data)


class Served:
    """A session that is being served to the test."""

    def __init__(self, board: Board) -> None:
        self.stream = Stream()
        self.session = Session(board, Lease("s", 1), JobSpec(NO_BLOB, "", SessionTask()), lambda: self.stream)
        self.results: list[JobResult] = []
        self._thread = threading.Thread(target=lambda: self.results.append(self.session.run()))

    def __enter__(self) -> Served:
        self._thread.start()
        assert self.stream.heard.get(timeout=60).WhichOneof("body") == "serve"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stream.says.put(pb.DeviceEvent(close=pb.CloseSession()))
        self.outcome()

    def outcome(self) -> OutcomeKind:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.results[0].outcome.kind

    def load(self, manifest: Blob) -> pb.SessionReply:
        self.stream.ask(id=1, load=pb.LoadArtifact(manifest=convert.blob_to_pb(manifest)))
        return self.stream.reply()


@pytest.fixture
def published(remote: Remote, module: bytes) -> Blob:
    return remote.publish(artifact(module, FUNCTIONS))


def test_the_last_word_of_a_session_is_done(board: Board) -> None:
    with Served(board) as served:
        served.session.cancel("the agent stops")
        assert served.stream.heard.get(timeout=60).WhichOneof("body") == "done"
    assert served.outcome() is OutcomeKind.CANCELLED
    assert list(board.scratch.iterdir()) == []


def test_a_request_reaches_the_worker_from_the_thread_that_takes_it_off_the_wire(board: Board) -> None:
    """Not by way of the reader, which is told of nothing here; what ends a request or the session is the reader's."""
    with Served(board) as served:
        asked = pb.SessionRequest(id=1, list_files=pb.ListFiles())
        left = served.stream.hear(pb.DeviceEvent(data=asked.SerializeToString()).SerializeToString())
        assert left.WhichOneof("body") is None
        assert served.stream.reply().WhichOneof("body") == "files"
        for event in (
            pb.DeviceEvent(data=pb.SessionRequest(id=2, cancel=pb.CancelRequest()).SerializeToString()),
            pb.DeviceEvent(data=b"\xff"),
            pb.DeviceEvent(close=pb.CloseSession()),
        ):
            assert served.stream.hear(event.SerializeToString()) == event


def test_where_nobody_reads_the_result_comes_before_the_stream_ends(board: Board) -> None:
    with Served(board) as served:
        served.stream.reads.clear()
        served.stream.says.put(pb.DeviceEvent(data=b"\xff\xff"))
        assert served.outcome() is OutcomeKind.BAD_REQUEST
        assert not served.stream.closed.is_set()
        served.stream.reads.set()


def test_a_session_that_is_forgotten_ends(board: Board) -> None:
    with Served(replace(board, session_idle_s=0.2)) as served:
        assert served.outcome() is OutcomeKind.CANCELLED
        assert "nothing was asked of it for 0.2 s" in served.results[0].outcome.message


def test_calling_off_a_timing_that_waits_for_a_hot_board(
    board: Board, published: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def hot(_: Board) -> Health:
        asked.set()
        return Health(temperature_celsius=120.0)

    monkeypatch.setattr(Board, "health", hot)
    x = pb.Value(name="x", dtype="float32", shape=[4], inline=bytes(16))
    with Served(replace(board, calm_s=3600.0)) as served:
        number = served.load(published).loaded.artifact
        options = types_pb2.TimeOptions(number=1, repeat=1)
        wanted = pb.TimeFunction(artifact=number, function="add", inputs=[x], options=options, run_ms=7_200_000)
        served.stream.ask(id=2, time=wanted)
        assert asked.wait(60)
        for _ in range(_WAITING):  # as many as may wait for the worker, which takes none
            served.stream.ask(id=2, piece=b"x")
        served.stream.ask(id=2, cancel=pb.CancelRequest())
        assert served.stream.reply().failed.outcome.message == "its client called it off"
        call = pb.CallFunction(artifact=number, function="add", inputs=[x])
        served.stream.ask(id=3, call=call)
        assert served.stream.reply().WhichOneof("body") == "called", "the artifact is there as before"


PIECES = 16


@pytest.mark.parametrize(
    ("put", "fetch"),
    [
        (
            {"put": pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[PIECES << 20], streamed_bytes=PIECES << 20))},
            {"fetch": pb.FetchTensor(handle=1)},
        ),
        (
            {"put_file": pb.PutFile(file=pb.SessionFile(name="a", size_bytes=PIECES << 20))},
            {"fetch_file": pb.FetchFile(name="a")},
        ),
    ],
    ids=["tensor", "file"],
)
def test_calling_off_what_is_being_fetched(board: Board, put: dict[str, Any], fetch: dict[str, Any]) -> None:
    with Served(board) as served:
        served.stream.ask(id=1, **put)
        for _ in range(PIECES):
            served.stream.ask(id=1, piece=bytes(1 << 20))
        assert not served.stream.reply().HasField("failed")
        served.stream.reads.clear()
        served.stream.ask(id=2, **fetch)
        wait_for(lambda: served.session._frames._items.qsize() == 4, "the replies to be held up")
        served.stream.ask(id=2, cancel=pb.CancelRequest())
        wait_for(lambda: served.session._unwanted == 2, "the agent to hear of it")
        served.stream.reads.set()
        replies = []
        while not replies or not replies[-1].HasField("failed"):
            replies.append(served.stream.reply())
        assert len(replies) < PIECES
        assert replies[-1].failed.outcome.message == "its client called it off"
        served.stream.ask(id=3, list_files=pb.ListFiles())
        assert served.stream.reply().WhichOneof("body") == "files"
    assert served.outcome() is OutcomeKind.OK


def test_a_session_that_ends_fetches_nothing_more(board: Board, remote: Remote, published: Blob) -> None:
    remote.gate.clear()
    with Served(board) as served:
        served.stream.ask(id=1, load=pb.LoadArtifact(manifest=convert.blob_to_pb(published)))
        assert remote.waiting.wait(60)
        served.session.cancel("enough")
        assert served.outcome() is OutcomeKind.CANCELLED
    assert remote.fetched == []


def test_what_is_unloaded_may_leave_the_cache(board: Board, published: Blob) -> None:
    with Served(board) as served:
        number = served.load(published).loaded.artifact
        assert board.cache._held
        served.stream.ask(id=2, unload=pb.UnloadArtifact(artifact=number))
        assert served.stream.reply().WhichOneof("body") == "done"
        assert not board.cache._held
        (shown,) = (board.scratch.parent / "loaded").iterdir() if board.cage and not board.cage.user else (None,)
        assert shown is None or list(shown.iterdir()) == []
    assert served.outcome() is OutcomeKind.OK


def test_what_a_runner_took_along_may_leave_the_cache(board: Board, published: Blob) -> None:
    with Served(board) as served:
        number = served.load(published).loaded.artifact
        x = pb.Value(name="x", dtype="float32", shape=[4], inline=bytes(16))
        served.stream.ask(id=2, call=pb.CallFunction(artifact=number, function="crash", inputs=[x]))
        assert served.stream.reply().failed.runner_ended
        assert not board.cache._held


@pytest.mark.parametrize("end", ["session cancelled", "request called off", "client closes"])
def test_a_runner_that_hangs_at_start_keeps_no_session(
    board: Board, tmp_path: Path, published: Blob, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_START_S", 600.0)  # it would wait for longer than this test does
    program, said = tmp_path / "hangs", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {said}.new; mv {said}.new {said}; exec sleep 600\n")
    program.chmod(0o755)
    with Served(replace(board, runner=program)) as served:
        served.stream.ask(id=1, load=pb.LoadArtifact(manifest=convert.blob_to_pb(published)))
        wait_for(said.exists, "its runner to begin")
        if end == "session cancelled":
            served.session.cancel("the agent stops")
        elif end == "request called off":
            served.stream.ask(id=1, cancel=pb.CancelRequest())
            failed = convert.outcome_from_pb(served.stream.reply().failed.outcome)
            assert failed.kind is OutcomeKind.CANCELLED and "called it off" in failed.message
        else:
            served.stream.says.put(pb.DeviceEvent(close=pb.CloseSession()))
        if end != "request called off":
            served.outcome()
        wait_for(lambda: not runs(int(said.read_text())), "its runner to end")
    assert list(board.scratch.iterdir()) == []


def test_tensors_need_memory_that_is_free(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    put = pb.PutTensor(tensor=pb.Value(dtype="uint8", shape=[size], streamed_bytes=size))
    monkeypatch.setattr(Board, "health", lambda _: Health(memory_available_bytes=size))
    with Served(board) as served:
        served.stream.ask(id=1, put=put)
        served.stream.ask(id=1, piece=bytes(size))
        failed = served.stream.reply().failed.outcome
        assert convert.outcome_from_pb(failed).kind is OutcomeKind.OUT_OF_MEMORY
        assert f"has room now for {int(0.9 * size)}" in failed.message
        monkeypatch.setattr(Board, "health", lambda _: Health(memory_available_bytes=2 * size))
        served.stream.ask(id=2, put=put)
        served.stream.ask(id=2, piece=bytes(size))
        assert served.stream.reply().WhichOneof("body") == "tensor"


def test_a_full_disk_is_said_with_its_remedy(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SessionFiles, "commit", full)
    with Served(board) as served:
        served.stream.ask(id=1, put_file=pb.PutFile(file=pb.SessionFile(name="a", size_bytes=0)))
        failed = served.stream.reply().failed.outcome
        assert convert.outcome_from_pb(failed).kind is OutcomeKind.OUT_OF_MEMORY
        assert "remove files of the session" in failed.message


def test_a_second_folder_that_cannot_be_made_leaves_none(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", failing_for("staging-"))
    session = Session(board, Lease("s", 1), JobSpec(NO_BLOB, "", SessionTask()), Stream)
    assert session.run().outcome.kind is OutcomeKind.DEVICE_FAULT
    assert list(board.scratch.iterdir()) == []


def failing_for(prefix: str) -> Callable[..., str]:
    make = tempfile.mkdtemp

    def mkdtemp(**named: str) -> str:
        if named["prefix"] == prefix:
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(**named)

    return mkdtemp


# ---- Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> SessionFiles:
    for name in ("folder", "staging"):
        (tmp_path / name).mkdir()
    return SessionFiles(tmp_path / "folder", tmp_path / "staging")


def test_more_files_than_a_message_lists(files: SessionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_files, "MAX_FILES", 3)
    for number in range(4):
        (tmp_path / "folder" / f"f{number}").touch()
    with pytest.raises(LimitError, match="more than 3 files"):
        files.list()
    files.remove("f3")
    assert [name for name, _ in files.list()] == ["f0", "f1", "f2"]


def test_a_file_for_which_the_disk_has_no_room(files: SessionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(64 << 20) + 10))
    files.begin("small", 10).close()
    with pytest.raises(LimitError, match="disk has 10 to spare"):
        files.begin("large", 11)
