"""The C sources of the runtime and the runner, as package data, and which file belongs to which product.

`libkedge_rt.so` and `libkedge_rt.a` are made of LIBRARY_SOURCES; `kedge-runner` of both lists. All are C11, need
only libc, libdl, libpthread and libm, and are found in SOURCE_DIR.
"""

from __future__ import annotations

from pathlib import Path

SOURCE_DIR = Path(__file__).parent
LIBRARY_SOURCES = (
    "addresses.c", "clock.c", "context.c", "cpu.c", "device.c", "device_cpu.c", "device_cuda.c", "device_opencl.c",
    "error.c", "expr.c", "module.c", "placement.c", "pool.c", "quota.c", "roof.c", "staging.c", "sync.c", "tensor.c",
    "time.c",
)  # fmt: skip
RUNNER_SOURCES = ("cage.c", "frame.c", "runner.c", "runner_requests.c", "runner_tensors.c", "sandbox.c")
#: kedge.h is the public one; a change of any of them changes the products.
HEADERS = ("device.h", "internal.h", "kedge.h", "runner.h")
