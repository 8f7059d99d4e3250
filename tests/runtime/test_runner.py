"""The runner as agents use it: real processes, hand-written modules, every way to end."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kedge.compiler.toolchain import RuntimeFiles
from kedge.device_agent.runner import SHARED_MEMORY_BYTES, Limits, Runner
from kedge.device_agent.runner_errors import (
    RunnerCancelled,
    RunnerCrashed,
    RunnerError,
    RunnerOutOfMemory,
    RunnerRefused,
    RunnerTimeout,
    RunnerUnavailable,
)
from kedge.device_agent.runtime.protocol import Kept, ModuleInfo, PortInfo, Tensor
from kedge.rpc import abi
from kedge.rpc.types import TimeOptions
from support import native
from support.agents import wait_for

from .conftest import children

pytestmark = pytest.mark.usefixtures("nothing_left")

NO_LIMITS = Limits()
#: The functions of misbehaving.c, in order.
MISDEEDS = (
    "segfault", "forever", "slow", "big_arena", "quit", "chatter", "orphan", "scribble", "copy", "grow",
    "escape", "give_up",
)  # fmt: skip

#: What escape() tries, in order; each result is an errno.
ATTEMPTS = ("fork", "inet", "unix", "kill", "ptrace", "execute", "thread", "limit")


def floats(*values: float, shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor("float32", shape or (len(values),), struct.pack(f"<{len(values)}f", *values))


def ones(rows: int) -> Tensor:
    return floats(*[1.0] * 8 * rows, shape=(rows, 8))


@pytest.fixture
def misbehave(runtime: RuntimeFiles, misbehaving: Path) -> Any:
    """`misbehave(name, limits=..., inputs=..., deadline_s=...)` runs one misdeed in a runner of its own."""
    started: list[Runner] = []

    def run(
        name: str, limits: Limits = NO_LIMITS, inputs: Any = (), deadline_s: float = 30, grace_s: float = 0.5
    ) -> Any:
        runner = Runner(runtime.runner, threads=1, limits=limits, grace_s=grace_s)
        started.append(runner)
        runner.open(misbehaving)
        try:
            return runner.call(MISDEEDS.index(name), inputs, deadline_s)
        except RunnerError as error:
            return error

    yield run
    for runner in started:
        runner.close()


# ---- what works ----------------------------------------------------------------------------------------------------


def test_hello(runtime: RuntimeFiles) -> None:
    with Runner(runtime.runner) as runner:
        hello = runner.hello
        assert hello.abi_version == abi.ABI_VERSION
        assert hello.pid == runner.pid
        assert hello.machine == os.uname().machine
        assert hello.page_size == os.sysconf("SC_PAGESIZE")
        assert hello.num_cpus == len(os.sched_getaffinity(0))
        assert hello.shared_memory
        assert list(hello.features) == sorted(hello.features)
        assert runner.alive
    assert not runner.alive


def test_open_describes_the_module(runtime: RuntimeFiles, arithmetic: Path, weights: Path) -> None:
    with Runner(runtime.runner) as runner:
        info = runner.open(arithmetic, weights, 64)
    assert isinstance(info, ModuleInfo)
    assert info.target == "c"
    assert [function.name for function in info.functions] == ["main", "join", "ramp", "fail", "huge"]
    assert info.functions[1].inputs == (PortInfo("a", "float32", 1), PortInfo("b", "float32", 2))
    assert info.functions[1].outputs == (PortInfo("c", "int64", 2),)


def test_call_with_weights(loaded: Runner) -> None:
    (result,) = loaded.call(0, [ones(2)])
    assert (result.dtype, result.shape) == ("float32", (2, 4))
    assert struct.unpack("<8f", result.data) == (56.0, 64.0) * 4
    assert loaded.last_call_ns > 0


def test_symbols_and_arena(loaded: Runner) -> None:
    for n, m in ((3, 2), (50, 70), (1, 1)):  # the arena grows, then stays
        (result,) = loaded.call(1, [floats(*[0.0] * n), floats(*[0.0] * m * 2 * n, shape=(m, 2 * n))])
        assert result.shape == (n + m, 2 * n)
        assert set(struct.unpack(f"<{(n + m) * 2 * n}q", result.data)) == {n * 100 + m}


def test_a_free_dim_may_be_zero(loaded: Runner) -> None:
    (result,) = loaded.call(1, [Tensor("float32", (0,), b""), Tensor("float32", (3, 0), b"")])
    assert (result.shape, bytes(result.data)) == ((3, 0), b"")


def test_large_tensors_go_through_shared_memory(loaded: Runner) -> None:
    rows = SHARED_MEMORY_BYTES // 8
    data = struct.pack("<8f", *range(8)) * rows
    (result,) = loaded.call(0, [Tensor("float32", (rows, 8), memoryview(data))])
    view = memoryview(result.data)
    assert not view.readonly
    assert struct.unpack("<4f", view[-16:]) == (280.0, 308.0) * 2
    view[0:4] = b"\0\0\0\0"  # the caller's own from here on


def test_outputs_go_inline_when_files_are_limited(runtime: RuntimeFiles, misbehaving: Path) -> None:
    values = [float(i) for i in range(1000)]
    with Runner(runtime.runner, limits=Limits(file_size_bytes=0)) as runner:
        runner.open(misbehaving)
        (result,) = runner.call(MISDEEDS.index("copy"), [floats(*values)])
    assert list(struct.unpack("<1000f", result.data)) == values


def test_discarded_outputs(loaded: Runner) -> None:
    assert loaded.call(0, [ones(1)], discard_outputs=True) == []


def test_time(loaded: Runner) -> None:
    result = loaded.time(0, [ones(1)], TimeOptions(repeat=7, min_repeat_ns=100_000))
    assert len(result.samples_ns) == 7
    assert result.number > 1
    assert result.samples_ns[-1] * result.number >= 100_000
    assert result.resolution_ns > 0


def test_affinity(runtime: RuntimeFiles) -> None:
    cpu = max(os.sched_getaffinity(0))
    with Runner(runtime.runner, cpus=[cpu]) as runner:
        assert runner.hello.num_cpus == 1
        assert os.sched_getaffinity(runner.pid) == {cpu}


def test_limits_are_set_before_hello(runtime: RuntimeFiles) -> None:
    limits = Limits(memory_bytes=1 << 31, cpu_s=100, open_files=20, file_size_bytes=1 << 20)
    with Runner(runtime.runner, limits=limits) as runner:
        text = Path(f"/proc/{runner.pid}/limits").read_text()
        status = Path(f"/proc/{runner.pid}/status").read_text()
    found = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()[1:]}
    assert found["Max address space"] == [str(1 << 31)] * 2
    assert found["Max cpu time"] == ["100", "101"]
    assert found["Max open files"] == ["20", "20"]
    assert found["Max file size"] == [str(1 << 20)] * 2
    assert found["Max core file size"] == ["0", "0"]
    assert "NoNewPrivs:\t1" in status


def test_the_sandbox_lets_nothing_out_but_threads(misbehave: Any) -> None:
    attempts = len(ATTEMPTS)
    (made,) = misbehave("escape", limits=Limits(sandbox=True), inputs=[floats(*[0.0] * attempts)])
    found = dict(zip(ATTEMPTS, struct.unpack(f"<{attempts}f", made.data), strict=True))
    assert found.pop("thread") == 0
    assert found == dict.fromkeys(found, errno.EPERM)


def test_without_the_sandbox_it_could(misbehave: Any) -> None:
    (made,) = misbehave("escape", inputs=[floats(*[0.0] * len(ATTEMPTS))])
    found = dict(zip(ATTEMPTS, struct.unpack(f"<{len(ATTEMPTS)}f", made.data), strict=True))
    assert (found["fork"], found["unix"], found["kill"], found["execute"]) == (0, 0, 0, errno.ENOENT)


def test_a_crash_in_the_sandbox_is_still_told_apart(misbehave: Any) -> None:
    limits = Limits(sandbox=True, memory_bytes=1 << 31, cpu_s=100, open_files=64)
    ended = [misbehave(name, limits=limits) for name in ("segfault", "give_up", "quit")]
    assert [error.signal for error in ended] == [signal.SIGSEGV, signal.SIGABRT, 0]


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_two_modules_share_tensors(loaded: Runner, misbehaving: Path) -> None:
    other = loaded.open(misbehaving).module
    assert other == 1
    x = loaded.keep(ones(1))
    (y,) = loaded.call_keeping(0, [x])
    assert (y.dtype, y.shape, y.nbytes) == ("float32", (1, 4), 16)
    flat = Tensor("float32", (4,), loaded.fetch(y).data)
    (z,) = loaded.call(MISDEEDS.index("copy"), [flat], module=other)
    assert struct.unpack("<4f", z.data) == (56.0, 64.0) * 2
    loaded.close_module(0)
    # What a module computed stays when it is gone.
    assert loaded.fetch(y).shape == (1, 4)
    with pytest.raises(RunnerRefused, match="no module 0 is open"):
        loaded.call(0, [x])


def test_inputs_that_stay_and_inputs_that_come_along(loaded: Runner) -> None:
    a, b = floats(1, 2), floats(*range(12), shape=(3, 4))
    (wanted,) = loaded.call(1, [a, b])
    kept_a, kept_b = loaded.keep(a), loaded.keep(b)
    for given in ([kept_a, b], [a, kept_b], [kept_a, kept_b]):
        (found,) = loaded.call(1, given)
        assert (found.shape, bytes(found.data)) == (wanted.shape, bytes(wanted.data))
    timed = loaded.time(1, [kept_a, b], TimeOptions(repeat=3))
    assert len(timed.samples_ns) == 3
    with pytest.raises(RunnerRefused, match=r"input x has shape \[2\], expected \[N, 8\]"):
        loaded.call(0, [kept_a])


@pytest.mark.parametrize("count", [0, 3, 1 << 18, (1 << 19) + 1])
def test_a_tensor_comes_back_as_it_went(loaded: Runner, count: int) -> None:
    data = bytes(i % 251 for i in range(count * 4))
    kept = loaded.keep(Tensor("float32", (count,), data))
    assert kept.nbytes == len(data)
    assert bytes(loaded.fetch(kept).data) == data
    loaded.release([kept.handle])
    with pytest.raises(RunnerRefused, match=f"no tensor {kept.handle} is kept"):
        loaded.fetch(kept)


def test_a_tensor_that_stays_cannot_be_written_to(runtime: RuntimeFiles, misbehaving: Path) -> None:
    with Runner(runtime.runner) as runner:
        runner.open(misbehaving)
        kept = runner.keep(floats(1))
        with pytest.raises(RunnerCrashed) as caught:
            runner.call(MISDEEDS.index("scribble"), [kept])
        assert caught.value.signal == signal.SIGSEGV


def test_what_is_released_is_memory_again(runtime: RuntimeFiles) -> None:
    with Runner(runtime.runner, limits=Limits(memory_bytes=512 << 20)) as runner:
        large = Tensor("uint8", (64 << 20,), bytes(64 << 20))
        for _ in range(12):
            runner.release([runner.keep(large).handle])
        held: list[Kept] = []
        with pytest.raises(RunnerOutOfMemory):
            held.extend(runner.keep(large) for _ in range(12))
        assert len(held) > 2
        runner.release([kept.handle for kept in held])
        assert runner.keep(large).handle > held[-1].handle  # never given out twice


# ---- refusals: the runner lives on ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs", "status", "text"),
    [
        (0, [floats(*[0.0] * 18, shape=(2, 9))], abi.E_INPUT, r"input x has shape \[2, 9\], expected \[N, 8\]"),
        (0, [floats(*[0.0] * 8)], abi.E_INPUT, r"input x has shape \[8\], expected \[N, 8\]"),
        (0, [Tensor("float64", (1, 8), bytes(64))], abi.E_INPUT, "input x has dtype float64, expected float32"),
        (0, [Tensor("float32", (0, 8), b"")], abi.E_INPUT, r"dim 0 of input x \(N\) is 0, expected at least 1 and at"),
        (0, [], abi.E_ARGUMENT, "main takes 1 inputs, but 0 came"),
        (9, [], abi.E_ARGUMENT, "there is no function 9"),
        (1, [floats(0, 0), floats(0, 0, 0, shape=(1, 3))], abi.E_INPUT, r"expected \[M, N\*2\], which is 4 in dim 1"),
        (3, [], abi.E_KERNEL, "a parallel loop failed with 17"),
    ],
)
def test_refusals(loaded: Runner, function: int, inputs: list[Tensor], status: int, text: str) -> None:
    with pytest.raises(RunnerRefused, match=text) as caught:
        loaded.call(function, inputs)
    assert caught.value.status == status
    assert loaded.call(0, [ones(1)])[0].shape == (1, 4)


def test_a_size_that_overflows_is_out_of_memory(loaded: Runner) -> None:
    with pytest.raises(RunnerOutOfMemory, match="overflow"):
        loaded.call(4, [floats(*[0.0] * 4)])
    assert loaded.alive


def test_nothing_open(runtime: RuntimeFiles) -> None:
    with Runner(runtime.runner) as runner, pytest.raises(RunnerRefused, match="no module 0 is open"):
        runner.call(0, [])


def test_more_modules_than_a_runner_holds(runtime: RuntimeFiles) -> None:
    lib = native.module("minimal")
    with Runner(runtime.runner) as runner:
        assert [runner.open(lib).module for _ in range(64)] == list(range(64))
        with pytest.raises(RunnerRefused, match="as many modules are open as one runner holds"):
            runner.open(lib)
        runner.close_module(17)
        assert runner.open(lib).module == 64
        with pytest.raises(RunnerRefused, match="no module 17 is open"):
            runner.call(0, [], module=17)


@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (["-DABI=99"], abi.E_ABI, f"speaks ABI 99, this runtime speaks {abi.ABI_VERSION}: compile it again"),
        (["-DMAGIC=1"], abi.E_LOAD, "not a module that kedge compiled"),
        (['-DFEATURES="warp-drive,sse2,time-travel"'], abi.E_FEATURE, "lacks: warp-drive, .*time-travel"),
        (["-DWEIGHTS_SIZE=64"], abi.E_LOAD, "needs 64 bytes of weights"),
    ],
)
def test_modules_that_are_refused(runtime: RuntimeFiles, flags: list[str], status: int, text: str) -> None:
    lib = native.module("minimal", *flags)
    with Runner(runtime.runner) as runner:
        with pytest.raises(RunnerRefused, match=text) as caught:
            runner.open(lib)
        assert caught.value.status == status
        assert caught.value.stage == "load"
        runner.open(native.module("minimal"))
        assert runner.call(0, []) == []


def test_a_refusal_to_load_tells_what_was_written_meanwhile(runtime: RuntimeFiles, tmp_path: Path) -> None:
    """As GPUs' drivers do."""
    source = tmp_path / "talks.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) static void talk(void) { fputs("no room for it", stderr); }\n'
    )
    lib = native.compile_c([source], "-shared", "-fPIC")
    refused = "exports no kedge_module: no room for it$"
    with Runner(runtime.runner) as runner, pytest.raises(RunnerRefused, match=refused):
        runner.open(lib)


