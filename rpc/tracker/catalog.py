"""What the tracker knows of the artifacts it was sent: whether they are complete, whose, and what they run on."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from kedge.rpc.artifact import Manifest, needs_of
from kedge.rpc.blobs import blob_of
from kedge.rpc.errors import ArtifactError, InputError, LimitError
from kedge.rpc.limits import check_spec
from kedge.rpc.selector import parse
from kedge.rpc.status import NotReadyError
from kedge.rpc.tracker.allowance import Allowance
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.facts import ANYWHERE, Needs
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.principal import Principal
from kedge.rpc.types import Blob, JobSpec, SessionTask, Tensor

_MAX_MANIFEST_BYTES = 16 << 20
#: Of manifests that are kept in memory, as text.
_REMEMBERED_BYTES = 64 << 20

#: What jobs are matched with devices by: so many variants that differ, and so many CPU features of each.
_MAX_NEEDS = 100
_MAX_FEATURES = 500
#: So many blobs are looked for as fast as somebody else could be asked to.
_FEW_BLOBS = 50

#: A manifest, the blobs that it names, and its bytes.
_Known = tuple[Manifest, list[Blob], int]


class Catalog:
    """The artifacts in `blobs`, as far as each principal may know of them; `allowance` limits what users may have."""

    def __init__(self, blobs: TrackerBlobs, owners: Owners, allowance: Allowance | None = None) -> None:
        self._blobs = blobs
        self._owners = owners
        self.allowance = allowance or Allowance(blobs, owners)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._known_bytes = 0

    def missing(self, blobs: Sequence[Blob], principal: Principal) -> list[Blob]:
        """Those that are not here, as far as the principal may know: what others have sent is missing too.

        The others stay until a job needs them, or for some minutes. Raises BlobQuotaError where they are more than the
        principal may have, whether they are here or not.
        """
        distinct = {blob.digest: blob for blob in blobs}.values()
        self.allowance.check(principal, distinct)
        there = self._blobs.promise(blob for blob in distinct if self._owners.has(principal, blob.digest))
        return [blob for blob in distinct if blob.digest not in there]

    def named_by(self, spec: JobSpec, principal: Principal) -> list[Blob]:
        """The principal's own blobs that a spec names and, where its manifest is known, that needs."""
        if isinstance(spec.task, SessionTask):
            return []
        named = [spec.manifest, *(tensor.data for tensor in spec.task.inputs if isinstance(tensor.data, Blob))]
        known = self._known.get(spec.manifest.digest)
        if known is not None:
            named += known[1]
        return [blob for blob in named if self._owners.has(principal, blob.digest)]

    def digests_of(self, spec: JobSpec) -> set[str]:
        """Every blob that a device needs for an accepted job; a session names its own as it goes."""
        if isinstance(spec.task, SessionTask):
            return set()
        inputs = {tensor.data.digest for tensor in spec.task.inputs if isinstance(tensor.data, Blob)}
        return inputs.union(self.members_of(spec.manifest))

    def members_of(self, manifest: Blob) -> tuple[str, ...]:
        """The manifest itself and the parts of all its members; raises MissingBlobError, ArtifactError."""
        _, parts, _ = self._known.get(manifest.digest) or self._remember(manifest, self._read(manifest))
        return (manifest.digest, *{part.digest for part in parts})

    async def check(self, spec: JobSpec, principal: Principal) -> Needs:
        """What `spec` needs of a device.

        Raises:
            NotReadyError: blobs are missing, or the principal has not sent them; it names them.
            ArtifactError, InputError, SelectorError, BlobError, IncompatibleTargetError: the spec makes no sense.
            LimitError: the artifact is for too many kinds of devices.
        """
        parse(spec.selector)
        if isinstance(spec.task, SessionTask):
            check_spec(spec)
            return ANYWHERE
        manifest = await self._manifest(spec.manifest, principal)
        manifest.function(spec.function)
        check_spec(spec)
        held = []
        for tensor in spec.task.inputs:
            try:
                tensor.check()
            except ValueError as error:
                raise InputError(str(error)) from error
            if isinstance(tensor.data, Blob):
                held.append(tensor.data)
        await self._require(held, "inputs", principal)
        needs = tuple(dict.fromkeys(needs_of(manifest, spec.on)))
        if len(needs) > _MAX_NEEDS or max(len(need.features) for need in needs) > _MAX_FEATURES:
            raise LimitError(
                f"the variants of artifact {manifest.name!r} need {len(needs)} kinds of devices; at most {_MAX_NEEDS} "
                f"are accepted, each with at most {_MAX_FEATURES} CPU features",
                hint="compile it for fewer targets",
            )
        return needs

    async def store_inputs(self, spec: JobSpec, principal: Principal) -> JobSpec:
        """The spec with the inputs that are within it as blobs, as if the principal had sent them; raises BlobError."""
        if isinstance(spec.task, SessionTask):
            return spec
        inputs = [await asyncio.to_thread(self._store, tensor, principal) for tensor in spec.task.inputs]
        return replace(spec, task=replace(spec.task, inputs=tuple(inputs)))

    def _store(self, tensor: Tensor, principal: Principal) -> Tensor:
        if isinstance(tensor.data, Blob) or not tensor.data:
            return tensor
        blob = blob_of(tensor.data)
        if self.missing([blob], principal):
            with self.allowance.upload(principal, blob), self._blobs.begin(blob, 0, principal.tag) as writer:
                writer.append(tensor.data)
                writer.commit()
                if not principal.trusted:
                    self._owners.add(principal.owner, blob.digest)
        return replace(tensor, data=blob)

    async def members_for(self, manifest: Blob, principal: Principal) -> tuple[str, ...]:
        """All of an artifact that the principal has sent; raises NotReadyError, ArtifactError, BlobError."""
        await self._manifest(manifest, principal)
        return self.members_of(manifest)

    async def _manifest(self, blob: Blob, principal: Principal) -> Manifest:
        # Also what was complete before: somebody may have removed blobs, or they were found damaged.
        known = self._known.get(blob.digest)
        if known is None or not self._owners.has(principal, blob.digest):  # whom nothing of it must be told
            await self._require([blob], "manifest", principal)
        if known is None:
            # A large one takes a while: others are served meanwhile.
            known = self._remember(blob, await asyncio.to_thread(self._read, blob))
        self._known.move_to_end(blob.digest)
        manifest, parts, _ = known
        await self._require([blob, *parts], f"artifact {manifest.name!r}", principal)
        return manifest

    def _read(self, blob: Blob) -> Manifest:
        if blob.size > _MAX_MANIFEST_BYTES:
            raise ArtifactError(f"a manifest of {blob.size} bytes is not accepted (at most {_MAX_MANIFEST_BYTES})")
        return Manifest.from_json(self._blobs.read(blob.digest))

    def _remember(self, blob: Blob, manifest: Manifest) -> _Known:
        parts = [Blob(part.digest, part.size) for member in manifest.members for part in member.parts]
        if blob.digest not in self._known:
            self._known_bytes += blob.size
        self._known[blob.digest] = known = manifest, parts, blob.size
        while self._known_bytes > _REMEMBERED_BYTES and len(self._known) > 1:
            _, (_, _, forgotten_bytes) = self._known.popitem(last=False)
            self._known_bytes -= forgotten_bytes
        return known

    async def _require(self, blobs: list[Blob], what: str, principal: Principal) -> None:
        if not blobs:
            return
        # Of each blob a file is looked at, and others are served while that is done to many.
        many = len(blobs) > _FEW_BLOBS
        missing = await asyncio.to_thread(self.missing, blobs, principal) if many else self.missing(blobs, principal)
        if missing:
            names = ", ".join(blob.digest for blob in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise NotReadyError(
                f"{what}: {len(missing)} of {len(set(blobs))} blobs are missing on the tracker: {names}",
                hint="upload them before the job",
            )
