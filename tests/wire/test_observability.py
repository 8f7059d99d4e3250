"""What a tracker tells of itself: metrics that Prometheus reads, gRPC's health service, reflection."""

from __future__ import annotations

import socket
import sqlite3
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from kedge.rpc.artifact import Artifact
from kedge.rpc.client import Fleet, connect
from kedge.rpc.errors import ConnectError
from kedge.rpc.tracker import store
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Address, Tls, open_channel
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.toys import QUICK, device_info

X = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
Numbers = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[RunningTracker]:
    with start(
        port=0,
        data_dir=tmp_path / "counted",
        settings=QUICK,
        insecure_loopback=True,
        metrics=Address("127.0.0.1", 0),
    ) as tracker:
        yield tracker


def scrape(tracker: RunningTracker) -> Numbers:
    """Every sample by its name and labels."""
    with urllib.request.urlopen(f"http://{tracker.serving.metrics}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(numbers: Numbers, name: str, **labels: str) -> float:
    return numbers[name, frozenset(labels.items())]


def test_a_scrape_counts_what_happened(counted: RunningTracker, artifact: Artifact) -> None:
    with connect(counted.address) as fleet:
        with FakeAgent(counted.address, device_info(), work=echo):
            fleet.run(artifact, X).wait()
            fleet.run(artifact, X).wait()
            fleet.bench(artifact, X).wait()
            numbers = scrape(counted)
            assert of(numbers, "kedge_devices", state="idle") == 1
            assert of(numbers, "kedge_agents_connected") == 1
        wait_for(lambda: not fleet.devices(), "the agent to be gone")
        waiting = [fleet.run(artifact, X) for _ in range(3)]
        queue = scrape(counted)
        for job in waiting:
            job.cancel()
        after = scrape(counted)
    assert of(numbers, "kedge_jobs_submitted_total", kind="run") == 2
    assert of(numbers, "kedge_jobs_finished_total", kind="run", outcome="ok") == 2
    assert of(numbers, "kedge_jobs_finished_total", kind="bench", outcome="ok") == 1
    assert of(numbers, "kedge_job_queue_wait_seconds_count", kind="run") == 2
    assert of(numbers, "kedge_jobs", state="queued", kind="run") == 0
    assert of(queue, "kedge_jobs", state="queued", kind="run") == 3
    assert of(queue, "kedge_devices", state="gone") == 1 and of(queue, "kedge_agents_connected") == 0
    assert of(after, "kedge_jobs", state="queued", kind="run") == 0
    assert of(after, "kedge_jobs_finished_total", kind="run", outcome="cancelled") == 3
    assert of(after, "kedge_store_commit_duration_seconds_count") >= 6
    assert of(after, "kedge_store_facts_total") == 3 * 3 + 3 * 2 + 2  # the device came and went
    assert of(after, "kedge_store_troubled") == 0
    assert of(after, "kedge_data_free_bytes") > 0
    assert of(after, "kedge_blob_uploaded_bytes_total") > 7_000  # weights and code, once
    assert of(after, "kedge_blob_lookups_total", result="miss") >= 3
    # Jobs are begun and heard of on one stream, but while another such job is open: two of the three that wait.
    submit = {"grpc_type": "unary", "grpc_service": "kedge.v1.Fleet", "grpc_method": "SubmitJob"}
    assert of(after, "grpc_server_handled_total", grpc_code="OK", **submit) == 2
    assert of(after, "grpc_server_handling_seconds_count", **submit) == 2
    stream = {**submit, "grpc_type": "bidi_stream", "grpc_method": "RunJobs"}
    assert of(after, "grpc_server_started_total", **stream) == 1
    agents = {"grpc_type": "bidi_stream", "grpc_service": "kedge.v1.Agents", "grpc_method": "Connect"}
    assert of(after, "grpc_server_started_total", **agents) == 1


def test_stages_are_counted_as_agents_report_them(counted: RunningTracker, artifact: Artifact) -> None:
    with connect(counted.address) as fleet, FakeAgent(counted.address, device_info(), work=echo):
        fleet.run(artifact, X).wait()
    numbers = scrape(counted)
    for stage, seconds in (("transfer", 10e-9), ("run", 20e-9)):  # as the agent reports
        assert of(numbers, "kedge_job_stage_duration_seconds_count", kind="run", stage=stage) == 1
        assert of(numbers, "kedge_job_stage_duration_seconds_sum", kind="run", stage=stage) == pytest.approx(seconds)


def test_failed_calls_are_counted_by_their_code(counted: RunningTracker) -> None:
    with connect(counted.address) as fleet, pytest.raises(Exception, match="knows no job"):
        fleet.job("0" * 12)
    labels = {"grpc_type": "unary", "grpc_service": "kedge.v1.Fleet", "grpc_method": "GetJob"}
    key = "grpc_server_handled_total", frozenset({"grpc_code": "NOT_FOUND", **labels}.items())
    wait_for(lambda: scrape(counted).get(key) == 1, "the call to be counted, right after its error has left")


def test_strangers_are_counted(tmp_path: Path) -> None:
    with start(port=0, data_dir=tmp_path / "secure", settings=QUICK, metrics=Address("127.0.0.1", 0)) as tracker:
        assert tracker.serving.security is not None
        tls = Tls(tracker.serving.security.authority.certificate_pem, token="kdg_nobody")
        with Fleet(tracker.address, tls) as stranger, pytest.raises(Exception, match="does not know this token"):
            stranger.hello()
        refused = "kedge_calls_refused_total", frozenset({("reason", "authentication")})
        wait_for(lambda: scrape(tracker)[refused] == 1, "the call to be counted, right after its error has left")
        numbers = scrape(tracker)
    assert of(numbers, "kedge_calls_refused_total", reason="permission") == 0


def test_nothing_names_a_job_a_device_or_a_user(counted: RunningTracker, artifact: Artifact) -> None:
    with connect(counted.address) as fleet, FakeAgent(counted.address, device_info("bench-77"), work=echo):
        job = fleet.run(artifact, X)
        job.wait()
        names = {value for _, labels in scrape(counted) for _, value in labels}
    assert not {job.id, "bench-77", "local", artifact.manifest.name} & names


def test_metrics_are_off_unless_asked_for(tracker: RunningTracker) -> None:
    assert tracker.serving.metrics is None


def test_a_port_that_is_taken_is_named(counted: RunningTracker, tmp_path: Path) -> None:
    assert counted.serving.metrics is not None
    with pytest.raises(ConnectError, match=f"cannot serve metrics at {counted.serving.metrics}"):
        start(port=0, data_dir=tmp_path / "other", insecure_loopback=True, metrics=counted.serving.metrics)
    assert not (tmp_path / "other").exists(), "nothing is made before all addresses are checked"
    start(port=0, data_dir=tmp_path / "other", insecure_loopback=True).stop()


@pytest.mark.parametrize(("whom", "host"), [("clients", "127.0.0.1"), ("agents", "localhost"), ("clients", "0.0.0.0")])
def test_metrics_have_a_port_of_their_own(tmp_path: Path, whom: str, host: str) -> None:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = {"clients": one.getsockname()[1], "agents": two.getsockname()[1]}
    wanted = Address(host, ports[whom])
    with pytest.raises(ConnectError, match=f"cannot serve metrics at {wanted}: {whom} are served at that port"):
        start(port=ports["clients"], agents_port=ports["agents"], data_dir=tmp_path / "data", metrics=wanted)
    assert not (tmp_path / "data").exists()


def test_a_tracker_is_healthy_until_its_disk_is_not(
    counted: RunningTracker, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, full = health_pb2.HealthCheckResponse, threading.Event()
    write = store._write

    def on_a_disk(connection: Any, fact: Any, rows: Any) -> None:
        if full.is_set():
            raise OperationalError("INSERT", None, sqlite3.OperationalError("disk is full"))
        write(connection, fact, rows)

    monkeypatch.setattr(store, "_write", on_a_disk)
    with open_channel(counted.address) as channel, connect(counted.address) as fleet, ThreadPoolExecutor(1) as pool:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "kedge.v1.Fleet", "kedge.v1.Agents"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60).status == known.SERVING
        with pytest.raises(grpc.RpcError, match="there is no service"):
            stub.Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=60)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(2)]
        assert [next(watch).status for watch in watches] == [known.SERVING] * 2
        watches.pop().cancel()  # the others are told all the same
        (watch,) = watches
        full.set()
        submitted = pool.submit(fleet.run, artifact, X)
        assert next(watch).status == known.NOT_SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status == known.NOT_SERVING
        numbers = scrape(counted)
        full.clear()
        assert next(watch).status == known.SERVING
        submitted.result(timeout=60)
        counted.stop()
        assert next(watch).status == known.NOT_SERVING
    assert of(numbers, "kedge_store_troubled") == 1 and of(numbers, "kedge_store_commit_failures_total") >= 1


def test_reflection_lists_the_services_and_their_messages(tracker: RunningTracker) -> None:
    with open_channel(tracker.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {"kedge.v1.Fleet", "kedge.v1.Agents", "grpc.health.v1.Health"} <= services
        assert "kedge.v1.Access" not in services  # this tracker has no tokens
        described = database.FindFileContainingSymbol("kedge.v1.Fleet")
    assert "SubmitJob" in [method.name for method in described.service[0].method]
