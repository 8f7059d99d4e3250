"""`kedge jobs`, `kedge result`: what was submitted, and what came of it."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import kedge
from kedge.cli import output
from kedge.cli.arguments import check_outputs, load_artifact, parse_duration, save_outputs
from kedge.cli.completion import completed, device_names, recent_job_ids
from kedge.cli.place import require_tracker
from kedge.cli.running import facts_of, show_outputs
from kedge.cli.waiting import wait_text
from kedge.rpc.errors import UsageError
from kedge.rpc.types import Job, JobState


def _states(incomplete: str) -> list[str]:
    return [state.value for state in JobState if state.value.startswith(incomplete)]


def jobs(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB…]", help="Only these.", autocompletion=completed(recent_job_ids))
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state", metavar="STATE", help="queued, assigned, running, done; repeatable.", autocompletion=_states
        ),
    ] = None,
    user: Annotated[str, typer.Option("--user", help="Only this user's; others' are for administrators.")] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Only those that this device has, or had last.",
            autocompletion=completed(device_names),
        ),
    ] = "",
    artifact: Annotated[
        str, typer.Option("--artifact", metavar="OUT.kdg|DIGEST", help="Only of this file, or digest's beginning.")
    ] = "",
    since: Annotated[
        str, typer.Option("--since", metavar="DURATION", help="Only those submitted within the last 90s, 2h, 7d.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="How many, newest first.")] = 20,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:
    """List the jobs of a tracker, newest first. What is asked for has to hold all together.

    Exits with 1 when one of the named jobs is not there.

    Examples:

      kedge jobs --tracker 127.0.0.1:9190

      kedge jobs --limit 100 --json

      kedge jobs --state queued --state running --device rpi4-2

      kedge jobs --user ann --artifact digits-arm.kdg --since 2h

      kedge jobs 3f2a9c0b1d22 5d1f0a77c3e2
    """
    named = tuple(dict.fromkeys(ids or ()))
    wanted: dict[str, Any] = {
        "user": user,
        "device": device,
        "artifact": _digest(artifact),
        "since_unix_s": time.time() - parse_duration(since) if since else 0.0,
        "ids": named,
        "states": tuple(_state(text) for text in state or ()),
    }
    with kedge.connect(require_tracker(tracker)) as fleet:
        found = fleet.jobs(limit=max(limit, len(named)), **wanted)
    if as_json:
        output.emit_json([job.to_json() for job in found])
    elif found:
        output.show(jobs_table(found))
    elif not any(wanted.values()):
        output.stderr().print(f"no job was submitted to {tracker} yet", soft_wrap=True)
    missing = [job_id for job_id in named if job_id not in {job.id for job in found}]
    if missing or (any(wanted.values()) and not found):
        given = {"--user": user, "--device": device, "--artifact": artifact, "--since": since}
        filters = [("--state", text) for text in state or ()] + [item for item in given.items() if item[1]]
        fitting = f" that fits {' '.join(itertools.chain(*filters))}" if filters else ""
        output.stderr().print(f"there is no job {', '.join(missing)}".rstrip() + fitting, soft_wrap=True)
    if missing:
        raise typer.Exit(1)


def _state(text: str) -> JobState:
    try:
        return JobState(text)
    except ValueError:
        raise UsageError(f"--state {text!r}", hint=f"one of {', '.join(_states(''))}") from None


def _digest(text: str) -> str:
    """The digest of an artifact's file, or its beginning as it was typed; raises UsageError, ArtifactError."""
    if not text or (re.fullmatch(r"[0-9a-fA-F]{4,64}", text) and not Path(text).exists()):
        return text
    if Path(text).suffix != ".kdg" and not Path(text).exists():
        raise UsageError(f"--artifact {text!r}", hint="a .kdg file, or 4 to 64 hex digits of a digest")
    return load_artifact(Path(text)).digest


def result(
    job_id: Annotated[
        str,
        typer.Argument(metavar="JOB", help="As 'kedge jobs' shows.", autocompletion=completed(recent_job_ids)),
    ],
    outputs: Annotated[
        Path | None, typer.Option("--outputs", metavar="OUT.npz", help="Where to save the outputs.", dir_okay=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.001, max=31_622_400, help="How long to wait; the job goes on.",
            show_default="until it is done",
        ),
    ] = None,
    tracker: output.TrackerOption = None,
    as_json: output.JsonFlag = False,
) -> None:  # fmt: skip
    """Wait for a job, and show what came of it: outputs or times, how long each stage took, why it failed.

    For jobs of a script, or of a command that was killed: the job went on. Ctrl-C leaves it alone, too. Exits as `kedge
    run` and `kedge bench` do: with 8 when it ended badly, or is not done in time.

    Examples:

      kedge result 3f2a9c0b1d22 --tracker tracker:9190

      kedge result 3f2a9c0b1d22 --outputs out.npz --timeout 600
    """
    from kedge.rpc.client.plan import raise_unless_ok

    check_outputs(outputs)
    last: list[Job] = []
    with kedge.connect(require_tracker(tracker)) as fleet, output.progress("result") as report:

        def tell(job: Job) -> None:
            last[:] = [job]
            report(_where(job))

        found = fleet.job(job_id).wait(timeout, tell, check=False)
    if outputs and found.outputs:
        save_outputs(outputs, found.outputs)
    if as_json:
        timing = None if found.timing is None else found.timing.to_json()
        each = {name: facts_of(array) for name, array in found.outputs.items()}
        output.emit_json({**last[0].to_json(), "outputs": each, "timing": timing})
    else:
        stages = ", ".join(f"{time.stage} {time.duration_ns / 1e6:.3g} ms" for time in found.stage_times)
        where = f" on {found.device}" if found.device else ""
        output.stdout().print(f"job {found.job_id}{where}: {found.outcome.kind}", soft_wrap=True)
        if stages:
            output.stdout().print(stages, soft_wrap=True)
        if found.outputs:
            show_outputs(found.outputs, outputs)
        if found.timing is not None:
            output.stdout().print(str(found.timing), soft_wrap=True)
    raise_unless_ok(found)
    if found.timing is not None and found.timing.verdict == "invalid":
        raise typer.Exit(1)


def _where(job: Job) -> str:
    """Where a job is, in words."""
    if job.state is JobState.QUEUED:
        return f"queued{wait_text(job)}: {job.detail}" if job.detail else f"queued{wait_text(job)}"
    return f"{job.device}: {job.stage}" if job.stage is not None else f"{job.state} {job.device}".rstrip()


def jobs_table(found: Sequence[Any]) -> Table:
    """Jobs for people: what they do, where they are, and what keeps them or came of them."""
    table = output.table("=job", "user", "task", "state", "outcome", "=device", ">age", "detail")
    for job in found:
        age = output.age_text(time.time() - job.submitted_unix_ms / 1000)
        user, device = job.user or "-", job.device or "-"
        table.add_row(job.id, user, _task(job), job.state, _outcome(job), device, age, _detail(job))
    return table


def _outcome(job: Any) -> str:
    return job.result.outcome.kind if job.result is not None else "-"


def _task(job: Any) -> str:
    from kedge.rpc.types import BenchTask, SessionTask

    if isinstance(job.spec.task, SessionTask):
        return "session"
    kind = "bench" if isinstance(job.spec.task, BenchTask) else "run"
    return f"{kind} {job.spec.function}"


def _detail(job: Any) -> str:
    """Why it waits and for how long, or the first line of why it failed."""
    if job.detail:
        return f"{job.detail.partition(chr(10))[0]}{wait_text(job)}"
    said: str = job.result.outcome.message if job.result is not None else ""
    return said.partition("\n")[0]
