"""Which devices a job wants: labels, or a device's name.

    selector := [ term { "," term } ]
    term     := key ("=" | "!=" | ">=" | "<=" | ">" | "<") value
              | key ["not"] "in" "(" value { "," value } ")"
              | name                                           a device by its name

`arch=aarch64,soc in (bcm2711,bcm2712),mem_mb>=2048,emulated!=true`. All terms must hold; an empty selector takes any
device. A label that a device lacks equals nothing, so `!=` and `not in` hold; comparisons with `<` and `>` are between
numbers and never hold for a label that is missing or not a number.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Tuple

from kedge.rpc.errors import KedgeError
from kedge.rpc.types import DeviceInfo

_WORD = r"[A-Za-z0-9_.:/+@-]+"
_NOT_IN_VALUES = re.compile(r"[^A-Za-z0-9._-]+")
_TOKEN = re.compile(rf'\s*(?:(?P<op>[<>!]=|[<>=(),])|"(?P<quoted>[^"]*)"|(?P<word>{_WORD}))')
#: Conditions of one selector: the tracker looks at each of them for each of its devices.
_MAX_TERMS = 250
#: Characters before and after a mistake that an error shows.
_SHOWN = 60
_ORDER: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class SelectorError(KedgeError):
    """A selector that cannot be read; the message points at the place."""

    exit_status = 2


@dataclass(frozen=True)
class Term:
    """One condition: `op` is one of `= != < <= > >= in` and `not in`; only the last two have several values."""

    key: str
    op: str
    values: Tuple[str, ...]

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Does a device with these labels satisfy the term?"""
        have = labels.get(self.key)
        if self.op in ("=", "in"):
            return have in self.values
        if self.op in ("!=", "not in"):
            return have not in self.values
        try:
            return have is not None and _ORDER[self.op](float(have), float(self.values[0]))
        except ValueError:
            return False

    def __str__(self) -> str:
        values = [value if re.fullmatch(_WORD, value) else f'"{value}"' for value in self.values]
        return f"{self.key} {self.op} ({','.join(values)})" if "in" in self.op else f"{self.key}{self.op}{values[0]}"


@dataclass(frozen=True)
class Selector:
    """A conjunction of terms; without any it takes every device."""

    terms: Tuple[Term, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Does a device with these labels (see `labels_of`) satisfy every term?"""
        return all(term.holds(labels) for term in self.terms)

    def __str__(self) -> str:
        return ",".join(str(term) for term in self.terms)


def labels_of(info: DeviceInfo) -> Dict[str, str]:
    """A device's own labels with the facts that every device has.

    `name, arch, cpu, cores, mem_mb, target, emulated`: facts win over labels of the same name. A device with GPUs also
    has `gpu` (the kind: "cuda", where it can, else "opencl"), their number by kind (`cuda>=2`), and of each its name,
    memory and, where it has one, generation: `cuda.0.name`, `cuda.0.mem_mb`, `cuda.0.arch`.
    """
    return {
        **info.labels,
        "name": info.name,
        "arch": info.arch,
        "cpu": info.cpu_name,
        "cores": str(info.num_cores),
        "mem_mb": str(info.memory_bytes >> 20),
        "target": info.target,
        "emulated": "true" if info.emulated else "false",
        **_gpu_labels(info),
    }


def label_value(text: str) -> str:
    """`text` as a label's value: letters, digits, dots, dashes and underscores."""
    return _NOT_IN_VALUES.sub("-", text.strip()).strip("-")


def _gpu_labels(info: DeviceInfo) -> Dict[str, str]:
    kinds = sorted({gpu.kind for gpu in info.accelerators})
    labels = {kind: str(sum(gpu.kind == kind for gpu in info.accelerators)) for kind in kinds}
    if kinds:
        labels["gpu"] = kinds[0]
    for gpu in info.accelerators:
        facts = {"name": label_value(gpu.name), "mem_mb": str(gpu.memory_bytes >> 20), "arch": label_value(gpu.arch)}
        labels.update({f"{gpu.kind}.{gpu.index}.{key}": value for key, value in facts.items() if value})
    return labels


def parse(text: str) -> Selector:
    """Read a selector; raises SelectorError with the position of what is wrong."""
    return Selector(tuple(_Parser(text).terms()))


class _Parser:
    """Recursive descent over the tokens of one selector."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def terms(self) -> Tuple[Term, ...]:
        if not self.text.strip():
            return ()
        found = [self.term()]
        while self.peek()[0]:
            self.expect(",")
            if len(found) == _MAX_TERMS:
                raise self.error(f"more than {_MAX_TERMS} conditions; 'in (…)' takes many values in one", self.skip())
            found.append(self.term())
        return tuple(found)

    def term(self) -> Term:
        key = self.word("a label or a device name")
        kind, token, end = self.peek()
        if kind == "op" and token in ("=", "!=", *_ORDER):
            self.at = end
            value = self.word(f"a value after {token!r}")
            if token in _ORDER and not _is_number(value):
                raise self.error(f"{value!r} is not a number", self.at - len(value))
            return Term(key, token, (value,))
        if kind == "word" and token in ("in", "not"):
            self.at = end
            if token == "not":
                self.keyword("in")
            return Term(key, "in" if token == "in" else "not in", self.values())
        if kind and token not in (",",):
            raise self.error(f"expected an operator after {key!r}", self.skip())
        return Term("name", "=", (key,))

    def values(self) -> Tuple[str, ...]:
        self.expect("(")
        values = [self.word("a value")]
        while self.peek()[1] == ",":
            self.expect(",")
            values.append(self.word("a value"))
        self.expect(")")
        return tuple(values)

    def peek(self) -> Tuple[str, str, int]:
        """The kind and text of the next token and where it ends; an empty kind at the end of the text."""
        match = _TOKEN.match(self.text, self.at)
        if match and match.lastgroup:
            return match.lastgroup, match.group(match.lastgroup), match.end()
        if self.text[self.at :].strip():
            raise self.error("unexpected character", self.skip())
        return "", "", len(self.text)

    def word(self, what: str) -> str:
        kind, token, end = self.peek()
        if kind not in ("word", "quoted"):
            raise self.error(f"expected {what}", self.skip())
        self.at = end
        return token

    def keyword(self, name: str) -> None:
        kind, token, end = self.peek()
        if (kind, token) != ("word", name):
            raise self.error(f"expected {name!r}", self.skip())
        self.at = end

    def expect(self, symbol: str) -> None:
        kind, token, end = self.peek()
        if (kind, token) != ("op", symbol):
            raise self.error(f"expected {symbol!r}", self.skip())
        self.at = end

    def skip(self) -> int:
        """Where the next token begins."""
        rest = self.text[self.at :]
        return self.at + len(rest) - len(rest.lstrip())

    def error(self, why: str, position: int) -> SelectorError:
        begin, end = max(0, position - _SHOWN), position + _SHOWN
        before = ("…" if begin else "") + self.text[begin:position]
        after = self.text[position:end] + ("…" if end < len(self.text) else "")
        return SelectorError(
            f"selector, column {position + 1}: {why}\n    {before}{after}\n    {' ' * len(before)}^",
            hint="for example: arch=aarch64,mem_mb>=2048  or  soc in (bcm2711,bcm2712)  or a device's name",
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
