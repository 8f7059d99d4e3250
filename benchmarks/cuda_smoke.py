"""The runtime on a real CUDA device: what the tests hold against a stand-in for the driver, and a few plain figures.

python benchmarks/cuda_smoke.py build FOLDER    # on a machine with the toolchain: the runtime and the test module
python benchmarks/cuda_smoke.py run FOLDER      # on a machine with a GPU and this repository; needs numpy alone

`run --opencl` takes OpenCL's first device. It prints JSON: the device, each scenario with "ok" or why not, and
microseconds of a call with one launch, of three dependent launches, and GB/s of copies and of an addition.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / ".paths")]  # nothing is installed where the GPU is

if TYPE_CHECKING:
    from support.gpu import Context, Gpu


def build(folder: Path) -> None:
    from kedge.compiler.target import parse
    from kedge.compiler.toolchain import build_runtime
    from support import native

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(build_runtime(parse("native")).lib, folder / "libkedge_rt.so")
    shutil.copy(native.module("gpu", "-DCUDA", "-s"), folder / "gpu-cuda.so")
    shutil.copy(native.module("gpu", "-s"), folder / "gpu-opencl.so")


def attempt(name: str, scenario: Any, gpu: Gpu) -> str:
    try:
        scenario(gpu)
    except Exception as failure:  # noqa: BLE001 - the report says it, and the next one runs
        traceback.print_exc()
        return f"{type(failure).__name__}: {failure}"
    print(name, "ok", file=sys.stderr)
    return "ok"


def median_us(context: Context, function: str, inputs: list[Any], outputs: list[Any], number: int) -> float:
    samples = context.time(function, inputs, outputs, number=number, repeat=15, warmup=5)
    return statistics.median(samples) / 1e3


def figures(gpu: Gpu) -> dict[str, float]:
    import time

    import numpy as np

    from kedge.rpc import abi

    count = 16 << 20  # 64 MiB each
    host = np.ones(count, np.float32)
    small = np.ones(64, np.float32)
    found: dict[str, float] = {}
    with gpu.context() as context:
        a, b, y = (context.put(host) for _ in range(3))
        s, t = context.put(small), context.put(small)
        found["launch_us"] = median_us(context, "wide", [s], [t], 1000)
        found["one_call_us"] = median_us(context, "wide", [s], [t], 1)
        found["three_dependent_launches_us"] = median_us(context, "chain", [s], [t], 1000)
        found["add_gb_s"] = 3 * host.nbytes / median_us(context, "add", [a, b], [y], 10) / 1e3
        for name, to, source, direction in (
            ("to_device_gb_s", a.address, host.ctypes.data, abi.COPY_TO_DEVICE),
            ("from_device_gb_s", host.ctypes.data, a.address, abi.COPY_FROM_DEVICE),
            ("on_device_gb_s", b.address, a.address, abi.COPY_ON_DEVICE),
        ):
            durations = []
            for _ in range(10):
                start = time.perf_counter_ns()
                context.copy(to, source, host.nbytes, direction)
                durations.append(time.perf_counter_ns() - start)
            found[name] = host.nbytes / statistics.median(durations)
        for one in (a, b, y, s, t):
            context.free(one.address)
    return found


def run(folder: Path, opencl: bool) -> int:
    from kedge.rpc import abi
    from support import gpu as support

    kind, module = (abi.DEVICE_OPENCL, "gpu-opencl.so") if opencl else (abi.DEVICE_CUDA, "gpu-cuda.so")
    gpu = support.Gpu(str(folder / "libkedge_rt.so"), str(folder / module), (kind, 0))
    found = gpu.properties()
    report: dict[str, Any] = {
        "device": {
            field: value.decode() if isinstance(value := getattr(found, field), bytes) else value
            for field, _ in found._fields_
        },
        "scenarios": {name: attempt(name, scenario, gpu) for name, scenario in support.SCENARIOS.items()},
    }
    report["figures"] = figures(gpu)
    if not opencl:  # last: it takes the device's context away from everything in this process
        report["scenarios"]["fault"] = attempt("fault", support.fault, gpu)
    print(json.dumps(report, indent=2))
    return 0 if set(report["scenarios"].values()) == {"ok"} else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--opencl", action="store_true", help="run on OpenCL's first device")
    options = parser.parse_args()
    if options.what == "build":
        build(options.folder)
        return 0
    return run(options.folder, options.opencl)


if __name__ == "__main__":
    sys.exit(main())
