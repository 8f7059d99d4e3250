"""How the tracker's handlers of calls end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from kedge.rpc.messages import Hello
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.agents_service import AgentsService
from kedge.rpc.tracker.handlers import to_the_end
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.principal import LOCAL, enter
from kedge.rpc.types import Health
from support.toys import device_info


def test_what_is_left_to_do_outlives_every_cancellation() -> None:
    async def main() -> None:
        go_on, done = asyncio.Event(), []

        async def clean_up() -> None:
            await go_on.wait()
            done.append(True)

        handler = asyncio.create_task(to_the_end(clean_up()))
        for _ in range(3):
            await asyncio.sleep(0)
            handler.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert done == [True]

    asyncio.run(main())


class Shell:
    """Remembers who left."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def agent_connected(self, _hello: Hello, _send: object) -> int:
        return 7

    def agent_left(self, connection: int) -> None:
        self.left.append(connection)


class Context:
    """Of a call from this machine."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}


def test_an_agent_whose_call_is_ended_while_it_breaks_off_has_left(tmp_path: Path) -> None:
    async def silence() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    async def main() -> None:
        enter(LOCAL)
        shell, audit = Shell(), Audit(tmp_path / "audit.jsonl")
        agents = AgentsService(cast(Any, shell), cast(Any, None), audit)
        hello = Hello(local_protocol(), device_info("rpi"), "1", health=Health())
        call = asyncio.create_task(agents._talk(hello, silence(), cast(Any, Context())))
        for _ in range(2):  # once it waits, and in the midst of what follows
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert shell.left == [7] and asyncio.all_tasks() == {asyncio.current_task()}
        audit.close()

    asyncio.run(main())
