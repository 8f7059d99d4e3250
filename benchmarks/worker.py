"""One runtime in one process: loads a model, then times it on command. Started by `harness.Contender`.

Protocol on stdin/stdout, one line each: {"calls": N, "warmup": M} -> {"samples_ns": [...]}; {"output": PATH} saves the
outputs of one call. The parent stops this process (SIGSTOP) while another one is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]
Ready = tuple[Callable[[], object], Callable[[], Arrays]]


def kedge_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    import kedge

    shapes = {name: array.shape for name, array in inputs.items()}
    artifact = kedge.compile(kedge.load(model, shapes=shapes), target="native")
    module = artifact.open(threads=threads)
    return module.bind(inputs), lambda: module.run(inputs)


def onnxruntime_runtime(model: Path, inputs: Arrays, threads: int) -> Ready:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    results = dict(zip(names, session.run(names, inputs), strict=True))
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name in names:
        binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(results[name]))
    return (lambda: session.run_with_iobinding(binding)), (lambda: results)


RUNTIMES = {"kedge": kedge_runtime, "onnxruntime": onnxruntime_runtime}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    with np.load(options.inputs) as archive:
        inputs = {name: archive[name] for name in archive.files}
    call, outputs = RUNTIMES[options.runtime](options.model, inputs, options.threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "output" in command:
            np.savez(command["output"], allow_pickle=False, **outputs())
            reply: dict[str, Any] = {"saved": command["output"]}
        else:
            reply = {"samples_ns": measure(call, command["calls"], command["warmup"])}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
