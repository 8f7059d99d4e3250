"""What an artifact's user lets the device of a session read."""

from __future__ import annotations

from collections.abc import Iterable

from kedge.rpc.tracker.blobs import TrackerBlobs


class Grants:
    """Which blobs the device of each session may read, and that they stay as long as it may."""

    def __init__(self, blobs: TrackerBlobs) -> None:
        self._blobs = blobs
        #: Of each job, by the digest of a manifest: how often it was granted, and all its blobs.
        self._of: dict[str, dict[str, tuple[int, frozenset[str]]]] = {}

    def add(self, job_id: str, manifest: str, digests: Iterable[str]) -> None:
        """The device may read these, until that is withdrawn as often."""
        granted = self._of.setdefault(job_id, {})
        count, members = granted.get(manifest, (0, frozenset(digests)))
        if count == 0:
            self._blobs.hold(members)
            self._blobs.redeem(members)
        granted[manifest] = (count + 1, members)

    def withdraw(self, job_id: str, manifest: str) -> None:
        """Undo one `add`; nothing where there was none."""
        granted = self._of.get(job_id, {})
        if manifest in granted:
            count, members = granted.pop(manifest)
            if count > 1:
                granted[manifest] = (count - 1, members)
            else:
                self._blobs.let_go(members)

    def allow(self, job_id: str, digest: str) -> bool:
        """Whether the device may read it for a session."""
        return any(digest in members for _, members in self._of.get(job_id, {}).values())

    def end(self, job_id: str) -> None:
        """The session is over."""
        for _, members in self._of.pop(job_id, {}).values():
            self._blobs.let_go(members)
