"""The Python API's functions: thin doors to the floors below."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kedge.rpc.errors import InputError

if TYPE_CHECKING:
    from kedge.artifact import Artifact
    from kedge.compiler.artifact_cache import Request
    from kedge.compiler.cache import KernelCache
    from kedge.compiler.graph.external import External
    from kedge.compiler.graph.ir import Module
    from kedge.compiler.pipeline import Pipeline
    from kedge.compiler.schedule.schedule import Schedule
    from kedge.compiler.target import AnyTarget
    from kedge.compiler.tir.stmt import PrimFunc
    from kedge.isolated import LocalDevice
    from kedge.rpc.accelerator import Accelerator
    from kedge.rpc.artifact import Artifact as PlainArtifact
    from kedge.rpc.client import Fleet

ModelPath: TypeAlias = "str | os.PathLike[str]"
TargetLike: TypeAlias = "str | AnyTarget"
Progress: TypeAlias = Callable[[str], None]
#: The suffix of saved modules, `kedge.compiler.graph.store.SUFFIX`, without importing what reads them.
_SAVED = ".kmod"
Shapes: TypeAlias = Mapping[str, Sequence[int | str | None]] | None


def load(path: ModelPath, shapes: Mapping[str, Sequence[int | str | None]] | None = None) -> Module:
    """Read an ONNX model as a module with the function "main", or a module that `Module.save` wrote.

    Args:
        path: the `.onnx` file, or the `.kmod` file of a saved module.
        shapes: input name -> shape where the model's own is to be changed; a name as a dim leaves it free.

    Raises:
        FrontendError: the file is missing, corrupt or not ONNX, or `shapes` does not fit it.
        InputError: `shapes` is no mapping, or is given for a saved module.
        UnsupportedOperatorError: naming every operator of the model that kedge does not know.
    """
    from kedge.compiler.frontend.onnx import load_onnx
    from kedge.compiler.graph.store import SUFFIX, load_module

    _check_shapes(shapes)
    if Path(path).suffix == SUFFIX:
        if shapes:
            raise InputError("a saved module keeps its shapes", hint="give `shapes` when the ONNX model is loaded")
        return load_module(path)
    return load_onnx(Path(path), dict(shapes) if shapes else None)


def compile(  # noqa: A001 - the field says compile
    model: Module | PrimFunc | Schedule | ModelPath,
    target: TargetLike | Sequence[TargetLike] = "native",
    *,
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    pipeline: Pipeline | None = None,
    externals: Sequence[External] = (),
    name: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a model, a module or one te / TensorIR function.

    A file that was compiled before, with the same options, by the same compiler, is not compiled again: its artifact is
    taken from the user's cache, and has `.cached`. With `pipeline` or `externals`, whose Python functions have no
    digest, and of models with operators of domains other than ONNX's, only compiled kernels are.

    Args:
        model: an `.onnx` path, a `Module`, a `PrimFunc` or a `Schedule`. A function without a schedule gets one; one
            that is scheduled by hand is compiled as it is.
        target: a tag, `native`, a target string, or several of them (one variant each, sharing the weights).
        shapes: as for `load`, where `model` is a path.
        pipeline: the passes; `kedge.pipeline("default")` unless given.
        externals: C functions that compute what their patterns match, in place of kedge's kernels.
        name: of the artifact; the file's or function's name unless given.
        cache: False: take nothing from the user's cache of kernels and artifacts, and keep nothing there.
        progress: told what is being done.

    Raises:
        CompileError: with the operator of the user's model and what does not fit.
        InputError: `shapes` is no mapping, or is given for a saved module.
        TypeError: `model` is none of these, or an argument says nothing about this kind of model.
    """
    if isinstance(model, (str, os.PathLike)):
        return _compile_file(Path(model), target, shapes, pipeline, externals, name, cache, progress)
    from kedge.artifact import Artifact
    from kedge.compiler.graph.ir import Module
    from kedge.compiler.pipeline import compile_prim_func
    from kedge.compiler.schedule.schedule import Schedule
    from kedge.compiler.tir.stmt import PrimFunc

    if shapes is not None:
        raise TypeError("shapes= is for a path; a module is given its shapes by kedge.load(path, shapes=…)")
    if isinstance(model, (PrimFunc, Schedule)):
        if pipeline is not None or externals:
            raise TypeError("pipeline= and externals= are for graphs; a PrimFunc has none")
        with _kernel_cache(cache) as kernels:
            return Artifact.of(compile_prim_func(model, target, name=name, cache=kernels, progress=progress))
    if not isinstance(model, Module):
        accepted = "give an .onnx path, a kedge.Module, a PrimFunc or a Schedule"
        raise TypeError(f"cannot compile a value of type {type(model).__name__}: {accepted}")
    return Artifact.of(_compile_module(model, target, pipeline, externals, name or "model", cache, progress))


