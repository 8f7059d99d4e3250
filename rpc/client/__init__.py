"""Clients of a tracker: synchronous here, asyncio in `kedge.rpc.client.aio`. Nothing is imported before its use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedge.rpc.client.fleet import Fleet, Job, PinnedDevice, PinnedModel, connect
    from kedge.rpc.client.plan import Result, WaitTimeoutError
    from kedge.rpc.client.session import Session, SessionModel
    from kedge.rpc.client.tensors import DeviceTensor
    from kedge.rpc.client.timing import Timing

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

_WHERE = {
    "Result": "kedge.rpc.client.plan",
    "WaitTimeoutError": "kedge.rpc.client.plan",
    "Session": "kedge.rpc.client.session",
    "SessionModel": "kedge.rpc.client.session",
    "DeviceTensor": "kedge.rpc.client.tensors",
    "Timing": "kedge.rpc.client.timing",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE.get(name, "kedge.rpc.client.fleet")), name)
    globals()[name] = value
    return value
