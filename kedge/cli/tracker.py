"""`kedge tracker start`, `kedge tracker status` and `kedge tracker move-database`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import kedge
from kedge.cli import output
from kedge.cli.arguments import check_log_format, parse_bytes, state_dir
from kedge.cli.place import require_tracker
from kedge.rpc.errors import UsageError

DEFAULT_PORT = 9190


def start(
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port for clients and for joining; 0: any free one.")
    ] = DEFAULT_PORT,
    agents_port: Annotated[
        int | None,
        typer.Option("--agents-port", min=0, max=65535, help="The port for agents; 0: any.", show_default="--port + 1"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Jobs, results and blobs.", show_default="~/.local/state/kedge/tracker"),
    ] = None,
    blob_quota: Annotated[
        str | None,
        typer.Option(
            "--blob-quota",
            metavar="SIZE",
            help="Keep at most so many bytes of blobs; the longest unused go first, outputs of jobs last.",
            show_default="three quarters of the disk space that is free for them",
        ),
    ] = None,
    user_quota: Annotated[
        str | None,
        typer.Option(
            "--blob-quota-per-user",
            metavar="SIZE",
            help="Of that, what one user's jobs and uploads may have.",
            show_default="half of it",
        ),
    ] = None,
    keep_jobs: Annotated[
        int, typer.Option("--keep-jobs", min=1, help="Forget the oldest jobs that are done when there are more.")
    ] = 100_000,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0.01, help="Forget jobs that were done so many days ago.")
    ] = 30.0,
    keep_size: Annotated[
        str,
        typer.Option("--keep-size", metavar="SIZE", help="The same where they and their results take more than this."),
    ] = "32GiB",
    insecure_loopback: Annotated[
        bool,
        typer.Option("--insecure-loopback", help="Plaintext, without asking who is there; on this machine only."),
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="HOST:PORT", help="Metrics for Prometheus there.", show_default="none"),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database",
            metavar="URL",
            envvar="KEDGE_DATABASE",
            help="A PostgreSQL database, which several trackers may share.",
            show_default="a file in the data folder",
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option("--join", metavar="STRING", help="With --database: join its trackers, once."),
    ] = None,
    peers_port: Annotated[
        int | None,
        typer.Option(
            "--peers-port",
            min=0,
            max=65535,
            help="With --database: the port for other trackers.",
            show_default="--port + 3",
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise", metavar="HOST", help="With --database: how other trackers reach this.", show_default="--host"
        ),
    ] = None,
    log_format: output.LogFormatOption = "text",
) -> None:
    """Start the tracker in the foreground; Ctrl-C stops it, and jobs and results survive.

    A new tracker makes a certificate authority and a token for its owner, and prints a command that lets one device
    join. Clients have tokens ('kedge tracker token create'), agents have certificates, all connections are encrypted.

    Examples:

      kedge tracker start --host 0.0.0.0

      kedge tracker start --port 0 --data-dir /srv/kedge

      kedge tracker start --keep-jobs 20000 --keep-days 7 --keep-size 8GiB --blob-quota 50GiB --metrics 127.0.0.1:9192

      kedge tracker start --blob-quota 500GiB --blob-quota-per-user 100GiB

      kedge tracker start --host 0.0.0.0 --database postgresql://kedge@db.lab/kedge --join 'kedge1.…'
    """
    from kedge.rpc.security.join import parse_join
    from kedge.rpc.tracker.main import run
    from kedge.rpc.tracker.retention import Retention
    from kedge.rpc.tracker.security.folder import Limits
    from kedge.rpc.transport import parse_address

    if database is None and (join is not None or peers_port is not None or advertise is not None):
        raise UsageError(
            "--join, --peers-port and --advertise are for one of several trackers", hint="name their --database"
        )
    if insecure_loopback and join is not None:
        raise UsageError("--insecure-loopback: there is nothing to join", hint="leave --join out")
    options: dict[str, Any] = {
        "agents_port": agents_port,
        "insecure_loopback": insecure_loopback,
        "metrics": parse_address(metrics) if metrics else None,
        "blob_quota": None if blob_quota is None else parse_bytes(blob_quota),
        "limits": Limits(max_user_bytes=None if user_quota is None else parse_bytes(user_quota)),
        "keep": Retention(keep_jobs, keep_days, parse_bytes(keep_size)),
        "database": database,
        "join": None if join is None else parse_join(join),
        "peers_port": peers_port,
        "advertise": advertise,
    }
    folder = data_dir or state_dir() / "tracker"
    raise typer.Exit(run(host, port, folder, log_format=check_log_format(log_format), **options))


def status(tracker: output.TrackerOption = None, as_json: output.JsonFlag = False) -> None:
    """Show the trackers that share a database: who leads, in which epoch, who is gone.

    Examples:

      kedge tracker status --tracker a:9190,b:9190
    """
    with kedge.connect(require_tracker(tracker)) as fleet:
        found = fleet.status()
    if as_json:
        output.emit_json({"epoch": found.epoch, "trackers": [asdict(each) for each in found.trackers]})
        return
    if not found.trackers:
        output.stdout().print(f"the tracker at {tracker} is the only one, with a database of its own", soft_wrap=True)
        return
    table = output.table("tracker", "address", "state", ">up", ">seen", "software")
    newest_ms = max(each.seen_unix_ms for each in found.trackers)
    for each in found.trackers:
        state = "gone" if each.gone else f"leads, epoch {found.epoch}" if each.leads else "follows"
        up, seen = (
            output.age_text((newest_ms - moment) / 1000) for moment in (each.started_unix_ms, each.seen_unix_ms)
        )
        table.add_row(each.name, each.address, state, "-" if each.gone else up, seen, each.software)
    output.show(table)


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
