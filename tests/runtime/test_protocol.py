"""The runner's frames as bytes: over pipes, as a board over SSH would, and malformed in every way."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.toolchain import RuntimeFiles
from kedge.device_agent.runtime import protocol
from kedge.device_agent.runtime.protocol import Header, Tensor
from kedge.rpc import abi
from kedge.rpc.types import TimeOptions


class Pipes:
    """A runner on its standard streams."""

    def __init__(self, runner: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [runner, "--stdio", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def send(self, kind: int, request: int, payload: bytes = b"", flags: int = 0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(Header(kind, flags, request, len(payload)).pack() + payload)
        self.process.stdin.flush()

    def receive(self) -> tuple[Header, bytes]:
        assert self.process.stdout is not None
        header = Header.unpack(self.process.stdout.read(protocol.HEADER.size))
        return header, self.process.stdout.read(header.length)

    def error(self) -> tuple[int, int, str]:
        """Request, status and text of the error that must come next."""
        header, payload = self.receive()
        assert header.type == protocol.ERROR
        return (header.request, *protocol.unpack_error(payload))

    def end(self) -> tuple[int, bytes]:
        """Close the stream; exit status and standard error."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@pytest.fixture
def pipes(runtime: RuntimeFiles) -> Iterator[Pipes]:
    runner = Pipes(runtime.runner)
    header, payload = runner.receive()
    assert header.type == protocol.HELLO
    assert not protocol.unpack_hello(payload).shared_memory
    yield runner
    runner.process.kill()
    runner.process.communicate()


def call_payload(function: int, *tensors: Tensor) -> bytes:
    return with_data(protocol.pack_call(0, function, 0) + protocol.pack_inputs(tensors)[0], *tensors)


def with_data(head: bytes, *tensors: Tensor) -> bytes:
    descriptors, offsets, size = protocol.pack_tensors(tensors)
    head += descriptors
    data = bytearray(size)
    for tensor, offset in zip(tensors, offsets, strict=True):
        data[offset : offset + tensor.nbytes] = tensor.data
    return head.ljust(protocol.align(len(head)), b"\0") + data


def opened(pipes: Pipes, arithmetic: Path, weights: Path) -> Pipes:
    pipes.send(protocol.OPEN, 1, protocol.pack_open(str(arithmetic), str(weights), 64, 1))
    header, payload = pipes.receive()
    assert (header.type, header.request) == (protocol.RESULT, 1)
    assert protocol.unpack_open_result(payload).functions[0].name == "main"
    return pipes


def test_a_session_over_pipes(pipes: Pipes, arithmetic: Path, weights: Path) -> None:
    opened(pipes, arithmetic, weights)
    pipes.send(protocol.CALL, 2, call_payload(0, Tensor("float32", (1, 8), struct.pack("<8f", *[1.0] * 8))))
    header, payload = pipes.receive()
    assert (header.type, header.request, header.flags) == (protocol.RESULT, 2, 0)
    _, (result,) = protocol.unpack_call_result(payload, None)
    assert struct.unpack("<4f", result.data) == (56.0, 64.0) * 2
    pipes.send(protocol.BYE, 0)
    assert pipes.process.wait(60) == 0


def test_what_a_model_prints_stays_out_of_the_frames(pipes: Pipes, misbehaving: Path) -> None:
    pipes.send(protocol.OPEN, 1, protocol.pack_open(str(misbehaving), "", 0, 1))
    assert pipes.receive()[0].type == protocol.RESULT
    pipes.send(protocol.CALL, 2, call_payload(4))  # quit, with a last word
    assert pipes.process.wait(60) == 7
    assert pipes.process.stdout is not None
    assert pipes.process.stdout.read() == b""
    assert pipes.end() == (7, b"a last word\n")


def test_devices_are_asked_for_by_type(pipes: Pipes) -> None:
    pipes.send(protocol.DEVICES, 1, protocol.pack_devices(abi.DEVICE_CUDA))
    header, payload = pipes.receive()
    found = protocol.unpack_devices(payload, "cuda")
    assert header.type == protocol.RESULT and (found.accelerators or found.reason)
    pipes.send(protocol.DEVICES, 2, protocol.pack_devices(77))
    assert protocol.unpack_devices(pipes.receive()[1], "other").accelerators == ()
    pipes.send(protocol.DEVICES, 3, b"")
    header, payload = pipes.receive()
    assert header.type == protocol.ERROR
    assert protocol.unpack_error(payload) == (abi.E_ARGUMENT, "a malformed question about devices")


