"""What a tracker that leads has of the fleet's others: copies of blobs.

What is uploaded is there as well before the upload counts: a tracker that is lost takes no accepted job's blobs along.
What this tracker lacks, since another one led when it came, is fetched from one that has it, verified by its digest.
All that jobs need is offered to every other tracker again from time to time: that keeps it there, and brings one that
came later up to date.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import CorruptBlobError, MissingBlobError
from kedge.rpc.errors import KedgeError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.transport import Address, Tls, open_channel
from kedge.rpc.types import Blob, TrackerMember

log = logging.getLogger("kedge.tracker")

_THREADS = 8
#: What another tracker is asked has to be answered so soon, and a byte sent: several at once share 100 Mbit/s.
_ANSWER_S = 5.0
_UPLOAD_S_PER_BYTE = 1e-6
#: A tracker that failed is left alone for so long; then it is brought up to date.
_AVOID_S = 10.0
#: A tracker that begins to lead knows of others by what they tell the database, and one that is being restarted is not
#: there: until it would be back, what it may have had alone is not missing.
_RETURN_S = 20.0
#: Between two offers of all that is needed; a blob that was offered stays for longer than that.
OFFER_S = 60.0


class Replication:
    """The other trackers that are alive, by name, and the status of all. None of them for one that is alone."""

    def __init__(self) -> None:
        self.epoch = 0
        self.members: tuple[TrackerMember, ...] = ()

    async def copy(self, blob: Blob) -> None:
        """Have a blob that was uploaded at every other tracker, as far as they answer."""

    async def fetch(self, blobs: Sequence[Blob]) -> bool:
        """Have those of these blobs here that another tracker has; whether all that may have one were heard."""
        return True

    async def ensure(self, digests: Iterable[str]) -> None:
        """Have what is here and has these digests at every other tracker, as far as they answer."""


#: Of a tracker that shares no database.
NO_REPLICATION = Replication()


class _Peer:
    """One other tracker."""

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.address = address
        self._channel = open_channel(address, tls)
        self.client = BlobClient(self._channel, address)
        #: By the steady clock: when it may be asked again.
        self.avoid_until = 0.0
        self.offer_due = 0.0
        #: What it has, and until when that may be taken for granted.
        self.has_until: dict[str, float] = {}

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()


class PeerReplication(Replication):
    """Those that `update` names. Belongs to the event loop; transfers run in threads of its own."""

    def __init__(self, blobs: TrackerBlobs, tls: Tls | None) -> None:
        super().__init__()
        self._blobs = blobs
        self._tls = tls
        self._peers: dict[str, _Peer] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kedge-replication")
        self._fetching: dict[str, asyncio.Future[None]] = {}
        #: Nobody is blamed for the time that others need of these threads.
        self._free = asyncio.Semaphore(_THREADS)
        self._returned_at = 0.0

    def lead(self, epoch: int) -> None:
        """This tracker has begun to lead."""
        self.epoch = epoch
        self._returned_at = time.monotonic() + _RETURN_S

    def update(self, addresses: dict[str, Address]) -> None:
        """The others that are alive now, by name, with where they serve trackers."""
        for name in [name for name, peer in self._peers.items() if addresses.get(name) != peer.address]:
            self._threads.submit(self._peers.pop(name).close)
        for name, address in addresses.items():
            if name not in self._peers:
                self._peers[name] = _Peer(address, self._tls)

    def close(self) -> None:
        """Disconnect from all."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def copy(self, blob: Blob) -> None:
        """Send a blob to those that lack it; one that fails is brought up to date later."""
        await asyncio.gather(*(self._send(peer, [blob]) for peer in self._askable()))

    async def fetch(self, blobs: Sequence[Blob]) -> bool:
        """Fetch what another tracker has; what none has, or cannot be fetched now, stays missing."""
        wanted = [blob for blob in blobs if not self._blobs.has(blob)]
        if wanted and self._peers:
            await asyncio.gather(*(self._fetch_once(blob) for blob in wanted))
        return len(self._askable()) == len(self._peers) and time.monotonic() >= self._returned_at

    async def ensure(self, digests: Iterable[str]) -> None:
        """Send what is not known to be there: a job may need blobs that nobody sent now, since they were here."""
        now, wanted = time.monotonic(), set(digests)
        unsure = {peer: {each for each in wanted if peer.has_until.get(each, 0.0) <= now} for peer in self._askable()}
        asked = sorted(set().union(*unsure.values()))
        if not asked:
            return
        here = await asyncio.get_running_loop().run_in_executor(self._threads, self._here, asked)
        sends = ((peer, [blob for blob in here if blob.digest in digests]) for peer, digests in unsure.items())
        await asyncio.gather(*(self._send(peer, blobs) for peer, blobs in sends if blobs))

    async def offer(self, digests: Callable[[], Iterable[str]]) -> None:
        """Bring those up to date whose turn it is."""
        now = time.monotonic()
        due = [peer for peer in self._askable() if peer.offer_due <= now]
        if not due:
            return
        for peer in due:
            peer.offer_due = now + OFFER_S
            peer.has_until = {digest: until for digest, until in peer.has_until.items() if until > now}
        needed = await asyncio.get_running_loop().run_in_executor(self._threads, self._here, list(digests()))
        await asyncio.gather(*(self._send(peer, needed) for peer in due))

    def _here(self, digests: list[str]) -> list[Blob]:
        found = []
        for digest in digests:
            with suppress(MissingBlobError):
                found.append(Blob(digest, self._blobs.size(digest)))
        return found

    def _askable(self) -> list[_Peer]:
        now = time.monotonic()
        return [peer for peer in self._peers.values() if peer.avoid_until <= now]

    async def _send(self, peer: _Peer, blobs: list[Blob]) -> None:
        items = [(blob, self._blobs.path(blob.digest)) for blob in blobs]
        patience_s = _ANSWER_S + sum(blob.size for blob in blobs) * _UPLOAD_S_PER_BYTE
        if await self._ask(peer, f"{len(items)} blobs", patience_s, peer.client.upload_missing, items):
            until = time.monotonic() + OFFER_S
            peer.has_until.update((blob.digest, until) for blob in blobs)

    async def _fetch_once(self, blob: Blob) -> None:
        """The first one who wants a blob fetches it; others wait for that."""
        running = self._fetching.get(blob.digest)
        if running is None:
            running = asyncio.ensure_future(self._fetch(blob))
            self._fetching[blob.digest] = running
            running.add_done_callback(lambda _done: self._fetching.pop(blob.digest, None))
        await asyncio.shield(running)

    async def _fetch(self, blob: Blob) -> None:
        patience_s = _ANSWER_S + blob.size * _UPLOAD_S_PER_BYTE
        for peer in self._askable():
            if await self._ask(peer, f"blob {blob.digest}", patience_s, peer.client.download, blob, self._blobs):
                log.info("fetched blob %s of %d bytes from the tracker at %s", blob.digest, blob.size, peer.address)
                return

    async def _ask(self, peer: _Peer, what: str, patience_s: float, work: Callable[..., Any], *arguments: Any) -> bool:
        """Whether it went well; a tracker that does not answer is avoided for a while."""
        await self._free.acquire()
        if peer.avoid_until > time.monotonic():  # as others have found out meanwhile
            self._free.release()
            return False
        asked = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        asked.add_done_callback(lambda _done: self._free.release())
        asked.add_done_callback(_heard)
        try:
            async with asyncio.timeout(patience_s):
                await asyncio.shield(asked)
        except MissingBlobError:
            return False
        except CorruptBlobError as error:  # of one blob's bytes, on either side; whoever says so answers
            log.warning("the tracker at %s: %s: %s", peer.address, what, error)
            return False
        except (KedgeError, grpc.RpcError, ValueError, TimeoutError) as error:
            log.warning("the tracker at %s: %s could not be copied: %s", peer.address, what, error or "no answer")
            peer.avoid_until = time.monotonic() + _AVOID_S
            peer.offer_due = 0.0
            peer.has_until.clear()
            return False
        return True


def _heard(asked: asyncio.Future[Any]) -> None:
    """What comes too late, or when nobody waits for it any more, is no error that nobody knows."""
    if not asked.cancelled():
        asked.exception()
