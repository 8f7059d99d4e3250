"""One runtime in one process: loads a model, then times it on command. Started by `harness.Contender`.

Protocol on stdin/stdout, one line each; the first line out says {"ready": true}.

    {"calls": N, "warmup": M}       -> {"samples_ns": [...]}: N calls, after M that are not timed
    {"seconds": S, "warmup_s": W}   -> {"samples_ns": [...]}: as many calls as S seconds take, at least one, after at
                                       least one that is not timed and W seconds of such
    {"native": S}                   -> {"samples_ns": [...]}: kedge alone, its calls timed in C for about S seconds
    {"memory": true}                -> {"loaded_bytes": …, "peak_bytes": …}: resident now, and at most in two calls
    {"output": PATH}                -> {"saved": PATH}: the outputs of one call

Every runtime reads and writes arrays that are made once: what is timed is the model and the least way into it. The
parent stops this process (SIGSTOP) while another one is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PR_SET_PDEATHSIG = 1  # of prctl(2)
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Ready:
    """A loaded model: a call over fixed arrays, what it gives, and kedge's own timing (seconds -> nanoseconds).

    `inputs` live as long as it does: runtimes read their memory, and most keep no reference.
    """

    inputs: Arrays
    call: Callable[[], object]
    outputs: Callable[[], Arrays]
    native: Callable[[float], list[float]] | None = None


def kedge_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    """An artifact (`.kdg`) as it is; a model is compiled first, in this process."""
    import kedge

    if model.suffix == ".kdg":
        artifact = kedge.Artifact.load(model)
    else:
        shapes = {name: array.shape for name, array in inputs.items()}
        artifact = kedge.compile(kedge.load(model, shapes=shapes), target="native")
    module = artifact.open(threads=threads)

    def native(seconds: float) -> list[float]:
        once = module.time(inputs, repeat=1, min_repeat_ms=0).samples_ns[0]
        # Many short repeats: the least of them is one that nobody disturbed.
        repeat = max(1, min(100, int(seconds * 1e9 / once)))
        return list(module.time(inputs, repeat=repeat, min_repeat_ms=seconds * 1e3 / repeat).samples_ns)

    return Ready(inputs, module.bind(inputs), lambda: module.run(inputs), native)


def onnxruntime_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    results = {}
    for output in session.get_outputs():
        shape = output.shape
        if not all(isinstance(dim, int) for dim in shape):  # free: one call tells how large it is
            shape = session.run([output.name], inputs)[0].shape
        results[output.name] = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        binding.bind_ortvalue_output(output.name, results[output.name])

    def outputs() -> Arrays:
        session.run_with_iobinding(binding)
        return {name: value.numpy() for name, value in results.items()}

    return Ready(inputs, lambda: session.run_with_iobinding(binding), outputs)


def openvino_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    import openvino as ov
    from openvino.properties import hint, inference_num_threads

    options = {
        inference_num_threads: threads,
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        hint.inference_precision: ov.Type.f32,
        # The process has just its cores already. A thread tied to one of them waits where another's work is on it.
        hint.enable_cpu_pinning: False,
    }
    compiled = ov.Core().compile_model(str(model), "CPU", options)
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        request.set_tensor(port, ov.Tensor(inputs[port.any_name], shared_memory=True))
    results = {}
    for port in compiled.outputs:
        array = results[port.any_name] = np.empty(tuple(port.shape), np.float32)
        request.set_tensor(port, ov.Tensor(array, shared_memory=True))

    def outputs() -> Arrays:
        request.infer(share_outputs=True)
        return results

    return Ready(inputs, lambda: request.infer(share_outputs=True), outputs)


def numpy_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    """A model of one MatMul, by numpy's BLAS; the harness has told that how many threads to use."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(model).graph
    if [node.op_type for node in graph.node] != ["MatMul"]:
        raise SystemExit("numpy runs models of one MatMul alone")
    known = inputs | {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    a, b = (known[name] for name in graph.node[0].input)
    c = np.empty((*a.shape[:-1], b.shape[-1]), a.dtype)
    matmul = np.matmul

    def outputs() -> Arrays:
        return {graph.node[0].output[0]: matmul(a, b, out=c)}

    return Ready(inputs, lambda: matmul(a, b, out=c), outputs)


RUNTIMES = {
    "kedge": kedge_runtime,
    "numpy": numpy_runtime,
    "onnxruntime": onnxruntime_runtime,
    "openvino": openvino_runtime,
}


def measure(call: Callable[[], object], calls: int, warmup: int) -> list[int]:
    """Nanoseconds of each of `calls` calls, after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    clock, samples = time.perf_counter_ns, []
    for _ in range(calls):
        start = clock()
        call()
        samples.append(clock() - start)
    return samples


def measure_for(call: Callable[[], object], seconds: float, warmup_s: float) -> list[int]:
    """Nanoseconds of each call that begins within `seconds`, after untimed ones for `warmup_s`; at least one each."""
    clock = time.perf_counter_ns
    end = clock() + warmup_s * 1e9
    call()
    while clock() < end:
        call()
    samples: list[int] = []
    end = clock() + seconds * 1e9
    while not samples or clock() < end:
        start = clock()
        call()
        samples.append(clock() - start)
    return samples


def memory(call: Callable[[], object]) -> dict[str, int]:
    """Bytes resident now that the model is loaded, and the most of them while it is called twice.

    The kernel forgets the peak of loading first (`clear_refs` in proc(5)).
    """
    Path("/proc/self/clear_refs").write_text("5")
    loaded = resident("VmRSS")
    call()
    call()
    return {"loaded_bytes": loaded, "peak_bytes": resident("VmHWM")}


def resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"this system does not tell {field} of a process")
    return int(found[1]) * 1024


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends: stopped, it would notice nothing and stay."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def answer(command: dict[str, Any], ready: Ready) -> dict[str, Any]:
    match command:
        case {"output": path}:
            np.savez(path, allow_pickle=False, **ready.outputs())
            return {"saved": path}
        case {"memory": True}:
            return memory(ready.call)
        case {"seconds": seconds, "warmup_s": warmup_s}:
            return {"samples_ns": measure_for(ready.call, seconds, warmup_s)}
        case {"native": seconds} if ready.native is not None:
            return {"samples_ns": ready.native(seconds)}
        case {"calls": calls, "warmup": warmup}:
            return {"samples_ns": measure(ready.call, calls, warmup)}
    raise SystemExit(f"no such command for this runtime: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cores", default="", help="which ones the process may use: 0,1; all unless given")
    options = parser.parse_args()
    end_with_parent()
    if options.cores:  # before a runtime is imported, which may count them then
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    with np.load(options.inputs) as archive:
        inputs = {name: archive[name] for name in archive.files}
    ready = RUNTIMES[options.runtime](options.model, inputs, options.threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), ready)), flush=True)


if __name__ == "__main__":
    main()