def test_an_open_that_says_no_device_is_malformed(pipes: Pipes, arithmetic: Path) -> None:
    pipes.send(protocol.OPEN, 1, protocol.pack_open(str(arithmetic), "", 0, 1)[:-4])
    assert protocol.unpack_error(pipes.receive()[1]) == (abi.E_ARGUMENT, "a malformed open")


def test_the_end_of_the_stream_ends_it(pipes: Pipes) -> None:
    assert pipes.end() == (0, b"")


def test_the_end_of_the_stream_ends_a_call(pipes: Pipes, misbehaving: Path) -> None:
    pipes.send(protocol.OPEN, 1, protocol.pack_open(str(misbehaving), "", 0, 1))
    pipes.receive()
    pipes.send(protocol.CALL, 2, call_payload(1))  # forever
    assert pipes.end() == (0, b"")


def test_one_request_at_a_time_and_cancel(pipes: Pipes, misbehaving: Path) -> None:
    pipes.send(protocol.OPEN, 1, protocol.pack_open(str(misbehaving), "", 0, 1))
    pipes.receive()
    pipes.send(protocol.CALL, 2, call_payload(2))  # slow
    pipes.send(protocol.CALL, 3, call_payload(2))
    assert pipes.error() == (3, abi.E_ARGUMENT, "another request runs; one at a time")
    pipes.send(protocol.CANCEL, 3)  # not the one that runs
    pipes.send(99, 4)
    assert pipes.error() == (4, abi.E_ARGUMENT, "unknown message")
    pipes.send(protocol.CANCEL, 2)
    assert pipes.error() == (2, abi.E_CANCELLED, "function slow was cancelled")
    pipes.send(protocol.CANCEL, 2)  # it is over
    pipes.send(protocol.CALL, 5, call_payload(8, Tensor("float32", (1,), bytes(4))))
    assert pipes.receive()[0].type == protocol.RESULT


def test_bytes_that_are_no_frame(pipes: Pipes) -> None:
    assert pipes.process.stdin is not None
    pipes.process.stdin.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert pipes.end() == (2, b"kedge-runner: what came is not a frame\n")


def test_a_frame_that_is_cut_off(pipes: Pipes) -> None:
    assert pipes.process.stdin is not None
    pipes.process.stdin.write(Header(protocol.CALL, 0, 1, 100).pack() + b"\0" * 50)
    assert pipes.end() == (2, b"kedge-runner: what came is not a frame\n")


def test_a_payload_that_does_not_fit_in_memory(runtime: RuntimeFiles) -> None:
    pipes = Pipes(runtime.runner, "--limit-memory", str(256 << 20))
    pipes.receive()
    pipes.send(protocol.OPEN, 1, bytes(300 << 20))
    assert pipes.error() == (1, abi.E_MEMORY, "no memory for the request")
    assert pipes.end()[0] == 0


def test_shared_inputs_without_a_file(pipes: Pipes, arithmetic: Path, weights: Path) -> None:
    opened(pipes, arithmetic, weights)
    tensor = Tensor("float32", (1, 8), bytes(32))
    pipes.send(protocol.CALL, 2, call_payload(0, tensor), protocol.FLAG_SHARED)
    assert pipes.error() == (2, abi.E_ARGUMENT, "no file came with shared inputs")


def kept(pipes: Pipes, dtype: str, shape: tuple[int, ...], first: bytes) -> protocol.Kept:
    pipes.send(protocol.KEEP, 3, protocol.pack_keep(dtype, shape) + first)
    header, payload = pipes.receive()
    assert header.type == protocol.RESULT
    return protocol.Kept(protocol.unpack_keep(payload), dtype, shape)


