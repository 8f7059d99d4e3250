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
    """The first of so many ports of loopback in a row that nobody listens on."""
    while True:
        port = _random.choice(_PORTS)
        with ExitStack() as stack:
            try:
                for number in range(port, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
        return port
