"""The checks of `kedge doctor`: from the Python packages to a job on a device, each with its remedy."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

import kedge
from kedge.rpc.artifact.place import GPU_KINDS
from kedge.rpc.errors import KedgeError

PACKAGES = (
    "numpy",
    "llvmlite",
    "onnx",
    "ziglang",
    "grpcio",
    "protobuf",
    "sqlalchemy",
    "paramiko",
    "cryptography",
    "grpcio-health-checking",
    "grpcio-reflection",
    "prometheus-client",
)
MIN_FREE_BYTES = 500 << 20
#: Less than this will not last.
LOW_FREE_BYTES = 5 << 30

Progress = Callable[[str], None]
Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: "ok", "note" (works without) or "broken" with what to do about it."""

    check: str
    status: Status
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding as JSON-able values."""
        return asdict(self)


def diagnose(tracker: str | None, device: str | None, progress: Progress = lambda what: None) -> list[Finding]:
    """Run every check that applies; a failing check is a finding, never an exception."""
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _packages),
        ("cache", _cache),
        ("toolchain", lambda: _toolchain(progress)),
        ("compile and run here", _compile_and_run),
        *((f"{kind} devices", partial(_gpus, kind)) for kind in GPU_KINDS),
        ("emulated boards", _boards),
    ]
    if tracker:
        checks.append(("tracker", lambda: _hops(tracker, device)))
    for name, check in checks:
        progress(name)
        try:
            findings.extend(check())
        except KedgeError as error:
            findings.append(Finding(name, "broken", error.message, error.hint or ""))
        except ImportError as error:
            findings.append(Finding(name, "broken", str(error), "pip install --force-reinstall kedge"))
    if not tracker:
        status: Status = "broken" if device else "note"
        findings.append(Finding("tracker", status, "none was named", "add --tracker HOST:PORT to test the fleet"))
    return findings


def _packages() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "broken", "not installed", f"pip install {package}")


def _cache() -> Iterator[Finding]:
    from kedge.compiler.quota import Quota

    quota = Quota()
    folder = quota.root
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "set KEDGE_CACHE_DIR to a folder that you may write to"
        yield Finding("cache", "broken", f"cannot write to {folder}: {error.strerror}", remedy)
        return
    status: Status = "ok" if free >= MIN_FREE_BYTES else "broken"
    remedy = "" if status == "ok" else f"free some space, or set KEDGE_CACHE_DIR (at least {MIN_FREE_BYTES >> 20} MiB)"
    yield Finding(
        "cache", status, f"{folder}, up to {quota.limit / (1 << 30):.3g} GiB; {free / (1 << 30):.1f} GiB free", remedy
    )


def _toolchain(progress: Progress) -> Iterator[Finding]:
    """The linker, the C compiler and the runner that they make."""
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime, zig_version

    runner = build_runtime(parse("native"), progress=progress).runner
    yield Finding("toolchain", "ok", f"zig {zig_version()} compiles and links")
    yield Finding("runner", "ok", str(runner))


def _compile_and_run() -> Iterator[Finding]:
    with kedge.local(threads=1) as device:
        yield try_on("compile and run here", device, "native")


def try_on(check: str, device: Any, target: str) -> Finding:
    """Compile y = 2 x + 1, small enough to blame nobody but the road, and run it on the device."""
    from kedge.compiler import te

    x = te.placeholder((64,), "float32", name="x")
    y = te.compute((64,), lambda i: x[i] * 2.0 + 1.0, name="y")
    artifact = kedge.compile(te.create_prim_func([x, y], name="main"), target=target, name="doctor")
    data = np.arange(64, dtype=np.float32)
    result = device.load(artifact).run({"x": data})["y"]
    if np.array_equal(result, data * 2 + 1):
        return Finding(check, "ok", device.target)
    return Finding(
        check, "broken", f"{device.target} computed 2 x + 1 wrongly", "report this with the output of --json"
    )


def _hops(tracker: str, selector: str | None) -> Iterator[Finding]:
    from kedge.fleet_diagnosis import hops

    return hops(tracker, selector)


def _gpus(kind: str) -> Iterator[Finding]:
    from kedge.isolated import gpus
    from kedge.rpc.artifact.place import INSTALL

    found = gpus(kind)
    if found.accelerators:
        names = ", ".join(f"{gpu.device} is {gpu.name} ({gpu.driver})" for gpu in found.accelerators)
        yield Finding(f"{kind} devices", "ok", names)
    else:
        yield Finding(f"{kind} devices", "note", found.reason or "none", f"for kernels there: {INSTALL[kind]}")


def _boards() -> Iterator[Finding]:
    from kedge.deploy.emulated import EmulatedBoard

    for arch in ("arm64", "armhf"):
        missing = EmulatedBoard.missing_requirements(arch)
        if missing:
            yield Finding(f"emulated {arch} board", "note", missing, "only needed for `kedge demo` and the board tests")
        else:
            yield Finding(f"emulated {arch} board", "ok", "qemu and user land tools are there")