def test_handles_of_others_are_none(pipes: Pipes, arithmetic: Path, weights: Path) -> None:
    opened(pipes, arithmetic, weights)
    x = kept(pipes, "float32", (1, 8), bytes(32))
    stranger = protocol.Kept(x.handle + 1, "float32", (1, 8))
    pipes.send(protocol.CALL, 4, with_data(protocol.pack_call(0, 0, 0) + protocol.pack_inputs([stranger])[0]))
    assert pipes.error() == (4, abi.E_ARGUMENT, f"no tensor {stranger.handle} is kept")
    pipes.send(protocol.FETCH, 5, protocol.pack_fetch(stranger.handle, 0, 4))
    assert pipes.error() == (5, abi.E_ARGUMENT, f"no tensor {stranger.handle} is kept")
    # A release of several is of all or of none.
    pipes.send(protocol.RELEASE, 6, protocol.pack_release([x.handle, stranger.handle]))
    assert pipes.error()[2] == f"no tensor {stranger.handle} is kept; none was released"
    pipes.send(protocol.RELEASE, 7, protocol.pack_release([x.handle, x.handle]))
    assert pipes.receive()[0].type == protocol.RESULT
    pipes.send(protocol.FETCH, 8, protocol.pack_fetch(x.handle, 0, 4))
    assert pipes.error()[1] == abi.E_ARGUMENT


def test_a_tensor_that_comes_in_pieces_is_used_once_it_is_whole(pipes: Pipes, arithmetic: Path, weights: Path) -> None:
    opened(pipes, arithmetic, weights)
    x = kept(pipes, "float32", (1, 8), bytes(12))
    calling = with_data(protocol.pack_call(0, 0, 0) + protocol.pack_inputs([x])[0])
    missing = f"of tensor {x.handle} 20 bytes have not come yet"
    for kind, payload in ((protocol.CALL, calling), (protocol.FETCH, protocol.pack_fetch(x.handle, 0, 12))):
        pipes.send(kind, 4, payload)
        assert pipes.error() == (4, abi.E_ARGUMENT, missing)
    pipes.send(protocol.FILL, 5, protocol.pack_fill(x.handle) + bytes(21))
    assert pipes.error() == (5, abi.E_ARGUMENT, "21 bytes come for a tensor that lacks 20")
    pipes.send(protocol.FILL, 6, protocol.pack_fill(x.handle) + bytes(range(20)))
    assert pipes.receive()[0].type == protocol.RESULT
    pipes.send(protocol.FILL, 7, protocol.pack_fill(x.handle) + b"more")
    assert pipes.error() == (7, abi.E_ARGUMENT, "4 bytes come for a tensor that lacks 0")
    pipes.send(protocol.FETCH, 8, protocol.pack_fetch(x.handle, 10, 4))
    assert bytes(pipes.receive()[1]) == bytes([0, 0, 0, 1])
    pipes.send(protocol.CALL, 9, calling)
    assert pipes.receive()[0].type == protocol.RESULT


def test_requests_about_tensors_that_are_cut_off(pipes: Pipes) -> None:
    keep = protocol.pack_keep("float32", (4,))
    x = kept(pipes, "float32", (4,), bytes(16))
    for kind, payload, why in (
        (protocol.KEEP, keep + bytes(17), "17 bytes come for a tensor that lacks 16"),
        (protocol.KEEP, keep[:-1], "a malformed request to keep"),
        (protocol.KEEP, b"", "a malformed request to keep"),
        (protocol.FILL, bytes(7), "no tensor 0 is kept"),
        (protocol.FETCH, bytes(7), "no tensor 0 is kept"),
        (protocol.FETCH, protocol.pack_fetch(x.handle, 0, 17), "a malformed request to fetch"),
        (protocol.FETCH, protocol.pack_fetch(x.handle, 17, 0), "a malformed request to fetch"),
        (protocol.FETCH, protocol.pack_fetch(x.handle, 8, 2**64 - 4), "a malformed request to fetch"),
        (protocol.RELEASE, struct.pack("<I", 1 << 31) + bytes(4), "a malformed request to release"),
        (protocol.CLOSE, b"", "there is no such module to close"),
        (protocol.CLOSE, protocol.pack_close(0), "there is no such module to close"),
    ):
        pipes.send(kind, 9, payload)
        assert pipes.error() == (9, abi.E_ARGUMENT, why)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_mangled_requests_are_errors(data: st.DataObject, fuzzed: Pipes) -> None:
    """Whatever bytes a request holds, the runner answers and lives."""
    good = call_payload(0, Tensor("float32", (2, 8), bytes(64)))
    timed = protocol.pack_time(0, 0, TimeOptions(repeat=1)) + good[12:]
    keep = protocol.pack_keep("float32", (2, 8)) + bytes(64)
    # The options are tested elsewhere: a huge repeat takes its time.
    kind, payload, start = data.draw(
        st.sampled_from(
            [
                (protocol.CALL, good, 0),
                (protocol.TIME, timed, 80),
                (protocol.KEEP, keep, 0),
                (protocol.FILL, protocol.pack_fill(1) + bytes(16), 0),
                (protocol.FETCH, protocol.pack_fetch(1, 0, 64), 0),
                (protocol.RELEASE, protocol.pack_release([1, 2, 3]), 0),
                (protocol.CLOSE, protocol.pack_close(3), 0),
            ]
        )
    )
    mangled = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        mangled[data.draw(st.integers(start, len(mangled) - 1))] = data.draw(st.integers(0, 255))
    if kind == protocol.CLOSE:
        mangled[0] |= 1  # module 0 is for the other requests
    fuzzed.send(kind, 7, bytes(mangled[: data.draw(st.integers(start, len(mangled)))]))
    header, _ = fuzzed.receive()
    assert header.request == 7
    assert header.type in (protocol.ERROR, protocol.RESULT)


