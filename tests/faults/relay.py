"""A gRPC server of the suite's own that forwards every call to a tracker, and meddles with messages when told to.

duplicate    one message of an agent's stream, or a submit, is delivered twice
delay        one message of an agent's stream waits a while; what comes behind it waits too
late         an agent loses its connection with a message on its way, which arrives once the agent is back
lose-reply   a submit reaches the tracker, its answer is lost
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc

from kedge.protos.v1 import fleet_pb2
from kedge.rpc.transport import CHANNEL_OPTIONS, MAX_STREAMS, server_options

Meddling = Literal["duplicate", "delay", "late", "lose-reply"]
_CONNECT = "/kedge.v1.Agents/Connect"
_SUBMIT = "/kedge.v1.Fleet/SubmitJob"
_STREAM = "/kedge.v1.Fleet/RunJobs"
#: Calls that begin jobs; the first two begin one with the same message.
_SUBMITS = (_SUBMIT, "/kedge.v1.Fleet/RunJob", _STREAM)


@dataclass(eq=False)
class Order:
    """One thing to do; `way` is "up" or "down" on agents' streams, "submit" for a client's call."""

    what: Meddling
    way: str
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)


class Relay:
    """Serves in plaintext on a free port of 127.0.0.1, at `address`. A context manager that ends it."""

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._orders: list[Order] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self.address = self._call(self._start())

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def order(self, order: Order) -> Order:
        """Have something done to the next message that it fits."""
        self._loop.call_soon_threadsafe(self._orders.append, order)
        return order

    async def _start(self) -> str:
        self._server = grpc.aio.server(options=server_options(MAX_STREAMS))
        self._server.add_generic_rpc_handlers((_Everything(self),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._channel = grpc.aio.insecure_channel(self._tracker, options=CHANNEL_OPTIONS)
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _stop(self) -> None:
        await self._server.stop(0.2)
        await self._channel.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _take(self, method: str, way: str) -> Order | None:
        way = "submit" if method in _SUBMITS else way
        if method not in (_CONNECT, *_SUBMITS):
            return None
        found = next((order for order in self._orders if order.way == way), None)
        if found is not None:
            self._orders.remove(found)
            found.done.set()
        return found

    async def forward(
        self, method: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """One call, whatever it is: on the wire they are all streams of messages."""
        left = context.time_remaining()
        call: Any = self._channel.stream_stream(method)(timeout=left if left is not None and left < 1e6 else None)
        severed = asyncio.Event()
        speaking = asyncio.create_task(self._speak(method, requests, call, severed))
        first = True
        try:
            async for message in _until(call, severed):
                order = None if first or method != _CONNECT else self._take(method, "down")
                first = False
                if order is not None and order.what == "delay":
                    await asyncio.sleep(order.seconds)
                yield message
                if order is not None and order.what == "duplicate":
                    yield message
            if severed.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the relay cut the connection")
        except grpc.aio.AioRpcError as error:
            trailing = tuple((key, value) for key, value in error.trailing_metadata() or () if key.startswith("kedge"))
            await context.abort(error.code(), error.details() or "", trailing)
        finally:
            if not severed.is_set():
                speaking.cancel()
                call.cancel()

    async def _speak(self, method: str, requests: AsyncIterator[bytes], call: Any, severed: asyncio.Event) -> None:
        first = method == _CONNECT  # a hello is said once
        try:
            async for message in requests:
                order = None if first else self._take(method, "up")
                first = False
                if order is None:
                    await call.write(message)
                elif order.way == "submit":
                    await self._submit(method, order, message, call, severed)
                elif order.what == "late":
                    severed.set()
                    await asyncio.sleep(order.seconds)
                    await call.write(message)
                    await call.done_writing()
                    return
                else:
                    if order.what == "delay":
                        await asyncio.sleep(order.seconds)
                    await call.write(message)
                    if order.what == "duplicate":
                        await call.write(message)
            await call.done_writing()
        except grpc.aio.AioRpcError:
            return  # whoever reads the call hears of it
        except grpc.aio.AbortError:
            return  # the client was told, where the call ended
        except asyncio.InvalidStateError:
            return  # the call has ended

    async def _submit(self, method: str, order: Order, message: bytes, call: Any, severed: asyncio.Event) -> None:
        once = self._channel.unary_unary(_SUBMIT)
        job = fleet_pb2.RunJobsRequest.FromString(message).job if method == _STREAM else None
        await once(message if job is None else job.SerializeToString())
        if order.what == "lose-reply":
            severed.set()
            call.cancel()
        else:
            await call.write(message)


async def _until(call: Any, severed: asyncio.Event) -> AsyncIterator[bytes]:
    """The messages of a call, until it is severed."""
    cut = asyncio.create_task(severed.wait())
    try:
        while True:
            reading = asyncio.ensure_future(call.read())
            await asyncio.wait([reading, cut], return_when=asyncio.FIRST_COMPLETED)
            if cut.done():
                reading.cancel()
                return
            message = reading.result()
            if message is grpc.aio.EOF:
                code = await call.code()
                if code is not grpc.StatusCode.OK:
                    raise grpc.aio.AioRpcError(
                        code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
                    )
                return
            yield message
    finally:
        cut.cancel()


class _Everything(grpc.GenericRpcHandler):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method

        async def forward(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for message in self._relay.forward(method, requests, context):
                yield message

        return grpc.stream_stream_rpc_method_handler(forward)
