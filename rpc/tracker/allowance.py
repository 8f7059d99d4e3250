"""How much of the tracker's blob store one user may have: a share of it, so that there is always room for others.

What counts is what cannot go to make room (see `kedge.rpc.tracker.blobs`): the user's blobs that a job needs, that were
sent or asked about in the last minutes, and uploads that are under way with all that they have announced. A blob that
several users have sent counts for each of them, once, however many jobs need it and however often it is sent.
What is kept in case that it is needed again, the outputs of jobs that are done among it, counts for nobody.

What a device sends is its job's, and never refused for that: results of a user who has enough are not lost. They count
for some minutes, when the user sends more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kedge.rpc.blobs import BlobQuotaError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.principal import Principal, Role
from kedge.rpc.types import Blob

#: Without a quota of their own: the share of the whole store that one user may have.
USER_SHARE = 0.5


class Allowance:
    """At most `quota_bytes` for each user of `blobs`; None: `USER_SHARE` of its quota. Safe from several threads."""

    def __init__(self, blobs: TrackerBlobs, owners: Owners, quota_bytes: int | None = None) -> None:
        self._blobs = blobs
        self._owners = owners
        self._quota_bytes = quota_bytes
        blobs.when_kept(owners.stays)
        self._lock = threading.RLock()
        #: How many uploads of it each owner has under way.
        self._under_way: Counter[tuple[str, Blob]] = Counter()

    def check(self, principal: Principal, blobs: Iterable[Blob]) -> None:
        """The principal may have these too, whether or not they are there; raises BlobQuotaError."""
        if principal.trusted or principal.role in (Role.AGENT, Role.PEER):
            return
        self._blobs.end_promises()
        owner = principal.owner
        with self._lock:
            sending = {blob for whose, blob in self._under_way if whose == owner}
            unsent = sum(blob.size for blob in sending if not self._owners.keeps(owner, blob))
            has = self._owners.staying_bytes(owner) + unsent
        more = sum(blob.size for blob in {*blobs} - sending if not self._owners.keeps(owner, blob))
        quota = round(self._blobs.quota_bytes() * USER_SHARE) if self._quota_bytes is None else self._quota_bytes
        if more and has + more > quota:
            raise BlobQuotaError(
                f"{more} more bytes of blobs are {has + more - quota} more than user {principal.name!r} may have on "
                f"this tracker: {quota}, of which jobs, results and uploads of the last minutes have {has}",
                hint="wait for jobs to end, send less, or start the tracker with a larger --blob-quota-per-user",
            )

    @contextmanager
    def upload(self, principal: Principal, blob: Blob) -> Iterator[None]:
        """While the principal sends a blob it counts, wherever it has got; raises BlobQuotaError."""
        with self._lock:
            self.check(principal, [blob])
            self._under_way[principal.owner, blob] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[principal.owner, blob] -= 1
                if not self._under_way[principal.owner, blob]:
                    del self._under_way[principal.owner, blob]
