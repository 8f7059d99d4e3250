"""Which variant runs on a machine, and where on it; what is said when none does; how a manifest says what it needs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kedge.rpc import abi
from kedge.rpc.accelerator import Accelerator
from kedge.rpc.artifact import Found, Manifest, Variant, VariantDevice, make_member, needs_of, place
from kedge.rpc.artifact.place import parse_device
from kedge.rpc.errors import ArtifactError, IncompatibleTargetError, InputError
from kedge.rpc.types import DeviceInfo

CUDA, OPENCL = VariantDevice("cuda", "sm_80", 1024, 49152), VariantDevice("opencl", "", 256, 32768)
H200 = Accelerator("cuda", 0, "H200", "580", "sm_90", ("fp16", "fp64"), 1 << 37, 49152, 1024, 132)
T4 = Accelerator("cuda", 1, "T4", "580", "sm_75", ("fp16", "fp64"), 1 << 34, 49152, 1024, 40)
MALI = Accelerator("opencl", 0, "Mali-T860", "1.2", "OpenCL C 1.2", (), 1 << 31, 32768, 256, 4)


def variant(device: VariantDevice | None = None, features: tuple[str, ...] = (), arch: str = "x86_64") -> Variant:
    return Variant(
        "llvm" if device is None else device.kind, arch, f"{arch}-linux-gnu", features, "lib.so", device=device
    )


def manifest(*variants: Variant) -> Manifest:
    return Manifest("m", abi.ABI_VERSION, "test", (), variants, (make_member("lib.so", b"code"),))


class Machine:
    """GPUs that are there, and which kinds were asked for."""

    def __init__(self, *gpus: Accelerator) -> None:
        self.gpus = gpus
        self.asked: list[str] = []

    def __call__(self, kind: str) -> Found:
        self.asked.append(kind)
        return Found(tuple(gpu for gpu in self.gpus if gpu.kind == kind), "" if self.gpus else f"no lib{kind}.so")


@pytest.mark.parametrize(
    ("variants", "gpus", "device", "chosen", "where"),
    [
        ((variant(CUDA), variant()), (H200,), "", 0, "cuda:0"),
        ((variant(CUDA), variant()), (T4,), "", 1, "cpu"),
        ((variant(CUDA), variant()), (T4, H200), "", 0, "cuda:0"),
        ((variant(CUDA), variant()), (), "", 1, "cpu"),
        ((variant(CUDA), variant()), (H200,), "cpu", 1, "cpu"),
        ((variant(), variant(CUDA)), (H200,), "", 0, "cpu"),
        ((variant(), variant(CUDA)), (H200,), "cuda", 1, "cuda:0"),
        ((variant(CUDA), variant(OPENCL)), (MALI,), "", 1, "opencl:0"),
        ((variant(CUDA), variant(OPENCL)), (MALI, H200), "opencl:0", 1, "opencl:0"),
        ((variant(VariantDevice("cuda", "sm_75")),), (H200, T4), "cuda:1", 0, "cuda:1"),
        # Of the kind that is chosen, what asks most of the machine.
        ((variant(VariantDevice("cuda", "sm_75")), variant(CUDA), variant()), (H200,), "", 1, "cuda:0"),
        ((variant(), variant(features=("avx2",)), variant(features=("avx512f",))), (), "", 1, "cpu"),
        ((variant(VariantDevice("cuda", "sm_90a")), variant(CUDA)), (H200,), "", 0, "cuda:0"),
        ((variant(VariantDevice("cuda", "sm_90a")), variant(CUDA)), (Accelerator("cuda", 0, "B200", "", "sm_100", (),
          0, 49152, 1024),), "", 1, "cuda:0"),
        ((variant(VariantDevice("opencl", features=("fp64",))), variant()), (MALI,), "", 1, "cpu"),
    ],
)  # fmt: skip
def test_the_first_variant_that_fits_decides(
    variants: tuple[Variant, ...], gpus: tuple[Accelerator, ...], device: str, chosen: int, where: str
) -> None:
    found = place(manifest(*variants), "x86_64", {"avx2"}, Machine(*gpus), device)
    assert (variants.index(found.variant), found.device) == (chosen, where)


@pytest.mark.parametrize(
    ("variants", "gpus", "device", "message", "hint"),
    [
        ((variant(OPENCL),), (), "", "needs an OpenCL device, and there is none (no libopencl.so)", "libOpenCL.so.1"),
        ((variant(CUDA),), (), "", "needs a CUDA device, and there is none (no libcuda.so)", "NVIDIA's driver"),
        ((variant(CUDA), variant(VariantDevice("cuda", "sm_90"))), (), "", "machine: each of 'cuda -arch=sm_80' (host "
         "x86_64), 'cuda -arch=sm_90' (host x86_64) needs a CUDA device, and there is none (no libcuda.so)", "NVIDIA"),
        ((variant(CUDA),), (T4,), "", "cuda:1 (T4) is sm_75, not sm_80 or newer", "compile it for this machine"),
        ((variant(CUDA),), (H200,), "cuda:3", "should run on cuda:3, but there are only cuda:0 (H200)", "name one"),
        ((variant(VariantDevice("opencl", "", 512)),), (MALI,), "", "has 256 threads in a block, not 512", "compile"),
        ((variant(VariantDevice("opencl", features=("fp64",))),), (MALI,), "", "lacks fp64", "compile"),
        ((variant(CUDA), variant()), (MALI,), "opencl", "no variant for opencl: it has 'cuda -arch=sm_80'", "opencl"),
        ((variant(CUDA),), (H200,), "cpu", "no variant for cpu: it has 'cuda", "--target native"),
        ((variant(CUDA, arch="aarch64"),), (H200,), "", "is for aarch64", "kedge devices"),
        ((variant(CUDA), variant(features=("amx-tile",))), (), "", "there is none (no libcuda.so); 'llvm' needs CPU "
         "features this machine lacks: amx-tile", "NVIDIA"),
        ((), (), "", "no variant for any device", "native"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_why(
    variants: tuple[Variant, ...], gpus: tuple[Accelerator, ...], device: str, message: str, hint: str
) -> None:
    with pytest.raises(IncompatibleTargetError) as caught:
        place(manifest(*variants), "x86_64", (), Machine(*gpus), device)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_drivers_are_asked_only_where_it_matters() -> None:
    machine = Machine(H200)
    place(manifest(variant(), variant(CUDA)), "x86_64", (), machine)
    place(manifest(variant(CUDA), variant()), "x86_64", (), machine, "cpu")
    place(manifest(variant(CUDA, arch="aarch64"), variant()), "x86_64", (), machine)
    assert machine.asked == []
    place(manifest(variant(CUDA), variant(OPENCL), variant()), "x86_64", (), machine)
    assert machine.asked == ["cuda"]


@pytest.mark.parametrize(
    "text", ["gpu", "cuda:", "cuda:x", "cpu:0", "opencl:-1", "OpenCL", "cuda:0,cuda:1", "cuda:12345"]
)
def test_a_device_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="there is no device"):
        parse_device(text)


def test_needs_are_met_by_the_devices_that_place_would_choose() -> None:
    both = manifest(variant(CUDA), variant(features=("avx2",)))
    plain, fast = DeviceInfo("a", "x86_64", cpu_features=("avx2",)), DeviceInfo("b", "x86_64", accelerators=(H200,))
    assert [[need.is_met_by(info) for need in needs_of(both)] for info in (plain, fast)] == [
        [False, True],
        [True, False],
    ]
    assert [need.is_met_by(fast) for need in needs_of(both, "cuda:1")] == [False]
    assert [str(need) for need in needs_of(both)] == ["x86_64 with cuda", "x86_64"]


def test_a_manifest_with_devices_reads_back_and_one_without_stays_as_it_was() -> None:
    with_gpu = manifest(variant(VariantDevice("cuda", "sm_90", 1024, 49152, ("fp16",))), variant())
    assert Manifest.from_json(with_gpu.to_json()) == with_gpu
    first, second = json.loads(with_gpu.to_json())["variants"]
    assert first["device"] == {
        "kind": "cuda", "arch": "sm_90", "max_threads": 1024, "shared_bytes": 49152, "features": ["fp16"],
    }  # fmt: skip
    assert set(second) == {"target", "arch", "triple", "features", "lib", "weights", "weights_offset"}


@pytest.mark.parametrize(
    "device", [{}, "cuda", {"kind": 1}, {"kind": "cuda", "max_threads": -1}, {"kind": "cuda", "features": [1]}]
)
def test_a_malformed_device_is_refused(device: object) -> None:
    tree = json.loads(manifest(variant(CUDA)).to_json())
    tree["variants"][0]["device"] = device
    with pytest.raises(ArtifactError, match="malformed"):
        Manifest.from_json(json.dumps(tree).encode())


@pytest.mark.parametrize("arch", ["sm_", "sm_90b", "compute_90", "sm_" + 5000 * "9", "sm_\u0669\u0660"])
def test_a_generation_that_is_none_fits_nowhere(arch: str) -> None:
    odd = manifest(variant(VariantDevice("cuda", arch)), variant())
    assert place(Manifest.from_json(odd.to_json()), "x86_64", (), Machine(H200)).device == "cpu"
    assert not needs_of(odd)[0].is_met_by(DeviceInfo("a", "x86_64", accelerators=(H200,)))


def test_kernels_on_a_gpu_need_one_thread_of_the_host() -> None:
    gpu, cpu = (place(manifest(variant(CUDA), variant()), "x86_64", (), Machine(H200), on) for on in ("cuda", "cpu"))
    assert [(at.threads(0, 8), at.threads(3, 8)) for at in (gpu, cpu)] == [(1, 3), (8, 3)]


def test_a_kind_of_device_from_a_newer_kedge_fits_nowhere() -> None:
    newer = manifest(variant(VariantDevice("metal")), variant())
    machine = Machine(H200)
    assert place(newer, "x86_64", (), machine).device == "cpu"
    assert machine.asked == [], "nobody could answer"
    with pytest.raises(IncompatibleTargetError, match=r"'metal' .* is for metal, which this kedge does not know"):
        place(manifest(variant(VariantDevice("metal"))), "x86_64", (), machine)


@pytest.mark.parametrize("other", [abi.ABI_VERSION - 1, abi.ABI_VERSION + 1])
def test_an_artifact_of_another_abi_is_refused_as_such(other: int) -> None:
    """Also where none of its variants would fit: what they ask for may be written down in another way."""
    for variants in ((variant(),), (variant(CUDA),), ()):
        with pytest.raises(IncompatibleTargetError, match=f"has ABI {other}, this kedge speaks {abi.ABI_VERSION}"):
            place(replace(manifest(*variants), abi=other), "x86_64", (), Machine())
