"""What reaches a terminal: much of it was said by devices, artifacts and other users."""

from __future__ import annotations

import pytest
from rich.text import Text

from kedge.cli import _fail, output
from kedge.rpc.errors import KedgeError

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
    with output._plain_lines(HOSTILE, patience_s=0) as report:
        report(HOSTILE)
    said = capsys.readouterr()
    assert said.out.replace("\n", "").count(SHOWN) == 3, said.out
    assert said.err.replace("\n", "").count(SHOWN) >= 3, said.err
    for text in said:
        assert not {"\x1b", "\x07", "\r"} & set(text)
