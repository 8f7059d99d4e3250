"""The client for asyncio: `kedge.connect` and what it gives, with coroutines."""

from __future__ import annotations

from kedge.rpc.client import Result, Timing, WaitTimeoutError
from kedge.rpc.client.aio import Fleet, Job, PinnedDevice, PinnedModel, connect
from kedge.rpc.client.aio_session import DeviceTensor, Session, SessionModel

__all__ = [
    "DeviceTensor",
    "Fleet",
    "Job",
    "PinnedDevice",
    "PinnedModel",
    "Result",
    "Session",
    "SessionModel",
    "Timing",
    "WaitTimeoutError",
    "connect",
]
