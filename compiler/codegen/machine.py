"""The seam to LLVM: everything that touches llvmlite's binding. Text in, object file or assembly out."""

from __future__ import annotations

import functools
import threading
from typing import Any

import llvmlite.binding as llvm

from kedge.compiler.errors import CodegenError
from kedge.compiler.target.model import Target

#: llvmlite's pass builders and machines are not safe to share between threads.
LOCK = threading.Lock()


@functools.cache
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def host_cpu() -> tuple[str, tuple[str, ...]]:
    """LLVM's name of this machine's CPU, and its names of the features it has."""
    features = llvm.get_host_cpu_features()
    return llvm.get_host_cpu_name(), tuple(sorted(name for name, on in features.items() if on))


@functools.cache
def _machine(target: Target) -> Any:
    _initialize()
    arch = target.arch
    # The generic CPU with an explicit feature list: `-mcpu` alone would allow instructions that the artifact does
    # not declare. The CPU's own instruction scheduling comes from the "tune-cpu" attribute of each function.
    features = ",".join(_features(target))
    return llvm.Target.from_triple(arch.triple).create_target_machine(
        cpu=arch.generic_cpu, features=features, opt=3, reloc="pic", codemodel="small", abiname=arch.abi_name
    )


def _features(target: Target) -> tuple[str, ...]:
    """LLVM's switches for just what the target has. An ARMv7 triple by itself would stand for NEON and 32 registers."""
    on = [*target.arch.baseline, *target.features]
    if target.arch.name != "armv7l":
        return tuple(f"+{name}" for name in on)
    if target.has("neon"):
        # Unless LLVM schedules machine instructions it moves loads together, far from where they are used, and spills.
        return (*(f"+{name}" for name in on), "+use-misched")
    return ("-neon", "-d32", *(f"+{'vfp4d16' if name == 'vfp4' else name}" for name in on))


def parse_ir(text: str) -> Any:
    """Parse and verify LLVM IR; raises CodegenError with the offending text's message.

    A failure here is a defect of code generation, never of the user's model.
    """
    _initialize()
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as error:
        raise CodegenError(f"internal error: LLVM refused the generated code: {error}") from error
    return module


def _optimized(text: str, target: Target, *, speed: int, vectorize: bool) -> tuple[Any, Any]:
    module = parse_ir(text)
    machine = _machine(target)
    options = llvm.create_pipeline_tuning_options(speed_level=speed)
    options.loop_vectorization = vectorize
    # Wide vectors are already explicit; packing scalars again costs more compile time than it ever gains.
    options.slp_vectorization = False
    options.loop_unrolling = True
    builder = llvm.create_pass_builder(machine, options)
    if vectorize:
        builder.getModulePassManager().run(module, builder)
    else:
        _simplify(module, builder)
    return module, machine


def _simplify(module: Any, builder: Any) -> None:
    """What code needs whose loops are vectors and unrolled as they should be: every function is simplified once.

    LLVM's whole pipeline finds nothing else that pays there, and takes nearly three times as long: it looks for
    dependences between all pairs of a tile's accesses.
    """
    first = llvm.create_new_module_pass_manager()
    first.add_always_inliner_pass()
    first.add_global_dead_code_eliminate_pass()
    first.run(module, builder)
    passes = builder.getFunctionPassManager()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


def emit_object(text: str, target: Target, *, speed: int = 2, vectorize: bool = True) -> bytes:
    """The ELF object file of LLVM IR `text`; loops that are left to LLVM are vectorized only if it says so."""
    with LOCK:
        module, machine = _optimized(text, target, speed=speed, vectorize=vectorize)
        return bytes(machine.emit_object(module))


def emit_assembly(text: str, target: Target, *, speed: int = 2, vectorize: bool = True) -> str:
    """The assembly of LLVM IR `text`, as the object file would hold it."""
    with LOCK:
        module, machine = _optimized(text, target, speed=speed, vectorize=vectorize)
        return str(machine.emit_assembly(module))
