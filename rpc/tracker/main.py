"""`kedge tracker start`: a tracker in the foreground."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from kedge.rpc import logs
from kedge.rpc.tracker.ports import ANY_ADDRESS, machine_addresses
from kedge.rpc.tracker.server import Serving, serve, stop
from kedge.rpc.transport import Address

log = logging.getLogger("kedge.tracker")


def run(host: str, port: int, data_dir: Path, *, log_format: str = "text", **options: Any) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Writes one line to stdout once it listens, "kedge tracker ready at HOST:PORT", a new tracker also the command that
    lets a first device join, and its log to stderr, in one of `kedge.rpc.logs.FORMATS`. `options` are those of `serve`.

    Raises:
        ConnectError: the address cannot be listened on.
        StoreError, BlobError, SecretFileError: the data folder cannot be used, another tracker uses it, or it failed
            meanwhile.
    """
    logs.configure(log_format, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    return asyncio.run(_run(host, port, data_dir, options))


async def _run(host: str, port: int, data_dir: Path, options: dict[str, Any]) -> int:
    async with serve(host, port, data_dir, **options) as serving:
        _on_signals(serving.stopped)
        if serving.metrics is not None:
            log.info("metrics at http://%s/metrics", serving.metrics)
        sys.stdout.write(f"kedge tracker ready at {serving.address}\n")
        sys.stdout.write(_welcome(serving))
        sys.stdout.flush()
        log.info("stopping: %s", await serving.stopped)
    return 0


def _welcome(serving: Serving) -> str:
    """What a new tracker tells whoever started it."""
    if serving.keys is None:
        log.warning("everybody on this machine is let in, in plaintext (--insecure-loopback)")
        return ""
    if serving.security is None or not serving.keys.is_new:
        return ""
    host = serving.address.host
    if host in ANY_ADDRESS:
        host = machine_addresses()[-1]
    join = serving.security.first_join(Address(host, serving.address.port))
    return (
        f"On the first device, within a day (the string is a secret, and lets one device in):\n"
        f"  kedge agent start --join '{join}'\n"
        f"For more devices and users: kedge tracker token create --help\n"
    )


def _on_signals(stopped: asyncio.Future[str]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform == "win32":
            name = number.name
            signal.signal(number, lambda _got, _frame, name=name: loop.call_soon_threadsafe(stop, stopped, name))
        else:
            loop.add_signal_handler(number, stop, stopped, number.name)
