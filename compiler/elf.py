"""What is in an object file or a static library: enough to refuse one for another machine by name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kedge.compiler.target.arch import ARCHS, Arch

_ARCHIVE, _THIN, _ELF, _BITCODE = b"!<arch>\n", b"!<thin>\n", b"\x7fELF", b"BC\xc0\xde"
_HEADER = 60
_RELOCATABLE, _SHARED = 1, 3


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """The machine (e_machine), the bits and the kind of one ELF file; `member` is its name in a library."""

    member: str
    machine: int
    bits: int
    kind: int


def complaint(data: bytes, arch: Arch) -> str | None:
    """Why `data` cannot be linked into code for `arch`; None where it can."""
    if data.startswith(_THIN):
        return "is a thin archive, which holds no code; make a full one (ar rcs)"
    if not data.startswith((_ARCHIVE, _ELF, _BITCODE)):
        return "is neither an ELF object file nor a static library"
    members = list(_members(data))
    bitcode = next((name for name, member in members if member.startswith(_BITCODE)), None)
    if bitcode is not None:
        return f"holds LLVM bitcode{f' ({bitcode})' if bitcode else ''} and no machine code; compile it without -flto"
    found = [each for name, member in members for each in _object(name, member)]
    if not found:
        return "holds no ELF object file"
    for each in found:
        where = f" ({each.member})" if each.member else ""
        if (each.machine, each.bits) != (arch.elf_machine, arch.pointer_bits):
            return f"is for {_machine(each)}{where}, not for {arch.name}"
        if each.kind == _SHARED:
            return f"is a shared object{where}; an artifact carries its code with it, so give a static library"
        if each.kind != _RELOCATABLE:
            return f"is a finished program{where}, not an object file"
    return None


def _machine(file: ObjectFile) -> str:
    names = [arch.name for arch in ARCHS if (arch.elf_machine, arch.pointer_bits) == (file.machine, file.bits)]
    return names[0] if names else f"ELF machine {file.machine} with {file.bits} bits"


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The files in a library by name; what is no library is its only file, without a name."""
    if not data.startswith(_ARCHIVE):
        yield "", data
        return
    position = len(_ARCHIVE)
    while position + _HEADER <= len(data):
        header = data[position : position + _HEADER]
        name = header[:16].decode(errors="replace").strip().rstrip("/")
        size = header[48:58].strip()
        if header[58:60] != b"`\n" or not size.isdigit():
            return
        start = position + _HEADER
        yield name, data[start : start + int(size)]
        position = start + int(size) + int(size) % 2


def _object(member: str, data: bytes) -> Iterator[ObjectFile]:
    """Nothing for what is no ELF file: a library also holds tables of symbols and names."""
    if data.startswith(_ELF) and len(data) >= 20:
        order = "<" if data[5] == 1 else ">"
        kind, machine = struct.unpack_from(order + "HH", data, 16)
        yield ObjectFile(member, machine, 64 if data[4] == 2 else 32, kind)
