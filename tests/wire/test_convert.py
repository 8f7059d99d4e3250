from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.protos.v1 import agent_pb2, types_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc import types as t
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import ProtocolError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
i32 = st.integers(-(2**31), 2**31 - 1)
u32 = st.integers(0, 2**32 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
real = st.floats(allow_nan=False)
texts = st.lists(text, max_size=3).map(tuple)

blobs = st.builds(t.Blob, text, i64)
tensors = st.builds(
    t.Tensor, text, text, st.lists(i64, max_size=4).map(tuple), st.one_of(st.binary(max_size=20), blobs)
)
tensor_lists = st.lists(tensors, max_size=3).map(tuple)
outcomes = st.builds(Outcome, st.sampled_from(OutcomeKind), st.none() | st.sampled_from(Stage), i32, i32, text)
gpus = st.builds(t.Accelerator, text, u32, text, text, text, texts, i64, i64, u32, u32)
cores = st.lists(u32, max_size=3).map(tuple)
confinements = st.builds(t.Confinement, text, text, st.booleans(), st.booleans(), st.booleans(), cores, texts)
devices = st.builds(
    t.DeviceInfo, text, text, st.dictionaries(text, text, max_size=3), texts, text, u32, i64, text, st.booleans(), u32,
    text, st.lists(gpus, max_size=2).map(tuple), st.none() | confinements,
)  # fmt: skip
statuses = st.builds(t.DeviceStatus, devices, st.sampled_from(t.DeviceState), i64, text)
health = st.builds(
    t.Health, st.none() | real, st.none() | real, st.none() | real, text, st.none() | i64, st.none() | i64
)
options = st.builds(t.TimeOptions, *[i64] * 8, st.booleans())
rows = st.lists(real, max_size=5).map(tuple)
steps = st.builds(t.StepSamples, st.lists(rows, max_size=3).map(tuple), real, rows, st.integers(0, 2**31 - 1))
pinnings = st.builds(t.Pinning, cores, st.booleans(), st.booleans(), st.none() | real)
measurements = st.builds(
    t.Measurement, options, st.lists(real, max_size=5).map(tuple), i64, i32, st.none() | health, st.none() | health,
    st.none() | st.sampled_from(t.Verdict), texts, st.none() | steps, st.none() | pinnings,
)  # fmt: skip
deadlines = st.builds(t.Deadlines, i64, i64, i64, i64)
tasks = st.one_of(
    st.builds(t.RunTask, tensor_lists, st.booleans()), st.builds(t.BenchTask, tensor_lists, options, st.booleans())
)
signatures = st.none() | st.builds(t.Signature, st.binary(max_size=40), st.binary(max_size=70))
specs = st.builds(t.JobSpec, blobs, text, tasks, text, deadlines, i32, i32, text, signatures)
stage_times = st.lists(st.builds(t.StageTime, st.sampled_from(Stage), i64), max_size=3).map(tuple)
results = st.builds(t.JobResult, outcomes, tensor_lists, st.none() | measurements, stage_times, text)
jobs = st.builds(
    t.Job, text, specs, st.sampled_from(t.JobState), st.none() | st.sampled_from(Stage), text, st.none() | results, i64,
    i64, text,
)  # fmt: skip
leases = st.builds(t.Lease, text, st.integers(0, 2**64 - 1), i64)
lease_lists = st.lists(leases, max_size=3).map(tuple)
protocols = st.builds(t.Protocol, u32, texts, text)
agent_bodies = st.one_of(
    st.builds(m.Hello, protocols, devices, text, lease_lists),
    st.builds(m.Heartbeat, health, lease_lists),
    st.builds(m.JobStarted, leases),
    st.builds(m.JobProgress, leases, st.sampled_from(Stage)),
    st.builds(m.JobFinished, leases, results),
    st.builds(m.Goodbye, text),
)
tracker_bodies = st.one_of(
    st.builds(m.Welcome, protocols, text, i64),
    st.builds(m.AssignJob, leases, specs),
    st.builds(m.AbortJob, leases, text),
    st.builds(m.ResultAccepted, text, st.booleans()),
    st.builds(m.Refused, text, st.booleans()),
)

ROUND_TRIPS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "blob": (blobs, convert.blob_to_pb, convert.blob_from_pb),
    "tensor": (tensors, convert.tensor_to_pb, convert.tensor_from_pb),
    "outcome": (outcomes, convert.outcome_to_pb, convert.outcome_from_pb),
    "device status": (statuses, convert.device_status_to_pb, convert.device_status_from_pb),
    "health": (health, convert.health_to_pb, convert.health_from_pb),
    "measurement": (measurements, convert.measurement_to_pb, convert.measurement_from_pb),
    "spec": (specs, convert.job_spec_to_bytes, convert.job_spec_from_bytes),
    "result": (results, convert.job_result_to_bytes, convert.job_result_from_bytes),
    "job": (jobs, convert.job_to_pb, convert.job_from_pb),
    "protocol": (protocols, convert.protocol_to_pb, convert.protocol_from_pb),
    "agent message": (
        agent_bodies,
        lambda body: convert.agent_message_to_pb(body, 3).SerializeToString(),
        lambda data: convert.agent_message_from_pb(agent_pb2.AgentMessage.FromString(data)),
    ),
    "tracker message": (
        tracker_bodies,
        lambda body: convert.tracker_message_to_pb(body, 3).SerializeToString(),
        lambda data: convert.tracker_message_from_pb(agent_pb2.TrackerMessage.FromString(data)),
    ),
}


