"""`kedge cache`: what compiles keep for the next time, and how to be rid of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from kedge.cli import output
from kedge.compiler.quota import PARTS, Kept, Quota
from kedge.rpc.errors import UsageError


def _parts(incomplete: str) -> list[str]:
    """The parts that complete what was typed."""
    return [part for part in PARTS if part.startswith(incomplete)]


def cache(context: typer.Context, as_json: output.JsonFlag = False) -> None:
    """Show what was compiled and is kept for the next time: where, how much, and how much it may be.

    Whole artifacts are kept, and the kernels in them. Where they take more than KEDGE_CACHE_SIZE (5 GiB unless it is
    set), those go first that were not used for longest. KEDGE_CACHE_DIR is the folder.

    Examples:

      kedge cache

      kedge cache --json

      KEDGE_CACHE_SIZE=20GiB kedge compile vgg16.onnx -o vgg16.kdg
    """
    if context.invoked_subcommand is not None:
        return
    quota = Quota()
    seen = quota.seen()
    kept = seen.kept
    parts = {part: [each for each in kept if each.part == part] for part in PARTS}
    other = quota.other_bytes()
    if as_json:
        facts = {part: _facts(parts[part]) for part in reversed(PARTS)}
        output.emit_json(
            {
                "folder": str(quota.root),
                "limit_bytes": quota.limit,
                **facts,
                "unfinished": _facts(seen.unfinished),
                "other": {"bytes": other},
            }
        )
        return
    rows = output.table("kept", ">files", ">size")
    for part in reversed(PARTS):
        rows.add_row(part, str(len(parts[part])), output.size_text(_bytes(parts[part])))
    rows.add_row("together", str(len(kept)), f"{output.size_text(_bytes(kept))} of {output.size_text(quota.limit)}")
    output.stdout().print(f"{quota.root}\n", soft_wrap=True)
    output.show(rows)
    if seen.unfinished:
        what = f"{len(seen.unfinished)} file{'' if len(seen.unfinished) == 1 else 's'}"
        output.stdout().print(
            f"\nbeing written, or left by a process that was killed and removed after a day: "
            f"{what}, {output.size_text(_bytes(seen.unfinished))}",
            soft_wrap=True,
        )
    output.stdout().print(
        f"\nbeside, without a limit: {output.size_text(other)} (runtime, C libraries, boards)", soft_wrap=True
    )


def clear(
    part: Annotated[
        str | None,
        typer.Argument(
            metavar="[artifacts|kernels]",
            help="Only these.",
            show_default="both",
            autocompletion=_parts,
        ),
    ] = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Remove what was compiled, all of it or one part; the next compile makes it again.

    Examples:

      kedge cache clear

      kedge cache clear artifacts
    """
    if part is not None and part not in PARTS:
        raise UsageError(f"{part!r} is no part of the cache", hint=f"one of {', '.join(PARTS)}, or nothing for both")
    quota = Quota()
    removed = quota.clear(PARTS if part is None else (part,))
    if as_json:
        output.emit_json({"folder": str(quota.root), "removed": _facts(removed)})
        return
    what = f"{len(removed)} file{'' if len(removed) == 1 else 's'}, {output.size_text(_bytes(removed))}"
    output.stdout().print(f"removed from {quota.root}: {what}", soft_wrap=True)


def _facts(kept: Iterable[Kept]) -> dict[str, Any]:
    found = list(kept)
    return {"files": len(found), "bytes": _bytes(found)}


def _bytes(kept: Iterable[Kept]) -> int:
    return sum(each.size for each in kept)
