"""A tracker that runs: the data folder, the services and the port, started and stopped in order."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import grpc

from kedge.protos.v1 import agent_pb2_grpc, blobs_pb2_grpc, fleet_pb2_grpc
from kedge.rpc.blobs import BlobStore
from kedge.rpc.errors import ConnectError
from kedge.rpc.tracker.service import AgentsService, BlobsService, FleetService
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.tracker.state import Settings
from kedge.rpc.tracker.store import Store, StoreError
from kedge.rpc.transport import DEFAULT_PORT, SERVER_OPTIONS, Address

LOOPBACK = "127.0.0.1"
#: Calls that are under way when the tracker stops may go on for so long.
_GRACE_S = 0.5
_BLOB_THREADS = 8


@asynccontextmanager
async def serve(
    host: str, port: int, data_dir: Path, settings: Settings | None = None
) -> AsyncIterator[tuple[Address, asyncio.Future[str]]]:
    """A tracker in this event loop while the context lasts.

    Gives the address it is bound to, and a future for whoever stops it: a reason to stop in order. If the store
    fails, that future carries the error, and the tracker has to be stopped.

    Raises:
        ConnectError: the address cannot be listened on.
        StoreError, BlobError: the data folder cannot be used.
    """
    _check_free(host, port)
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def fail(error: BaseException) -> None:
        if not stopped.done():
            stopped.set_exception(StoreError(f"the tracker's store in {data_dir} failed: {error!r}"))

    def on_failure(error: BaseException) -> None:
        loop.call_soon_threadsafe(fail, error)

    store = Store(data_dir, on_failure=on_failure)
    try:
        blobs = BlobStore(data_dir / "blobs", write_behind=True)
        shell = Shell(store, settings)
        with ThreadPoolExecutor(_BLOB_THREADS, thread_name_prefix="kedge-blobs") as threads:
            server = grpc.aio.server(options=SERVER_OPTIONS)
            cast(Any, fleet_pb2_grpc).add_FleetServicer_to_server(FleetService(shell, blobs), server)
            cast(Any, agent_pb2_grpc).add_AgentsServicer_to_server(AgentsService(shell), server)
            cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(BlobsService(blobs, threads), server)
            try:
                bound = server.add_insecure_port(str(Address(host, port)))
            except RuntimeError as error:
                raise ConnectError(f"cannot listen on {Address(host, port)}: {error}") from error
            try:
                await server.start()
                yield Address(host, bound), stopped
            finally:
                shell.close()
                await server.stop(_GRACE_S)
    finally:
        # The store's thread may still call into this loop: it must not stand still meanwhile.
        await loop.run_in_executor(None, store.close)


def _check_free(host: str, port: int) -> None:
    """Raise ConnectError with the reason when nobody can listen there: gRPC itself does not tell it."""
    address = Address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, place = found[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except socket.gaierror as error:
        raise ConnectError(
            f"cannot listen on {address}: {error.strerror}", hint="name an address of this machine"
        ) from error
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "another program uses the port, maybe another tracker: stop it, or choose --port",
            errno.EADDRNOTAVAIL: "name an address of this machine with --host, or 0.0.0.0 for all of them",
            errno.EACCES: "choose a port above 1023 with --port",
        }
        why, hint = error.strerror, remedies.get(error.errno or 0)
        raise ConnectError(f"cannot listen on {address}: {why}", hint=hint) from error


@dataclass(slots=True)
class RunningTracker:
    """A tracker in a thread of its own; a context manager that stops it."""

    address: Address
    data_dir: Path
    _loop: asyncio.AbstractEventLoop
    _stopped: asyncio.Future[str]
    _thread: threading.Thread

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.address.port

    def stop(self) -> None:
        """Stop it in order; jobs and results stay in the data folder. May be called again."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # its loop ended just now
                self._loop.call_soon_threadsafe(stop, self._stopped, "asked to")
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start(
    host: str = LOOPBACK,
    port: int = DEFAULT_PORT,
    data_dir: Path | str = "kedge-tracker",
    settings: Settings | None = None,
) -> RunningTracker:
    """Start a tracker in a thread and return once it listens; port 0 takes any free one.

    Raises:
        ConnectError: the address cannot be listened on.
        StoreError, BlobError: the data folder cannot be used, or another tracker uses it.
    """
    ready: Future[tuple[Address, asyncio.AbstractEventLoop, asyncio.Future[str]]] = Future()
    folder = Path(data_dir)

    async def main() -> None:
        async with serve(host, port, folder, settings) as (address, stopped):
            ready.set_result((address, asyncio.get_running_loop(), stopped))
            await stopped

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    thread = threading.Thread(target=body, name="kedge-tracker", daemon=True)
    thread.start()
    address, loop, stopped = ready.result()
    return RunningTracker(address, folder, loop, stopped, thread)


def stop(stopped: asyncio.Future[str], reason: str) -> None:
    """Tell whoever waits for it to stop the tracker; only the first reason counts."""
    if not stopped.done():
        stopped.set_result(reason)
