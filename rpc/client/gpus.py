"""The GPUs of this machine as a runtime library finds them, in this process."""

from __future__ import annotations

import ctypes
from typing import Any

from kedge.rpc import abi
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact.place import DEVICE_TYPES, Found


def find_gpus(lib: Any, kind: str) -> Found:
    """The GPUs of `kind`, "opencl" or "cuda"; loads their driver into this process.

    Args:
        lib: what `abi.load_runtime` returned.
        kind: "opencl" or "cuda".
    """
    device_type = DEVICE_TYPES[kind]
    count = int(lib.kedge_device_count(device_type))
    reason = "" if count else _text(lib.kedge_last_error())
    found = []
    for index in range(count):
        p = abi.DeviceProperties(struct_size=ctypes.sizeof(abi.DeviceProperties))
        if lib.kedge_device_info(device_type, index, p) != abi.OK:
            reason = _text(lib.kedge_last_error())
            continue
        features = tuple(name for name in _text(p.features).split(",") if name)
        sizes = (p.global_memory, p.local_memory, p.max_group, p.compute_units)
        found.append(Accelerator(kind, index, _text(p.name), _text(p.driver_version), _text(p.arch), features, *sizes))
    return Found(tuple(found), reason)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
