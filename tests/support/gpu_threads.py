"""Kernels for GPUs, run thread by thread in Python: finds races and barriers that not all threads reach.

The statements of `codegen.gpu.ir` become a Python generator that stops after every store and at every barrier. The
threads of a group take turns in a random order: what a CPU's OpenCL runs one thread after the other, and a GPU nearly
at once, happens here in any order. Two threads that touch one element of which one writes it, with no barrier between,
are a race, whatever values came of it; so are two groups of one launch.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kedge.compiler.codegen.gpu.ir import GROUP_AXES, THREAD_AXES, Barrier, Launch
from kedge.compiler.codegen.gpu.kernel import device_body
from kedge.compiler.dtypes import FLOATS
from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Expr, Load, Select, Var, as_expr
from kedge.compiler.tir.stmt import Buffer, For, If, PrimFunc, Seq, Stmt, Store

Array = np.ndarray[Any, Any]


class Race(AssertionError):
    """Two threads, or two groups, met in an element."""


class Hang(AssertionError):
    """Not all threads of a group came to the same barrier."""


def run_threads(
    func: PrimFunc, arrays: Sequence[Array], symbols: Mapping[str, int], rng: random.Random
) -> tuple[Array, ...]:
    """The outputs of a scheduled function, as its kernels compute them.

    Arithmetic is in double precision and unbounded integers. What nobody wrote is NaN, or 85.

    Raises:
        Race, Hang: see the module.
        CodegenError: the function is no code for a GPU.
    """
    func, body = device_body(func, "k")
    env: dict[Var, int] = {var: symbols[var.name] for var in func.symbols}
    machine = _Machine(env, rng)
    n_inputs = len(func.params) - func.n_outputs
    for buffer, array in zip(func.params, arrays, strict=False):
        machine.memory[buffer] = array.reshape(-1).tolist()
    for buffer in (*func.params[n_inputs:], *(b for b in func.allocs if b.scope == "global")):
        machine.memory[buffer] = machine.fresh(buffer)
    machine.host(body)
    return tuple(
        np.array(machine.memory[b], b.dtype).reshape([machine.value(as_expr(dim)) for dim in b.shape])
        for b in func.params[n_inputs:]
    )


def launches(func: PrimFunc) -> list[Launch]:
    """The launches of a scheduled function."""
    found: list[Launch] = []

    def visit(stmt: Stmt) -> None:
        match stmt:
            case Launch():
                found.append(stmt)
            case Seq(stmts=stmts):
                for one in stmts:
                    visit(one)
            case For(body=body):
                visit(body)
            case If(then=then, orelse=orelse):
                visit(then)
                if orelse is not None:
                    visit(orelse)

    visit(device_body(func, "k")[1])
    return found


@dataclass
class _Machine:
    env: dict[Var, int]
    rng: random.Random
    memory: dict[Buffer, list[Any]] = field(default_factory=dict)
    kernels: dict[Launch, Callable[..., Iterator[int]]] = field(default_factory=dict)

    def value(self, expr: Expr) -> int:
        names = {var: f"v{number}" for number, var in enumerate(self.env)}
        text = _Writer(names, {}).expr(expr)
        return int(eval(text, {**_GLOBALS, **{names[var]: value for var, value in self.env.items()}}))

    def fresh(self, buffer: Buffer) -> list[Any]:
        size = math.prod(self.value(as_expr(dim)) for dim in buffer.shape)
        return [math.nan if buffer.dtype in FLOATS else 85] * size

    def host(self, stmt: Stmt) -> None:
        match stmt:
            case Seq(stmts=stmts):
                for one in stmts:
                    self.host(one)
            case For():
                for value in range(self.value(stmt.extent)):
                    self.env[stmt.var] = value
                    self.host(stmt.body)
            case If():
                chosen = stmt.then if self.value(stmt.condition) else stmt.orelse
                if chosen is not None:
                    self.host(chosen)
            case Launch():
                self.launch(stmt)
            case _:
                raise AssertionError(f"{type(stmt).__name__} on the host")

    def launch(self, launch: Launch) -> None:
        sizes = [self.value(size) for size in launch.grid]
        groups = list(itertools.product(*(range(size) for size in sizes)))
        self.rng.shuffle(groups)
        met: dict[tuple[Buffer, int], tuple[Any, bool]] = {}
        for group in groups:
            _Group(self, launch, group, met).run()


@dataclass
class _Group:
    """One group's run. `met` holds which group touched an element of global memory, and whether one wrote it."""

    machine: _Machine
    launch: Launch
    position: tuple[int, ...]
    met: dict[tuple[Buffer, int], tuple[Any, bool]]
    phase: dict[tuple[int, int], tuple[Any, bool]] = field(default_factory=dict)

    def run(self) -> None:
        launch, machine = self.launch, self.machine
        buffers = (*launch.buffers, *launch.shared, *launch.private)
        if launch not in machine.kernels:
            machine.kernels[launch] = _compiled(launch, buffers)
        shared = {b: machine.fresh(b) for b in launch.shared}
        going: dict[tuple[int, ...], Iterator[int]] = {}
        axes = dict(zip(GROUP_AXES, self.position, strict=True))
        for thread in itertools.product(*(range(size) for size in launch.block)):
            axes.update(zip(THREAD_AXES, thread, strict=True))
            memory = [
                machine.memory[b] if b.scope == "global" else shared[b] if b.scope == "shared" else machine.fresh(b)
                for b in buffers
            ]
            positions = [axes.get(axis, 0) for axis in launch.axes]
            scalars = [machine.env[var] for var in launch.scalars]
            load, store = self.doors(thread, buffers, memory)
            going[thread] = machine.kernels[launch](load, store, *positions, *scalars)
        self.phases(going)

    def phases(self, going: dict[tuple[int, ...], Iterator[int]]) -> None:
        rng = self.machine.rng
        while going:
            self.phase.clear()
            waiting: dict[tuple[int, ...], int] = {}
            running = list(going)
            while running:
                at = rng.randrange(len(running))
                thread = running[at]
                for _ in range(rng.choice((1, 1, 3, 50))):
                    stop = next(going[thread], -1)
                    if stop != 0:
                        waiting[thread] = stop
                        running[at] = running[-1]
                        running.pop()
                        break
            places = set(waiting.values())
            if len(places) > 1:
                raise Hang(f"threads of {self.launch.name} wait at {sorted(places)} (-1: at its end)")
            if places == {-1}:
                return

    def doors(
        self, thread: tuple[int, ...], buffers: Sequence[Buffer], memory: list[list[Any]]
    ) -> tuple[Callable[[int, int], Any], Callable[[int, int, Any], None]]:
        """What a thread reads and writes through."""
        phase, met, group = self.phase, self.met, self.position
        public = [buffer.scope in ("global", "shared") for buffer in buffers]
        everywhere = [buffer.scope == "global" for buffer in buffers]

        def touch(number: int, place: int, wrote: bool) -> None:
            buffer = buffers[number]
            if not 0 <= place < len(memory[number]):
                raise AssertionError(f"{buffer.name}[{place}] is outside of its {len(memory[number])} elements")
            if public[number]:
                _meet(phase, (number, place), thread, wrote, f"threads of {self.launch.name} in {buffer.name}")
            if everywhere[number]:
                _meet(met, (buffer, place), group, wrote, f"groups of {self.launch.name} in {buffer.name}")

        def load(number: int, place: int) -> Any:
            touch(number, place, False)
            return memory[number][place]

        def store(number: int, place: int, value: Any) -> None:
            touch(number, place, True)
            memory[number][place] = value

        return load, store


