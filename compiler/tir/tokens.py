"""A cursor over the tokens of a text, for the parsers of both IRs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NoReturn, TypeVar

from kedge.compiler.errors import ParseError

T = TypeVar("T")

#: No integer of any dtype has more.
MOST_DIGITS = 20


class Tokens:
    """The tokens of `text` from `position` on, one at a time: `kind` and `token` are the current one's.

    `pattern` names each kind of token by a group; "space" is passed over, "name", "string" (in double quotes) and
    "number" have their usual meaning. After the last token the kind is "end". `first_line` is the number of the
    text's first line, for messages.
    """

    #: What comes after the last token, for messages.
    ending = "the end"

    def __init__(self, text: str, pattern: re.Pattern[str], *, position: int = 0, first_line: int = 1) -> None:
        self.text = text
        self.position = position
        self.start = position
        self.kind = ""
        self.token = ""
        self._pattern = pattern
        self._first_line = first_line
        self.advance()

    def advance(self) -> None:
        """Go to the next token."""
        while True:
            self.start = self.position
            if self.position == len(self.text):
                self.kind, self.token = "end", self.ending
                return
            match = self._pattern.match(self.text, self.position)
            if match is None:
                self.kind, self.token = "sign", self.text[self.position]
                self.fail("a token")
            self.position = match.end()
            if match.lastgroup != "space":
                self.kind, self.token = match.lastgroup or "", match.group()
                return

    def back_to(self, mark: tuple[int, str, str, int]) -> None:
        """Return to where `mark` was taken."""
        self.position, self.kind, self.token, self.start = mark

    def mark(self) -> tuple[int, str, str, int]:
        """The present place, for `back_to`."""
        return self.position, self.kind, self.token, self.start

    def fail(self, wanted: str) -> NoReturn:
        """Raise ParseError: `wanted` was to stand where the current token does."""
        before = self.text.count("\n", 0, self.start)
        column = self.start - (self.text.rfind("\n", 0, self.start) + 1) + 1
        shown = [*self.text.split("\n"), ""][before].strip()
        where = f"line {self._first_line + before}, column {column}"
        raise ParseError(f"{where}: wanted {wanted}, not {self.token!r}\n  {shown}")

    def take(self, *tokens: str) -> bool:
        """Pass over the current token if it is one of these signs or words."""
        if self.kind in ("sign", "name") and self.token in tokens:
            self.advance()
            return True
        return False

    def expect(self, token: str) -> None:
        """Pass over this sign or word; raises ParseError where there is another token."""
        if not self.take(token):
            self.fail(repr(token))

    def name(self) -> str:
        """A name, plain or in quotes."""
        quoted = self.kind == "string" and self.token.startswith('"')
        if self.kind != "name" and not quoted:
            self.fail("a name")
        try:
            name = str(json.loads(self.token)) if quoted else self.token
        except ValueError:
            self.fail("a name whose escapes are those of JSON")
        self.advance()
        return name

    def integer(self) -> int:
        """A whole number, maybe negative."""
        negative = self.take("-")
        if self.kind != "number" or not self.token.isdigit() or len(self.token) > MOST_DIGITS:
            self.fail(f"an integer of at most {MOST_DIGITS} digits")
        value = int(self.token)
        self.advance()
        return -value if negative else value

    def items(self, close: str, item: Callable[[], T]) -> list[T]:
        """What stands between commas up to `close`, which is passed over."""
        found: list[T] = []
        while not self.take(close):
            if found:
                self.expect(",")
            found.append(item())
        return found

    def end(self) -> None:
        """Raise ParseError unless all is read."""
        if self.kind != "end":
            self.fail(self.ending)
