"""The client for asyncio: `kedge.connect` and what it gives, with coroutines."""

from __future__ import annotations

from kedge.rpc.client import Result, Timing, WaitTimeoutError
from kedge.rpc.client.aio import Fleet, Job, LoadedModel, Session, connect

__all__ = ["Fleet", "Job", "LoadedModel", "Result", "Session", "Timing", "WaitTimeoutError", "connect"]
