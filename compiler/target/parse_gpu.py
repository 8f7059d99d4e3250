"""GPU target strings: `opencl`, `cuda -arch=sm_87 -host="llvm -mtriple=aarch64-linux-gnu"`, a board's tag."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kedge.compiler.errors import TargetError
from kedge.compiler.target.gpu import (
    CUDA_ARCHS,
    DEFAULT_CUDA_ARCH,
    DEFAULT_MAX_THREADS,
    DEFAULT_SHARED_BYTES,
    DEFAULT_WARP,
    GPU_BOARDS,
    GPU_KINDS,
    GpuBoard,
    GpuKind,
    GpuTarget,
    cuda_level,
    generation_of,
)
from kedge.compiler.target.model import THROUGHPUT_OPTIONS, Target
from kedge.compiler.target.options import nearest, options, positive

_OPTIONS: dict[GpuKind, tuple[str, ...]] = {
    "opencl": ("-max-threads", "-shared", "-warp", "-host"),
    "cuda": ("-arch", "-max-threads", "-shared", "-host"),
}
_OF_THE_HOST = {
    name: f'{name} is the host\'s: write -host="llvm {name}=VALUE"'
    for name in ("-mtriple", "-mcpu", "-mattr", "-num-cores", "-l1", "-l2", "-l3", *THROUGHPUT_OPTIONS)
}


def gpu_head(word: str) -> GpuBoard | None:
    """The GPU that the first word of a target names, by a tag or by a kind alone; None where it names no GPU."""
    for kind in GPU_KINDS:
        if word == kind:
            return GpuBoard(kind, kind, DEFAULT_CUDA_ARCH if kind == "cuda" else "", kind)
    return next((board for board in GPU_BOARDS if board.tag == word), None)


def parse_gpu(text: str, board: GpuBoard, words: Sequence[str], parse_host: Callable[[str], Target]) -> GpuTarget:
    """The target of `board` with the options `words`; `text` is the whole target string, for messages.

    Raises:
        TargetError: an unknown option, generation or host, or a number beyond what the generation has.
    """
    kind = board.kind
    given = dict(options(text, words, _OPTIONS[kind], _OF_THE_HOST))
    arch_name = board.arch_name
    if "-arch" in given:
        arch_name = _cuda_arch(board, given["-arch"])
    numbers = {name: positive(name, value) for name, value in given.items() if name not in ("-arch", "-host")}
    max_threads = numbers.get("-max-threads", DEFAULT_MAX_THREADS[kind])
    shared_bytes = numbers.get("-shared", DEFAULT_SHARED_BYTES[kind])
    if kind == "cuda":
        _check_limit("-max-threads", max_threads, DEFAULT_MAX_THREADS[kind], arch_name)
        _check_limit("-shared", shared_bytes, CUDA_ARCHS[generation_of(arch_name) or ""], arch_name)
    host = parse_host(given.get("-host", board.host))
    return GpuTarget(kind, arch_name, max_threads, shared_bytes, numbers.get("-warp", DEFAULT_WARP[kind]), host)


def _cuda_arch(board: GpuBoard, value: str) -> str:
    if generation_of(value) is None:
        raise TargetError(f"-arch={value}: unknown CUDA architecture", hint=nearest(f"sm_{value[-2:]}", CUDA_ARCHS))
    if board.tag != board.kind and cuda_level(value) > cuda_level(board.arch_name):
        raise TargetError(f"-arch={value} contradicts the target, which is {board.arch_name}: older code runs there")
    return value


def _check_limit(name: str, value: int, limit: int, arch_name: str) -> None:
    if value > limit:
        raise TargetError(f"{name}={value}: a block on {arch_name} has at most {limit}")
