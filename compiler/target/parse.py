"""Target strings: a board's tag, a CPU level, `native`, or a kind with options."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from kedge.compiler.errors import CompileError, CompileWarning, TargetError
from kedge.compiler.target.arch import ARCHS, X86_64, Arch, closure, dependents
from kedge.compiler.target.cpus import BOARDS, CPUS, Cpu, best_cpu, find_cpu
from kedge.compiler.target.gpu import GPU_BOARDS, GPU_KINDS, GpuTarget
from kedge.compiler.target.model import THROUGHPUT_OPTIONS, Target, Throughput, throughput_of
from kedge.compiler.target.options import nearest, options, positive, rate, size
from kedge.compiler.target.parse_gpu import gpu_head, parse_gpu

#: What `parse` gives: a CPU, or a GPU with its host.
AnyTarget: TypeAlias = Target | GpuTarget

_PLANNED = ("rocm", "c")
_OPTIONS = ("-mtriple", "-mcpu", "-mattr", "-num-cores", "-l1", "-l2", "-l3", *THROUGHPUT_OPTIONS)
#: Levels of x86-64 are targets by themselves; other CPUs are named with -mcpu.
_LEVELS = tuple(cpu for cpu in CPUS if cpu.arch is X86_64 and cpu.name.startswith("x86-64"))
DEFAULT_CORES = 4


@dataclass(slots=True)
class _Draft:
    """What has been read so far."""

    arch: Arch | None = None
    cpu: Cpu | None = None
    cpu_name: str | None = None
    num_cores: int = DEFAULT_CORES
    attrs: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    base: Target | None = None


def parse(text: str | AnyTarget) -> AnyTarget:
    """The target that `text` names; a target is returned as it is.

    Accepts a tag ("raspberry-pi/4b", "nvidia/h200"), a level ("x86-64-v3"), "native", or a kind with options, for
    instance `llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72 -mattr=+dotprod -num-cores=4`, `opencl` or
    `cuda -arch=sm_87 -host="llvm -mtriple=aarch64-linux-gnu"`. Options may follow a tag, too. A GPU's host is this
    machine unless its tag or `-host` says otherwise. Of what a device's agent reports (`ReportedTarget`), a CPU that is
    not known here is taken, with a CompileWarning, for the highest level that its features allow.

    Raises:
        TargetError: an unknown tag, CPU, feature or option; the hint names the nearest known ones. Or it is no text.
    """
    if isinstance(text, (Target, GpuTarget)):
        return text
    if not isinstance(text, str):
        what = "None" if text is None else f"of type {type(text).__name__}"
        raise TargetError(f"target={text!r}: it is {what}, not a name", hint='give a name, such as target="native"')
    words = _words(text)
    reported = _reported_features(text)
    gpu = gpu_head(words[0])
    if gpu is not None:
        return parse_gpu(text, gpu, words[1:], partial(_parse_host, reported=reported))
    return _parse_cpu(text, words, reported)


def _reported_features(text: str) -> frozenset[str] | None:
    """What the CPU of a device has that reported `text`; None where somebody typed it."""
    if type(text) is str:  # most are, and need none of what is said to a tracker
        return None
    from kedge.rpc.types import ReportedTarget

    return frozenset(text.cpu_features) if isinstance(text, ReportedTarget) else None


def parse_all(targets: str | AnyTarget | Iterable[str | AnyTarget]) -> list[AnyTarget]:
    """The targets of one compile, each once, in order; raises TargetError as `parse`, and CompileError for none."""
    if isinstance(targets, (str, Target, GpuTarget)) or not isinstance(targets, Iterable):
        return [parse(targets)]
    found = list(dict.fromkeys(map(parse, targets)))
    if not found:
        raise CompileError("no target was given", hint="name one, for instance native")
    return found


def parse_cpu(text: str | AnyTarget) -> Target:
    """The target that `text` names, which must be a CPU; raises TargetError, as `parse`."""
    target = parse(text)
    if not isinstance(target, Target):
        raise TargetError(f"{str(text)!r} is a GPU; a CPU is needed here", hint="name a CPU, for instance native")
    return target


def known_tags() -> tuple[str, ...]:
    """Every tag, level and kind that `parse` takes by itself, sorted."""
    boards = [board.tag for board in BOARDS] + [board.tag for board in GPU_BOARDS]
    return tuple(sorted([*boards, *(cpu.name for cpu in _LEVELS), *GPU_KINDS, "native"]))


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise TargetError(f"target {text!r}: {error}", hint="check the quotes") from error
    if not words:
        raise TargetError("an empty target", hint="name one, for instance native or raspberry-pi/4b")
    return words


def _parse_cpu(text: str, words: list[str], reported: frozenset[str] | None) -> Target:
    draft = _head(words[0])
    for name, value in options(text, words[1:], _OPTIONS):
        _apply(draft, name, value)
    if reported is not None and draft.arch is not None:
        _take_for_known(draft, draft.arch, reported)
    return _finish(draft, text)


def _take_for_known(draft: _Draft, arch: Arch, reported: frozenset[str]) -> None:
    """Leave of a device's target what is known here: its agent may be newer. `reported` is all that its CPU has."""
    known = {*arch.known_features, *arch.baseline}
    unknown = [attr[1:] for attr in draft.attrs if attr[0] == "+" and attr[1:] not in known]
    draft.attrs = [attr for attr in draft.attrs if attr[1:] in known]
    if draft.cpu_name is None or find_cpu(draft.cpu_name, arch) is not None:
        if unknown:
            warnings.warn(
                f"the device's CPU has {', '.join(unknown)}, which this kedge does not know and code does without: "
                "a newer kedge may compile faster code",
                CompileWarning,
                stacklevel=2,
            )
        return
    # The name promised some of these, so that the target does not list them.
    usable = {
        feature for feature in reported & known if closure(arch, frozenset((feature,))) <= reported | {*arch.baseline}
    }
    draft.cpu = best_cpu(draft.cpu_name, arch, frozenset(usable))
    warnings.warn(
        f"the device's CPU {draft.cpu_name!r} is not known to this kedge, and taken for {draft.cpu.name} with what it "
        "has beyond that: a newer kedge may compile faster code",
        CompileWarning,
        stacklevel=2,
    )
    draft.cpu_name = draft.cpu.name
    draft.attrs += [f"+{feature}" for feature in sorted(usable)]