def test_files_that_are_refused(runtime: RuntimeFiles, arithmetic: Path, weights: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "lib.so"
    garbage.write_bytes(b"not an ELF file")
    with Runner(runtime.runner) as runner:
        for lib, data, offset, text in (
            (garbage, None, 0, "cannot load .*lib.so"),
            (tmp_path / "absent.so", None, 0, "cannot load .*No such file"),
            (runtime.lib, None, 0, "exports no kedge_module"),
            (arithmetic, None, 0, "needs 64 bytes of weights"),
            (arithmetic, tmp_path / "absent.bin", 0, "absent.bin: No such file"),
            (arithmetic, weights, 128, "end before byte 192"),
            (arithmetic, weights, 3, "weights_offset 3 is not a multiple of 64"),
        ):
            with pytest.raises(RunnerRefused, match=text):
                runner.open(lib, data, offset)
        assert len(runner.open(arithmetic, weights, 64).functions) == 5


def test_bad_time_options(loaded: Runner) -> None:
    for options in (TimeOptions(repeat=0), TimeOptions(number=0), TimeOptions(repeat=1 << 62)):
        with pytest.raises(RunnerError):
            loaded.time(0, [ones(1)], options)
    assert loaded.alive


# ---- ends ----------------------------------------------------------------------------------------------------------


def test_segfault(misbehave: Any) -> None:
    error = misbehave("segfault")
    assert isinstance(error, RunnerCrashed)
    assert (error.signal, error.exit_status, error.stage) == (signal.SIGSEGV, 0, "run")


def test_exit_carries_the_last_words(misbehave: Any) -> None:
    error = misbehave("quit")
    assert isinstance(error, RunnerCrashed)
    assert (error.signal, error.exit_status, error.stderr) == (0, 7, "a last word\n")


def test_writing_to_a_shared_input_crashes(misbehave: Any) -> None:
    error = misbehave("scribble", inputs=[Tensor("float32", (1 << 18,), bytes(1 << 20))])
    assert isinstance(error, RunnerCrashed)
    assert error.signal == signal.SIGSEGV


def test_an_endless_loop_is_killed(misbehave: Any) -> None:
    start = time.monotonic()
    error = misbehave("forever", deadline_s=0.1, grace_s=0.1)
    assert isinstance(error, RunnerTimeout)
    assert (error.stage, error.alive) == ("run", False)
    assert time.monotonic() - start < 60


def test_code_that_heeds_a_cancel_keeps_its_runner(runtime: RuntimeFiles, misbehaving: Path) -> None:
    with Runner(runtime.runner, grace_s=10) as runner:
        runner.open(misbehaving)
        with pytest.raises(RunnerTimeout) as caught:
            runner.call(MISDEEDS.index("slow"), [], deadline_s=0.05)
        assert caught.value.alive
        assert runner.call(MISDEEDS.index("copy"), [floats(1)])[0].data == floats(1).data


def test_cpu_seconds(misbehave: Any) -> None:
    error = misbehave("forever", limits=Limits(cpu_s=1), deadline_s=60)
    assert isinstance(error, RunnerTimeout)
    assert "1 CPU seconds" in str(error)


@pytest.mark.parametrize("name", ["big_arena", "grow"])
def test_out_of_memory(misbehave: Any, name: str) -> None:
    error = misbehave(name, limits=Limits(memory_bytes=1 << 30))
    assert isinstance(error, RunnerOutOfMemory)


def test_too_many_threads_for_the_limit(runtime: RuntimeFiles, misbehaving: Path) -> None:
    runner = Runner(runtime.runner, threads=64, limits=Limits(memory_bytes=64 << 20))
    with runner, pytest.raises(RunnerOutOfMemory, match="cannot start thread"):
        runner.open(misbehaving)


def test_chatter_disturbs_nobody(misbehave: Any) -> None:
    assert misbehave("chatter") == []


def test_an_orphan_is_killed_too(misbehave: Any) -> None:
    """A child that the code forked holds every descriptor: the crash is seen nevertheless, and the child ends."""
    error = misbehave("orphan", grace_s=0.05)
    assert isinstance(error, RunnerCrashed)
    assert error.signal == signal.SIGSEGV


def test_a_dead_runner_says_so(runtime: RuntimeFiles, misbehaving: Path) -> None:
    with Runner(runtime.runner) as runner:
        runner.open(misbehaving)
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(RunnerCrashed) as caught:
            runner.call(8, [floats(1)])
        assert caught.value.signal == signal.SIGKILL
        assert not runner.alive
        with pytest.raises(RunnerUnavailable, match="start a new one"):
            runner.call(8, [floats(1)])


def test_a_program_that_ignores_its_children_still_sees_them_end(runtime: RuntimeFiles, misbehaving: Path) -> None:
    """The kernel reaps them then, and their exit status is lost."""
    usual = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        Runner(runtime.runner).close()
        with Runner(runtime.runner) as runner:
            runner.open(misbehaving)
            os.kill(runner.pid, signal.SIGKILL)
            with pytest.raises(RunnerCrashed):
                runner.call(8, [floats(1)])
            assert not runner.alive
    finally:
        signal.signal(signal.SIGCHLD, usual)


def test_a_stopped_runner_is_killed_at_its_deadline(loaded: Runner) -> None:
    os.kill(loaded.pid, signal.SIGSTOP)
    with pytest.raises(RunnerTimeout) as caught:
        loaded.call(0, [ones(1 << 16)], deadline_s=0.1)  # larger than the socket's buffer as well
    assert not caught.value.alive


# ---- cancelling and closing from another thread --------------------------------------------------------------------


def in_thread(run: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def catch() -> None:
        try:
            results.append(run())
        except RunnerError as error:
            results.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    return thread, results


def wait_until_busy(runner: Runner) -> None:
    """Until native code runs: its main thread is no longer at rest in the queue of requests."""
    stat = Path(f"/proc/{runner.pid}/stat")
    deadline = time.monotonic() + 60
    start = int(stat.read_text().rsplit(")")[-1].split()[11])
    while int(stat.read_text().rsplit(")")[-1].split()[11]) == start:
        assert time.monotonic() < deadline


def test_a_reply_in_time_is_not_late_because_it_is_read_late(loaded: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped in mid-call finds the deadline over, and the reply there."""
    send = loaded._process.send

    def stopped_after(*arguments: Any) -> None:
        send(*arguments)
        assert select.select([loaded._process._socket], [], [], 10)[0]
        time.sleep(0.3)

    monkeypatch.setattr(loaded._process, "send", stopped_after)
    assert loaded.call(0, [ones(1 << 16)], deadline_s=0.25)[0].nbytes == 16 << 16


def test_cancel(runtime: RuntimeFiles, misbehaving: Path) -> None:
    with Runner(runtime.runner, grace_s=10) as runner:
        runner.open(misbehaving)
        for _ in range(50):  # a cancel right behind the call finds it, however early
            thread, results = in_thread(lambda: runner.call(MISDEEDS.index("slow"), []))
            while not runner._in_flight:
                pass
            runner.cancel()
            thread.join(60)
            assert isinstance(results[0], RunnerCancelled)
            assert results[0].alive
        runner.cancel()  # nothing in flight: nothing happens
        assert runner.call(MISDEEDS.index("copy"), [floats(1)])[0].shape == (1,)


def test_cancel_of_code_that_does_not_listen(runtime: RuntimeFiles, misbehaving: Path) -> None:
    with Runner(runtime.runner, grace_s=0.05) as runner:
        runner.open(misbehaving)
        thread, results = in_thread(lambda: runner.call(MISDEEDS.index("forever"), []))
        wait_until_busy(runner)
        runner.cancel()
        thread.join(60)
        assert isinstance(results[0], RunnerCancelled)
        assert not results[0].alive


def test_cancel_of_timing(loaded: Runner) -> None:
    options = TimeOptions(repeat=2, cooldown_interval_ns=3600 * 10**9)
    thread, results = in_thread(lambda: loaded.time(0, [ones(1)], options))
    while not loaded._in_flight:
        pass
    loaded.cancel()
    thread.join(60)
    assert isinstance(results[0], RunnerCancelled)
    assert results[0].alive


@pytest.mark.parametrize("end", [Runner.close, Runner.kill])
def test_ending_it_during_a_call(runtime: RuntimeFiles, misbehaving: Path, end: Callable[[Runner], None]) -> None:
    with Runner(runtime.runner) as runner:
        runner.open(misbehaving)
        thread, results = in_thread(lambda: runner.call(MISDEEDS.index("forever"), []))
        wait_until_busy(runner)
        end(runner)
        thread.join(60)
        assert isinstance(results[0], RunnerCrashed)
        assert results[0].signal == signal.SIGKILL


def test_a_forgotten_runner_is_killed(runtime: RuntimeFiles) -> None:
    runner = Runner(runtime.runner)
    pid = runner.pid
    del runner
    assert not Path(f"/proc/{pid}").exists()


def test_started_from_a_thread_that_ends(runtime: RuntimeFiles, misbehaving: Path) -> None:
    made: list[Runner] = []
    thread = threading.Thread(target=lambda: made.append(Runner(runtime.runner)))
    thread.start()
    thread.join()
    with made[0] as runner:
        runner.open(misbehaving)
        assert runner.call(8, [floats(1)])[0].shape == (1,)


def test_it_dies_with_its_parent(runtime: RuntimeFiles, misbehaving: Path) -> None:
    """The parent is killed in the middle of a call that never ends."""
    code = (
        "import sys, threading\n"
        "from kedge.device_agent.runner import Runner\n"
        "r = Runner(sys.argv[1]); r.open(sys.argv[2]); print(r.pid, flush=True); r.call(1, [], 600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(runtime.runner), str(misbehaving)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while _alive(pid):
        assert time.monotonic() < deadline


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# ---- programs that are no runner -----------------------------------------------------------------------------------


def test_no_such_program(tmp_path: Path) -> None:
    with pytest.raises(RunnerUnavailable, match="No such file") as caught:
        Runner(tmp_path / "absent")
    assert caught.value.stage == "start"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("exit 5", r"ended before it said hello \(exit status 5\)"),
        ("echo broken >&2; exit 1", "broken"),
        ("exec sleep 1000", "said nothing for 1 s"),
        (
            'eval "exec 9>&$(echo $* | sed s/.*--fd.//)"; echo a line that is long enough to be a header >&9',
            "instead of",
        ),
    ],
)
def test_programs_that_are_no_runner(tmp_path: Path, script: str, text: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(RunnerUnavailable, match=text):
        Runner(program, start_deadline_s=1.0 if "sleep" in script else 60)


def test_a_program_that_the_disk_does_not_give(runtime: RuntimeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then exec hangs. The deadline holds, later starts are not held up, and what comes of it ends."""
    answers, popen, before = threading.Event(), subprocess.Popen, children()

    def stuck(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        assert answers.wait(60)
        return process

    monkeypatch.setattr(subprocess, "Popen", stuck)
    for _ in range(2):
        with pytest.raises(RunnerUnavailable, match="had not begun after") as caught:
            Runner(runtime.runner, start_deadline_s=0.2)
        assert caught.value.stage == "start"
    monkeypatch.undo()
    with Runner(runtime.runner) as runner:
        assert runner.alive
    assert len(children() - before) == 2
    answers.set()
    wait_for(lambda: children() == before, "what started late to end")


def test_a_cpu_that_does_not_exist(runtime: RuntimeFiles) -> None:
    with pytest.raises(RunnerUnavailable, match="--cpus: Invalid argument"):
        Runner(runtime.runner, cpus=[1000])


# ---- when this process itself is short of something ----------------------------------------------------------------


@contextmanager
def limited(resource_: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource_)
    resource.setrlimit(resource_, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource_, (soft, hard))


def limit_with_free_descriptors(count: int) -> int:
    """The limit on descriptors that leaves so many, wherever those that are open lie."""
    taken = [os.dup(0) for _ in range(count + 1)]
    for fd in taken:
        os.close(fd)
    return taken[-1]


def test_no_descriptors_to_start_with(runtime: RuntimeFiles) -> None:
    """However few there are left, it starts or says why not, and nothing is leaked (`nothing_left`)."""
    with Runner(runtime.runner):
        pass  # what is opened once for all is open
    refused = 0
    for more in range(14):
        with limited(resource.RLIMIT_NOFILE, limit_with_free_descriptors(more)):
            try:
                Runner(runtime.runner).close()
            except RunnerUnavailable as error:
                assert "Too many open files" in str(error)
                refused += 1
    assert 3 <= refused < 14


def test_no_descriptor_for_the_inputs(loaded: Runner) -> None:
    """That is the device's fault: the artifact did not crash, and its runner lives on."""
    inputs = [Tensor("float32", (1 << 16, 8), bytes(1 << 21))]
    with limited(resource.RLIMIT_NOFILE, 3), pytest.raises(RunnerUnavailable, match="hand over the inputs: Too many"):
        loaded.call(0, inputs)
    assert loaded.call(0, inputs)[0].shape == (1 << 16, 4)


def test_no_memory_for_the_results(loaded: Runner) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    inputs = [Tensor("float32", (1 << 20,), bytes(4 << 20))]
    with (
        limited(resource.RLIMIT_AS, size + (64 << 20)),
        pytest.raises(RunnerUnavailable, match="take over the results"),
    ):
        loaded.call(2, inputs)  # 256 MiB come back
    assert loaded.call(0, [ones(1)])[0].shape == (1, 4)


def test_a_fork_leaves_the_runner_to_its_owner(loaded: Runner) -> None:
    """A child that tidies up what it inherited must not end its parent's runner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that other threads run; the child needs none of them
        child = os.fork()
    if child == 0:
        status = 1
        try:
            loaded.kill()
            loaded.close()
            loaded._finalizer()
            try:
                loaded.call(0, [ones(1)])
            except RunnerUnavailable:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loaded.call(0, [ones(1)])[0].shape == (1, 4)


def test_an_interrupt_while_it_starts(runtime: RuntimeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being started then belongs to nobody: it must end, and be reaped."""
    with Runner(runtime.runner):
        pass
    interrupted, started = threading.Event(), threading.Event()
    main, popen, raised = threading.get_ident(), subprocess.Popen, []

    def handler(*_: object) -> None:
        if not raised:
            raised.append(1)
            raise KeyboardInterrupt

    def slow(*arguments: Any, **options: Any) -> Any:
        while not interrupted.wait(0.01):  # one that comes right before the main thread waits does not wake it
            signal.pthread_kill(main, signal.SIGINT)
        try:
            return popen(*arguments, **options)
        finally:
            started.set()

    monkeypatch.setattr(subprocess, "Popen", slow)
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Runner(runtime.runner)
        interrupted.set()
        assert started.wait(60)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    with Runner(runtime.runner) as runner:  # by the same thread: what it had to do before is done
        assert children() >= {runner.pid}
    assert runner.pid not in children()
