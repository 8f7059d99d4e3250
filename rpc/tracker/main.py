"""`kedge tracker start`: a tracker in the foreground."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path

from kedge.rpc.tracker.server import serve, stop
from kedge.rpc.transport import Address

log = logging.getLogger("kedge.tracker")


def run(host: str, port: int, data_dir: Path) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Writes one line to stdout once it listens, "kedge tracker ready at HOST:PORT", and its log to stderr.

    Raises:
        ConnectError: the address cannot be listened on.
        StoreError, BlobError: the data folder cannot be used, another tracker uses it, or it failed meanwhile.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return asyncio.run(_run(host, port, data_dir))


async def _run(host: str, port: int, data_dir: Path) -> int:
    if not Address(host, port).is_loopback:
        log.warning("listening on %s without encryption or authentication: only for networks you trust", host)
    async with serve(host, port, data_dir) as (address, stopped):
        _on_signals(stopped)
        sys.stdout.write(f"kedge tracker ready at {address}\n")
        sys.stdout.flush()
        log.info("stopping: %s", await stopped)
    return 0


def _on_signals(stopped: asyncio.Future[str]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform == "win32":
            name = number.name
            signal.signal(number, lambda _got, _frame, name=name: loop.call_soon_threadsafe(stop, stopped, name))
        else:
            loop.add_signal_handler(number, stop, stopped, number.name)
