"""The tensors of a session that stay on the device, each with one runner, and what more it has room for."""

from __future__ import annotations

from typing import Dict, Iterable, List, Tuple

from kedge.device_agent.jobs import Board
from kedge.device_agent.runner import Runner
from kedge.device_agent.runtime import protocol
from kedge.device_agent.session_requests import FailedRequest
from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc.outcome import OutcomeKind

#: Of one request, of the device's memory, and of what is free of it.
_TENSOR_SHARE = 0.5
_FREE_SHARE = 0.9


class SessionTensors:
    """Which tensor is called what by the client, and where it is. Belongs to the session's worker alone."""

    def __init__(self) -> None:
        self._kept: Dict[int, Tuple[Runner, protocol.Kept]] = {}
        self._last = 0

    def keep(self, runner: Runner, name: str, kept: protocol.Kept) -> pb.Value:
        """Remember what a runner has; returns what the client is told of it."""
        self._last += 1
        self._kept[self._last] = (runner, kept)
        return pb.Value(name=name, dtype=kept.dtype, shape=kept.shape, handle=self._last)

    def find(self, handle: int) -> Tuple[Runner, protocol.Kept]:
        """Where a tensor is; raises FailedRequest where it is not there any more."""
        found = self._kept.get(handle)
        if found is None:
            raise FailedRequest(
                OutcomeKind.BAD_REQUEST, "this tensor is not on the device any more: it was freed, or its runner ended"
            )
        return found

    def free(self, handles: Iterable[int]) -> None:
        """Free tensors; those that went with their runner are gone already."""
        by_runner: Dict[Runner, List[int]] = {}
        for handle in set(handles):
            found = self._kept.pop(handle, None)
            if found is not None:
                by_runner.setdefault(found[0], []).append(found[1].handle)
        for runner, native_handles in by_runner.items():
            if runner.alive:
                runner.release(native_handles)

    def forget(self, runner: Runner) -> None:
        """A runner has ended, and its tensors with it."""
        self._kept = {handle: each for handle, each in self._kept.items() if each[0] is not runner}


def check_memory(board: Board, size: int) -> None:
    """Whether a device has room for so many bytes of tensors at once; raises FailedRequest where it has not."""
    if not size:
        return
    most, why = int(board.device.memory_bytes * _TENSOR_SHARE), "takes"
    free = board.health().memory_available_bytes
    if free is not None and free * _FREE_SHARE < most:
        most, why = int(free * _FREE_SHARE), "has room now for"
    if size > most:
        text = f"{size} bytes of tensors at once; {board.device.name} {why} {most}"
        raise FailedRequest(OutcomeKind.OUT_OF_MEMORY, text)