def _meet(seen: dict[Any, tuple[Any, bool]], element: Any, who: Any, wrote: bool, what: str) -> None:
    before = seen.get(element)
    if before is None or before[0] == who:
        seen[element] = who, wrote or (before is not None and before[1])
    elif wrote or before[1]:
        raise Race(f"{who} and {before[0] or 'others'} of the {what}[{element[1]}]")
    else:
        seen[element] = None, False  # several read it


# Python text of a kernel --------------------------------------------------------------------------------------------


def _compiled(launch: Launch, buffers: Sequence[Buffer]) -> Callable[..., Iterator[int]]:
    names: dict[Var, str] = {var: f"v{number}" for number, var in enumerate((*launch.axes.values(), *launch.scalars))}
    writer = _Writer(names, {buffer: number for number, buffer in enumerate(buffers)})
    head = f"def kernel(load, store, {', '.join(names.values())}):"
    writer.stmt(launch.body, 1)
    scope: dict[str, Any] = dict(_GLOBALS)
    exec("\n".join([head, *writer.lines, " return", " yield"]), scope)
    made: Callable[..., Iterator[int]] = scope["kernel"]
    return made


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "floormod": "%", "and": "and", "or": "or", "eq": "==",
    "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "div": "/",
}  # fmt: skip


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _best(pick: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: math.nan if a != a or b != b else pick(a, b)


_GLOBALS: dict[str, Any] = {
    "exp": math.exp, "sqrt": math.sqrt, "tanh": math.tanh, "erf": math.erf, "abs": abs, "sigmoid": _sigmoid,
    "floor": math.floor, "ceil": math.ceil, "isnan": math.isnan, "smaller": _best(min), "larger": _best(max),
    "nan": math.nan, "inf": math.inf, "pow": math.pow, "log": math.log, "math_not": lambda x: not x,
    "truncdiv": lambda a, b: int(a / b), "truncmod": math.fmod,
}  # fmt: skip


@dataclass
class _Writer:
    names: dict[Var, str]
    numbers: dict[Buffer, int]
    lines: list[str] = field(default_factory=list)
    barriers: int = 0

    def stmt(self, stmt: Stmt, depth: int) -> None:
        pad = " " * depth
        match stmt:
            case Seq(stmts=stmts):
                for one in stmts:
                    self.stmt(one, depth)
                self.lines.append(f"{pad}pass")
            case For():
                name = self.names.setdefault(stmt.var, f"v{len(self.names)}")
                self.lines.append(f"{pad}for {name} in range({self.expr(stmt.extent)}):")
                self.stmt(stmt.body, depth + 1)
            case If():
                self.lines.append(f"{pad}if {self.expr(stmt.condition)}:")
                self.stmt(stmt.then, depth + 1)
                if stmt.orelse is not None:
                    self.lines.append(f"{pad}else:")
                    self.stmt(stmt.orelse, depth + 1)
            case Barrier():
                self.barriers += 1
                self.lines.append(f"{pad}yield {self.barriers}")
            case Store():
                place = self.place(stmt.buffer, stmt.indices)
                self.lines.append(f"{pad}store({self.numbers[stmt.buffer]}, {place}, {self.expr(stmt.value)})")
                self.lines.append(f"{pad}yield 0")
            case _:
                raise AssertionError(f"{type(stmt).__name__} in a kernel")

    def place(self, buffer: Buffer, indices: Sequence[Expr]) -> str:
        text = "0"
        for index, dim in zip(indices, buffer.shape, strict=True):
            text = f"({text}) * ({self.expr(as_expr(dim))}) + ({self.expr(index)})"
        return text

    def expr(self, expr: Expr) -> str:
        match expr:
            case Const(value=value):
                return repr(value)
            case Var():
                return self.names[expr]
            case Load(buffer=buffer, indices=indices):
                return f"load({self.numbers[buffer]}, {self.place(buffer, indices)})"
            case Binary(op="min", a=a, b=b):
                return f"smaller({self.expr(a)}, {self.expr(b)})"
            case Binary(op="max", a=a, b=b):
                return f"larger({self.expr(a)}, {self.expr(b)})"
            case Binary(op="truncdiv" | "truncmod", a=a, b=b):
                return f"{expr.op}({self.expr(a)}, {self.expr(b)})"
            case Binary(op=op, a=a, b=b):
                return f"({self.expr(a)} {_INFIX[op]} {self.expr(b)})"
            case Select(condition=condition, a=a, b=b):
                return f"({self.expr(a)} if {self.expr(condition)} else {self.expr(b)})"
            case Cast(value=value, dtype=dtype):
                kind = "bool" if dtype == "bool" else "float" if dtype in FLOATS else "int"
                return f"{kind}({self.expr(value)})"
            case Call(name="not", args=(a,)):
                return f"(not {self.expr(a)})"
            case Call(name=name, args=args):
                return f"{name}({', '.join(map(self.expr, args))})"
        raise AssertionError(f"no Python for {expr!r}")
