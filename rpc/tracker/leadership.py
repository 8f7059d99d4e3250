"""A tracker that leads: its mind, its services, and the gates before them.

One that shares no database leads as long as it runs. One of several does so from a `kedge.rpc.tracker.epoch` on, until
the next one begins; what is made here ends with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from kedge.protos.v1 import agent_pb2_grpc, blobs_pb2_grpc, enrolment_pb2_grpc, fleet_pb2_grpc, sessions_pb2_grpc
from kedge.rpc.blobs import BlobQuotaError
from kedge.rpc.errors import KedgeError
from kedge.rpc.tracker.agents_service import AgentsService
from kedge.rpc.tracker.allowance import Allowance
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.blobs_service import BlobsService
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.fleet_service import FleetService
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.listeners import Serve, Table
from kedge.rpc.tracker.metrics import Metrics
from kedge.rpc.tracker.needed import Needed
from kedge.rpc.tracker.observer import SILENT, Observer
from kedge.rpc.tracker.replication import NO_REPLICATION, Replication
from kedge.rpc.tracker.security.audit import Audit
from kedge.rpc.tracker.security.folder import Limits, Security
from kedge.rpc.tracker.security.interceptor import Authenticate, Gate, by_certificate, by_peer, by_token, trust
from kedge.rpc.tracker.security.owners import Owners
from kedge.rpc.tracker.security.services import AccessService, EnrolmentService
from kedge.rpc.tracker.sessions_service import SessionsService
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.shell import Clock, Shell
from kedge.rpc.tracker.store import Store

log = logging.getLogger("kedge.tracker")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a tracker has whether it leads or not. `metrics` is None where nothing is counted."""

    data_dir: Path
    blobs: TrackerBlobs
    audit: Audit
    threads: ThreadPoolExecutor
    limits: Limits
    settings: Settings | None
    clock: Clock
    metrics: Metrics | None

    @property
    def observer(self) -> Observer:
        """What is told of everything that is counted."""
        return self.metrics or SILENT


class RetainedBlobs:
    """The blobs that stored jobs need: known, and held. Reads the store and every manifest: not in an event loop.

    Raises:
        StoreError: the store does not answer.
    """

    def __init__(self, resources: Resources, store: Store, owners: Owners) -> None:
        self._blobs, self._owners = resources.blobs, owners
        allowance = Allowance(resources.blobs, owners, resources.limits.max_user_bytes)
        self.catalog = Catalog(resources.blobs, owners, allowance)
        self.needed = Needed(resources.blobs, self.catalog.members_of)
        store.keep_needed(self.needed)

    def forget_strays(self) -> None:
        """Blobs that are not here, and that no job or kept result needs, are nobody's any more: what was dropped while
        another tracker led. One that only another tracker has is sent once more when it is needed."""
        needed = self.needed.digests()
        for digest in {digest for _, digest in self._owners} - needed:
            if not self._blobs.has_digest(digest):
                self._owners.forget(digest)


class Leadership:
    """The services over `store`. `security` is None where plaintext is spoken on loopback."""

    def __init__(
        self,
        resources: Resources,
        store: Store,
        security: Security | None,
        owners: Owners,
        retained: RetainedBlobs,
        replication: Replication = NO_REPLICATION,
    ) -> None:
        self._security = security
        self._audit = resources.audit
        self._limits = resources.limits
        catalog, self.needed = retained.catalog, retained.needed
        _fit(resources.blobs)
        self.shell = Shell(store, resources.settings, resources.clock, resources.observer)
        self._gates: list[Gate] = []
        self._fleet = FleetService(self.shell, catalog, resources.audit, resources.blobs.root, replication)
        self._agents = AgentsService(self.shell, owners, resources.audit)
        grants = Grants(resources.blobs)
        self._sessions = SessionsService(self.shell, catalog, grants, resources.audit)
        self._blobs = BlobsService(
            self.shell.state.held_by,
            resources.blobs,
            catalog,
            owners,
            grants,
            resources.threads,
            resources.limits.max_blob_bytes,
            resources.observer,
            replication,
        )

    def close(self, why: KedgeError | None = None) -> None:
        """Decide nothing any more; with a reason, end whatever is under way with it."""
        self.shell.close()
        if why is not None:
            for gate in self._gates:
                gate.close(why)
        self.needed.release()

    def everybody(self) -> Serve:
        """Of a tracker that speaks plaintext."""
        table = Table()
        self._add_fleet(table)
        self._add_agents(table)
        self._add_sessions(table)
        return table.behind(self._gate(trust))

    def clients(self) -> Serve:
        """Whoever has a token."""
        security, table = self._secure(), Table()
        self._add_fleet(table)
        self._add_sessions(table)
        self._add_access(table)
        return table.behind(self._gate(by_token(security.tokens), security.now_s))

    def agents(self) -> Serve:
        """Whoever has a certificate."""
        security, table = self._secure(), Table()
        self._add_agents(table)
        self._add_sessions(table)
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(self._blobs, table)
        cast(Any, enrolment_pb2_grpc).add_EnrolmentServicer_to_server(EnrolmentService(security, self._end), table)
        return table.behind(self._gate(by_certificate(security.devices, security.now_s), security.now_s))

    def peers(self) -> Serve:
        """The fleet's other trackers, which relay what their clients and agents ask."""
        table = Table()
        self._add_fleet(table)
        self._add_agents(table)
        self._add_sessions(table)
        if self._security is None:
            return table.behind(self._gate(trust))
        self._add_access(table)
        authenticate = by_peer(self._security.tokens, self._security.devices, self._security.now_s)
        return table.behind(self._gate(authenticate, self._security.now_s))

    def _secure(self) -> Security:
        assert self._security is not None, "only who is asked can be told apart"
        return self._security

    def _add_fleet(self, table: Table) -> None:
        cast(Any, fleet_pb2_grpc).add_FleetServicer_to_server(self._fleet, table)
        cast(Any, blobs_pb2_grpc).add_BlobsServicer_to_server(self._blobs, table)

    def _add_sessions(self, table: Table) -> None:
        cast(Any, sessions_pb2_grpc).add_SessionsServicer_to_server(self._sessions, table)

    def _add_agents(self, table: Table) -> None:
        cast(Any, agent_pb2_grpc).add_AgentsServicer_to_server(self._agents, table)

    def _add_access(self, table: Table) -> None:
        security = self._secure()
        cast(Any, enrolment_pb2_grpc).add_EnrolmentServicer_to_server(EnrolmentService(security, self._end), table)
        cast(Any, enrolment_pb2_grpc).add_AccessServicer_to_server(
            AccessService(security, self._end, self.shell.forget_device), table
        )

    def _end(self, owner: str, token_id: str, error: KedgeError) -> None:
        """End what an owner has under way, wherever it came in."""
        for gate in self._gates:
            gate.end(owner, token_id, error)

    def _gate(self, authenticate: Authenticate, now_s: Callable[[], float] = time.time) -> grpc.aio.ServerInterceptor:
        gate = Gate(authenticate, self._audit, self._limits.max_calls, now_s)
        self._gates.append(gate)
        return gate


def _fit(blobs: TrackerBlobs) -> None:
    """Drop what a quota leaves no room for; what is needed stays, and new uploads are refused."""
    try:
        blobs.make_room()
    except BlobQuotaError as error:
        log.warning("%s", error)
    log.info("blobs take %d of %d bytes", blobs.taken_bytes(), blobs.quota_bytes())