def _parse_host(text: str, reported: frozenset[str] | None) -> Target:
    """The target of a GPU's host."""
    words = _words(text)
    if gpu_head(words[0]) is not None:
        raise TargetError(f"-host={text!r}: the host of a GPU is a CPU", hint='for instance -host="native"')
    return _parse_cpu(text, words, reported)


def _head(word: str) -> _Draft:
    if word == "native":
        from kedge.compiler.target.host import native

        host = native()
        return _Draft(host.arch, base=host, num_cores=host.num_cores)
    if word == "llvm":
        return _Draft()
    if word in _PLANNED:
        raise TargetError(
            f"target kind {word!r} is known but not built yet",
            hint="this version generates code for CPUs (llvm) and for GPUs (opencl, cuda)",
        )
    for board in BOARDS:
        if board.tag == word:
            return _Draft(board.arch, find_cpu(board.cpu, board.arch), board.cpu, board.num_cores)
    for level in _LEVELS:
        if level.name == word:
            return _Draft(level.arch, level, level.name)
    if any(cpu.name == word for cpu in CPUS):
        raise TargetError(f"{word!r} is a CPU, not a target by itself", hint=f'write "llvm -mcpu={word}"')
    raise TargetError(f"unknown target {word!r}", hint=nearest(word, [*known_tags(), "llvm"]))


def _apply(draft: _Draft, name: str, value: str) -> None:
    if name == "-mtriple":
        arch = _arch_of_triple(value)
        if draft.arch is not None and draft.arch is not arch:
            raise TargetError(f"-mtriple={value} contradicts the target, which is {draft.arch.name}")
        draft.arch = arch
    elif name == "-mcpu":
        draft.cpu_name = value
        draft.base = None
    elif name == "-mattr":
        draft.attrs += [item for item in value.split(",") if item and item != "none"]
    elif name == "-num-cores":
        draft.num_cores = positive(name, value)
    elif name in ("-fma", "-loads", "-stores"):
        draft.rates[name] = rate(name, value)
    else:
        draft.sizes[name] = size(name, value) if name == "-l3" else positive(name, value)


