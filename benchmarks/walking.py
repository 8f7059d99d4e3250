"""The walking product's figures in one run: models against ONNX Runtime, the wire beside gRPC, the agent's memory.

python benchmarks/walking.py            # by hand, on a quiet machine; writes benchmarks/results/walking-DATE.json
python benchmarks/walking.py --smoke    # a few iterations of everything, checks outputs, judges no figure
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import harness
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import kedge
from kedge.compiler import te
from kedge.data import digits_model, digits_test
from kedge.demo import processes

RESULTS = Path(__file__).with_name("results")
CHUNK = 1 << 20
DEVICE = "bench-agent"
TRIVIAL_INPUTS = {"x": np.zeros(16, np.float32)}


def mlp(path: Path) -> Path:
    """MLP 784-256-10 with seeded random weights."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) / 16).astype(np.float32), name)

    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 784])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        [weight("w1", 256, 784), weight("b1", 256), weight("w2", 10, 256), weight("b2", 10)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def models(folder: Path, smoke: bool) -> list[dict[str, Any]]:
    """kedge against ONNX Runtime, each in its own process, at 1 and 2 threads."""
    images, _ = digits_test()
    rng = np.random.default_rng(1)
    cases = [
        ("MLP 784-256-10", mlp(folder / "mlp.onnx"), {"x": rng.random((1, 784), dtype=np.float32)}),
        ("digits, batch 1", digits_model(), {"image": images[:1]}),
        ("digits, batch 64", digits_model(), {"image": images[:64]}),
    ]
    rows = []
    for title, model, inputs in cases:
        np.savez(folder / "inputs.npz", allow_pickle=False, **inputs)
        rows += [{"model": title, "threads": n, **against_ort(folder, model, n, smoke)} for n in (1, 2)]
    return rows


def against_ort(folder: Path, model: Path, threads: int, smoke: bool) -> dict[str, Any]:
    contenders = [
        harness.Contender.start(runtime, model, folder / "inputs.npz", threads) for runtime in ("kedge", "onnxruntime")
    ]
    try:
        ours, theirs = (contender.outputs(folder / "outputs.npz") for contender in contenders)
        for name, expected in theirs.items():
            np.testing.assert_allclose(ours[name], expected, rtol=1e-4, atol=1e-5)
        harness.compare(contenders, blocks=2 if smoke else 20, calls=10 if smoke else 500, warmup=2 if smoke else 50)
        kedge_us, ort_us = (harness.median_us(contender) for contender in contenders)
    finally:
        for contender in contenders:
            contender.close()
    return {"kedge_us": kedge_us, "onnxruntime_us": ort_us, "ratio": kedge_us / ort_us}


@contextmanager
def fleet_of_one(folder: Path) -> Iterator[str]:
    """A tracker and an agent in their own processes; gives the tracker's address."""
    with processes.tracker(folder / "tracker") as address, processes.agent(address, DEVICE, folder / "agent"):
        yield address


def trivial() -> kedge.Artifact:
    """One kernel under a microsecond, called with TRIVIAL_INPUTS."""
    x = te.placeholder((16,), "float32", name="x")
    y = te.compute((16,), lambda i: x[i] + 1.0, name="y")
    return kedge.compile(te.create_prim_func([x, y], name="main"), target="native", name="trivial")


def job_overhead(address: str, smoke: bool) -> dict[str, float]:
    """Milliseconds from submit to result: a cached one-kernel artifact in a new runner, its kernel under 1 µs."""
    artifact, inputs, samples = trivial(), TRIVIAL_INPUTS, []
    with kedge.connect(address) as fleet:
        fleet.wait_for_device(DEVICE, timeout=30)
        for _ in range(5):
            fleet.run(artifact, inputs, device=DEVICE).wait()
        for _ in range(10 if smoke else 300):
            start = time.perf_counter()
            fleet.run(artifact, inputs, device=DEVICE).wait()
            samples.append((time.perf_counter() - start) * 1e3)
    samples.sort()
    return {"p50_ms": statistics.median(samples), "p90_ms": samples[int(len(samples) * 0.9)], "jobs": len(samples)}


def upload_rate(address: str, smoke: bool) -> dict[str, float]:
    """MB/s of a fresh blob through the tracker, hashed at both ends, beside gRPC's own stream of the same bytes."""
    size = (16 if smoke else 256) << 20
    ours, raw = [], []
    with kedge.connect(address) as fleet, raw_sink() as sink:
        for _ in range(1 if smoke else 5):
            data = os.urandom(size)
            start = time.perf_counter()
            fleet.upload(data)
            ours.append(size / 1e6 / (time.perf_counter() - start))
            raw.append(raw_stream(sink, data))
    return {"upload_mb_s": statistics.median(ours), "grpc_raw_mb_s": statistics.median(raw)}


@contextmanager
def raw_sink() -> Iterator[str]:
    """A gRPC server in a process of its own that counts bytes and does nothing else."""
    process = subprocess.Popen([sys.executable, __file__, "--sink"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.communicate()


def serve_sink() -> None:
    def consume(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(len(chunk) for chunk in requests)).encode()

    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.method_handlers_generic_handler("raw", {"Sink": grpc.stream_unary_rpc_method_handler(consume)})
    server.add_generic_rpc_handlers((handler,))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


def raw_stream(address: str, data: bytes) -> float:
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_unary("/raw/Sink")
        start = time.perf_counter()
        counted = call(data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
        seconds = time.perf_counter() - start
    if int(counted) != len(data):
        raise RuntimeError(f"the sink saw {counted!r} of {len(data)} bytes")
    return len(data) / 1e6 / seconds


def agent_memory_mb() -> float:
    """PSS of the idle agent, in MB, with the runner that waits for its next job."""
    children: dict[int, list[int]] = {}
    todo: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(process.name))
            if f"--name={DEVICE}".encode() in (process / "cmdline").read_bytes():
                todo.append(int(process.name))
    if not todo:
        raise RuntimeError("no process of the agent was found")
    total_kb = 0
    while todo:
        pid = todo.pop()
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total_kb += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        todo += children.get(pid, [])
    return total_kb * 1024 / 1e6


def compile_seconds() -> dict[str, float]:
    """A whole `kedge compile` of the digits model in a fresh process: with an empty cache, and again."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "KEDGE_CACHE_DIR": cache}
        command = [sys.executable, "-m", "kedge", "compile", str(digits_model()), "-o", f"{cache}/digits.kdg"]
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
    return {"cold_s": seconds[0], "warm_s": seconds[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few iterations, no result file")
    parser.add_argument("--sink", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sink:
        serve_sink()
        return
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": harness.machine()}
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as name:
        folder = Path(name)
        print("models against ONNX Runtime (medians, each runtime alone in its process)")
        result["models"] = models(folder, options.smoke)
        for row in result["models"]:
            print(
                f"  {row['model']:<18} {row['threads']} threads: kedge {row['kedge_us']:8.1f} µs,"
                f" ONNX Runtime {row['onnxruntime_us']:8.1f} µs, ratio {row['ratio']:.2f}"
            )
        with fleet_of_one(folder) as address:
            result["job_overhead"] = job_overhead(address, options.smoke)
            print(f"overhead of a job: {result['job_overhead']} (wanted: p50 under 15 ms)")
            result["agent_idle_pss_mb"] = agent_memory_mb()
            print(f"idle agent: {result['agent_idle_pss_mb']:.1f} MB PSS (wanted: under 60)")
            result["upload"] = upload_rate(address, options.smoke)
            print(f"upload: {result['upload']} (wanted: over 200 MB/s)")
        result["digits_compile"] = compile_seconds()
        print(f"digits compile, whole process: {result['digits_compile']} (wanted: under 3 s cold)")
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"walking-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
