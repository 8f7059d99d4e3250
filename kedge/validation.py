"""Is an artifact right? Its outputs against the ONNX reference evaluator's, and layer by layer against the graph's.

The layers are the fused groups that became kernels. They are compiled once more with every group as an output, for the
target that the device takes, and run there; what they should be is computed operator by operator in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import kedge
from kedge.artifact import external_functions
from kedge.compiler.graph.external import External
from kedge.compiler.graph.ir import Call, ExternalCall, Function, Fused, Module, Value
from kedge.rpc.artifact import Artifact
from kedge.rpc.client.inputs import arrange
from kedge.rpc.errors import IncompatibleTargetError, InputError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage

Array = np.ndarray[Any, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one array is from its reference. `max_rel` is the largest error over the reference's largest value.

    `external` names the C function from outside that computes a layer.
    """

    name: str
    max_abs: float
    max_rel: float
    ok: bool
    external: str = ""


@dataclass(frozen=True, slots=True)
class Validation:
    """The differences per output, and per layer in the order of computation where layers were asked for.

    `skipped` says why layers were not compared although they were asked for.
    """

    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether every output is within the tolerances, and everything that external code computes.

        A mistake of foreign code may well hide behind what follows it; kedge's own layers only help to find a mistake.
        """
        return self.outcome.ok

    @property
    def wrong_externals(self) -> tuple[Difference, ...]:
        """The layers that external code computes wrong."""
        return tuple(layer for layer in self.layers if layer.external and not layer.ok)

    @property
    def outcome(self) -> Outcome:
        """Ok, or a wrong result, which says how far off what is."""
        wrong = [item for item in (*self.outputs, *self.wrong_externals) if not item.ok]
        if not wrong:
            return Outcome(OutcomeKind.OK)
        said = ", ".join(f"{item.external or item.name} by {item.max_abs:.3g}" for item in wrong)
        return Outcome(OutcomeKind.WRONG_RESULT, Stage.RUN, message=f"off the reference: {said}")

    @property
    def worst_layer(self) -> Difference | None:
        """The layer with the largest relative error; a NaN is worse than any number."""
        return max(self.layers, key=lambda layer: (np.isnan(layer.max_rel), layer.max_rel), default=None)

    def to_json(self) -> dict[str, Any]:
        """The differences as JSON-able values."""
        worst = self.worst_layer
        return {
            "ok": self.ok,
            "outcome": self.outcome.kind.value,
            "outputs": [asdict(output) for output in self.outputs],
            "layers": [asdict(layer) for layer in self.layers],
            "worst_layer": asdict(worst) if worst else None,
            "layers_skipped": self.skipped or None,
        }


@dataclass(frozen=True, slots=True)
class ExposeGroups:
    """A pass that makes every fused group an output: `f(x) -> y` becomes `f(x) -> y, group 0, group 1, …`."""

    name: str = "expose-groups"

    def __call__(self, module: Module) -> Module:
        """The module with more outputs."""
        return replace(module, functions={name: _exposed(function) for name, function in module.functions.items()})


def _exposed(function: Function) -> Function:
    known = {id(value) for value in function.outputs}
    groups: list[Value] = []
    names: list[str] = []
    for value in function.values():
        if isinstance(value, (Call, Fused)) and len(value.types) == 1 and id(value) not in known:
            groups.append(value)
            names.append(f"{len(names)}: {', '.join(value.origin) or type(value).__name__}")
    return replace(
        function,
        outputs=(*function.outputs, *groups),
        output_names=(*function.output_names, *names),
    )


def validate(
    model: Path,
    artifact: Artifact,
    inputs: Mapping[str, Array],
    device: Any,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
    layers: bool = True,
    externals: Sequence[External] = (),
    progress: Progress = lambda what: None,
) -> Validation:
    """Compare an artifact on a device (`kedge.local()` or a session) with its model.

    What external code computes is compared as everything else is: with the operators that it stands for.

    Args:
        model: the `.onnx` file that the artifact was compiled from.
        inputs: one array per input.
        rtol: allowed error relative to the largest value of the reference.
        atol: allowed absolute error.
        layers: also compile, run and compare every fused group.
        externals: those that the artifact was compiled with, so that layers can be compiled again. Outputs are
            compared without, too.

    Raises:
        InputError: the inputs do not fit, or the artifact's outputs are not the model's.
        FrontendError: the model cannot be read, or the reference evaluator cannot run it.
    """
    from kedge.compiler.frontend.onnx.reference import reference_outputs

    progress(f"reading {model.name}")
    kedge.load(model)  # says what is wrong with the file; the reference evaluator does not
    function = artifact.manifest.function("main")
    inputs = {port.name: array for port, array in zip(function.inputs, arrange(function, inputs), strict=True)}
    progress("running the reference evaluator")
    expected = reference_outputs(model, inputs)
    progress("running the artifact")
    actual = device.load(artifact).run(inputs)
    if set(expected) != set(actual):
        raise InputError(
            f"the artifact's outputs are {', '.join(sorted(actual))}, the model's {', '.join(sorted(expected))}",
            hint="was it compiled from this model?",
        )
    outputs = tuple(_difference(name, actual[name], expected[name], rtol, atol) for name in expected)
    given = {external.function for external in externals}
    missing = [name for name in external_functions(artifact.manifest) if name not in given]
    if layers and missing:
        return Validation(outputs, (), f"the artifact has external code that was not given: {', '.join(missing)}")
    found = _layers(model, artifact, inputs, device, rtol, atol, externals, progress) if layers else ()
    return Validation(outputs, found)


def _layers(
    model: Path,
    artifact: Artifact,
    inputs: Mapping[str, Array],
    device: Any,
    rtol: float,
    atol: float,
    externals: Sequence[External],
    progress: Progress,
) -> tuple[Difference, ...]:
    from kedge.compiler.graph.interp import run

    progress("compiling with every layer as an output")
    ports = artifact.manifest.function("main").inputs
    module = kedge.load(model, shapes={port.name: port.shape for port in ports})
    pipeline = kedge.pipeline("default").partition(externals).insert_after("fuse", ExposeGroups())
    # Layouts, and so layers, are a target's own.
    loaded, target = _load_first(
        device,
        [variant.target for variant in sorted(artifact.manifest.variants, key=lambda each: -len(each.features))],
        lambda target: kedge.compile(module, target, pipeline=pipeline, name=artifact.manifest.name),
    )
    progress("running layer by layer")
    optimized = pipeline.run(module, target)
    main = optimized.functions["main"]
    functions = {
        name: value.body.name
        for name, value in zip(main.output_names, main.outputs, strict=True)
        if isinstance(value, ExternalCall)
    }
    expected = run(optimized, inputs)
    actual = loaded.run(inputs)
    final = {port.name for port in artifact.manifest.function("main").outputs}
    return tuple(
        replace(
            _difference(name.partition(": ")[2], actual[name], expected[name], rtol, atol),
            external=functions.get(name, ""),
        )
        for name in expected
        if name not in final
    )


def _load_first(device: Any, targets: Sequence[str], make: Callable[[str], Artifact]) -> tuple[Any, str]:
    """What `make` gives for the first target that the device takes, loaded there, and that target."""
    for target in targets[:-1]:
        try:
            return device.load(make(target)), target
        except IncompatibleTargetError:
            continue
    return device.load(make(targets[-1])), targets[-1]


def _difference(name: str, actual: Array, expected: Array, rtol: float, atol: float) -> Difference:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise InputError(
            f"{name} is {actual.dtype}{list(actual.shape)}, the reference {expected.dtype}{list(expected.shape)}",
            hint="was the artifact compiled from this model?",
        )
    if expected.size == 0:
        return Difference(name, 0.0, 0.0, True)
    # Equal infinities and NaN in both are agreement; NaN in one is the worst disagreement.
    wide_actual, wide_expected = actual.astype(np.float64), expected.astype(np.float64)
    same = (wide_actual == wide_expected) | (np.isnan(wide_actual) & np.isnan(wide_expected))
    errors = np.where(same, 0.0, np.abs(wide_actual - np.where(same, 0.0, wide_expected)))
    finite = np.abs(wide_expected[np.isfinite(wide_expected)])
    scale = float(finite.max()) if finite.size else 0.0
    max_abs = float(errors.max())
    return Difference(name, max_abs, max_abs / scale if scale else max_abs, bool(max_abs <= atol + rtol * scale))
