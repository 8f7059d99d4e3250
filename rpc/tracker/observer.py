"""What a tracker tells about itself while it works; by default nobody listens."""

from __future__ import annotations

from kedge.rpc.tracker.facts import Fact, Stored


class Observer:
    """Hears of everything that is worth counting. Methods return at once, and are called from any thread."""

    def found(self, stored: Stored) -> None:
        """What an earlier tracker left."""

    def stored(self, fact: Fact, now_ms: int) -> None:
        """A fact is durable, and what follows from it leaves now (Unix milliseconds)."""

    def committed(self, facts: int, duration_s: float) -> None:
        """So many facts were stored by one commit."""

    def commit_failed(self) -> None:
        """The disk did not take a commit; it is tried again."""

    def looked_up(self, hits: int, misses: int) -> None:
        """Somebody asked which blobs the tracker lacks: so many need not be sent, so many have to be."""

    def uploaded(self, size_bytes: int) -> None:
        """Bytes of blobs came in."""

    def downloaded(self, size_bytes: int) -> None:
        """Bytes of blobs went out."""


SILENT = Observer()
