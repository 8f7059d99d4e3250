"""`kedge run`, `kedge bench`, `kedge validate`: an artifact at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.text import Text

from kedge.cli import output
from kedge.cli.arguments import (
    check_outputs,
    function_of,
    inputs_of,
    load_artifact,
    parse_bytes,
    reading,
    save_outputs,
)
from kedge.cli.externals import load_externals
from kedge.cli.place import Terms, check_on, open_device, require_device
from kedge.rpc.artifact.place import CPU

ArtifactArgument = Annotated[Path, typer.Argument(metavar="OUT.kdg", help="A compiled artifact.", show_default=False)]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="IN.npz", help="Arrays by input name. Without: seeded random data.", dir_okay=False
    ),
]
FunctionOption = Annotated[
    str,
    typer.Option("--function", help="The function to call; the only one, or main, unless named.", show_default=False),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The seed of random inputs.")]


def run(
    context: typer.Context,
    artifact: ArtifactArgument,
    inputs: InputsOption = None,
    outputs: Annotated[
        Path | None, typer.Option("--outputs", metavar="OUT.npz", help="Where to save the outputs.", dir_okay=False)
    ] = None,
    function: FunctionOption = "",
    shape: output.ShapeOption = None,
    seed: SeedOption = 0,
    threads: output.ThreadsOption = 0,
    on: output.OnOption = "",
    device: output.DeviceOption = None,
    tracker: output.TrackerOption = None,
    priority: output.PriorityOption = 0,
    queue_timeout: output.QueueTimeoutOption = None,
    transfer_timeout: output.TransferTimeoutOption = None,
    load_timeout: output.LoadTimeoutOption = None,
    timeout: output.TimeoutOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Run an artifact once, here or on a device, and show or save its outputs.

    Examples:

      kedge run digits.kdg

      kedge run digits.kdg --inputs images.npz --outputs probabilities.npz

      kedge run digits-gpu.kdg --on opencl:0

      kedge run digits-arm.kdg --device arch=aarch64 --tracker tracker:9190

      kedge run digits-arm.kdg --device rpi4-2 --tracker tracker:9190 --priority -1 --queue-timeout 3600 --timeout 60
    """
    terms = Terms(priority, queue_timeout, transfer_timeout, load_timeout, timeout)
    require_device(context, device, terms)
    check_on(on)
    check_outputs(outputs)
    loaded = load_artifact(artifact)
    data = inputs_of(function_of(loaded, function), inputs, shape, seed)
    with output.progress("run") as report, open_device(loaded, device, tracker, threads, report, terms, on) as place:
        results = place.load(loaded).run(data, function=function)
    if outputs:
        save_outputs(outputs, results)
    if as_json:
        output.emit_json({name: facts_of(array) for name, array in results.items()})
    else:
        show_outputs(results, outputs)


def show_outputs(results: Mapping[str, np.ndarray[Any, Any]], saved: Path | None) -> None:
    """Show what the outputs are like, and where it was saved."""
    table = output.table("output", "dtype", "shape", ">min", ">max", ">mean", "first values")
    for name, array in results.items():
        facts = facts_of(array)
        shown = [str(facts[key]) if facts[key] is None else f"{facts[key]:.4g}" for key in ("min", "max", "mean")]
        first = ", ".join(f"{value:.4g}" for value in array.reshape(-1)[:4])
        table.add_row(name, facts["dtype"], str(tuple(array.shape)), *shown, first)
    output.show(table)
    if saved:
        output.stdout().print(f"saved to {saved}", soft_wrap=True)


