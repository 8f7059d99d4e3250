"""Which variant of an artifact runs on a machine, and on which of its devices: its CPU, or a GPU.

Pure: what the machine has is passed in. GPUs are asked for only where a variant needs one, since finding them loads
drivers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    AbstractSet,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from kedge.rpc import abi
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact.manifest import Manifest, Variant, VariantDevice
from kedge.rpc.errors import IncompatibleTargetError, InputError

if TYPE_CHECKING:
    from kedge.rpc.types import DeviceInfo

CPU = "cpu"
GPU_KINDS = ("opencl", "cuda")
#: The DLDeviceType of each kind.
DEVICE_TYPES: Mapping[str, int] = {CPU: abi.DEVICE_CPU, "opencl": abi.DEVICE_OPENCL, "cuda": abi.DEVICE_CUDA}
#: For each kind: what people call one, and what a machine without any lacks.
_TITLES: Mapping[str, str] = {"opencl": "an OpenCL device", "cuda": "a CUDA device"}
INSTALL: Mapping[str, str] = {
    "opencl": "install libOpenCL.so.1 (Debian: ocl-icd-libopencl1) and the OpenCL driver of the GPU",
    "cuda": "install NVIDIA's driver, which brings libcuda.so.1",
}


@dataclass(frozen=True)
class Found:
    """The GPUs of one kind that a machine has; where it has none, `reason` may say why."""

    accelerators: Tuple[Accelerator, ...] = ()
    reason: str = ""


Look = Callable[[str], Found]


@dataclass(frozen=True)
class Placement:
    """A variant, and the device that it runs on: `kind` "cpu", "opencl" or "cuda" and the index among its kind."""

    variant: Variant
    kind: str = CPU
    index: int = 0

    @property
    def device(self) -> str:
        """As users write it: "cpu", "opencl:0"."""
        return CPU if self.kind == CPU else f"{self.kind}:{self.index}"

    @property
    def dl_device(self) -> Tuple[int, int]:
        """As DLPack has it: device type and id."""
        return DEVICE_TYPES[self.kind], self.index

    def threads(self, wanted: int, offered: int) -> int:
        """How many threads of the host to use where `wanted` were asked for, 0: all `offered`, or one beside a GPU."""
        return wanted or (offered if self.kind == CPU else 1)


def look_nowhere(kind: str) -> Found:
    """A machine without GPUs."""
    return Found()


def look_at(info: DeviceInfo) -> Look:
    """The GPUs that an agent reported."""
    return lambda kind: Found(tuple(gpu for gpu in info.accelerators if gpu.kind == kind))


def parse_device(text: str) -> Tuple[str, int]:
    """ "opencl:1" as ("opencl", 1), "cuda" as ("cuda", -1) for any of them, "" as ("", -1); raises InputError."""
    match = re.fullmatch(r"(?:(cpu)|(opencl|cuda)(?::(\d{1,4}))?)?", text)
    if match is None:
        raise InputError(
            f"there is no device {text!r} of a machine", hint="name cpu, opencl or cuda, or one by number: opencl:1"
        )
    cpu, gpu, index = match.groups()
    return cpu or gpu or "", int(index) if index is not None else -1


def place(
    manifest: Manifest, arch: str, features: Iterable[str], look: Look = look_nowhere, device: str = ""
) -> Placement:
    """The variant for a machine, and its device there.

    The artifact's first variant that fits decides whether a GPU is used, and of which kind; of that kind's variants
    that fit it takes the one that asks most of the machine.

    Args:
        manifest: of the artifact.
        arch: what `uname -m` prints there.
        features: of the CPU, in LLVM's names.
        look: the GPUs of a kind there; called only where it matters.
        device: only this one: "cpu", "opencl", "cuda:0"; "" leaves it open.

    Raises:
        InputError: `device` names none.
        IncompatibleTargetError: no variant fits, and the message says what each lacks; or the ABI is another.
    """
    if manifest.abi != abi.ABI_VERSION:
        raise IncompatibleTargetError(
            f"artifact {manifest.name!r} has ABI {manifest.abi}, this kedge speaks {abi.ABI_VERSION}",
            hint="compile the model again, or update the older of the two",
        )
    wanted, index = parse_device(device)
    machine = _Machine(arch, frozenset(features), look, index)
    candidates = _candidates(manifest, device, wanted)
    fitting: List[Placement] = []
    reasons: Dict[str, List[str]] = {}
    for variant in candidates:
        if fitting and kind_of(variant) != fitting[0].kind:
            continue
        found, reason = machine.fit(variant)
        if found is None:
            reasons.setdefault(reason, []).append(describe(variant))
        else:
            fitting.append(found)
    if fitting:
        return max(fitting, key=lambda placement: _demand(placement.variant))
    told = [f"{'each of ' * (len(those) > 1)}{', '.join(those)} {reason}" for reason, those in reasons.items()]
    raise IncompatibleTargetError(
        f"artifact {manifest.name!r} cannot run on this {arch} machine: {'; '.join(told)}",
        hint=machine.remedy(candidates),
    )


def kind_of(variant: Variant) -> str:
    """Where a variant's kernels run: "cpu" or the kind of GPU."""
    return CPU if variant.device is None else variant.device.kind


def describe(variant: Variant) -> str:
    """A variant for messages: the target string in quotes, of a GPU without what concerns its host's details."""
    if variant.device is None:
        return repr(variant.target)
    generation = f" -arch={variant.device.arch}" if variant.device.arch else ""
    return f"'{variant.device.kind}{generation}' (host {variant.arch})"


