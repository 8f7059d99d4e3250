"""One kernel, from a function to its object file: schedule, LLVM IR, machine code. Worker processes import this."""

from __future__ import annotations

from kedge.compiler import debug
from kedge.compiler.cache import KernelObject
from kedge.compiler.codegen.alloc import print_prepared
from kedge.compiler.codegen.kernel import emit_kernel
from kedge.compiler.codegen.machine import emit_assembly, emit_object
from kedge.compiler.codegen.prepare import prepare
from kedge.compiler.codegen.shapes import encode
from kedge.compiler.errors import CompileError
from kedge.compiler.lower.program import Draft, Kernel
from kedge.compiler.schedule.default import schedule_func
from kedge.compiler.target import AnyTarget, GpuTarget


def compile_kernel(kernel: Kernel | Draft, target: AnyTarget, symbol: str) -> KernelObject:
    """The machine code of a kernel under a linker symbol; a draft is scheduled first.

    Raises:
        CompileError: code generation refuses the function; each reason has its own class. Or its expressions are
            nested too deeply. All name the nodes of the user's model that the kernel stands for.
    """
    name = kernel.func.name
    try:
        with debug.timed(f"kernel {name}"):
            if isinstance(kernel, Draft):
                kernel = schedule_func(kernel.func, target, origin=kernel.origin)
            return _compile(kernel, target, symbol)
    except CompileError as error:
        if kernel.origin:
            error.message = f"node {', '.join(kernel.origin)}: {error.message}"
        raise
    except RecursionError as error:
        node = f"node {', '.join(kernel.origin)}: " if kernel.origin else ""
        raise CompileError(
            f"{node}{name}: an expression is nested deeper than the compiler can follow",
            hint="compute a part of it in a tensor of its own, or raise sys.setrecursionlimit",
        ) from error


def _compile(kernel: Kernel, target: AnyTarget, symbol: str) -> KernelObject:
    func = kernel.func
    stage = f"kernel-{stage_name(target)}-{func.name}"
    debug.show(stage, "tir", debug.KERNEL, func.show)
    if isinstance(target, GpuTarget):
        return _compile_device(kernel, target, symbol, stage)
    debug.show(stage, "loops", debug.KERNEL, lambda: print_prepared(func, prepare(func)))
    made = emit_kernel(func, target, symbol)
    debug.show(stage, "ll", debug.LLVM, lambda: made.ir)
    if debug.wanted(debug.LLVM):
        debug.show(stage, "s", debug.LLVM, lambda: emit_assembly(made.ir, target, vectorize=made.scalar_loops))
    code = emit_object(made.ir, target, vectorize=made.scalar_loops)
    workspace = encode(made.workspace, func.sizes)
    return KernelObject(symbol, code, workspace, rule=kernel.rule, decisions=kernel.decisions)


def _compile_device(kernel: Kernel, target: GpuTarget, symbol: str, stage: str) -> KernelObject:
    """One scheduled function to the text of its kernels, inside the host's code that launches them."""
    from kedge.compiler.codegen.gpu.kernel import emit_device  # for a CPU, time to import it would be wasted

    made = emit_device(kernel.func, target, symbol)
    debug.show(stage, "cl" if target.kind == "opencl" else "ptx", debug.KERNEL, lambda: made.text)
    debug.show(f"{stage}-host", "ll", debug.LLVM, lambda: made.ir)
    code, workspace = emit_object(made.ir, target.host, speed=1), encode(made.workspace, kernel.func.symbols)
    return KernelObject(symbol, code, workspace, made.kernels, made.features, kernel.rule, kernel.decisions)


def stage_name(target: AnyTarget) -> str:
    """A target in the names of stages, where variants for CPUs of one architecture are told apart."""
    return target.label if isinstance(target, GpuTarget) else f"{target.label}-{target.cpu}"