def _arch_of_triple(triple: str) -> Arch:
    machine, _, system = triple.partition("-")
    for arch in ARCHS:
        if machine in arch.aliases:
            if system and "linux" not in system.split("-"):
                raise TargetError(
                    f"triple {triple!r}: kedge makes code for Linux only", hint=f"for instance {machine}-linux-gnu"
                )
            _check_environment(triple, arch)
            return arch
    known = [f"{alias}-linux-gnu" for arch in ARCHS for alias in arch.aliases[:1]]
    raise TargetError(f"triple {triple!r}: unknown architecture {machine!r}", hint=nearest(triple, known))


def _check_environment(triple: str, arch: Arch) -> None:
    """Refuse a C library or a calling convention that the runtime, which loads what is compiled, is not made for."""
    own = arch.triple.rpartition("-")[2]
    environment = triple.partition("linux")[2].removeprefix("-")
    if environment not in ("", "gnu", own):
        raise TargetError(
            f"triple {triple!r}: kedge's runtime and runner are for glibc, not {environment!r}",
            hint=f"{arch.triple}, for a system that has glibc 2.17 or newer (RISC-V: 2.27)",
        )


def _finish(draft: _Draft, text: str) -> Target:
    if draft.cpu_name is not None and (draft.cpu is None or draft.cpu.name != draft.cpu_name):
        draft.cpu = _find_cpu(draft)
        draft.arch = draft.cpu.arch
    if draft.arch is None:
        raise TargetError(
            f"target {text!r} does not say which architecture", hint="add -mtriple=aarch64-linux-gnu or -mcpu=…"
        )
    cpu = draft.cpu or find_cpu(draft.arch.generic_cpu, draft.arch)
    assert cpu is not None, f"no generic CPU for {draft.arch.name}"
    known = draft.base or cpu
    name = draft.base.cpu if draft.base is not None else cpu.name
    features = closure(draft.arch, frozenset(known.features))
    for attr in draft.attrs:
        features = _change(draft.arch, features, attr)
    usual = throughput_of(draft.arch, name, features)
    return Target(
        draft.arch,
        name,
        tuple(sorted(features)),
        draft.num_cores,
        draft.sizes.get("-l1", known.l1_bytes),
        draft.sizes.get("-l2", known.l2_bytes),
        draft.sizes.get("-l3", known.l3_bytes),
        Throughput(
            draft.rates.get("-fma", usual.fma_per_cycle),
            draft.sizes.get("-fma-latency", usual.fma_latency),
            draft.rates.get("-loads", usual.loads_per_cycle),
            draft.rates.get("-stores", usual.stores_per_cycle),
        ),
    )


def _find_cpu(draft: _Draft) -> Cpu:
    name = draft.cpu_name or ""
    archs = (draft.arch,) if draft.arch is not None else ARCHS
    found = [cpu for cpu in CPUS if cpu.name == name and cpu.arch in archs]
    if not found:
        known = [cpu.name for cpu in CPUS if cpu.arch in archs]
        where = f" of {draft.arch.name}" if draft.arch is not None else ""
        raise TargetError(f"unknown CPU {name!r}{where}", hint=nearest(name, known))
    if len(found) > 1:
        # The 64-bit system is what such a board runs today; a triple says otherwise.
        found = [cpu for cpu in found if cpu.arch.pointer_bits == 64] or found
    return found[0]


def _change(arch: Arch, features: frozenset[str], attr: str) -> frozenset[str]:
    sign, name = attr[0], attr[1:]
    if sign not in "+-":
        raise TargetError(f"-mattr: {attr!r} needs a sign", hint=f"write +{attr} or -{attr}")
    if name in arch.baseline:
        if sign == "-":
            raise TargetError(f"-mattr: {arch.name} always has {name!r}; it cannot be switched off")
        return features
    if name not in arch.known_features:
        raise TargetError(f"-mattr: unknown feature {name!r} of {arch.name}", hint=nearest(name, arch.known_features))
    if sign == "+":
        return features | closure(arch, frozenset((name,)))
    return features - dependents(arch, name)
