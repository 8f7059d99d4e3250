"""The machine code of external functions: C sources compiled and kept by content, libraries checked by machine."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedge.compiler.elf import complaint
from kedge.compiler.entries import make_folder, read_entry, write_entry
from kedge.compiler.errors import CompileError, CompileWarning, ToolchainError
from kedge.compiler.graph.external import External
from kedge.compiler.target.model import Target
from kedge.compiler.toolchain import (
    CObject,
    DuplicateSymbolError,
    Progress,
    UndefinedSymbolError,
    c_libraries,
    cache_dir,
    compile_c,
    compiler_key,
    link_shared,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExternalObjects:
    """What the linker gets of an external: object files or static libraries. `digest` is that of all of it."""

    function: str
    parts: tuple[bytes, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of the parts."""
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in self.parts)).hexdigest()


def external_objects(external: External, target: Target, progress: Progress | None = None) -> ExternalObjects:
    """The code of an external for a target. What the C compiler warns of is a `CompileWarning`, each time.

    Raises:
        CompileError: a file is missing, there is no library for the architecture, or it is one for another.
        ToolchainError: the C compiler refuses the source; the message is the compiler's.
    """
    parts = []
    if external.source is not None:
        made = _compiled(external, target, progress)
        if made.warnings:
            name = _TEXT if external.text is None else f"{external.function}.c"
            said = made.warnings.replace(_TEXT, name)
            warnings.warn(f"external {external.function}: {said}", CompileWarning, stacklevel=2)
        parts.append(made.code)
    library = external.library_for(target.arch.name)
    if library is not None:
        parts.append(_library(external, library, target))
    return ExternalObjects(external.function, tuple(parts))


def link_with_externals(
    objects: Sequence[bytes],
    externals: Collection[ExternalObjects],
    target: Target,
    progress: Progress | None = None,
) -> bytes:
    """The shared object of kedge's objects and external code, which may use the C library and its mathematics.

    Raises:
        CompileError: a function that no external code defines, or that the C library lacks; one that two define.
        ToolchainError: the linker refuses it otherwise.
    """
    # One file may define the functions of several externals.
    parts = {part: external.function for external in externals for part in external.parts}
    named = [(f"{function}-{number}.o", part) for number, (part, function) in enumerate(parts.items(), 1)]
    libraries = c_libraries(target, progress=progress)
    try:
        return link_shared(objects, target, named, libraries)
    except DuplicateSymbolError as error:
        raise CompileError(
            f"external code ({', '.join(sorted(external.function for external in externals))}) defines "
            f"{', '.join(error.symbols)} more than once\n{error.message}",
            hint="make static what only one file uses, and give several functions of one file the same source=",
        ) from error
    except UndefinedSymbolError as error:
        names = {external.function for external in externals}
        own = [symbol for symbol in error.symbols if symbol in names]
        if own:
            raise CompileError(
                f"the code of external {', '.join(own)} defines no function of that name",
                hint=f"int32_t {own[0]}(const kedge_external_call *call), neither static nor with another name",
            ) from error
        raise CompileError(
            f"external code ({', '.join(sorted(names))}) needs {', '.join(error.symbols)}, which neither it nor the C "
            f"library defines\n{error.message}",
            hint="give what defines it as library=; of the system there are libc and libm, no threads and no dlopen",
        ) from error


# Sources --------------------------------------------------------------------------------------------------------


#: The file name of a source that is given as text.
_TEXT = "external.c"


def _compiled(external: External, target: Target, progress: Progress | None) -> CObject:
    with tempfile.TemporaryDirectory(prefix="kedge-external-") as folder:
        source, text = _source(external, Path(folder))
        flags = tuple(external.cflags)
        # Flags may have relative paths, and what a source includes is looked for beside it.
        places = (str(Path.cwd()) if flags else "", str(source.parent.absolute()) if external.text is None else "")
        parts = (*places, text, flags)
        key = hashlib.sha256(repr((parts, compiler_key(target))).encode()).hexdigest()
        path = cache_dir() / "external" / key[:2] / key
        found = _cached(path)
        if found is not None:
            return found
        if progress is not None:
            name = source.name if external.text is None else f"{external.function}.c"
            progress(f"compiling {name} for {target.arch.name}")
        make_folder(path.parent)  # what zig says of a cache that cannot be written is about the source
        try:
            made = compile_c(source, target, flags)
        except ToolchainError as error:
            said = error.message.replace(str(Path(folder, _TEXT)), f"{external.function}.c")
            raise ToolchainError(
                f"external {external.function} does not compile for {target.arch.name}:\n{said}", hint=error.hint
            ) from error
        shown = CObject(made.code, made.warnings.replace(f"{folder}/", ""), made.includes)
        head = {"warnings": shown.warnings, "includes": {str(each.absolute()): _sha(each) for each in shown.includes}}
        write_entry(path, json.dumps(head), shown.code)
        return shown


def _source(external: External, folder: Path) -> tuple[Path, str]:
    """The file to compile, and its text."""
    text = external.text
    if text is not None:
        path = folder / _TEXT  # the same for all functions in one text, so that they share an object
        path.write_text(text, errors="surrogateescape")
        return path, text
    assert external.source is not None  # asked for by the caller
    path = Path(external.source)
    if path.suffix != ".c":
        raise CompileError(
            f"external {external.function}: {path} is no C file",
            hint="give a .c file, or compile it yourself: library=",
        )
    return path, _read(external, path).decode(errors="surrogateescape")


def _cached(path: Path) -> CObject | None:
    """The object in a file, if it is whole and none of the headers that it was made from has changed."""
    entry = read_entry(path)
    if entry is None:
        return None
    head: Mapping[str, Mapping[str, str]] = json.loads(entry[0])
    includes = head["includes"]
    if any(_sha(Path(name)) != digest for name, digest in includes.items()):
        return None
    return CObject(entry[1], str(head["warnings"]), tuple(map(Path, includes)))


def _sha(path: Path) -> str:
    """The digest of a file; of none where it is gone."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# Libraries ------------------------------------------------------------------------------------------------------


def _library(external: External, path: Path, target: Target) -> bytes:
    data = _read(external, path)
    wrong = complaint(data, target.arch)
    if wrong is not None:
        raise CompileError(
            f"external {external.function}: {path} {wrong}",
            hint=f'a path for each architecture: library={{"{target.arch.name}": …}}',
        )
    return data


def _read(external: External, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CompileError(f"external {external.function}: cannot read {path}: {error.strerror}") from error