def facts_of(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What people want to know of an array before they look at it."""
    some = array.size > 0
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "min": float(array.min()) if some else None,
        "max": float(array.max()) if some else None,
        "mean": float(array.mean()) if some else None,
    }


def bench(
    context: typer.Context,
    artifact: ArtifactArgument,
    inputs: InputsOption = None,
    function: FunctionOption = "",
    shape: output.ShapeOption = None,
    seed: SeedOption = 0,
    threads: output.ThreadsOption = 1,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=100_000, help="Samples to take.")] = 20,
    number: Annotated[int, typer.Option("--number", min=1, help="Calls in a sample, before it grows.")] = 1,
    min_repeat_ms: Annotated[
        float | None,
        typer.Option(
            "--min-repeat-ms",
            min=0,
            help="Grow the calls in a sample until they take so long.",
            show_default="50; with --profile 10, with --cache-flush-bytes 0",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Untimed calls before the first sample.")] = 1,
    cooldown_interval_ms: Annotated[
        float, typer.Option("--cooldown-interval-ms", min=0, help="Pause so long between groups of samples.")
    ] = 0,
    repeats_to_cooldown: Annotated[
        int, typer.Option("--repeats-to-cooldown", min=1, help="Samples in such a group.")
    ] = 1,
    cache_flush_bytes: Annotated[
        str | None,
        typer.Option(
            "--cache-flush-bytes",
            metavar="SIZE",
            help="Walk over so much memory before every timed call, such as 64MiB.",
            show_default="none: caches stay warm",
        ),
    ] = None,
    limit_zero_time_iterations: Annotated[
        int,
        typer.Option("--limit-zero-time-iterations", min=0, help="Take a sample of no time after so many attempts."),
    ] = 100,
    profile: Annotated[bool, typer.Option("--profile", help="Time every kernel, and show them in a table.")] = False,
    on: output.OnOption = "",
    device: output.DeviceOption = None,
    tracker: output.TrackerOption = None,
    priority: output.PriorityOption = 0,
    queue_timeout: output.QueueTimeoutOption = None,
    transfer_timeout: output.TransferTimeoutOption = None,
    load_timeout: output.LoadTimeoutOption = None,
    timeout: output.TimeoutOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Time an artifact natively, here or on a device, in a fresh isolated process.

    Examples:

      kedge bench digits.kdg

      kedge bench digits.kdg --shape image=64,1,8,8 --threads 2 --repeat 50

      kedge bench digits.kdg --cache-flush-bytes 64MiB --repeat 100

      kedge bench digits.kdg --profile

      kedge bench digits-gpu.kdg --on cuda

      kedge bench digits-arm.kdg --device key=rpi4 --tracker tracker:9190 --json
    """
    terms = Terms(priority, queue_timeout, transfer_timeout, load_timeout, timeout)
    require_device(context, device, terms)
    check_on(on)
    loaded = load_artifact(artifact)
    data = inputs_of(function_of(loaded, function), inputs, shape, seed)
    how = {
        "repeat": repeat,
        "number": number,
        "min_repeat_ms": min_repeat_ms,
        "warmup": warmup,
        "cooldown_interval_ms": cooldown_interval_ms,
        "repeats_to_cooldown": repeats_to_cooldown,
        "cache_flush_bytes": parse_bytes(cache_flush_bytes) if cache_flush_bytes else 0,
        "limit_zero_time_iterations": limit_zero_time_iterations,
    }
    with (
        output.progress("bench") as report,
        open_device(loaded, device, tracker, threads, report, terms, on) as place,
    ):
        module = place.load(loaded)
        report(f"timing {repeat} samples on {module.device}")
        result = (module.profile if profile else module.time)(data, function=function, **how)
    timing = result.timing if profile else result
    if as_json:
        output.emit_json({**result.to_json(), "on": module.device})
    else:
        if profile:
            _show_profile(result)
        where = "" if module.device == CPU else f"on {module.device}\n"
        output.stdout().print(f"{where}{timing}", soft_wrap=True)
    if timing.verdict == "invalid":
        raise typer.Exit(1)


def _show_profile(profile: Any) -> None:
    table = output.table(*profile.COLUMNS)
    for row in profile.rows():
        table.add_row(*row)
    output.show(table)
    output.stdout().print(f"{profile.caption}\n", soft_wrap=True)


def validate(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="The model it was compiled from.", show_default=False)
    ],
    artifact: ArtifactArgument,
    inputs: InputsOption = None,
    shape: output.ShapeOption = None,
    seed: SeedOption = 0,
    rtol: Annotated[float, typer.Option("--rtol", min=0, help="Allowed error relative to the reference.")] = 1e-3,
    atol: Annotated[float, typer.Option("--atol", min=0, help="Allowed absolute error.")] = 1e-5,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Also compare layer by layer.")] = True,
    external: output.ExternalOption = None,
    threads: output.ThreadsOption = 0,
    on: output.OnOption = "",
    device: output.DeviceOption = None,
    tracker: output.TrackerOption = None,
    priority: output.PriorityOption = 0,
    queue_timeout: output.QueueTimeoutOption = None,
    transfer_timeout: output.TransferTimeoutOption = None,
    load_timeout: output.LoadTimeoutOption = None,
    timeout: output.TimeoutOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Compare an artifact's outputs with the ONNX reference evaluator's, and name the worst layer.

    Exits with 1 when an output differs by more than the tolerances, or a layer that external code computes.

    Examples:

      kedge validate digits.onnx digits.kdg

      kedge validate digits.onnx digits-arm.kdg --device arch=aarch64 --tracker tracker:9190
    """
    from kedge.validation import validate as compare

    terms = Terms(priority, queue_timeout, transfer_timeout, load_timeout, timeout)
    require_device(context, device, terms)
    check_on(on)
    externals = load_externals(external)
    loaded = load_artifact(artifact)
    data = inputs_of(function_of(loaded, "main"), inputs, shape, seed)
    with (
        output.compile_warnings(),
        reading(model),
        output.progress("validate") as report,
        open_device(loaded, device, tracker, threads, report, terms, on) as place,
    ):
        result = compare(
            model, loaded, data, place, rtol=rtol, atol=atol, layers=layers, externals=externals, progress=report
        )
    if as_json:
        output.emit_json(result.to_json())
    else:
        _show_validation(result)
    if not result.ok:
        raise typer.Exit(1)


def _show_validation(result: Any) -> None:
    table = output.table("output", ">max |error|", ">max |error| / max |reference|", "verdict")
    for item in result.outputs:
        table.add_row(
            item.name,
            f"{item.max_abs:.3g}",
            f"{item.max_rel:.3g}",
            Text("ok") if item.ok else Text("differs", style="red"),
        )
    output.show(table)
    for wrong in result.wrong_externals:
        output.stdout().print(
            f"external {wrong.external} differs at {wrong.name}: max |error| {wrong.max_abs:.3g}", soft_wrap=True
        )
    if result.skipped:
        output.stdout().print(f"layers are not compared: {result.skipped}; --external FILE.py gives it", soft_wrap=True)
    if result.worst_layer is not None:
        worst = result.worst_layer
        output.stdout().print(
            f"worst layer of {len(result.layers)}: {worst.name}, max |error| {worst.max_abs:.3g}", soft_wrap=True
        )
