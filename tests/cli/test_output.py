"""What reaches a terminal: much of it was said by devices, artifacts and other users."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from types import SimpleNamespace, UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import pytest
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

import kedge
import kedge.rpc.client.access
from kedge.cli import _fail, output
from kedge.rpc.client.access import EnrolledInfo, TokenInfo
from kedge.rpc.errors import KedgeError
from kedge.rpc.security import credentials
from kedge.rpc.types import DeviceStatus, Job, JobState, Reservation, TrackerStatus
from support.commands import Kedge

#: Writes the clipboard of many terminals, clears the screen, begins a line anew.
HOSTILE = "bench\x1b]52;c;cm0gLXJm\x07\x1b[2J\rroot"
SHOWN = r"bench\x1b]52;c;cm0gLXJm\x07\x1b[2J\x0droot"


def test_control_characters_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    table = output.table("device", "what it says", title=HOSTILE)
    table.add_row(HOSTILE, Text("idle"))
    output.show(table)
    output.stdout().print(HOSTILE)
    _fail(KedgeError(HOSTILE, hint=HOSTILE))
    with output.progress(HOSTILE) as report:
        report("waiting")
    with output._plain_lines(output.stderr(), HOSTILE, patience_s=0) as report:
        report(HOSTILE)
    said = capsys.readouterr()
    assert said.out.replace("\n", "").count(SHOWN) == 3, said.out
    assert said.err.replace("\n", "").count(SHOWN) >= 3, said.err
    for text in said:
        assert not {"\x1b", "\x07", "\r"} & set(text)


def test_names_that_are_copied_stay_whole_in_a_narrow_terminal() -> None:
    table = output.table("=job", "state", "=device", "detail")
    table.add_row("9722d6669cb0", "queued", "bench-1", "no connected device matches 'rack=3' " * 3)
    shown = io.StringIO()
    output._Console(width=40, file=shown).print(table)
    assert "9722d6669cb0" in shown.getvalue() and "bench-1" in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 40


def filled(kind: Any) -> Any:
    """A value of this type with HOSTILE wherever a string may be."""
    if kind is str:
        return HOSTILE
    if kind in (int, float, bool, bytes):
        return kind(1)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{item.name: filled(hints[item.name]) for item in fields(kind) if item.init})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(iter(kind))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return filled(arguments[0])
    if origin is tuple:
        return (filled(arguments[0]),)
    assert origin is Mapping, kind
    return {filled(arguments[0]): filled(arguments[1])}


class Strangers:
    """A tracker, as `kedge.connect` and `Access` reach it, that answers all that is asked with HOSTILE."""

    def __init__(self, *_address: object, **_options: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def devices(self, _selector: str = "", *, include_gone: bool = False) -> list[DeviceStatus]:
        found = filled(DeviceStatus)
        return [found, replace(found, info=replace(found.info, confinement=None))] if include_gone else [found]

    def jobs(self, **_which: object) -> list[Job]:
        return [filled(Job), replace(filled(Job), detail="", state=JobState.RUNNING)]

    def job(self, _job_id: str) -> Any:
        return SimpleNamespace(cancel=lambda: replace(filled(Job), result=None))

    def status(self) -> TrackerStatus:
        return filled(TrackerStatus)

    def set_maintenance(self, *_what: object) -> DeviceStatus:
        return filled(DeviceStatus)

    def reserve(self, *_what: object, **_when: object) -> Reservation:
        return filled(Reservation)

    def end_reservation(self, _reservation: str) -> Reservation:
        raise KedgeError(HOSTILE, hint=HOSTILE)

    def tokens(self) -> list[TokenInfo]:
        return [filled(TokenInfo)]

    def create_token(self, *_what: object, **_more: object) -> tuple[TokenInfo, str]:
        return filled(TokenInfo), "kedge1.x"

    def revoke_token(self, _token: str) -> TokenInfo:
        return filled(TokenInfo)

    def enrolled(self) -> list[EnrolledInfo]:
        return [filled(EnrolledInfo)]


@pytest.mark.parametrize(
    "command",
    [
        "devices", "devices -v --gone", "jobs", "top --once", "cancel x", "drain x", "resume x", "reserve x",
        "release x", "tracker status", "tracker enrolled", "tracker token list", "tracker token revoke x",
        "tracker token create --role submit",
    ],
)  # fmt: skip
def test_what_a_tracker_answers_is_shown_and_not_obeyed(
    command: str, kedge_here: Kedge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kedge, "connect", Strangers)
    monkeypatch.setattr(kedge.rpc.client.access, "Access", Strangers)
    monkeypatch.setattr(credentials, "find", lambda _address: SimpleNamespace(tls=None))
    done = kedge_here(*command.split(), "--tracker", "127.0.0.1:1")
    said = done.stdout + done.stderr
    assert r"\x1b]52;c;cm0gLXJm" in said
    assert not {"\x1b", "\x07", "\r"} & set(said)


def test_styled_text_is_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = output.stdout()
    table = output.table("result")
    table.add_row(Text(HOSTILE, style="red"))
    with console.capture() as captured:
        console.print(Text(HOSTILE, style="red"), Group(table, Panel(Text(HOSTILE))))
    obeyed = re.sub(r"\x1b\[[\d;]*m", "", captured.get())
    assert obeyed.count(r"bench\x1b]52;c;cm0gLXJm") == 3, obeyed
    assert not {"\x1b", "\x07", "\r"} & set(obeyed)
