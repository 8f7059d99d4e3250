"""What commands write: results to stdout, everything else to stderr, JSON where asked for."""

from __future__ import annotations

import json
import math
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from kedge.rpc.artifact.place import CPU, GPU_KINDS
from kedge.rpc.printable import printable

if TYPE_CHECKING:
    from kedge.rpc.types import DeviceStatus


def _kinds(incomplete: str) -> list[str]:
    """What completes a device of a machine."""
    return [kind for kind in (CPU, *GPU_KINDS) if kind.startswith(incomplete)]


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="SELECTOR",
        help="A device of the tracker, by name or labels: 'arch=aarch64,mem_mb>=2048'.",
    ),
]
OnOption = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="KIND[:N]",
        help="Where the kernels run: 'cpu', 'opencl', 'cuda', or one by number: 'opencl:1'.",
        show_default="as the artifact prefers",
        autocompletion=_kinds,
    ),
]
TrackerOption = Annotated[
    str | None,
    typer.Option(
        "--tracker", metavar="HOST:PORT", envvar="KEDGE_TRACKER", help="The tracker, or several: a:9190,b:9190."
    ),
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, max=4096, help="Threads to use; 0: all that are allowed.")
]
#: Of every deadline of a stage.
_UNTIL: dict[str, Any] = {
    "metavar": "SECONDS",
    "min": 0.001,
    "max": 31_622_400,
    "show_default": "what the tracker says",
}
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", help="How long a run on the device may take.", **_UNTIL),
]
PriorityOption = Annotated[
    int,
    typer.Option("--priority", help="Among jobs that wait for the device: higher goes first, above 0 for admins only."),
]
QueueTimeoutOption = Annotated[
    float | None, typer.Option("--queue-timeout", help="How long a job may wait for the device.", **_UNTIL)
]
TransferTimeoutOption = Annotated[
    float | None, typer.Option("--transfer-timeout", help="How long sending it to the device may take.", **_UNTIL)
]
LoadTimeoutOption = Annotated[
    float | None, typer.Option("--load-timeout", help="How long loading it there may take.", **_UNTIL)
]
LogFormatOption = Annotated[
    str, typer.Option("--log-format", metavar="text|json", help="The log on stderr: lines, or JSON objects.")
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=D0,D1,…", help="The shape of an input; a name as a dim leaves it free."),
]
ExternalOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--external", metavar="FILE.py", dir_okay=False, help="Python code that makes kedge.External: C code of yours.",
    ),
]  # fmt: skip


#: Wide enough that no table wraps.
UNWRAPPED_COLUMNS = 400


class _Console(Console):
    """A console that takes text as it is, but for control characters: much of it is what devices and artifacts say."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as lines of text, as wide as it will be shown."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What is written of anything; styled text, which did not come by `render_str`, is escaped here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def stdout() -> Console:
    """The console for results. What goes to a file or a pipe is not wrapped."""
    width = None if sys.stdout.isatty() else UNWRAPPED_COLUMNS
    return _Console(highlight=False, markup=False, emoji=False, width=width)


def stderr() -> Console:
    """The console for progress and errors."""
    return _Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def compile_warnings() -> Iterator[None]:
    """What the compiler warns of meanwhile goes to stderr as lines of text, each once."""
    from kedge.compiler.errors import CompileWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CompileWarning)
        try:
            yield
        finally:
            said = [str(each.message) for each in caught if issubclass(each.category, CompileWarning)]
            for line in dict.fromkeys(said):
                stderr().print(f"warning: {line}", soft_wrap=True)
    for each in caught:
        if not issubclass(each.category, CompileWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def show(table: Table) -> None:
    """Print a table on stdout, without the spaces that fill up its last column."""
    console = stdout()
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def emit_json(value: Any) -> None:
    """Print `value` as JSON on stdout."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON has no numbers for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in kedge's style; a column whose name starts with '>' is right-aligned, one whose name starts with
    '=' has names to be copied, which a narrow terminal does not break."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right, whole = column.startswith(">"), column.startswith("=")
        justify: Literal["left", "right"] = "right" if right else "left"
        result.add_column(column.lstrip(">="), justify=justify, overflow="fold", no_wrap=whole)
    return result


def size_text(n_bytes: float) -> str:
    """A byte count for people: "12.3 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def target_text(target: str) -> str:
    """A target string without the options that follow from its CPU or GPU, for tables."""
    details = ("-mattr=", "-l1=", "-l2=", "-l3=", "-fma", "-loads=", "-stores=", "-max-threads=", "-shared=", "-warp=")
    text = " ".join(word for word in target.split() if not word.startswith(details))
    return text + '"' * (text.count('"') % 2)  # the last detail of a quoted host took the closing quote with it


def age_text(seconds: float) -> str:
    """How long ago something was, for people: "12 s", "5 min", "3 h", "2 d"."""
    for unit, length in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < length:
            return f"{max(0.0, seconds):.0f} {unit}"
        seconds /= length
    return f"{seconds:.0f} d"


def clock_text(unix_ms: int) -> str:
    """A moment in this machine's time zone: "14:05", with the date where it is not today."""
    when = datetime.fromtimestamp(unix_ms / 1000)
    return when.strftime("%H:%M" if when.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def device_detail(device: DeviceStatus) -> str:
    """What a list says of a device beside its state: why it takes no jobs, whose it is, how warm it is."""
    from kedge.rpc.types import DeviceState

    words = [device.detail] if device.detail else []
    if device.state is DeviceState.GONE and device.last_seen_unix_ms:
        words.insert(0, f"last seen {clock_text(device.last_seen_unix_ms)}")
    if device.reservation is not None:
        whose = device.reservation.user or "somebody"
        until = clock_text(device.reservation.until_unix_ms)
        words.append(f"reserved for {whose} until {until} ({device.reservation.id})")
    for later in device.upcoming:
        begins, until = clock_text(later.from_unix_ms), clock_text(later.until_unix_ms)
        words.append(f"reserved for {later.user or 'somebody'} from {begins} until {until} ({later.id})")
    if device.health is not None and device.health.temperature_celsius is not None:
        words.append(f"{device.health.temperature_celsius:.0f} °C")
    return "; ".join(words)


class Report(Protocol):
    """A progress callback: what is being done, and how far of how much (0 of 0: unknown)."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """Report progress."""


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show progress on stderr: a live line in a terminal, elsewhere a line per stage once a second has passed."""
    console = stderr()
    if not console.is_terminal:
        with _plain_lines(console, title) as lines:
            yield lines
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)

        def report(what: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=f"{title}: {what}", completed=done, total=total or None)

        yield report


@contextmanager
def _plain_lines(console: Console, title: str, patience_s: float = 1.0) -> Iterator[Report]:
    """A log needs one line per stage, and none for what is over at once."""
    lock = threading.Lock()
    patient, current, written = True, "", ""

    def write() -> None:
        nonlocal written
        if current != written:
            written = current
            console.print(f"{title}: {current}", soft_wrap=True)

    def lose_patience() -> None:
        nonlocal patient
        with lock:
            patient = False
            write()

    def report(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal current
        with lock:
            current = what
            if not patient:
                write()

    timer = threading.Timer(patience_s, lose_patience)
    timer.daemon = True
    timer.start()
    try:
        yield report
    finally:
        timer.cancel()
        timer.join()
