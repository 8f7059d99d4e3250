"""ONNX's own test cases of single operators, and small networks, on a GPU that has no compiler beside it.

python benchmarks/gpu_conformance.py pack ARCHIVE.tar.xz --target nvidia/h200   # where kedge and its tests are
python benchmarks/gpu_conformance.py run ARCHIVE.tar.xz --runtime libkedge_rt.so   # there; needs numpy and ml_dtypes

What is packed passes in the interpreter, whose results the GPU's are held against with the tolerances of each case.
The runtime comes from `python benchmarks/cuda_smoke.py build FOLDER`. `run` prints how many ran, and which were wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / ".paths")]  # nothing is installed there

Arrays = dict[str, np.ndarray[Any, Any]]

#: Networks of models.py, the width and size that keep them small, and what they are there for.
NETWORKS = {
    "resnet18": (0.25, (64, 64)),  # residual additions, strided convolutions
    "mobilenetv2": (0.5, (64, 64)),  # depthwise convolutions, clipped activations
    "efficientnet": (0.5, (64, 64)),  # squeeze and excite
    "convnext": (0.25, (64, 64)),  # layer normalization, GELU
    "densenet121": (0.5, (64, 64)),  # concatenations
    "shufflenetv2": (1.0, (64, 64)),  # channels that change places
    "unet": (0.25, (64, 96)),  # transposed convolutions
}
NETWORK_TOLERANCE = 1e-4  # of the largest element


# What is packed ---------------------------------------------------------------------------------------------------


def bare(arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Shapes and element types as JSON, and the bytes: numpy's files do not know bfloat16."""
    facts = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
    return facts, {name: np.frombuffer(array.tobytes(), np.uint8) for name, array in arrays.items()}


def dressed(facts: dict[str, Any], raw: Any, prefix: str) -> Arrays:
    import ml_dtypes  # noqa: F401 - numpy knows its types by name from then on

    return {
        name: np.frombuffer(raw[f"{prefix}{position}"].tobytes(), kind).reshape(shape)
        for position, (name, (kind, shape)) in enumerate(facts.items())
    }


class Folder:
    """Artifacts with inputs and expected outputs, in a folder that is being filled."""

    def __init__(self, path: Path, target: str) -> None:
        self._path, self._target = path, target
        self.index: list[dict[str, Any]] = []
        self.refused: dict[str, str] = {}

    def add(self, name: str, source: Any, feeds: Arrays, outputs: Arrays, tolerance: dict[str, float]) -> None:
        import kedge
        from kedge.rpc.errors import KedgeError

        number = len(self.index)
        try:
            kedge.compile(source, target=self._target).save(self._path / f"{number}.kdg")
        except KedgeError as error:
            self.refused[name] = str(error).splitlines()[0]
            return
        entry: dict[str, Any] = {"name": name, "tolerance": tolerance}
        arrays: Arrays = {}
        for kind, some in (("i", feeds), ("o", outputs)):
            given = {key: np.asarray(array) for key, array in some.items()}
            entry[kind], raw = bare(given)
            arrays |= {f"{kind}{position}": raw[key] for position, key in enumerate(given)}
        np.savez(self._path / f"{number}.npz", **arrays)
        self.index.append(entry)

    def close(self) -> None:
        facts = {"target": self._target, "refused": self.refused, "cases": self.index}
        (self._path / "index.json").write_text(json.dumps(facts))