def _compile_file(
    path: Path, target: TargetLike | Sequence[TargetLike], shapes: Shapes, pipeline: Pipeline | None,
    externals: Sequence[External], name: str | None, cache: bool, progress: Progress | None,
) -> Artifact:  # fmt: skip
    """The artifact of a model's file: from the cache of artifacts where it is there, else compiled, and kept there."""
    from kedge.artifact import Artifact
    from kedge.compiler import debug

    named = name or path.stem
    _check_shapes(shapes)

    def compiled() -> Artifact:
        return Artifact.of(_compile_module(load(path, shapes), target, pipeline, externals, named, cache, progress))

    # Where stages are to be seen, they have to be gone through. Of saved modules kernels alone are kept.
    if not cache or pipeline is not None or externals or debug.wanted(1) or path.suffix == _SAVED:
        return compiled()
    from kedge.compiler.artifact_cache import ArtifactCache, Request

    artifacts = ArtifactCache()
    try:
        request = Request(path, shapes, named)
    except (OSError, TypeError, ValueError):  # a pipe can be read once; of what is wrong, what loads it says what
        return compiled()
    from kedge.compiler.target import parse_all

    with request:
        targets = parse_all(target)
        found = artifacts.find(request, targets)
        if found is not None:
            return Artifact.of(found.artifact, found.path, cached=True)
        module, files = _read(path, shapes, request)
        made = _compile_module(module, targets, None, (), named, cache, progress)
        return Artifact.of(made, None if files is None else artifacts.keep(request, targets, files, made))


def _check_shapes(shapes: Shapes) -> None:
    """Refuse shapes that are no mapping, before anything is done with them; dims are the front end's to judge."""
    if shapes is not None and not isinstance(shapes, Mapping):
        raise InputError(
            f"shapes is a value of type {type(shapes).__name__}, and no mapping of inputs to shapes",
            hint='give a dict: shapes={"x": (1, 3, 224, 224)}',
        )


def _read(path: Path, shapes: Shapes, request: Request) -> tuple[Module, tuple[str, ...] | None]:
    """The module of a file, and the other files that have its data; None for those where `path` does not tell all."""
    from kedge.compiler.frontend.onnx import external_files, import_model, read_model, uses_own_domains

    model = read_model(path)
    files = None if uses_own_domains(model) else external_files(model)
    if files is not None:
        try:
            request.watch(files)
        except (OSError, ValueError):
            files = None  # the import says which is missing, and of what; or somebody is just replacing it
    return import_model(model, shapes), files


def _compile_module(
    module: Module, target: TargetLike | Sequence[TargetLike], pipeline: Pipeline | None,
    externals: Sequence[External], name: str, cache: bool, progress: Progress | None,
) -> PlainArtifact:  # fmt: skip
    from kedge.compiler.pipeline import compile_module

    with _kernel_cache(cache) as kernels:
        return compile_module(
            module, target, pipeline=pipeline, externals=externals, name=name, cache=kernels, progress=progress
        )


@contextmanager
def _kernel_cache(users: bool) -> Iterator[KernelCache | None]:
    """None, which means the user's; else, and where every stage is to be seen, one that holds nothing yet."""
    from kedge.compiler import debug

    if users and not debug.wanted(debug.KERNEL):
        yield None
        return
    from kedge.compiler.cache import KernelCache

    with tempfile.TemporaryDirectory(prefix="kedge-kernels-") as folder:
        yield KernelCache(Path(folder))


def pipeline(name: str = "default") -> Pipeline:
    """A named pipeline of graph passes, to be changed with `.insert_after`, `.insert_before`, `.without`."""
    from kedge.compiler.pipeline import pipeline as named

    return named(name)


def local(threads: int = 0, device: str = "") -> LocalDevice:
    """This machine as a device, isolated in a native runner.

    Args:
        threads: of the kernels; 0 means all that this process may use, or one beside a GPU.
        device: where they run: "cpu", "opencl", "cuda" or one by its number, "cuda:1"; "" leaves it to each artifact.

    Raises:
        InputError: `threads` is negative, or `device` names none.
    """
    from kedge.isolated import LocalDevice
    from kedge.rpc.errors import InputError

    if threads < 0:
        raise InputError(f"threads is {threads}", hint="give a number of threads, or 0 for all that may be used")
    return LocalDevice(threads=threads, device=device)


def devices() -> list[Accelerator]:
    """The GPUs of this machine: `.kind` and `.index` (together "cuda:0"), `.name`, `.driver`, `.memory_bytes`.

    Raises:
        JobError: a driver crashed, or did not answer.
        ToolchainError: the native runtime is not built yet and cannot be.
    """
    from kedge.isolated import devices as found

    return found()


def connect(tracker: str) -> Fleet:
    """The fleet of the tracker at HOST:PORT.

    Raises:
        ConnectError: nobody answers there, or somebody who speaks another protocol version.
        AuthenticationError: `kedge join` has left no credentials for it, or the tracker does not accept them.
    """
    from kedge.rpc.client import connect as dial

    connection: Any = dial(tracker)
    fleet: Fleet = connection
    return fleet