@pytest.fixture(scope="module")
def fuzzed(runtime: RuntimeFiles, arithmetic: Path, weights: Path) -> Iterator[Pipes]:
    runner = Pipes(runtime.runner)
    runner.receive()
    yield opened(runner, arithmetic, weights)
    runner.process.kill()
    runner.process.communicate()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "one of them is required"),
        (["--fd", "x"], "--fd: needs a number"),
        (["--fd", "99"], "--fd: Bad file descriptor"),
        (["--stdio", "--limit-memory"], "--limit-memory: needs a number"),
        (["--stdio", "--limit-files", "-3"], "--limit-files: needs a number"),
        (["--frobnicate", "1"], "--frobnicate: unknown option; try --help"),
        (["--stdio", "--cpus", "0,x"], "--cpus: needs numbers with commas between"),
    ],
)
def test_bad_options(runtime: RuntimeFiles, options: list[str], text: str) -> None:
    done = subprocess.run([runtime.runner, *options], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 3
    assert text in done.stderr.decode()


def test_help(runtime: RuntimeFiles) -> None:
    done = subprocess.run([runtime.runner, "--help"], capture_output=True, text=True, check=True)
    assert "--limit-memory BYTES" in done.stdout


# ---- the Python end ------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(sorted(abi.DTYPES))
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(dtypes, shapes), max_size=5))
def test_tensors_round_trip(kinds: list[tuple[str, tuple[int, ...]]]) -> None:
    tensors = []
    for dtype, shape in kinds:
        size = abi.dtype_size(dtype)
        for dim in shape:
            size *= dim
        tensors.append(Tensor(dtype, shape, bytes(i % 251 for i in range(size))))
    payload = call_payload(0, *tensors)
    cursor = protocol.Cursor(payload)
    cursor.take(12 + 4 + 8 * len(tensors))
    back = protocol.unpack_tensors(cursor, None)
    assert [(t.dtype, t.shape, bytes(t.data)) for t in back] == [(t.dtype, t.shape, bytes(t.data)) for t in tensors]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    for read in (
        protocol.unpack_hello,
        protocol.unpack_open_result,
        protocol.unpack_time_result,
        protocol.unpack_error,
        lambda data: protocol.unpack_devices(data, "opencl"),
        protocol.unpack_keep,
        protocol.unpack_kept_call,
        lambda data: protocol.unpack_call_result(data, None),
    ):
        try:
            read(garbage)
        except protocol.ProtocolError:
            continue


def test_a_tensor_must_fit_its_bytes() -> None:
    with pytest.raises(ValueError, match=r"float32\[2, 3\] takes 24 bytes, but 20 were given"):
        Tensor("float32", (2, 3), bytes(20))
    with pytest.raises(ValueError, match="not the shape of a tensor"):
        Tensor("float32", (1,) * 9, bytes(4))
