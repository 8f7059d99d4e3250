"""The text of both IRs in colour, for terminals; without its colours it is the text that `show()` gives.

A token's role follows from its kind, its neighbours and the bracket it stands in, so that a buffer called `range` is
no loop. The colours are of the 256 that terminals share, all dark enough for a light background and light enough for a
dark one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<comment>(?<!\S)\#[^\n]*)
      | (?P<ref>[%@](?:"(?:[^"\\\n]|\\.)*"|[\w.]+)(?:\#\d+)?)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?(?!\w))
      | (?P<name>[A-Za-z_](?:[\w.]*\w)?)
      | (?P<digest>\w+)
      | (?P<sign>->|\+:|<=|>=|==|!=|//|.)""",
    re.VERBOSE,
)
_DTYPE = re.compile(r"(?:bool|u?int\d+|b?float\d+)\Z")
#: Words that mean something at the start of a line.
_OPENING = frozenset(
    {"module", "param", "func", "alloc", "block", "for", "if", "else", "pass", "where", "reads", "writes", "init",
     "return"}
)  # fmt: skip
#: The role of the name that follows such a word.
_DECLARING = {"func": "function", "block": "block", "for": "declared", "alloc": "declared", "param": "declared"}
_LOOPS = {"range": "serial", "parallel": "parallel", "vectorized": "vectorized", "unrolled": "unrolled",
          "tensorized": "tensorized", "thread": "thread"}  # fmt: skip
_SCOPES = frozenset({"global", "shared", "local", "register"})
_LITERALS = frozenset({"True", "False", "true", "false", "none", "inf", "nan"})

#: How each role looks: parameters of the escape sequence "select graphic rendition" (ECMA-48).
STYLES: Mapping[str, str] = {
    "keyword": "38;5;133",
    "function": "1;38;5;32",
    "block": "1;38;5;32",
    "declared": "1",
    "dtype": "38;5;30",
    "number": "38;5;130",
    "string": "38;5;64",
    "call": "38;5;32",
    "comment": "3;38;5;243",
    "scope": "38;5;30",
    "spatial": "38;5;30",
    "reduce": "38;5;161",
    "serial": "38;5;133",
    "parallel": "1;38;5;32",
    "vectorized": "1;38;5;28",
    "unrolled": "1;38;5;130",
    "tensorized": "1;38;5;161",
    "thread": "1;38;5;98",
}


def highlight(text: str) -> str:
    """`text` of either IR with colours; whatever else the text is, it comes out whole."""
    return "".join(f"\x1b[{STYLES[role]}m{part}\x1b[0m" if role in STYLES else part for role, part in classify(text))


def write(text: str, stream: TextIO | None = None) -> None:
    """Write `text` and a newline to `stream` (standard output), in colour where that is wanted."""
    out = sys.stdout if stream is None else stream
    out.write((highlight(text) if wants_colour(out, os.environ) else text) + "\n")


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to colour what goes to `stream`: as Python does, NO_COLOR, FORCE_COLOR and TERM=dumb come first."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return environment.get("TERM") != "dumb" and stream.isatty()


def classify(text: str) -> Iterator[tuple[str, str]]:
    """The parts of `text` in order, none left out, each with its role: a key of `STYLES`, or "" for the plain ones."""
    tokens = [_Token(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(text)]
    words = [index for index, token in enumerate(tokens) if token.kind != "space"]
    roles = [""] * len(tokens)
    line = _Line()
    for place, index in enumerate(words):
        if index == 0 or "\n" in tokens[index - 1].text:
            line.begin()
        after = tuple(tokens[i].text for i in words[place + 1 : place + 3])
        roles[index] = line.role(tokens[index], after)
    return ((role, token.text) for role, token in zip(roles, tokens, strict=True))


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


class _Line:
    """What stood before a token: the last word or sign of its line and its role, and the brackets that are open."""

    def __init__(self) -> None:
        self._before = self._role = ""
        self._brackets: list[str] = []

    def begin(self) -> None:
        self._before = self._role = ""

    def role(self, token: _Token, after: tuple[str, ...]) -> str:
        """The role of the next token, which the texts `after` follow."""
        if token.text in "([{":
            self._brackets.append(token.text)
        elif token.text in ")]}" and self._brackets:
            self._brackets.pop()
        role = self._find(token, after[0] if after else "", after[1] if len(after) > 1 else "")
        self._before, self._role = token.text, role
        return role

    def _find(self, token: _Token, following: str, second: str) -> str:
        match token.kind:
            case "comment" | "number":
                return token.kind
            case "ref":
                return "" if self._before else "declared"
            case "name" | "string" if not token.text.startswith("'"):
                return self._declaration(token.text, following, second) or (
                    "string" if token.kind == "string" else self._word(token.text, following)
                )
            case "string":
                return "string"
        return ""

    def _declaration(self, text: str, following: str, second: str) -> str:
        """The role of a name, plain or in quotes, that is declared here; "" where it is not."""
        if self._role == "keyword" and self._before in _DECLARING:
            return _DECLARING[self._before]
        if self._before == "fused":
            return "function"
        signature = following == ":" and self._brackets[-1:] == ["("] and self._before in ("(", ",")
        iteration = not self._before and following == "=" and second in ("spatial", "reduce")
        return "declared" if signature or iteration else ""

    def _word(self, text: str, following: str) -> str:
        if not self._before and text in _OPENING and following not in ("[", "="):
            return "keyword"
        if self._before == "in" and self._role == "keyword":
            return _LOOPS.get(text, "") if following == "(" else "scope" if text in _SCOPES else ""
        if self._is_joint(text, following):
            return "keyword"
        if _DTYPE.match(text) and (following in ("[", "(") or self._before == ":"):
            return "dtype"
        if following == "(":
            return text if text in ("spatial", "reduce") and self._before == "=" else "call"
        return "number" if text in _LITERALS else ""

    def _is_joint(self, text: str, following: str) -> bool:
        """Whether a word that may also be a name joins two parts of a line."""
        match text:
            case "in":
                return self._role == "declared" or self._before == "]"
            case "where":
                return self._before == ")"
            case "and" | "or":
                return self._before not in ("", "[", "(", ",") and following not in ("", ",", "]", ")")
            case "from":
                return following.startswith('"')
            case "const" | "fused":
                return self._before == "="
        return False
