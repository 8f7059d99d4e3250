"""The options of target strings: splitting them, and what is said about wrong ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from kedge.compiler.errors import TargetError

#: Every count fits 32 bits with a sign, as the interfaces of drivers have them.
MAX_COUNT = 2**31 - 1


def options(
    text: str, words: Sequence[str], known: Sequence[str], elsewhere: Mapping[str, str] | None = None
) -> Iterable[tuple[str, str]]:
    """The `words` after the head of target `text` as (option, value) pairs; the value stands after "=" or a blank.

    `known` options have one leading dash, users may write two. `elsewhere` says of options that belong to another
    part of a target how to write them there.

    Raises:
        TargetError: a word that is no option, an unknown option, or one without its value.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise TargetError(f"target {text!r}: unexpected {word!r}", hint=f"options look like {known[0]}=VALUE")
        name, equals, value = word.partition("=")
        name = "-" + name.lstrip("-")
        if name not in known:
            hint = (elsewhere or {}).get(name) or nearest(name, known)
            raise TargetError(f"target {text!r}: unknown option {name}", hint=hint)
        if not equals:
            if not rest or rest[0].startswith("-"):
                raise TargetError(f"target {text!r}: option {name} needs a value", hint=f"write {name}=VALUE")
            value = rest.pop(0)
        yield name, value


def positive(name: str, value: str) -> int:
    """The value of an option that counts something, 1 to `MAX_COUNT`; raises TargetError."""
    try:
        number = int(value)
    except ValueError:
        raise TargetError(f"{name}={value}: not a number") from None
    if not 1 <= number <= MAX_COUNT:
        raise TargetError(f"{name}={value}: must be at least 1 and at most {MAX_COUNT}")
    return number


def size(name: str, value: str) -> int:
    """The value of an option that counts bytes of what may be absent, 0 to `MAX_COUNT`; raises TargetError."""
    return 0 if value == "0" else positive(name, value)


def rate(name: str, value: str) -> float:
    """The value of an option that says how many in a cycle, above 0 and at most 64; raises TargetError."""
    try:
        number = float(value)
    except ValueError:
        raise TargetError(f"{name}={value}: not a number") from None
    if not 0 < number <= 64:
        raise TargetError(f"{name}={value}: must be above 0 and at most 64")
    return number


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names what comes close to `word`, or else everything known."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