def lacks(arch: str, features: AbstractSet[str], variant: Variant) -> str:
    """What a machine's CPU lacks for a variant, or ""."""
    if variant.arch != arch:
        return f"is for {variant.arch}"
    missing = ", ".join(sorted(set(variant.features) - features))
    return f"needs CPU features this machine lacks: {missing}" if missing else ""


def gpu_lacks(gpu: Accelerator, need: VariantDevice) -> str:
    """What a GPU of the right kind lacks for a variant, or ""."""
    if not _runs(gpu.arch, need.arch):
        return f"is {gpu.arch or 'of an unknown generation'}, not {need.arch} or newer"
    missing = ", ".join(sorted(set(need.features) - set(gpu.features)))
    if missing:
        return f"lacks {missing}"
    for name, wanted, there in (
        ("threads in a block", need.max_threads, gpu.max_threads),
        ("bytes of shared memory", need.shared_bytes, gpu.shared_bytes),
    ):
        if there < wanted:
            return f"has {there} {name}, not {wanted}"
    return ""


@dataclass(frozen=True)
class Need:
    """What one variant asks of a machine: architecture, CPU features and, for a GPU, which (`index` -1: any)."""

    arch: str
    features: FrozenSet[str] = frozenset()
    device: Optional[VariantDevice] = None
    index: int = -1

    def __str__(self) -> str:
        return self.arch if self.device is None else f"{self.arch} with {self.device.kind}"

    def is_met_by(self, info: DeviceInfo) -> bool:
        """Whether an agent's machine has all that."""
        if info.arch != self.arch or not self.features <= set(info.cpu_features):
            return False
        need = self.device
        return need is None or any(
            gpu.kind == need.kind and self.index in (-1, gpu.index) and not gpu_lacks(gpu, need)
            for gpu in info.accelerators
        )


def needs_of(manifest: Manifest, device: str = "") -> Tuple[Need, ...]:
    """What each variant needs that may be placed on `device` (see `place`); raises as `place` does where none may."""
    wanted, index = parse_device(device)
    return tuple(Need(v.arch, frozenset(v.features), v.device, index) for v in _candidates(manifest, device, wanted))


def _candidates(manifest: Manifest, device: str, wanted: str) -> List[Variant]:
    candidates = [v for v in manifest.variants if wanted in ("", kind_of(v))]
    if not candidates:
        have = ", ".join(map(describe, manifest.variants)) or "none at all"
        raise IncompatibleTargetError(
            f"artifact {manifest.name!r} has no variant for {device or 'any device'}: it has {have}",
            hint=f"compile it with --target {'native' if wanted in ('', CPU) else wanted}, too",
        )
    return candidates


@dataclass(frozen=True)
class _Machine:
    arch: str
    features: AbstractSet[str]
    look: Look
    index: int  # of the GPU that is wanted; -1: any

    def fit(self, variant: Variant) -> Tuple[Optional[Placement], str]:
        """Where the variant runs here, or None and why it does not."""
        reason = lacks(self.arch, self.features, variant)
        if reason:
            return None, reason
        need = variant.device
        if need is None:
            return Placement(variant), ""
        if need.kind not in GPU_KINDS:
            return None, f"is for {need.kind}, which this kedge does not know"
        found = self.look(need.kind)
        gpus = [gpu for gpu in found.accelerators if self.index in (-1, gpu.index)]
        reasons = [f"{_title(gpu)} {gpu_lacks(gpu, need)}" for gpu in gpus]
        for gpu in gpus:
            if not gpu_lacks(gpu, need):
                return Placement(variant, need.kind, gpu.index), ""
        if gpus:
            return None, f"fits no device here: {', '.join(reasons)}"
        if found.accelerators:
            there = ", ".join(map(_title, found.accelerators))
            return None, f"should run on {need.kind}:{self.index}, but there are only {there}"
        why = f" ({found.reason})" if found.reason else ""
        return None, f"needs {_TITLES[need.kind]}, and there is none{why}"

    def remedy(self, candidates: Sequence[Variant]) -> str:
        """What to do about variants that do not fit."""
        kinds = {kind_of(variant) for variant in candidates if not lacks(self.arch, self.features, variant)}
        absent = [kind for kind in GPU_KINDS if kind in kinds and not self.look(kind).accelerators]
        if absent:
            return "; ".join(INSTALL[kind] for kind in absent) + "; or compile it for the CPU, too: --target native"
        there = [gpu for kind in GPU_KINDS if kind in kinds for gpu in self.look(kind).accelerators]
        if there and self.index not in (-1, *(gpu.index for gpu in there)):
            return f"name one that is there: {', '.join(gpu.device for gpu in there)}"
        return "compile it for this machine: --target native here, or the target that `kedge devices` shows"


def _title(gpu: Accelerator) -> str:
    return f"{gpu.device} ({gpu.name})"


def _runs(have: str, need: str) -> bool:
    """Whether code for the generation `need` runs on `have`: the same or a newer one; sm_90a only on sm_90 itself."""
    if not need or have == need:
        return True
    numbers = [re.fullmatch(r"sm_([0-9]{1,4})(a?)", name) for name in (have, need)]
    if numbers[0] is None or numbers[1] is None:
        return False
    level, wanted = int(numbers[0].group(1)), int(numbers[1].group(1))
    return level == wanted if numbers[1].group(2) else level >= wanted


def _demand(variant: Variant) -> Tuple[int, int]:
    """How much a variant asks of a machine: the more, the better it uses it."""
    digits = re.sub(r"\D", "", variant.device.arch) if variant.device is not None else ""
    return int(digits or 0), len(variant.features)
