"""A tracker's metrics for Prometheus, over HTTP on a port of their own.

Labels are words of closed sets (states, kinds, outcomes, stages, methods, codes): no metric grows with users, devices
or jobs, and nothing here tells one of them. Calls have the names that gRPC's own interceptors use elsewhere
(`grpc_server_…`), so that dashboards made for those fit.
"""

from __future__ import annotations

import asyncio
import inspect
import shutil
import threading
import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kedge.rpc.errors import ConnectError
from kedge.rpc.protocol import VERSION, software
from kedge.rpc.tracker.facts import Fact, JobAccepted, JobAssigned, JobDone, JobRequeued, JobWithdrawn, Stored
from kedge.rpc.tracker.jobs import task_kind
from kedge.rpc.tracker.observer import Observer
from kedge.rpc.tracker.shell import Shell
from kedge.rpc.transport import Address
from kedge.rpc.types import DeviceState, JobState

Context = grpc.aio.ServicerContext[Any, Any]

_WAIT_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 14400)
_STAGE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600)
_CALL_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_COMMIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
#: A tracker whose event loop does not answer for so long fails the scrape, which is what an alert needs.
_CENSUS_S = 5.0
#: Codes that mean that a caller was turned away, and why.
_REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED: "authentication",
    grpc.StatusCode.PERMISSION_DENIED: "permission",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "limit",
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
#: By who streams: client, server.
_TYPES = {
    (False, False): ("unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", grpc.stream_stream_rpc_method_handler),
}