@pytest.mark.parametrize("what", ROUND_TRIPS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_there_and_back(what: str, data: st.DataObject) -> None:
    strategy, out, back = ROUND_TRIPS[what]
    value = data.draw(strategy)
    assert back(out(value)) == value


def test_every_enum_has_the_same_members_on_both_sides() -> None:
    pairs = [
        (Stage, types_pb2.Stage, "STAGE_"),
        (OutcomeKind, types_pb2.OutcomeKind, "OUTCOME_KIND_"),
        (t.Verdict, types_pb2.Verdict, "VERDICT_"),
        (t.DeviceState, types_pb2.DeviceState, "DEVICE_STATE_"),
        (t.JobState, types_pb2.JobState, "JOB_STATE_"),
    ]
    for plain, pb, prefix in pairs:
        theirs = {name.removeprefix(prefix) for name in pb.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
        assert theirs == {member.name for member in plain} - {"UNKNOWN"}


def test_what_a_newer_peer_says_is_not_taken_for_something_else() -> None:
    assert convert.outcome_from_pb(types_pb2.Outcome(kind=99, stage=99)) == Outcome(OutcomeKind.UNKNOWN)
    assert convert.agent_message_from_pb(agent_pb2.AgentMessage(request_id=1)) is None
    assert convert.tracker_message_from_pb(agent_pb2.TrackerMessage(request_id=1)) is None
    with pytest.raises(ProtocolError, match="task"):
        convert.job_spec_from_pb(types_pb2.JobSpec(function="main"))
    with pytest.raises(ProtocolError, match="job state"):
        convert.job_state_from_pb(99)
    with pytest.raises(ProtocolError, match="'x' carries no data"):
        convert.tensor_from_pb(types_pb2.Tensor(name="x"))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (t.Tensor("x", "float32", (2, 3), b"\0" * 24), None),
        (t.Tensor("x", "float32", (), b"\0" * 4), None),
        (t.Tensor("x", "float32", (0, 3), b""), None),
        (t.Tensor("x", "bfloat16", (2,), t.Blob("a", 4)), None),
        (t.Tensor("x", "float32", (2, 3), b"\0" * 20), "takes 24 bytes, not 20"),
        (t.Tensor("x", "float32", (2,), t.Blob("a", 4)), "takes 8 bytes, not 4"),
        (t.Tensor("x", "complex64", (2,), b""), "dtype 'complex64' is not one of"),
        (t.Tensor("x", "int8", (-1,), b""), "negative dim"),
    ],
)
def test_tensors_are_checked(tensor: t.Tensor, problem: str | None) -> None:
    if problem is None:
        tensor.check()
    else:
        with pytest.raises(ValueError, match=problem):
            tensor.check()


def test_inline_tensors_fit_into_a_message() -> None:
    mib = 1 << 20
    assert t.plan_inline([0, mib - 5, mib + 1, 5, 1]) == [True, True, False, True, False]
    assert t.plan_inline([mib // 4] * 6) == [True] * 4 + [False] * 2


def test_outcomes_read_well() -> None:
    assert str(Outcome(OutcomeKind.OK)) == "ok"
    assert str(Outcome(OutcomeKind.CRASH, Stage.RUN, signal=11)) == "crash (SIGSEGV) in stage run"
    assert str(Outcome(OutcomeKind.CRASH, exit_status=3)) == "crash (exit status 3)"
    assert str(Outcome(OutcomeKind.TIMEOUT, Stage.LOAD, message="5 s")) == "timeout in stage load: 5 s"
    assert f"{OutcomeKind.LOAD_ERROR}" == "load_error" == OutcomeKind.LOAD_ERROR
