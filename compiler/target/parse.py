"""Target strings: a board's tag, a CPU level, `native`, or a kind with options."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from kedge.compiler.errors import TargetError
from kedge.compiler.target.arch import ARCHS, X86_64, Arch, closure, dependents
from kedge.compiler.target.cpus import BOARDS, CPUS, Cpu, find_cpu
from kedge.compiler.target.model import Target

_PLANNED = ("opencl", "cuda", "rocm", "c")
_OPTIONS = ("-mtriple", "-mcpu", "-mattr", "-num-cores", "-l1", "-l2")
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
    base: Target | None = None


def parse(text: str | Target) -> Target:
    """The target that `text` names; a `Target` is returned as it is.

    Accepts a tag ("raspberry-pi/4b"), a level ("x86-64-v3"), "native", or "llvm" with options, for instance
    `llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72 -mattr=+dotprod -num-cores=4`. Options may follow a tag, too.

    Raises:
        TargetError: an unknown tag, CPU, feature or option; the hint names the nearest known ones.
    """
    if isinstance(text, Target):
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise TargetError(f"target {text!r}: {error}", hint="check the quotes") from error
    if not words:
        raise TargetError("an empty target", hint="name one, for instance native or raspberry-pi/4b")
    draft = _head(words[0])
    for name, value in _options(text, words[1:]):
        _apply(draft, name, value)
    return _finish(draft, text)


def known_tags() -> tuple[str, ...]:
    """Every tag and level that `parse` takes by itself, sorted."""
    return tuple(sorted([board.tag for board in BOARDS] + [cpu.name for cpu in _LEVELS] + ["native"]))


def _head(word: str) -> _Draft:
    if word == "native":
        from kedge.compiler.target.host import native

        host = native()
        return _Draft(host.arch, base=host, num_cores=host.num_cores)
    if word == "llvm":
        return _Draft()
    if word in _PLANNED:
        raise TargetError(
            f"target kind {word!r} is known but not built yet", hint="this version generates code for CPUs: llvm"
        )
    for board in BOARDS:
        if board.tag == word:
            return _Draft(board.arch, find_cpu(board.cpu, board.arch), board.cpu, board.num_cores)
    for level in _LEVELS:
        if level.name == word:
            return _Draft(level.arch, level, level.name)
    if any(cpu.name == word for cpu in CPUS):
        raise TargetError(f"{word!r} is a CPU, not a target by itself", hint=f'write "llvm -mcpu={word}"')
    raise TargetError(f"unknown target {word!r}", hint=_nearest(word, [*known_tags(), "llvm"]))


def _options(text: str, words: list[str]) -> Iterable[tuple[str, str]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise TargetError(f"target {text!r}: unexpected {word!r}", hint="options look like -mcpu=cortex-a72")
        name, equals, value = word.partition("=")
        name = "-" + name.lstrip("-")
        if name not in _OPTIONS:
            raise TargetError(f"target {text!r}: unknown option {name}", hint=_nearest(name, _OPTIONS))
        if not equals:
            if not rest or rest[0].startswith("-"):
                raise TargetError(f"target {text!r}: option {name} needs a value", hint=f"write {name}=VALUE")
            value = rest.pop(0)
        yield name, value


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
    else:
        try:
            number = int(value)
        except ValueError:
            raise TargetError(f"{name}={value}: not a number") from None
        if number < 1:
            raise TargetError(f"{name}={value}: must be at least 1")
        if name == "-num-cores":
            draft.num_cores = number
        else:
            draft.sizes[name] = number


def _arch_of_triple(triple: str) -> Arch:
    machine, _, system = triple.partition("-")
    for arch in ARCHS:
        if machine in arch.aliases:
            if system and "linux" not in system.split("-"):
                raise TargetError(
                    f"triple {triple!r}: kedge makes code for Linux only", hint=f"for instance {machine}-linux-gnu"
                )
            return arch
    known = [f"{alias}-linux-gnu" for arch in ARCHS for alias in arch.aliases[:1]]
    raise TargetError(f"triple {triple!r}: unknown architecture {machine!r}", hint=_nearest(triple, known))


def _finish(draft: _Draft, text: str) -> Target:
    if draft.cpu_name is not None and (draft.cpu is None or draft.cpu.name != draft.cpu_name):
        draft.cpu = _find_cpu(draft)
        draft.arch = draft.cpu.arch
    if draft.arch is None:
        raise TargetError(
            f"target {text!r} does not say which architecture", hint="add -mtriple=aarch64-linux-gnu or -mcpu=…"
        )
    if draft.base is not None:
        name, features = draft.base.cpu, frozenset(draft.base.features)
        l1, l2 = draft.base.l1_bytes, draft.base.l2_bytes
    else:
        cpu = draft.cpu or find_cpu(draft.arch.generic_cpu, draft.arch)
        assert cpu is not None, f"no generic CPU for {draft.arch.name}"
        name, features, l1, l2 = cpu.name, closure(draft.arch, frozenset(cpu.features)), cpu.l1_bytes, cpu.l2_bytes
    for attr in draft.attrs:
        features = _change(draft.arch, features, attr)
    return Target(
        draft.arch,
        name,
        tuple(sorted(features)),
        draft.num_cores,
        draft.sizes.get("-l1", l1),
        draft.sizes.get("-l2", l2),
    )


def _find_cpu(draft: _Draft) -> Cpu:
    name = draft.cpu_name or ""
    archs = (draft.arch,) if draft.arch is not None else ARCHS
    found = [cpu for cpu in CPUS if cpu.name == name and cpu.arch in archs]
    if not found:
        known = [cpu.name for cpu in CPUS if cpu.arch in archs]
        where = f" of {draft.arch.name}" if draft.arch is not None else ""
        raise TargetError(f"unknown CPU {name!r}{where}", hint=_nearest(name, known))
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
        raise TargetError(f"-mattr: unknown feature {name!r} of {arch.name}", hint=_nearest(name, arch.known_features))
    if sign == "+":
        return features | closure(arch, frozenset((name,)))
    return features - dependents(arch, name)


def _nearest(word: str, known: Iterable[str]) -> str:
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