class Metrics(Observer):
    """Everything that is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        build = Gauge("kedge_build_info", "1, with what this tracker is.", ["software", "protocol"], registry=registry)
        build.labels(software(), str(VERSION)).set(1)
        kind = ["kind"]
        self._submitted = Counter("kedge_jobs_submitted", "Jobs that were accepted.", kind, registry=registry)
        self._finished = Counter(
            "kedge_jobs_finished", "Jobs that ended, by outcome.", ["kind", "outcome"], registry=registry
        )
        self._requeued = Counter("kedge_jobs_requeued", "Times that a job had to wait anew.", kind, registry=registry)
        self._waited = Histogram(
            "kedge_job_queue_wait_seconds",
            "From when a job began to wait until a device had it.",
            kind,
            buckets=_WAIT_S,
            registry=registry,
        )
        self._stages = Histogram(
            "kedge_job_stage_duration_seconds",
            "How long the stages of jobs took, as devices report it.",
            ["kind", "stage"],
            buckets=_STAGE_S,
            registry=registry,
        )
        self._commits = Histogram(
            "kedge_store_commit_duration_seconds", "Commits of the store.", buckets=_COMMIT_S, registry=registry
        )
        self._facts = Counter("kedge_store_facts", "Facts that were stored.", registry=registry)
        self._failures = Counter(
            "kedge_store_commit_failures", "Commits that the disk did not take.", registry=registry
        )
        self._lookups = Counter(
            "kedge_blob_lookups", "Blobs that were asked for before sending them.", ["result"], registry=registry
        )
        self._in = Counter("kedge_blob_uploaded_bytes", "Bytes of blobs that came in.", registry=registry)
        self._out = Counter("kedge_blob_downloaded_bytes", "Bytes of blobs that went out.", registry=registry)
        self._is_leader = Gauge(
            "kedge_tracker_is_leader", "1 while this tracker leads, as one without others does.", registry=registry
        )
        self._epoch = Gauge(
            "kedge_tracker_epoch", "The newest leadership; 0 for a tracker that shares no database.", registry=registry
        )
        self._failovers = Counter(
            "kedge_tracker_leaderships", "Times that this tracker began to lead.", registry=registry
        )
        self._trackers = Gauge("kedge_trackers_alive", "Trackers that share the database.", registry=registry)
        for result in ("hit", "miss"):
            self._lookups.labels(result)
        #: An interceptor, to be the outermost.
        self.calls = CountCalls(registry)
        self._census: _Census | None = None
        #: Of jobs that are not done: the kind, and since when they wait.
        self._live: dict[str, tuple[str, int]] = {}

    def serve_state(self, shell: Shell, data_dir: Path) -> None:
        """Also tell how things are at the moment of a scrape. Called in the event loop's thread."""
        self.follows()
        self._is_leader.set(1)
        self._census = _Census(shell, data_dir, asyncio.get_running_loop())
        self.registry.register(self._census)

    def leads(self, epoch: int) -> None:
        """This tracker leads, in an epoch."""
        self._epoch.set(epoch)
        self._failovers.inc()

    def follows(self) -> None:
        """It does not: what the one that leads counts is not counted here too."""
        self._is_leader.set(0)
        if self._census is not None:
            self.registry.unregister(self._census)
            self._census = None

    def sees(self, epoch: int, trackers: int) -> None:
        """The newest epoch, and how many trackers are alive."""
        self._epoch.set(epoch)
        self._trackers.set(trackers)

    def found(self, stored: Stored) -> None:
        """Jobs of an earlier tracker."""
        self._live.clear()
        for record in stored.records:
            accepted, again = record.accepted, record.requeued
            since = accepted.submitted_ms if again is None else again.queued_ms
            self._live[accepted.job_id] = task_kind(accepted.spec.task), since

    def stored(self, fact: Fact, now_ms: int) -> None:
        """Count what became of jobs."""
        if isinstance(fact, JobAccepted):
            kind = task_kind(fact.spec.task)
            self._live[fact.job_id] = kind, fact.submitted_ms
            self._submitted.labels(kind).inc()
            return
        if isinstance(fact, JobWithdrawn):
            self._live.pop(fact.job_id, None)
        elif isinstance(fact, (JobAssigned, JobRequeued, JobDone)) and fact.job_id in self._live:
            kind, since = self._live[fact.job_id]
            if isinstance(fact, JobAssigned):
                self._waited.labels(kind).observe(max(0, now_ms - since) / 1000)
            elif isinstance(fact, JobRequeued):
                self._live[fact.job_id] = kind, fact.queued_ms
                self._requeued.labels(kind).inc()
            else:
                del self._live[fact.job_id]
                self._finished.labels(kind, fact.result.outcome.kind.value).inc()
                for each in fact.result.stage_times:
                    self._stages.labels(kind, each.stage.value).observe(each.duration_ns / 1e9)

    def committed(self, facts: int, duration_s: float) -> None:
        """One commit."""
        self._commits.observe(duration_s)
        self._facts.inc(facts)

    def commit_failed(self) -> None:
        """One that failed."""
        self._failures.inc()

    def looked_up(self, hits: int, misses: int) -> None:
        """Blobs that need not, and that have to be sent."""
        self._lookups.labels("hit").inc(hits)
        self._lookups.labels("miss").inc(misses)

    def uploaded(self, size_bytes: int) -> None:
        """Bytes that came in."""
        self._in.inc(size_bytes)

    def downloaded(self, size_bytes: int) -> None:
        """Bytes that went out."""
        self._out.inc(size_bytes)