def pack(archive: Path, target: str, only: str) -> None:
    import models
    import onnx
    from frontend import test_conformance as conformance
    from rich.progress import track

    from kedge.compiler.errors import FrontendError
    from kedge.compiler.frontend.onnx import load_onnx
    from kedge.compiler.graph import interp

    with tempfile.TemporaryDirectory() as scratch:
        folder = Folder(Path(scratch), target)
        for case in track([case for case in conformance.load("node") if fnmatch(case.name, only)], "single operators"):
            model = case.model or onnx.load(str(Path(case.model_dir) / "model.onnx"))
            ran: list[Any] = []

            def evaluate(module: Any, feeds: Arrays, ran: list[Any] = ran) -> Arrays:
                results = conformance.interpreted(module, feeds)
                ran.append((module, feeds, results))
                return results

            try:
                conformance.check(case, model, evaluate)
            except (AssertionError, FrontendError, ValueError):
                continue  # what kedge does not claim, tests/frontend/test_conformance.py says
            for module, feeds, results in ran:
                folder.add(case.name, module, feeds, results, {"rtol": case.rtol, "atol": case.atol})
        networks = [each for each in NETWORKS.items() if fnmatch(each[0], only)]
        for name, (width, size) in track(networks, "networks"):
            network = models.MODELS[name]
            module = load_onnx(network.make(size=size, width=width).proto())
            feeds = network.inputs(size=size)
            folder.add(name, module, feeds, interp.run(module, feeds), {"largest": NETWORK_TOLERANCE})
        folder.close()
        with tarfile.open(archive, "w:xz") as packed:
            packed.add(scratch, ".")
    print(f"{len(folder.index)} packed into {archive}, {len(folder.refused)} refused", file=sys.stderr)


# What is run ------------------------------------------------------------------------------------------------------


def complaints(entry: dict[str, Any], got: Arrays, want: Arrays) -> Iterator[str]:
    tolerance = entry["tolerance"]
    for name, expected in want.items():
        array = got[name]
        if (array.dtype, array.shape) != (expected.dtype, expected.shape):
            yield f"{name}: {array.dtype}{array.shape}, not {expected.dtype}{expected.shape}"
        elif expected.dtype.kind not in "fV":
            if not np.array_equal(array, expected):
                yield f"{name}: other elements"
        else:
            one, other = array.astype(np.float64), expected.astype(np.float64)
            if "largest" in tolerance:
                close = np.abs(one - other).max() <= tolerance["largest"] * np.abs(other).max()
            elif str(expected.dtype) == "bfloat16":  # two units in the last place
                close = np.allclose(one, other, rtol=2**-6, atol=tolerance["atol"], equal_nan=True)
            else:
                close = np.allclose(one, other, **tolerance, equal_nan=True)
            if not close:
                with np.errstate(invalid="ignore"):
                    yield f"{name}: differs by {np.nanmax(np.abs(one - other)):.3g}"


def run(archive: Path, runtime: Path, device: str) -> dict[str, Any]:
    from kedge.rpc.artifact import Artifact
    from kedge.rpc.client.inprocess import open_in_process
    from kedge.rpc.errors import KedgeError

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        packed = json.loads((folder / "index.json").read_text())
        wrong: dict[str, str] = {}
        for number, entry in enumerate(packed["cases"]):
            raw = np.load(folder / f"{number}.npz")
            feeds, want = dressed(entry["i"], raw, "i"), dressed(entry["o"], raw, "o")
            try:
                with open_in_process(Artifact.load(folder / f"{number}.kdg"), runtime, device=device) as model:
                    found = list(complaints(entry, dict(model.run(feeds)), want))
            except KedgeError as error:
                found = [str(error)]
            if found:
                wrong[entry["name"]] = "; ".join(found)
    count = len(packed["cases"])
    return {
        "target": packed["target"],
        "run": count,
        "right": count - len(wrong),
        "wrong": wrong,
        "refused": packed["refused"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="compile all cases into an archive")
    packing.add_argument("archive", type=Path, metavar="ARCHIVE.tar.xz")
    packing.add_argument("--target", default="nvidia/h200", help="what to compile for (default: nvidia/h200)")
    packing.add_argument("--only", default="*", metavar="PATTERN", help="of ONNX's cases and the networks, by name")
    running = commands.add_parser("run", help="run what was packed")
    running.add_argument("archive", type=Path, metavar="ARCHIVE.tar.xz")
    running.add_argument("--runtime", type=Path, required=True, help="a libkedge_rt.so for this machine")
    running.add_argument("--device", default="cuda:0", help='default: cuda:0; "" is the CPU')
    options = parser.parse_args()
    if options.command == "pack":
        pack(options.archive, options.target, options.only)
        return 0
    report = run(options.archive, options.runtime, options.device)
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
