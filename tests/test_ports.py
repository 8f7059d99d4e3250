"""What tests are given is theirs."""

from __future__ import annotations

import pytest

from support import ports
from support.ports import free_ports


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    some = free_ports()
    monkeypatch.setattr(ports, "_PORTS", range(some, some + 100))
    given = [free_ports(2) for _ in range(20)]
    assert len({*given, *(port + 1 for port in given)}) == 40
