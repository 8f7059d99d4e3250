"""Commands for which files of other users are such: root, as tests often are, may read and write all of them."""

from __future__ import annotations

import os
from pathlib import Path

_AS_OTHERS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def as_others(*command: str | Path) -> list[str]:
    """The command without root's right to pass over the modes of files; for anybody else it is the command."""
    words = list(map(str, command))
    return [*_AS_OTHERS, *words] if os.geteuid() == 0 else words


def give_away(folder: Path) -> None:
    """Make a folder and all in it what it is to other users: its owner may do what they may, and no more."""
    for path in reversed([folder, *folder.rglob("*")]):
        others = path.stat().st_mode & 0o7
        path.chmod(others * 0o111)
