"""Whose blobs are whose: knowing a digest is not enough to read a blob, nor to be told that it is there.

    root/user.ann/ab/abcdef…     ann has sent these bytes herself, or they came of her job
    root/agent.rpi4/ab/abcdef…   the device rpi4 has sent them

Empty files tell all of it: nothing to be migrated, nothing that a crash could leave half written. Trackers that share a
database keep the same in a table of it, since whoever leads next has to know it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from kedge.rpc.blobs import check_digest
from kedge.rpc.tracker.facts import BlobForgotten, BlobOwned
from kedge.rpc.tracker.schema import StoreAwayError
from kedge.rpc.tracker.security.principal import Principal
from kedge.rpc.tracker.store import Store

_STORE_S = 10.0


class Owners(Protocol):
    """Whose blobs are whose. Safe from several threads."""

    def add(self, owner: str, digest: str) -> None:
        """The owner has these bytes."""

    def has(self, principal: Principal, digest: str) -> bool:
        """Whether the principal may know of the blob and read it."""

    def forget(self, digest: str) -> None:
        """Nobody has these bytes: they are about to go."""

    def settle(self) -> None:
        """Wait until what was added is durable; raises StoreAwayError."""


class FileOwners:
    """The folder `root`, made when it does not exist."""

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

    def settle(self) -> None:
        """Files are there at once."""

    def _path(self, owner: str, digest: str) -> Path:
        return self._root / owner / check_digest(digest)[:2] / digest


class StoredOwners:
    """Those in the database of `store`, with a copy in memory: the tracker that leads is the only one that writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._by_digest: defaultdict[str, set[str]] = defaultdict(set)
        for digest, owner in store.owners().result():
            self._by_digest[digest].add(owner)

    def add(self, owner: str, digest: str) -> None:
        """The owner has these bytes: stored before all that is told to the store from now on."""
        with self._lock:
            if owner in self._by_digest[check_digest(digest)]:
                return
            self._by_digest[digest].add(owner)
            self._store.append([BlobOwned(digest, owner)], lambda: None)

    def has(self, principal: Principal, digest: str) -> bool:
        """Whether the principal may know of the blob and read it."""
        with self._lock:
            return principal.sees_all or principal.owner in self._by_digest.get(check_digest(digest), ())

    def forget(self, digest: str) -> None:
        """Nobody has these bytes."""
        with self._lock:
            if self._by_digest.pop(digest, None):
                self._store.append([BlobForgotten(digest)], lambda: None)

    def settle(self) -> None:
        """Wait until what was added is durable; raises StoreAwayError. Not from the event loop's thread."""
        durable: Future[None] = Future()
        self._store.append([], lambda: durable.set_result(None))
        try:
            durable.result(_STORE_S)
        except TimeoutError as error:
            raise StoreAwayError("the tracker cannot store whose blobs are whose now", hint="try again") from error
