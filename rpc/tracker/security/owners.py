"""Whose blobs are whose: knowing a digest is not enough to read a blob, nor to be told that it is there.

    root/user.ann/ab/abcdef…     ann has sent these bytes herself, or they came of her job
    root/agent.rpi4/ab/abcdef…   the device rpi4 has sent them

Empty files tell all of it: nothing to be migrated, nothing that a crash could leave half written.
"""

from __future__ import annotations

from pathlib import Path

from kedge.rpc.blobs import check_digest
from kedge.rpc.tracker.security.principal import Principal


class Owners:
    """The folder `root`, made when it does not exist. Safe from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def add(self, owner: str, digest: str) -> None:
        """The owner has these bytes."""
        path = self._path(owner, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def has(self, principal: Principal, digest: str) -> bool:
        """Whether the principal may know of the blob and read it."""
        return principal.sees_all or self._path(principal.owner, digest).exists()

    def forget(self, digest: str) -> None:
        """Nobody has these bytes: they are about to go."""
        for owner in self._root.iterdir():
            self._path(owner.name, digest).unlink(missing_ok=True)

    def _path(self, owner: str, digest: str) -> Path:
        return self._root / owner / check_digest(digest)[:2] / digest
