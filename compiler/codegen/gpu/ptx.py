"""PTX of launches, through LLVM's NVPTX back end: the same emitter as for CPUs, with threads' positions and barriers.

Shared arrays are globals of address space 3; LLVM finds out by itself which pointers are to which memory. exp, tanh …
are the polynomials of `mathlib`, so results agree with those of CPUs to the last bits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import llvmlite.binding as llvm

from kedge.compiler.codegen.address import Pointer
from kedge.compiler.codegen.affine import Linear
from kedge.compiler.codegen.builder import ModuleBuilder, Value
from kedge.compiler.codegen.gpu.ir import AXES, Barrier, Launch
from kedge.compiler.codegen.kernel import KernelEmitter
from kedge.compiler.codegen.machine import LOCK, parse_ir
from kedge.compiler.codegen.types import byte_size, scalar_type
from kedge.compiler.target.arch import Arch
from kedge.compiler.target.model import Target, Throughput
from kedge.compiler.tir.expr import Const
from kedge.compiler.tir.simplify import bounds
from kedge.compiler.tir.stmt import Buffer, For, Stmt

#: What code generation asks of an architecture; nothing of it is an ABI of Linux.
_NVPTX = Arch(
    name="nvptx64",
    triple="nvptx64-nvidia-cuda",
    aliases=(),
    zig_target="",
    zig_cpu="",
    generic_cpu="",
    elf_machine=190,
    lld_emulation="",
    data_layout="e-p6:32:32-i64:64-i128:128-i256:256-v16:16-v32:32-n16:32:64",
    pointer_bits=64,
    float_abi="",
    abi_name="",
    baseline=(),
    known_features=(),
    implied=MappingProxyType({}),
)
_POSITIONS = {"blockIdx": "ctaid", "threadIdx": "tid"}
#: Version of the PTX language: the first that knows the generation, and never one older than LLVM's default wants.
_PTX_VERSIONS = {"sm_100": "ptx86", "sm_103": "ptx88", "sm_110": "ptx90", "sm_120": "ptx87", "sm_121": "ptx88"}


def emit_ptx(launches: Sequence[Launch], arch: str) -> str:
    """PTX text with the kernels of a function, for the GPU generation `arch` ("sm_90") and newer ones."""
    return _assemble(emit_ptx_ir(launches, arch), arch)


def emit_ptx_ir(launches: Sequence[Launch], arch: str) -> str:
    """The LLVM IR of the kernels, before it is optimised."""
    module = _PtxModule(Target(_NVPTX, arch, (), 1, 0, 0, 0, Throughput(0, 0, 0, 0)))
    for launch in launches:
        _emit_kernel(module, launch)
    return module.text()


class _PtxModule(ModuleBuilder):
    """A module for NVPTX: no position-independent code, and attributes of its own."""

    def text(self) -> str:
        """The whole module."""
        head = [f'target datalayout = "{_NVPTX.data_layout}"', f'target triple = "{_NVPTX.triple}"', ""]
        declares = [f"declare {sig.replace('@', '@' + name, 1)}" for name, sig in sorted(self._declared.items())]
        return "\n".join([*head, *self._functions, *declares, "", 'attributes #0 = { nounwind "no-builtins" }', ""])


def _emit_kernel(module: ModuleBuilder, launch: Launch) -> None:
    emitter = _ThreadEmitter(module, launch.name)
    params = []
    for number, buffer in enumerate(launch.buffers):
        emitter.pointers[buffer] = Pointer(f"%arg{number}", byte_size(buffer.dtype))
        params.append(f"ptr noalias %arg{number}")
    for number, var in enumerate(launch.scalars):
        params.append(f"i64 %arg.s{number}")
        emitter.bind_symbol(var, Value(f"%arg.s{number}", "i64"))
    for buffer in launch.shared:
        emitter.share(buffer)
    for buffer in launch.private:
        emitter.own(buffer)
    emitter.position(launch)
    emitter.stmt(launch.body)
    emitter.b.emit("ret void")
    most = ",".join(map(str, launch.block))
    head = f'define ptx_kernel void @{launch.name}({", ".join(params)}) {module.attributes} "nvvm.maxntid"="{most}"'
    module.add(emitter.b.finish(head))


class _ThreadEmitter(KernelEmitter):
    """What one thread does."""

    def stmt(self, stmt: Stmt) -> None:
        """Emit a statement."""
        if isinstance(stmt, Barrier):
            name = "llvm.nvvm.barrier.cta.sync.aligned.all"
            self.b.module.declare(name, "void @(i32)")
            self.b.emit(f"call void @{name}(i32 0)")
        else:
            super().stmt(stmt)

    def is_full(self, loop: For) -> bool:
        """No tile was made for the registers of a thread, of which the driver has the last word."""
        return False

    def share(self, buffer: Buffer) -> None:
        """An array that the threads of a group share."""
        name = f"@{self.symbol}.{re.sub(r'[^A-Za-z0-9_]', '_', buffer.name)}.{len(self.pointers)}"
        kind = f"[{_count(buffer)} x {scalar_type(buffer.dtype).memory}]"
        self.module.add(f"{name} = internal addrspace(3) global {kind} undef, align 16")
        self.pointers[buffer] = Pointer(f"addrspacecast (ptr addrspace(3) {name} to ptr)", 16)

    def own(self, buffer: Buffer) -> None:
        """An array of which each thread has its own: registers, where its indices are known."""
        name = f"%{self.b.fresh('own')}"
        self.b.emit_entry(f"{name} = alloca [{_count(buffer)} x {scalar_type(buffer.dtype).memory}], align 16")
        self.pointers[buffer] = Pointer(name, 16, private=True)

    def position(self, launch: Launch) -> None:
        """The thread's position along each axis, as an index."""
        extents = {f"blockIdx.{a}": size for a, size in zip(AXES, launch.grid, strict=True)}
        extents |= {f"threadIdx.{a}": Const(size) for a, size in zip(AXES, launch.block, strict=True)}
        for axis, var in launch.axes.items():
            kind, _, letter = axis.partition(".")
            if kind not in _POSITIONS:
                continue
            name = f"llvm.nvvm.read.ptx.sreg.{_POSITIONS[kind]}.{letter}"
            self.b.module.declare(name, "i32 @()")
            index = self.b.convert("zext", self.b.result(f"call i32 @{name}()", "i32"), self.b.index_type)
            self.env[var] = Linear.atom(index)
            high = bounds(extents[axis])[1]
            self.known[index] = (0, 2**31 - 2 if high is None else high - 1)


def _count(buffer: Buffer) -> int:
    return max(1, math.prod(dim for dim in buffer.shape if isinstance(dim, int)))


@functools.cache
def _machine(arch: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = f"+{_PTX_VERSIONS.get(arch, 'ptx78')}"
    return llvm.Target.from_triple(_NVPTX.triple).create_target_machine(cpu=arch, features=features, opt=3)


def _assemble(ir: str, arch: str) -> str:
    with LOCK:
        module, machine = parse_ir(ir), _machine(arch)
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = options.slp_vectorization = False
        options.loop_unrolling = True
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        return str(machine.emit_assembly(module))
