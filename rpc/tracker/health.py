"""gRPC's own health service: serving, unless the store is in trouble or the tracker stops."""

# ruff: noqa: N802 - the protocol names the methods.

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


class HealthService:
    """One state for all services; the empty name stands for the whole tracker. Belongs to the event loop's thread."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services) | {""}
        self._serving = True
        self._stopping = False
        self._changed = asyncio.Event()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Offer it."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set_serving(self, serving: bool) -> None:
        """Tell everybody who watches."""
        if serving != self._serving and not self._stopping:
            self._serving = serving
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def stop(self) -> None:
        """Not serving, for good."""
        self.set_serving(False)
        self._stopping = True

    async def Check(self, request: Any, context: Context) -> Any:
        """How it is now."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:120]!r}")
        return self._answer(request.service)

    async def Watch(self, request: Any, _context: Context) -> AsyncIterator[Any]:
        """How it is now, and on every change until the caller has enough."""
        while True:
            changed = self._changed
            yield self._answer(request.service)
            await changed.wait()

    async def List(self, _request: Any, _context: Context) -> Any:
        """How every service is now; only newer versions of gRPC's package know this call."""
        return health_pb2.HealthListResponse(statuses={name: self._answer(name) for name in self._services})

    def _answer(self, service: str) -> Any:
        known = health_pb2.HealthCheckResponse
        if service not in self._services:
            return known(status=known.SERVICE_UNKNOWN)
        return known(status=known.SERVING if self._serving else known.NOT_SERVING)
