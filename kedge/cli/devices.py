"""Where a command runs an artifact: this machine, isolated in a runner, or a device of a tracker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kedge
from kedge.rpc.errors import ConnectError


def require_tracker(tracker: str | None) -> str:
    """The tracker's address; raises ConnectError where none was named."""
    if not tracker:
        raise ConnectError("no tracker is named", hint="add --tracker HOST:PORT, or set KEDGE_TRACKER")
    return tracker


@contextmanager
def open_device(selector: str | None, tracker: str | None, threads: int) -> Iterator[Any]:
    """A session on the device that `selector` chooses, or on this machine where there is no selector."""
    if selector is None:
        with kedge.local(threads=threads) as device:
            yield device
        return
    with kedge.connect(require_tracker(tracker)) as fleet, fleet.session(selector, threads=threads) as device:
        yield device
