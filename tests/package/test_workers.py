"""Kernels compiled by worker processes: the same bytes, the same errors, and an end whatever happens."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kedge.compiler import pipeline, te, workers
from kedge.compiler.cache import KernelCache, KernelObject
from kedge.compiler.errors import CodegenError, CompileError, WorkerError
from kedge.compiler.frontend import nn
from kedge.compiler.graph.ir import Module
from kedge.compiler.kernels import compile_kernel
from kedge.compiler.lower.program import Draft, Kernel
from kedge.compiler.target import parse
from kedge.compiler.tir.expr import Call, Expr
from kedge.compiler.tir.stmt import PrimFunc, Store
from kedge.compiler.tir.structural import canonical
from kedge.compiler.tir.visitor import map_stmt
from kedge.compiler.worker import Request, answer, dumps
from kedge.compiler.workers import Job, Workers, available_bytes, expected_s, worker_limit
from support import functions

TARGET = parse("x86-64-v3")


def job(func: PrimFunc, symbol: str = "kedge_test", origin: tuple[str, ...] = ()) -> Job:
    return Job(Draft(func, canonical(func), origin), TARGET, symbol)


def jobs() -> list[Job]:
    funcs = (functions.chain(8), functions.dense(8, 8, 8), functions.softmax(4, 8), functions.mean(1, 2, 4))
    return [job(func, f"kedge_{number}") for number, func in enumerate(funcs)]


def pair() -> Workers:
    """Two workers, started for anything."""
    return Workers(limit=2, worth_s=0)


def compiled(running: Workers, work: list[Job]) -> dict[str, KernelObject]:
    said: list[str] = []
    with running:
        made = {each.symbol: each for each in running.compile(work, lambda one: said.append(one.symbol))}
    assert sorted(said) == sorted(each.symbol for each in work) == sorted(made)
    return made


class Net(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        return self.fc3(self.fc2(self.fc1(x)))


@pytest.fixture(scope="module")
def net() -> Module:
    return Net().export(spec={"forward": {"x": nn.spec.Tensor(("N", 12), "float32")}})[0]


class Sent:
    """Has an effect in the process that unpickles it, as part of a kernel."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (self.code,)


def spoiled(code: str, symbol: str = "kedge_spoiled") -> Job:
    return job(functions.chain(16), symbol, (Sent(code),))  # type: ignore[arg-type]


def test_workers_make_the_same_bytes() -> None:
    assert compiled(pair(), jobs()) == compiled(Workers(limit=1), jobs())


def test_artifacts_are_the_same(net: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for number, make in enumerate((functools.partial(Workers, 1), functools.partial(Workers, 2, 0.0))):
        monkeypatch.setattr(pipeline, "Workers", make)
        cache = KernelCache(tmp_path / str(number))
        digests.append(pipeline.compile_module(net, ["x86-64", "raspberry-pi/4b"], cache=cache).digest)
        assert cache.misses > 2
    assert digests[0] == digests[1]


def test_every_stage_is_dumped_and_nothing_is_printed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEDGE_DEBUG", "1")
    seen = []
    for number, running in enumerate((Workers(limit=1), pair())):
        folder = tmp_path / str(number)
        monkeypatch.setenv("KEDGE_DUMP_DIR", str(folder))
        compiled(running, jobs())
        seen.append({path.name: path.read_text() for path in folder.iterdir()})
        printed = capsys.readouterr().err
        assert all(printed.count(f"kedge: kernel {one.kernel.func.name}: ") == 1 for one in jobs())
    assert seen[0] == seen[1] and len(seen[0]) == 4 * len(jobs())


def test_a_refusal_is_the_same_refusal() -> None:
    x = te.placeholder((8,), "int32", "x")
    root = te.create_prim_func([x, te.compute((8,), lambda i: Call("sqrt", (x[i],), "int32"), name="y")], "root")
    with pytest.raises(CodegenError) as here:
        compiled(Workers(limit=1), [job(root)])
    with pytest.raises(CodegenError) as there:
        compiled(pair(), [job(root), *jobs()])
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)


def test_a_defect_says_where_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> KernelObject:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("kedge.compiler.worker.compile_kernel", fail)
    reply = answer(Request(jobs()[0], sys.getrecursionlimit()))
    with pytest.raises(ZeroDivisionError, match="a defect") as caught:
        workers._unpacked(pickle.loads(dumps(reply)))
    assert "in a worker process" in caught.value.__notes__[0] and "in fail" in caught.value.__notes__[0]


def test_an_error_without_a_pickle_comes_as_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Exception):
        pass

    def fail(*_: object) -> KernelObject:
        raise Local("no pickle knows this class")

    monkeypatch.setattr("kedge.compiler.worker.compile_kernel", fail)
    result = answer(Request(jobs()[0], sys.getrecursionlimit())).result
    assert isinstance(result, CompileError) and "no pickle knows this class" in str(result)


