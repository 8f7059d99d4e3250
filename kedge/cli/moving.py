"""`kedge tracker move-database`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kedge.cli import output
from kedge.cli.fleet import state_dir


def move_database(
    database: Annotated[
        str,
        typer.Option("--database", metavar="URL", envvar="KEDGE_DATABASE", help="An empty PostgreSQL database."),
    ],
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="The tracker's data folder.", show_default="~/.local/state/kedge/tracker"),
    ] = None,
    as_json: output.JsonFlag = False,
) -> None:
    """Move a tracker's jobs, results, tokens and devices from its own file into a PostgreSQL database.

    The tracker must not run. Either all of it moves or nothing does; a move that was interrupted is ended by the same
    command. Then start the tracker with the same --data-dir, which keeps its blobs and keys, and that --database;
    without the database it refuses to start. There is no way back.

    Examples:

      kedge tracker move-database --database postgresql://kedge@db.lab/kedge

      kedge tracker move-database --data-dir /srv/kedge --database postgresql://kedge@db.lab/kedge --json
    """
    from kedge.rpc.tracker.database import Postgres
    from kedge.rpc.tracker.moving import move

    folder = data_dir or state_dir() / "tracker"
    with output.progress("moving") as report:
        moved = move(folder, database, report)
    place = Postgres(database).name
    if as_json:
        output.emit_json({"data_dir": str(folder), "database": place, "rows": moved})
        return
    rows = ", ".join(f"{count} {name}" for name, count in moved.items() if count)
    output.stdout().print(f"moved to {place}: {rows or 'nothing that was not there'}", soft_wrap=True)
    # Not as it is shown: that has no password.
    hint = f"hint: kedge tracker start --data-dir {folder} --database …, with the URL given here"
    output.stderr().print(hint, soft_wrap=True)
