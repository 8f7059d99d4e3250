"""Ports for servers whose port has to be known before they listen, or stays theirs while they are away."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

#: Below those that Linux gives to whoever asks for any (32768 and up): no connection takes one in the meantime.
_PORTS = range(10_000, 32_000)
#: Hypothesis and tests seed the other one: test processes would all find the same ports.
_random = random.SystemRandom()


def free_ports(count: int = 1) -> int:
    """The first of so many ports of loopback in a row that nobody listens on, and that no other test is given.

    Each is claimed by the abstract name of a socket, whose descriptor stays open and which the kernel frees when this
    process ends: nobody else is given it before its server listens, or while that is away.
    """
    while True:
        port = _random.choice(_PORTS)
        with ExitStack() as probes:
            claims: list[socket.socket] = []
            try:
                for number in range(port, port + count):
                    claims.append(probes.enter_context(socket.socket(socket.AF_UNIX)))
                    claims[-1].bind(f"\0kedge tests: port {number}")
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            for claim in claims:
                claim.detach()
        return port
