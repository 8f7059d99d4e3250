"""An agent that is gone while the tracker writes to it: no failure of the tracker's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from kedge.rpc.messages import Hello
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.agents_service import AgentsService
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.owners import FileOwners
from kedge.rpc.tracker.security.principal import LOCAL, enter
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.tracker.store import Store
from support.toys import device_info


class Gone:
    """The other end of a call whose peer has just died."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def write(self, _message: Any) -> None:
        raise self._error

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


async def nothing_more() -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize(
    ("error", "told"),
    [(grpc.aio.InternalError("Failed"), False), (grpc.aio.UsageError("done"), False), (ValueError("a bug"), True)],
)
def test_only_a_bug_is_logged_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, told: bool
) -> None:
    async def serve(store: Store) -> None:
        enter(LOCAL)
        shell = Shell(store)
        agents = AgentsService(shell, FileOwners(tmp_path / "owners"), Audit(tmp_path / "audit"))
        hello = Hello(local_protocol(), device_info(), "one")
        await agents._talk(hello, nothing_more(), cast(Any, Gone(error)))
        assert [status.state.value for status in shell.state.devices(include_gone=True)] == ["gone"]
        shell.close()

    store = Store(tmp_path)
    with caplog.at_level(logging.ERROR, "kedge.tracker"):
        asyncio.run(serve(store))
    store.close()
    assert bool(caplog.records) is told
