"""A tracker's settings, an artifact and devices for tests of the wire; nothing in them can run."""

from __future__ import annotations

import numpy as np

from kedge.protos.v1 import types_pb2
from kedge.rpc import abi, convert
from kedge.rpc.artifact import Artifact, Function, Manifest, Port, Symbol, Variant, make_member
from kedge.rpc.client.plan import Terms, pack, run_request
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.types import DeviceInfo

#: Times short enough that a test can see them pass.
QUICK = Settings(heartbeat_interval_ms=200, silence_ms=5_000, lease_ms=800, cancel_grace_ms=400, deadline_slack_ms=200)


#: What the compiler would report of `main`: one kernel that is called twice, over 32 * N bytes a time.
ECHO = {"name": "echo", "rule": "none", "decisions": {}, "origin": ["x"]}
STEP = {
    "kernel": "echo",
    "flops": None,
    "bytes": [[abi.EXPR_SYMBOL, 0], [abi.EXPR_CONST, 32], [abi.EXPR_MUL, 0]],
}


def make_artifact(arch: str = "x86_64", features: tuple[str, ...] = (), weight_bytes: int = 5_000) -> Artifact:
    """An artifact with everything but code: `main` (x: f32[N, 4] -> x_out) and `big` (x: f32[N] -> x_out)."""
    lib, weights = b"\x7fELF not really" * 100, bytes(range(256)) * (weight_bytes // 256 + 1)
    members = (make_member("lib.so", lib), make_member("weights.safetensors", weights, cuts=(1024, 4096)))
    manifest = Manifest(
        name="toy",
        abi=abi.ABI_VERSION,
        compiler="test",
        functions=(
            Function("main", (Port("x", "float32", ("N", 4)),), (Port("x_out", "float32", ("N", 4)),), (Symbol("N"),)),
            Function("big", (Port("x", "float32", ("N",)),), (Port("x_out", "float32", ("N",)),), (Symbol("N"),)),
        ),
        variants=(Variant("llvm", arch, f"{arch}-linux-gnu", features, "lib.so", "weights.safetensors", 8),),
        members=members,
        info={"variants": [{"kernels": [ECHO], "functions": {"main": [STEP, STEP]}}]},
    )
    return Artifact(manifest, {"lib.so": lib, "weights.safetensors": weights})


def device_info(name: str = "bench-1", arch: str = "x86_64", **labels: str) -> DeviceInfo:
    return DeviceInfo(
        name=name,
        arch=arch,
        labels=labels,
        cpu_features=("avx2", "fma"),
        num_cores=4,
        memory_bytes=4 << 30,
        target=f"llvm -mtriple={arch}-linux-gnu",
        abi_version=abi.ABI_VERSION,
    )


def spec_message(artifact: Artifact) -> types_pb2.JobSpec:
    """What a client would submit to run `main` once on [[0..3], [4..7]]."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    return convert.job_spec_to_pb(run_request(pack(artifact), {"x": x}, Terms("main", "")).spec)
