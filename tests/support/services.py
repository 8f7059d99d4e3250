"""Every call of every service, found in the descriptors: one that is added is tested without another word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import kedge.protos.v1

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Rpc:
    """One call: its path, the class of its requests, and which sides stream."""

    path: str
    request: Any
    client_streams: bool
    server_streams: bool

    def __str__(self) -> str:
        return self.path.removeprefix("/kedge.v1.")

    @property
    def endless(self) -> bool:
        """Whether it ends only when its caller has enough."""
        return self.path.endswith("Health/Watch")


def rpcs() -> list[Rpc]:
    """All that the .proto files say, gRPC's own for health and reflection among them."""
    found = []
    ours = sorted(Path(kedge.protos.v1.__path__[0]).glob("*_pb2.py"))
    modules = [import_module(f"kedge.protos.v1.{source.stem}") for source in ours]
    for module in (*modules, health_pb2, reflection_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                found.append(
                    Rpc(path, method.input_type._concrete_class, method.client_streaming, method.server_streaming)
                )
    return found


def send(channel: grpc.Channel, rpc: Rpc, messages: Iterable[bytes] = (b"",), **options: Any) -> tuple[str, str]:
    """Make a call with these bytes as its messages; the status it ends with ("OK" too) and what that says."""
    options.setdefault("timeout", 0.5 if rpc.endless else PATIENCE_S)
    kind = f"{'stream' if rpc.client_streams else 'unary'}_{'stream' if rpc.server_streams else 'unary'}"
    method = getattr(channel, kind)(rpc.path)
    requests = iter(messages)
    try:
        answer = method(requests if rpc.client_streams else next(requests), **options)
        if rpc.server_streams:
            for _ in answer:
                pass
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""
