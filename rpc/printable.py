"""Strangers' text for terminals and logs: in it a control sequence could write the clipboard, or forge lines."""

from __future__ import annotations

import re

#: C0 and C1 controls but for tabs and line feeds, and what turns the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with its control characters as escapes ("\\x1b"); lines stay lines, whichever system ended them."""
    return _CONTROLS.sub(_escape, text.replace("\r\n", "\n"))


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
