"""From a module to an artifact. Each line of `compile_module` is a floor of the compiler; read on from there.

graph passes -> lowering -> kernels (schedules, LLVM IR, object files) -> shared object -> artifact
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TypeAlias

from kedge.compiler import debug
from kedge.compiler.cache import KernelCache, KernelObject, key_of, symbol_of, text_key
from kedge.compiler.codegen.entry import CompiledKernel, emit_module
from kedge.compiler.codegen.machine import emit_object
from kedge.compiler.errors import CompileError
from kedge.compiler.external_code import ExternalObjects, external_objects, link_with_externals
from kedge.compiler.fingerprint import compiler_version
from kedge.compiler.graph.external import External
from kedge.compiler.graph.ir import Module
from kedge.compiler.graph.passes import Partition, Pass, TargetPass, default_passes, for_target
from kedge.compiler.kernels import stage_name
from kedge.compiler.lower.lower import draft, draft_prim_func
from kedge.compiler.lower.program import Draft, Kernel, Program, Recalled
from kedge.compiler.package import CompiledVariant, Weights, pack_weights, package
from kedge.compiler.report import report_variant
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target import AnyTarget, GpuTarget, parse, parse_all
from kedge.compiler.tir.stmt import PrimFunc
from kedge.compiler.toolchain import link_shared
from kedge.compiler.workers import Job, Workers
from kedge.rpc.artifact import Artifact

Progress: TypeAlias = Callable[[str], None]
TargetLike: TypeAlias = str | AnyTarget


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The graph passes that a module goes through, in order. Every change gives a new pipeline."""

    passes: tuple[Pass, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The passes' names, in order."""
        return tuple(step.name for step in self.passes)

    def insert_after(self, name: str, step: Pass) -> Pipeline:
        """`step` right after the last pass called `name`."""
        at = self._positions(name)[-1] + 1
        return replace(self, passes=(*self.passes[:at], step, *self.passes[at:]))

    def insert_before(self, name: str, step: Pass) -> Pipeline:
        """`step` right before the first pass called `name`."""
        at = self._positions(name)[0]
        return replace(self, passes=(*self.passes[:at], step, *self.passes[at:]))

    def without(self, name: str) -> Pipeline:
        """The pipeline without any pass called `name`."""
        gone = set(self._positions(name))
        return replace(self, passes=tuple(step for at, step in enumerate(self.passes) if at not in gone))

    def replace(self, name: str, step: Pass) -> Pipeline:
        """`step` in the place of the pass called `name`, the first of several, and the pipeline without the others.

        `pipeline("default").replace("layout", BlockChannels(winograd=False))` is the one without Winograd's algorithm.
        """
        first, *others = self._positions(name)
        passes = [step if at == first else each for at, each in enumerate(self.passes) if at not in others]
        return replace(self, passes=tuple(passes))

    def partition(self, externals: Sequence[External]) -> Pipeline:
        """The pipeline that hands subgraphs to external code where patterns see simple operators.

        That is before the first pass that depends on the target, such as layouts, and before fusion.

        Where a pattern names what is rewritten before (gemm, batch_norm), insert a `Partition` earlier instead.
        """
        if isinstance(externals, External):
            raise TypeError(f"externals are a list: [{externals.function}]")
        if not externals:
            return self
        step = Partition(tuple(externals))
        names = [each.name for each in self.passes if isinstance(each, TargetPass) or each.name == "fuse"]
        return self.insert_before(names[0], step) if names else replace(self, passes=(*self.passes, step))

    @property
    def externals(self) -> tuple[External, ...]:
        """The externals of all `Partition` passes."""
        found = [each for step in self.passes if isinstance(step, Partition) for each in step.externals]
        return tuple(dict.fromkeys(found))

    def _positions(self, name: str) -> list[int]:
        found = [at for at, step in enumerate(self.passes) if step.name == name]
        if not found:
            known = ", ".join(dict.fromkeys(self.names))
            raise CompileError(f"the pipeline has no pass {name!r}", hint=f"it has: {known}")
        return found

    def for_target(self, target: AnyTarget) -> Pipeline:
        """The pipeline with the passes that depend on a target, such as layouts, bound to `target`."""
        return replace(self, passes=for_target(self.passes, target))

    def run(self, module: Module, target: TargetLike | None = None) -> Module:
        """The module after all passes; without a target, those that depend on one change nothing."""
        bound = self if target is None else self.for_target(parse(target))
        debug.show("00-input", "graph", debug.GRAPH, module.show)
        return bound._run_from(0, len(bound.passes), module, "")

    def split_run(self, module: Module, count: int) -> Callable[[AnyTarget], Module]:
        """Run what no target matters to, once; what is given runs the rest for a target, `count` times.

        After the last time it holds nothing: weights that passes have changed take as much memory as the model's.
        """
        first = next((at for at, step in enumerate(self.passes) if isinstance(step, TargetPass)), len(self.passes))
        debug.show("00-input", "graph", debug.GRAPH, module.show)
        common = self._run_from(0, first, module, "")
        left = [common] * count
        del common

        def rest(target: AnyTarget) -> Module:
            return self.for_target(target)._run_from(first, len(self.passes), left.pop(), f"-{stage_name(target)}")

        return rest

    def _run_from(self, start: int, end: int, module: Module, suffix: str) -> Module:
        for number, step in enumerate(self.passes[start:end], start + 1):
            with debug.timed(step.name):
                module = step(module)
            debug.show(f"{number:02}-{step.name}{suffix}", "graph", debug.GRAPH, module.show)
        return module


def pipeline(name: str = "default") -> Pipeline:
    """A pipeline by name; "default" is the only one."""
    if name != "default":
        raise CompileError(f"there is no pipeline {name!r}", hint='use pipeline("default") and change it')
    return Pipeline(default_passes())


def compile_module(
    module: Module,
    target: TargetLike | Sequence[TargetLike],
    *,
    pipeline: Pipeline | None = None,
    externals: Sequence[External] = (),
    progress: Progress | None = None,
    name: str = "model",
    cache: KernelCache | None = None,
) -> Artifact:
    """The artifact of a module for one target, or with a variant for each of several.

    `externals` compute what their patterns match (see `Pipeline.partition`). `progress` is called with a line before
    each stage, and when each kernel begins that is compiled, in this thread. `cache` holds compiled kernels (default:
    the user's cache folder).

    Raises:
        CompileError: the module or a target is refused; each reason has its own class, see `kedge.compiler.errors`.
    """
    steps = (pipeline if pipeline is not None else Pipeline(default_passes())).partition(externals)
    kernels = KernelCache() if cache is None else cache
    say = progress if progress is not None else _say_nothing
    say("optimizing the graph")
    targets = parse_all(target)
    optimized = steps.split_run(module, len(targets))

    def make(one: AnyTarget) -> Program:
        say(f"optimizing the graph for {one.label}")
        return draft(optimized(one), steps.externals, kernels)

    return compile_programs(make, targets, name, kernels, progress)


def _say_nothing(_: str) -> None:
    """Progress that nobody asked for."""


def compile_prim_func(
    source: PrimFunc | Schedule,
    target: TargetLike | Sequence[TargetLike],
    *,
    progress: Progress | None = None,
    name: str | None = None,
    cache: KernelCache | None = None,
) -> Artifact:
    """The artifact of one tensor IR function, whose inputs and outputs are named as its parameters.

    What is scheduled by hand, a `Schedule` or its function, is compiled as it is.
    """
    func = source.func if isinstance(source, Schedule) else source
    return compile_programs(lambda _: draft_prim_func(source), target, name or func.name, cache, progress)


def compile_programs(
    make: Callable[[AnyTarget], Program],
    target: TargetLike | Sequence[TargetLike],
    name: str,
    cache: KernelCache | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact of lowered programs: `make(target)` gives the one for each target."""
    targets = parse_all(target)
    kernels = KernelCache() if cache is None else cache
    variants, reports = [], []
    try:
        with Workers() as workers:
            for one in targets:
                variant, report = _compile_variant(make, one, kernels, progress, workers)
                variants.append(variant)
                reports.append(report)
        kernels.clean()
    finally:
        kernels.count()  # what a compile wrote that then failed takes room, too
    if progress is not None:
        progress("packaging")
    with debug.timed("package"):
        return package(name, f"kedge {version('kedge')} ({compiler_version()})", variants, {"variants": reports})


def _compile_variant(
    make: Callable[[AnyTarget], Program], target: AnyTarget, cache: KernelCache, progress: Progress | None,
    workers: Workers,
) -> tuple[CompiledVariant, dict[str, object]]:  # fmt: skip
    """The code for one target, and what the manifest says of it."""
    with debug.timed(f"lower for {target.label}"):
        program = make(target)
    with debug.timed("weights"):
        weights = pack_weights(program.weights)
    externals = compile_externals(program, target, progress)  # first: a mistake in C shows before kernels take time
    kernels = compile_kernels(program, target, cache, workers, progress)
    objects = compile_objects(program, target, weights, kernels, cache)
    host = target.host
    with debug.timed("link"):
        lib = (
            link_with_externals(objects, externals.values(), host, progress)
            if externals
            else link_shared(objects, host)
        )
    features = tuple(sorted({feature for made in kernels.values() for feature in made.features}))
    variant = CompiledVariant(target, lib, weights, program.entries, features)
    return variant, report_variant(program, kernels, target, externals)


def compile_externals(
    program: Program, target: AnyTarget, progress: Progress | None = None
) -> dict[str, ExternalObjects]:
    """The code of the external functions that a program calls, by their names.

    Raises:
        CompileError: the target is a GPU, whose memory such functions cannot reach.
    """
    used = {call.code.function: call.code for call in program.externals.values()}
    if isinstance(target, GpuTarget):
        if used:
            raise CompileError(
                f"external {next(iter(used))} is code for a CPU, and its tensors would be in memory of {target.label}",
                hint="compile for a CPU, or without externals",
            )
        return {}
    with debug.timed("external code"):
        return {name: external_objects(code, target, progress) for name, code in used.items()}


def compile_kernels(
    program: Program, target: AnyTarget, cache: KernelCache, workers: Workers, progress: Progress | None = None
) -> dict[str, KernelObject]:
    """The machine code of a program's kernels, by their names: from the cache, or made by `workers`.

    Raises:
        CompileError: code generation refuses a kernel; each reason has its own class.
        WorkerError: a worker process ended before its work was done.
    """
    keys: dict[str, str] = {}
    made_as: dict[str, str] = {}  # of what was lowered again: the key of what came out
    found: dict[str, KernelObject | None] = {}
    missing: dict[str, Kernel | Draft] = {}
    for name, kernel in program.kernels.items():
        key = key_of(kernel, target)
        if key not in found:
            found[key] = cache.find(key)
        if found[key] is None and key not in made_as:
            whole = kernel.draft if isinstance(kernel, Recalled) else kernel
            made_as[key] = key_of(whole, target)
            missing.setdefault(made_as[key], whole)
        keys[name] = made_as.get(key, key)
    jobs = [Job(kernel, target, symbol_of(key)) for key, kernel in missing.items()]
    done = len(keys) - len(missing)

    def started(job: Job) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(f"compiling {job.kernel.func.name} for {target.label} ({done} of {len(keys)})")

    by_symbol = {symbol_of(key): key for key in missing}
    for made in workers.compile(jobs, started):
        key = by_symbol[made.symbol]
        cache.keep(key, made)
        found[key] = made
    complete = {key: made for key, made in found.items() if made is not None}
    return {name: complete[key] for name, key in keys.items()}


def compile_objects(
    program: Program, target: AnyTarget, weights: Weights, kernels: Mapping[str, KernelObject], cache: KernelCache
) -> tuple[bytes, ...]:
    """ELF object files of a program: its entries and descriptor first, then its kernels, each once."""
    known = {name: CompiledKernel(made.symbol, made.workspace) for name, made in kernels.items()}
    launches = tuple(dict.fromkeys(launch for made in kernels.values() for launch in made.launches))
    text = emit_module(program, target, known, weights.places, weights.data_size, launches)
    debug.show(f"entry-{stage_name(target)}", "ll", debug.LLVM, lambda: text)
    with debug.timed("entry"):
        key = text_key(text, target.host)
        entry = cache.find_object(key)
        if entry is None:
            entry = emit_object(text, target.host, speed=1)
            cache.keep_object(key, entry)
    code = {made.symbol: made.code for made in kernels.values()}
    return (entry, *code.values())
