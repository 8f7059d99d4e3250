"""Code from outside: a C function that computes what a pattern describes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from kedge.compiler.errors import CompileError
from kedge.compiler.graph.builder import freeze
from kedge.compiler.graph.dims import attribute_symbols, plain
from kedge.compiler.graph.ir import Attrs
from kedge.compiler.graph.patterns import Match, Operator, Pattern, leaves, roots
from kedge.compiler.tir.expr import Dim, Expr

FilePath: TypeAlias = "str | os.PathLike[str]"

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
#: Symbols that kedge's own code has in an artifact begin so.
RESERVED: Final = "kedge_"
#: In an artifact's report, the rule of a kernel that external code computes: this and the function's name.
EXTERNAL_RULE: Final = "external "


@dataclass(frozen=True, slots=True, eq=False)
class External:
    """A C function that computes every subgraph that `pattern` matches, in place of kedge's own kernels.

    The function is `int32_t FUNCTION(const kedge_external_call *call)`; `kedge_external.h` says what it gets. Its code
    is linked into the artifact, and may use the C library and its mathematics, nothing else.

    Args:
        function: the name of the C function.
        pattern: the subgraph, with one result. Its leaves are the function's inputs, in the order in which the pattern
            names them.
        source: a C file, C11 with GNU's extensions (from the current folder, while compiling), or the text of one,
            which has several lines. Several externals may name one source.
            It is compiled for each target, with the CPU features that the target requires.
        library: an object file or a static library to link, position-independent: one path, or a path for each
            architecture (`{"aarch64": "libfoo.a"}`). With `source`, what the source needs.
        supports: says of a match whether the function can do it; types are those of `match["x"].type`. Without:
            whatever the pattern matches.
        attributes: numbers for the function, from a match: `lambda match: {"alpha": match.attrs("act")["alpha"]}`.
            Ints, floats, bools, or sequences of one of them.
        workspace: bytes of scratch memory for one call, or a function from a match to them; over free dims an
            expression, `lambda match: match["x"].type.shape[0] * 64`.
        cflags: further flags for the C compiler, such as `-ffast-math` or `-I…`. One that allows more CPU features
            makes an artifact that crashes where they are missing.

    Raises:
        CompileError: the name is none in C or begins with kedge_, there is no code, or the pattern is no subgraph with
            one result.
    """

    function: str
    pattern: Pattern
    source: FilePath | None = None
    library: FilePath | Mapping[str, FilePath] | None = None
    supports: Callable[[Match], bool] | None = None
    attributes: Callable[[Match], Mapping[str, Any]] | None = None
    workspace: Dim | Callable[[Match], Dim] = 0
    cflags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not _IDENTIFIER.match(self.function) or self.function.startswith(RESERVED):
            raise CompileError(
                f"{self.function!r} cannot be an external function",
                hint=f"name a function in C, but none that begins with {RESERVED}",
            )
        if self.source is None and self.library is None:
            raise CompileError(f"external {self.function} has no code", hint="give source= or library=")
        self._check_types()
        if isinstance(self.pattern, (tuple, list)):
            raise CompileError(
                f"external {self.function} has a pattern with {len(self.pattern)} results",
                hint="a pattern has one result; make one external for each",
            )
        if not isinstance(self.pattern, Pattern) or not all(isinstance(r, Operator) for r in roots(self.pattern)):
            raise CompileError(
                f"external {self.function}: its pattern is no operator",
                hint='the result of a pattern is p.op("add", …), or alternatives of such',
            )
        leaves(self.pattern)

    def _check_types(self) -> None:
        libraries = self.library.values() if isinstance(self.library, Mapping) else (self.library,)
        for name, paths in (("source", (self.source,)), ("library", libraries)):
            strange = next((each for each in paths if not isinstance(each, (str, os.PathLike, type(None)))), None)
            if strange is not None:
                raise TypeError(f"external {self.function}: {name}= takes a path, not {strange!r}")
        if isinstance(self.cflags, str) or not all(isinstance(flag, (str, os.PathLike)) for flag in self.cflags):
            raise TypeError(f"external {self.function}: cflags= takes a list of flags, not {self.cflags!r}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the function's inputs, in order."""
        return tuple(name for _, name in leaves(self.pattern))

    @property
    def text(self) -> str | None:
        """The source, where it was given as text and not as a file."""
        return self.source if isinstance(self.source, str) and "\n" in self.source else None

    def library_for(self, arch: str) -> Path | None:
        """The library to link for an architecture; raises `CompileError` where there are some, but none for it."""
        if not isinstance(self.library, Mapping):
            return None if self.library is None else Path(self.library)
        if arch not in self.library:
            known = ", ".join(self.library) or "none"
            raise CompileError(f"external {self.function} has no library for {arch}", hint=f"library= has: {known}")
        return Path(self.library[arch])

    def accepts(self, match: Match) -> bool:
        """Whether the function can do what was matched."""
        return self.supports is None or bool(self._ask("supports", self.supports, match))

    def attributes_for(self, match: Match) -> Attrs:
        """The numbers that the function gets, in plain types."""
        given = {} if self.attributes is None else self._ask("attributes", self.attributes, match)
        if not isinstance(given, Mapping):
            raise CompileError(
                f"external {self.function}: attributes(match) gives {given!r}", hint='give a dict, {"alpha": 0.5}'
            )
        result = {str(name): _number(freeze(value)) for name, value in dict(given).items()}
        strange = next((name for name, value in result.items() if value is None), None)
        if strange is not None:
            raise CompileError(
                f"external {self.function}: its attribute {strange!r} is {given[strange]!r}",
                hint="numbers and sequences of numbers can be handed to C, integers in 64 bits",
            )
        return MappingProxyType(result)

    def workspace_for(self, match: Match) -> Dim:
        """The bytes of scratch memory, a dim."""
        size = self._ask("workspace", self.workspace, match) if callable(self.workspace) else self.workspace
        size = freeze(size)  # a number of numpy's is one too
        if not isinstance(size, (int, Expr)) or (isinstance(size, int) and size < 0):
            raise CompileError(f"external {self.function}: its workspace is {size!r}", hint="give a number of bytes")
        return plain(size)

    def _ask(self, what: str, function: Callable[[Match], Any], match: Match) -> Any:
        try:
            return function(match)
        except Exception as error:
            origin = ", ".join(name for call in match.calls for name in call.origin) or match.root.op
            raise CompileError(
                f"external {self.function}: {what}(match) fails at {origin}: {type(error).__name__}: {error}"
            ) from error


def _number(value: Any) -> Any:
    """An attribute as C gets it, ints or floats; None where it is no number, or none that C has."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value if _is_int64(value) else None
    if isinstance(value, float):
        return value
    if isinstance(value, tuple) and value and not tuple(attribute_symbols(value)):
        numbers = [int(each) if isinstance(each, bool) else each for each in value]
        if all(isinstance(each, int) for each in numbers):
            return tuple(numbers) if all(map(_is_int64, numbers)) else None
        if all(isinstance(each, (int, float)) for each in numbers):
            return tuple(map(float, numbers))
    return None


def _is_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


def by_function(externals: Sequence[External]) -> dict[str, External]:
    """Externals by the names of their functions; raises `CompileError` where two have one."""
    found: dict[str, External] = {}
    for external in externals:
        if not isinstance(external, External):
            raise TypeError(f"externals are kedge.External, not {type(external).__name__}")
        if found.setdefault(external.function, external) is not external:
            raise CompileError(
                f"two externals are called {external.function}",
                hint="make one with alternatives, `first | second`, or give the C functions two names",
            )
    return found
