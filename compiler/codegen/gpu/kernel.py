"""A scheduled `PrimFunc` for a GPU: blocks go, launches are split off, barriers put in; then text for the device.

func ─▶ thread reductions ─▶ without blocks ─▶ launches, barriers ─┬─▶ OpenCL C | PTX
                                                                   └─▶ the host's code that launches them
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kedge.compiler.codegen.gpu.host import emit_host
from kedge.compiler.codegen.gpu.ir import GROUP_AXES, THREAD_AXES, Launch, walk
from kedge.compiler.codegen.gpu.launches import split_launches
from kedge.compiler.codegen.gpu.opencl import features_of, opencl_source
from kedge.compiler.codegen.gpu.ptx import emit_ptx
from kedge.compiler.codegen.gpu.reductions import lower_thread_reductions
from kedge.compiler.codegen.prepare import drop_empty, lower_blocks
from kedge.compiler.codegen.types import byte_size
from kedge.compiler.errors import CodegenError
from kedge.compiler.target.gpu import GpuTarget
from kedge.compiler.tir.expr import Const, Dim, const
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.simplify import simplify_stmt
from kedge.compiler.tir.stmt import PrimFunc, Stmt

#: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_CUDA_LIMITS = {"blockIdx.x": 2**31 - 1, "blockIdx.y": 65535, "blockIdx.z": 65535, "threadIdx.z": 64}


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """A function for a GPU: the host's LLVM IR and workspace, the device's text, its kernels' symbols and needs."""

    symbol: str
    ir: str
    workspace: Dim
    text: str
    kernels: tuple[str, ...]
    features: tuple[str, ...]


def emit_device(func: PrimFunc, target: GpuTarget, symbol: str) -> DeviceCode:
    """`func`, whose loops are bound to threads, under the host's linker symbol `symbol`.

    Raises:
        CodegenError: a loop that begins at cache lines, or that is on no axis of threads, a group that is larger than
            the target allows, or threads that would have to wait where they cannot.
    """
    if func.sizes != func.symbols:
        raise CodegenError(
            f"{func.name}: a loop begins at cache lines, which are the host's", hint="schedule it without sch.align"
        )
    func, body = device_body(func, symbol)
    launches = [each for each in walk(body) if isinstance(each, Launch)]
    for launch in launches:
        _check_limits(func, launch, target)
    if target.kind == "opencl":
        text, features = opencl_source(launches), features_of(launches)
    else:
        text, features = emit_ptx(launches, target.arch_name), tuple[str, ...]()
    ir, workspace, kernels = emit_host(func, body, text, features, target.host, symbol)
    return DeviceCode(symbol, ir, workspace, text, kernels, features)


def device_body(func: PrimFunc, name: str) -> tuple[PrimFunc, Stmt]:
    """The function with the buffers that were added to it, and its body as the host runs it, launches inside."""
    reduced, added = lower_thread_reductions(flattened(func.body))
    func = replace(func, allocs=(*func.allocs, *added), body=reduced)
    plain = drop_empty(simplify_stmt(drop_empty(lower_blocks(reduced))))
    return func, split_launches(plain, name, func.name)


def _check_limits(func: PrimFunc, launch: Launch, target: GpuTarget) -> None:
    threads = math.prod(launch.block)
    if threads > target.max_threads:
        raise CodegenError(
            f"{func.name}: a group of {' x '.join(map(str, launch.block))} = {threads} threads; "
            f"{target.label} has groups of at most {target.max_threads}",
            hint="split a loop that is bound to threadIdx: outer, inner = sch.split(loop, [None, 256]), the outer to "
            f"blockIdx.x{_larger(target, '-max-threads', threads)}",
        )
    if target.kind == "cuda":
        _check_cuda(func, launch)
    sizes = [math.prod(dim for dim in b.shape if isinstance(dim, int)) * byte_size(b.dtype) for b in launch.shared]
    if sum(sizes) > target.shared_bytes:
        raise CodegenError(
            f"{func.name}: buffers in shared scope take {sum(sizes)} bytes; {target.label} has {target.shared_bytes} "
            "for a group",
            hint="make their tiles smaller: split the loops around them by smaller factors"
            f"{_larger(target, '-shared', sum(sizes))}",
        )


def _larger(target: GpuTarget, option: str, value: int) -> str:
    """How a target says that its device has more; what CUDA's generations have is known."""
    if target.kind != "opencl":
        return ""
    return f'; or, if the device has more, target="opencl {option}={value}"'


def _check_cuda(func: PrimFunc, launch: Launch) -> None:
    """What every generation of CUDA is limited to, besides what a target says; free dims the runtime checks."""
    sizes = dict(zip(GROUP_AXES, launch.grid, strict=True)) | dict(
        zip(THREAD_AXES, map(const, launch.block), strict=True)
    )
    for axis, size in sizes.items():
        limit = _CUDA_LIMITS.get(axis)
        if limit is not None and isinstance(size, Const) and size.value > limit:
            raise CodegenError(
                f"{func.name}: {size.value} on {axis}; CUDA has at most {limit}",
                hint=f'in a new Schedule, sch.bind(loop, "{axis[:-1]}x") instead, or sch.split the loop first',
            )
