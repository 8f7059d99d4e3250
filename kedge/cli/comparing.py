"""`kedge compare`: which of two artifacts is faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kedge.cli import output
from kedge.cli.arguments import function_of, inputs_of, load_artifact, state_dir
from kedge.cli.ending import ended_in_order
from kedge.cli.place import Terms, build_runner, check_on, open_device, require_device

if TYPE_CHECKING:
    from kedge.artifact import Artifact
    from kedge.places import Place


def compare(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A.kdg", help="What to compare with.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B.kdg", help="What is compared.", show_default=False)],
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs", metavar="IN.npz", help="Arrays for both. Without: seeded random data.", dir_okay=False
        ),
    ] = None,
    function: Annotated[str, typer.Option("--function", help="The function to time.", show_default=False)] = "",
    shape: output.ShapeOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of random inputs and of the order.")] = 0,
    blocks: Annotated[int, typer.Option("--blocks", min=6, max=10_000, help="Times that each is timed.")] = 10,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=10_000, help="Samples of one timing.")] = 3,
    min_repeat_ms: Annotated[float, typer.Option("--min-repeat-ms", min=0, help="The least length of one.")] = 20,
    threads: output.ThreadsOption = 1,
    fail_if_slower: Annotated[bool, typer.Option("--fail-if-slower", help="Exit with 1 where B is slower.")] = False,
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
    """Time two artifacts in turn, here or on a device, and say which is faster, by how much, and how sure that is.

    Each block times A, A once more and B in random order, every one in a process of its own; A beside A says what noise
    looks like. A device's tracker remembers its noise for all users ('kedge devices -v'), this machine its own.

    Exits with 1 where the times say nothing, and with --fail-if-slower where B is slower.

    Examples:

      kedge compare old.kdg new.kdg

      kedge compare old-arm.kdg new-arm.kdg --device key=rpi4 --tracker tracker:9190 --blocks 20 --fail-if-slower
    """
    from kedge.comparison import compare as compare_artifacts

    terms = Terms(priority, queue_timeout, transfer_timeout, load_timeout, timeout)
    require_device(context, device, terms)
    check_on(on)
    artifacts = load_artifact(a), load_artifact(b)
    of_a, of_b = (inputs_of(function_of(artifact, function), inputs, shape, seed) for artifact in artifacts)
    with (
        output.progress("compare") as report,
        _place(artifacts[0], device, tracker, threads, report, terms, on) as place,
    ):
        found = compare_artifacts(
            artifacts, (of_a, of_b), place, function=function, blocks=blocks, repeat=repeat,
            min_repeat_ms=min_repeat_ms, seed=seed, progress=report,
        )  # fmt: skip
    if as_json:
        output.emit_json(found.to_json())
    else:
        output.stdout().print(str(found), soft_wrap=True)
    if found.verdict == "invalid" or (fail_if_slower and found.verdict == "slower"):
        raise typer.Exit(1)


@contextmanager
def _place(
    artifact: Artifact,
    device: str | None,
    tracker: str | None,
    threads: int,
    report: output.Report,
    terms: Terms,
    on: str,
) -> Iterator[Place]:
    from kedge.places import OnDevice, ThisMachine

    if device is None:
        build_runner(report)
        with ended_in_order():
            yield ThisMachine(state_dir() / "noise.json", threads, on)
    else:
        with open_device(artifact, device, tracker, threads, report, terms, on) as pinned:
            yield OnDevice(pinned)
