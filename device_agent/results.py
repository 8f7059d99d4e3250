"""Results that the tracker has not accepted yet, on disk: an agent that is killed has not worked in vain.

One file for each, named after its lease, written while the result travels. It survives the agent, not a loss of power:
waiting for the disk would cost every job more than running a few of them again. A torn file is found and removed. An
agent that is killed before it is written is one that was killed a moment before the job's end: the job runs again.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, List

from kedge.rpc import messages as m
from kedge.rpc.types import Lease

if TYPE_CHECKING:
    from kedge.protos.v1 import agent_pb2

log = logging.getLogger("kedge.agent")

_NAME = re.compile(r"[0-9A-Za-z_-]+")
_SUFFIX = ".result"
#: Of one that is being written, by the one thread that writes them.
_SCRATCH = ".new"


@dataclass(frozen=True)
class Packed(m.JobFinished):
    """A job's end with the message that says it, which is checked, sent and kept as it is; nobody may change it."""

    pb: agent_pb2.JobFinished = field(compare=False, repr=False)


def to_pb(body: m.AgentBody, request_id: int) -> agent_pb2.AgentMessage:
    """What the agent says, out; of what is packed a copy is taken."""
    from kedge.protos.v1 import agent_pb2
    from kedge.rpc import convert

    if isinstance(body, Packed):
        return agent_pb2.AgentMessage(request_id=request_id, job_finished=body.pb)
    return convert.agent_message_to_pb(body, request_id)


class ResultStore:
    """The results in a folder, which is made when it does not exist; raises OSError where it cannot be."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> List[m.JobFinished]:
        """What an earlier agent left, oldest first. What cannot be read is removed: its job runs again."""
        from kedge.protos.v1 import agent_pb2
        from kedge.rpc import convert

        found = []
        for path in sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            finished = None
            if path.suffix == _SUFFIX:
                try:
                    finished = convert.agent_message_from_pb(agent_pb2.AgentMessage.FromString(path.read_bytes()))
                except Exception as error:  # noqa: BLE001 - whatever protobuf makes of a damaged file
                    log.warning("the result in %s cannot be read, its job is run again: %s", path, error)
            if isinstance(finished, m.JobFinished):
                found.append(finished)
            else:
                path.unlink()
        return found

    def keep(self, finished: m.JobFinished) -> None:
        """Write a result down. A disk that does not take it is reported: the result then lives as long as the agent."""
        data = to_pb(finished, 0).SerializeToString()
        path = self._path(finished.lease)
        scratch = path.with_suffix(_SCRATCH)
        try:
            try:
                scratch.write_bytes(data)
                scratch.replace(path)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise
        except OSError as error:
            log.warning("job %s: its result cannot be kept on disk: %s", finished.lease.job_id, error.strerror)

    def forget(self, lease: Lease) -> None:
        """The tracker has the result, or does not want it."""
        try:
            self._path(lease).unlink()
        except FileNotFoundError:
            pass  # it could not be kept
        except OSError as error:
            log.warning("job %s: its result cannot be removed: %s", lease.job_id, error.strerror)

    def _path(self, lease: Lease) -> Path:
        if not _NAME.fullmatch(lease.job_id):
            raise ValueError(f"{lease.job_id!r} is no job's id")
        return self._folder / f"{lease.job_id}-{lease.epoch}{_SUFFIX}"
