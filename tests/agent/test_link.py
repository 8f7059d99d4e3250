"""An agent's connection to trackers with several names, which have to be looked up first."""

from __future__ import annotations

import queue
import socket
import threading
from typing import Any

import pytest

from kedge.device_agent.agent import _Link
from kedge.rpc.errors import ConnectError
from kedge.rpc.transport import Address

TWO = Address("localhost", 1, (Address("localhost", 2),))


def test_names_that_nobody_knows_end_the_connection_and_not_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", away)
    told: queue.Queue[Any] = queue.Queue()
    link = _Link(TWO, None)
    link.start(told.put, told.put)
    error = told.get(timeout=60)
    assert isinstance(error, ConnectError) and "Temporary failure" in str(error)
    link.close(0.0)
    assert told.empty()


def test_a_lookup_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()
    known = socket.getaddrinfo

    def slow(*arguments: Any, **options: Any) -> Any:
        asked.set()
        assert answers.wait(60)
        return known(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    told: queue.Queue[Any] = queue.Queue()
    link = _Link(TWO, None)
    link.start(told.put, told.put)
    assert asked.wait(60)
    link.close(60.0)  # at once: the lookup still hangs
    assert told.empty() and not answers.is_set()
    answers.set()
    assert told.get(timeout=60) is None, "it makes no connection any more"
    assert link._channel is None
