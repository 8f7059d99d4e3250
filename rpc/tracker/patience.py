"""Connections to PostgreSQL that wait for an answer for so long, and no longer.

The server's own limits on statements do not hold where the server itself stands still, and the kernel there goes on
acknowledging what it is sent: no limit of TCP's notices that either.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg


class UnansweredError(psycopg.OperationalError):
    """The server took too long; the connection is closed."""


def impatient(unanswered_s: float) -> type[psycopg.Connection[Any]]:
    """Connections that are closed, with UnansweredError, where the server leaves something unanswered for so long."""

    class Impatient(psycopg.Connection[Any]):
        def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
            """As psycopg's: everything that is asked in a connection goes through here."""
            try:
                return super().wait(_until(time.monotonic() + unanswered_s, gen), *arguments, **options)
            except UnansweredError:
                self.pgconn.finish()
                raise

    return Impatient


def _until(due: float, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The same generator, up to that time by the steady clock.

    It is asked for what it waits for, and told what is ready: several times a second also that nothing is.
    """
    try:
        ready = yield next(gen)
        while True:
            if not ready and time.monotonic() >= due:
                raise UnansweredError("the server does not answer")
            ready = yield gen.send(ready)
    except StopIteration as end:
        return end.value