class CountCalls(grpc.aio.ServerInterceptor):
    """Counts the calls of services that exist; a path that nobody serves has no label of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        self._started = Counter("grpc_server_started", "Calls that began.", labels, registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls that ended.", [*labels, "grpc_code"], registry=registry)
        self._took = Histogram(
            "grpc_server_handling_seconds", "How long calls took.", labels, buckets=_CALL_S, registry=registry
        )
        self._refused = Counter("kedge_calls_refused", "Callers that were turned away.", ["reason"], registry=registry)
        for reason in _REFUSALS.values():
            self._refused.labels(reason)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler, counted."""
        handler: Any = await continuation(details)
        if handler is None:
            return None
        _, service, method = details.method.split("/")
        # Gates and relays have gRPC stream what is no stream for anybody else.
        told = descriptor_pool.Default().FindMethodByName(f"{service}.{method}")
        kind, _ = _TYPES[told.client_streaming, told.server_streaming]
        _, make = _TYPES[handler.request_streaming, handler.response_streaming]
        found = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        counted = self._counted(next(each for each in found if each is not None), (kind, service, method))
        return make(counted, handler.request_deserializer, handler.response_serializer)

    def _counted(self, inner: Callable[[Any, Context], Any], labels: tuple[str, str, str]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(inner):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                with self._one(labels, context):
                    async for response in inner(request, context):
                        yield response

            return stream

        async def call(request: Any, context: Context) -> Any:
            with self._one(labels, context):
                return await inner(request, context)

        return call

    @contextmanager
    def _one(self, labels: tuple[str, str, str], context: Context) -> Iterator[None]:
        self._started.labels(*labels).inc()
        began, code = time.perf_counter(), grpc.StatusCode.OK
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = _code(context, grpc.StatusCode.UNKNOWN)
            raise
        finally:
            self._took.labels(*labels).observe(time.perf_counter() - began)
            self._handled.labels(*labels, code.name).inc()
            if code in _REFUSALS:
                self._refused.labels(_REFUSALS[code]).inc()


def _code(context: Context, otherwise: grpc.StatusCode) -> grpc.StatusCode:
    """What a call that failed has set as its status."""
    code: Any = context.code()
    found = code if isinstance(code, grpc.StatusCode) else _CODES.get(code, otherwise)
    return otherwise if found is grpc.StatusCode.OK else found


class _Census:
    """How things are when somebody asks: the state machine belongs to the event loop, and is asked there."""

    def __init__(self, shell: Shell, data_dir: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._shell = shell
        self._data_dir = data_dir
        self._loop = loop

    def describe(self) -> list[Metric]:
        """Nothing before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Asked from a thread of the HTTP server."""
        jobs, devices, connected = asyncio.run_coroutine_threadsafe(self._count(), self._loop).result(_CENSUS_S)
        states = GaugeMetricFamily(
            "kedge_jobs", "Jobs that are not done; those in state queued are the queue.", labels=["state", "kind"]
        )
        for (state, kind), number in sorted(jobs.items()):
            states.add_metric([state.value, kind], number)
        yield states
        fleet = GaugeMetricFamily("kedge_devices", "Devices that are remembered, by state.", labels=["state"])
        for device_state in DeviceState:
            fleet.add_metric([device_state.value], devices[device_state])
        yield fleet
        yield GaugeMetricFamily("kedge_agents_connected", "Agents that are connected.", connected)
        troubled = self._shell.store_problem is not None
        yield GaugeMetricFamily("kedge_store_troubled", "1 while the store takes no facts.", int(troubled))
        free = shutil.disk_usage(self._data_dir).free
        yield GaugeMetricFamily("kedge_data_free_bytes", "Free bytes where the tracker's data lie.", free)

    async def _count(self) -> tuple[Counts[tuple[JobState, str]], Counts[DeviceState], int]:
        jobs = self._shell.state.census()
        for state in (JobState.QUEUED, JobState.ASSIGNED, JobState.RUNNING):
            for kind in ("run", "bench"):
                jobs[state, kind] += 0
        devices = Counts(status.state for status in self._shell.state.devices(include_gone=True))
        return jobs, devices, len(self._shell.state.devices())


def cannot_serve(address: Address, why: str) -> ConnectError:
    """The error that says why metrics cannot be served at an address."""
    return ConnectError(f"cannot serve metrics at {address}: {why}", hint="another address with --metrics")


@contextmanager
def exported(metrics: Metrics, address: Address) -> Iterator[Address]:
    """Answer scrapes at an address (port 0: any free one) while the context lasts; gives where that is.

    Raises:
        ConnectError: it cannot be listened on.
    """
    try:
        server, thread = start_http_server(address.port, address.host, metrics.registry)
    except OSError as error:
        raise cannot_serve(address, error.strerror or str(error)) from error
    try:
        yield Address(address.host, server.server_port)
    finally:
        _stop(server, thread)


def _stop(server: Any, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
