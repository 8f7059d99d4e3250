"""What stands behind a listener: the services of a tracker that leads, or the way to the one that does.

A listener stays open while its tracker changes from the one to the other. Behind its one interceptor, `Switch`, is
whatever serves it now.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Details = grpc.HandlerCallDetails
Find = Callable[[Details], Awaitable[Any]]
#: Gives the handler of a call; the first argument finds what the listener itself offers (health, reflection).
Serve = Callable[[Find, Details], Awaitable[Any]]


class Switch(grpc.aio.ServerInterceptor):
    """Hands every call to what serves the listener at the moment."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve

    async def intercept_service(self, continuation: Find, details: Details) -> Any:
        """The handler; None for a path that nobody serves."""
        return await self.serve(continuation, details)


class Table:
    """Handlers of services, as generated code adds them to a server."""

    def __init__(self) -> None:
        self._found: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        """A service."""
        self._found.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The same once more, for servers that look methods up by name."""

    def behind(self, gate: grpc.aio.ServerInterceptor) -> Serve:
        """These services, and what the listener itself offers, for whoever the gate lets in."""

        async def serve(native: Find, details: Details) -> Any:
            async def find(asked: Details) -> Any:
                for service in self._found:
                    handler = service.service(asked)
                    if handler is not None:
                        return handler
                return await native(asked)

            return await gate.intercept_service(find, details)

        return serve