def test_what_a_worker_says_is_for_who_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def talk(*_: object) -> KernelObject:
        logging.getLogger("kedge.compiler.schedule").warning("rule %s", "left out")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        return KernelObject("s", b"", ())

    monkeypatch.setattr("kedge.compiler.worker.compile_kernel", talk)
    reply = answer(Request(jobs()[0], sys.getrecursionlimit()))
    caplog.clear()
    dumps(reply)
    with pytest.warns(UserWarning, match="a warning"):
        assert workers._unpacked(reply).symbol == "s"
    assert [record.getMessage() for record in caplog.records] == ["rule left out"]


@pytest.mark.parametrize(
    ("code", "how", "hint"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL", "too little memory"),
        ("import os; os._exit(3)", "ended with status 3", "KEDGE_COMPILE_WORKERS=1"),
    ],
)
def test_a_worker_that_ends_is_an_error_that_names_the_kernel(code: str, how: str, hint: str) -> None:
    running = pair()
    with pytest.raises(WorkerError, match=f"compiling chain for x86_64 {how}") as caught:
        compiled(running, [spoiled(code), *jobs()])
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, even where this run was started by a shell that lets what is in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_workers_that_are_busy() -> None:
    running, processes = pair(), []
    endless = [spoiled("import signal; signal.pause()", name) for name in "ab"]

    def started(one: Job) -> None:
        if one is endless[1]:  # both are busy, and this process is about to wait for them
            processes.extend(each._process for each in running._running)
            threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt), running:
        assert not list(running.compile(endless, started)), "neither ends by itself"
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    worker = workers._Worker()
    assert worker._process.stdin is not None
    worker._process.stdin.close()
    assert worker._process.wait() == 0
    worker.close()


def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('the script runs', flush=True)\n"
        "from kedge.compiler.workers import Workers\n"
        "from test_workers import jobs\n"
        "with Workers(limit=2, worth_s=0) as running:\n"
        "    print(len(list(running.compile(jobs(), lambda job: None))), len(running._running))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["the script runs", "4 2", ""] and not done.stderr


def test_little_work_and_one_worker_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(workers, "_Worker", refuse)
    assert expected_s(jobs()) < 1
    assert len(compiled(Workers(limit=2), jobs())) == len(compiled(Workers(limit=1, worth_s=0), jobs()))
    # What comes scheduled may use instructions that were registered in this process.
    by_hand = [Job(Kernel(one.kernel.func, "by hand", {}, ()), TARGET, one.symbol) for one in jobs()]
    assert len(compiled(pair(), by_hand)) == len(by_hand)


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KEDGE_COMPILE_WORKERS", raising=False)
    monkeypatch.setattr(workers, "usable_threads", lambda: 8)
    for memory, count in ((None, 8), (3 * workers.WORKER_BYTES, 3), (0, 1)):
        monkeypatch.setattr(workers, "available_bytes", lambda memory=memory: memory)
        assert worker_limit() == count
    monkeypatch.setenv("KEDGE_COMPILE_WORKERS", "5")
    assert worker_limit() == 5
    for wrong in ("0", "many", "-1"):
        monkeypatch.setenv("KEDGE_COMPILE_WORKERS", wrong)
        with pytest.raises(CompileError, match="KEDGE_COMPILE_WORKERS is"):
            worker_limit()


def test_memory_is_what_the_system_and_the_group_leave(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:    4096 kB\n")
    assert available_bytes(tmp_path) == 4096 << 10
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    for limit, left in (("max", 4096 << 10), ("3000", 2000), ("500", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert available_bytes(tmp_path) == left


def test_what_is_too_deep_to_be_sent_is_compiled_here() -> None:
    x = te.placeholder((8,), "float32", "x")

    def deep(i: Expr) -> Expr:
        return functools.reduce(lambda total, _: total + x[i], range(360), x[i])

    func = te.create_prim_func([x, te.compute((8,), deep, name="y")], "deep")
    work = [job(func, "kedge_deep"), *jobs()]
    assert workers._pickled(work[0]) is None
    assert compiled(pair(), work) == compiled(Workers(limit=1), work)


def test_an_expression_that_is_too_deep_for_the_compiler_is_a_refusal() -> None:
    x = te.placeholder((8,), "float32", "x")
    deep = functools.reduce(lambda total, _: total + x[0], range(2000), x[0])
    plain = te.create_prim_func([x, te.compute((8,), lambda i: x[i] + 1.0, name="y")], "y")
    body = map_stmt(plain.body, lambda one: replace(one, value=deep) if isinstance(one, Store) else one)
    with pytest.raises(CompileError, match="node node: y: an expression is nested deeper"):
        compile_kernel(Draft(replace(plain, body=body), "", ("node",)), TARGET, "s")
