"""What one request of a session says, its deadlines and its tensors, and the ways in which it fails."""

from __future__ import annotations

import errno
import logging
from contextlib import contextmanager
from typing import Iterator, List, Tuple

from kedge.device_agent.cache import CacheFullError
from kedge.device_agent.jobs import DEFAULT_DEADLINES_MS, runner_outcome
from kedge.device_agent.runner_errors import RunnerError
from kedge.device_agent.runtime import protocol
from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc.artifact.manifest import Port
from kedge.rpc.blobs import CorruptBlobError, MissingBlobError
from kedge.rpc.errors import ArtifactError, IncompatibleTargetError, InputError, KedgeError, LimitError
from kedge.rpc.limits import check_number
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.types import MAX_DEADLINE_MS, plan_inline

log = logging.getLogger("kedge.agent")

#: What a client is told of a request that it called off.
CALLED_OFF = "its client called it off"


class FailedRequest(Exception):
    """A request that cannot be done; the session goes on."""

    def __init__(self, kind: OutcomeKind, message: str, stage: Stage = Stage.RUN) -> None:
        super().__init__(message)
        self.outcome = Outcome(kind, stage, message=message)


class CalledOff(FailedRequest):
    """Its client has no use for it any more."""

    def __init__(self) -> None:
        super().__init__(OutcomeKind.CANCELLED, CALLED_OFF)


class BrokenOrder(Exception):
    """What the client says makes no sense in this order: the session ends, by no fault of the device."""


def announced_bytes(request: pb.SessionRequest) -> int:
    """How many bytes follow a request in pieces."""
    which = request.WhichOneof("body")
    if which == "put_file":
        return max(0, request.put_file.file.size_bytes)
    if which == "put":
        return request.put.tensor.streamed_bytes
    if which in ("call", "time"):
        return sum(value.streamed_bytes for value in getattr(request, which).inputs)
    return 0


def deadline_s_of(given_ms: int, stage: Stage) -> float:
    """A stage's deadline in seconds, of what the client gave; raises InputError where that is out of range."""
    if not 0 <= given_ms <= MAX_DEADLINE_MS:  # its words would cost each call more than its check
        check_number(f"the deadline of stage {stage}", given_ms, 0, MAX_DEADLINE_MS, "0 means the device's default")
    return (given_ms if given_ms > 0 else DEFAULT_DEADLINES_MS[stage]) / 1000


def values_of(names: List[str], tensors: List[protocol.Tensor]) -> Tuple[List[pb.Value], List[memoryview]]:
    """Tensors as they travel: small ones in the message, the bytes of the others to follow it."""
    values, streamed = [], []
    for name, tensor, inline in zip(names, tensors, plan_inline(tensor.nbytes for tensor in tensors)):
        value = pb.Value(name=name, dtype=tensor.dtype, shape=tensor.shape)
        if inline:
            value.inline = bytes(tensor.data)
        else:
            value.streamed_bytes = tensor.nbytes
            streamed.append(memoryview(tensor.data).cast("B"))
        values.append(value)
    return values, streamed


def inline_tensor(value: pb.Value) -> protocol.Tensor:
    """A tensor that came in its message."""
    with refusing(value):
        return protocol.Tensor(value.dtype, tuple(value.shape), value.inline)


@contextmanager
def refusing(value: pb.Value) -> Iterator[None]:
    """What makes no tensor is the client's fault."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise FailedRequest(OutcomeKind.BAD_REQUEST, f"tensor {value.name!r}: {error}") from error


def check_port(port: Port, tensor: protocol.Given) -> None:
    """Refuse what the manifest rules out; symbolic dims are the runtime's to check."""
    fits = len(tensor.shape) == len(port.shape) and all(
        isinstance(dim, str) or dim == size for dim, size in zip(port.shape, tensor.shape)
    )
    if tensor.dtype != port.dtype or not fits:
        raise FailedRequest(OutcomeKind.BAD_REQUEST, f"input {port} does not take {tensor.dtype}{list(tensor.shape)}")


def outcome_of(error: Exception, stage: Stage, device: str) -> Outcome:
    """What a client is told of a request that failed on `device`; what has no name is logged."""
    if isinstance(error, FailedRequest):
        return error.outcome
    if isinstance(error, RunnerError):
        return runner_outcome(error)
    text = str(error) if isinstance(error, KedgeError) else f"{type(error).__name__}: {error}"
    if isinstance(error, (ArtifactError, CorruptBlobError, IncompatibleTargetError)):
        return Outcome(OutcomeKind.LOAD_ERROR, stage, message=text)
    if isinstance(error, (InputError, LimitError, MissingBlobError)):
        return Outcome(OutcomeKind.BAD_REQUEST, stage, message=text)
    if isinstance(error, CacheFullError):
        return Outcome(OutcomeKind.OUT_OF_MEMORY, stage, message=text)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text = f"{device} has no room on its disk ({error.strerror}): remove files of the session"
        return Outcome(OutcomeKind.OUT_OF_MEMORY, stage, message=text)
    if isinstance(error, MemoryError):
        return Outcome(OutcomeKind.OUT_OF_MEMORY, stage, message="the agent has no memory for it")
    if not isinstance(error, (KedgeError, OSError)):
        log.error("a session's request failed in a way that has no name", exc_info=error)
    return Outcome(OutcomeKind.DEVICE_FAULT, stage, message=text)
