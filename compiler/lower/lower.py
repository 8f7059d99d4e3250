"""From a fused graph to a program: one kernel per group, called in order over a planned arena.

`draft` leaves its kernels unscheduled, since the kernel cache often has their code; `lower` schedules them all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from kedge.compiler.errors import CompileError
from kedge.compiler.graph.bind import frozen, read_only
from kedge.compiler.graph.cost import flops, nbytes
from kedge.compiler.graph.dims import total
from kedge.compiler.graph.external import External, by_function
from kedge.compiler.graph.ir import (
    Call,
    Constant,
    ExternalCall,
    Function,
    Fused,
    Input,
    Item,
    Module,
    Param,
    TensorType,
    Value,
    operands,
)  # fmt: skip
from kedge.compiler.graph.passes.fuse import make_group
from kedge.compiler.graph.placement import VIEWS, Place, base, concats_in_place
from kedge.compiler.lower.external import external_kernel
from kedge.compiler.lower.limits import equalities, least_sizes, right_at_zero, with_symbols
from kedge.compiler.lower.lower_group import as_group, group_digest, group_key, kernel_name, lower_group
from kedge.compiler.lower.memory import Tenant, plan_memory
from kedge.compiler.lower.own_symbols import with_own_symbols
from kedge.compiler.lower.program import (
    Draft,
    Entry,
    ExternalKernel,
    Kernel,
    Lowered,
    Port,
    Program,
    Recalled,
    Slot,
    Step,
)
from kedge.compiler.schedule.default import is_scheduled, schedule_func
from kedge.compiler.schedule.rules.rule import TargetModel
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target.gpu import GpuTarget
from kedge.compiler.tir.expr import Dim, Expr, Var
from kedge.compiler.tir.stmt import Buffer, PrimFunc
from kedge.compiler.tir.structural import canonical, expr_key
from kedge.compiler.tir.visitor import substitute_expr
from kedge.rpc.abi import MAX_NDIM
from kedge.rpc.errors import InputError


class Memory(Protocol):
    """What earlier compiles lowered groups to, by `group_digest`."""

    def recall(self, group: str) -> Lowered | None:
        """What a group became, if it was lowered before."""

    def remember(self, group: str, lowered: Lowered) -> None:
        """Keep what a group became."""


def draft(module: Module, externals: Sequence[External] = (), memory: Memory | None = None) -> Program:
    """The program of a module that went through `default_passes`; `externals` have the code of its external calls.

    Its kernels are drafts, each once where several are structurally equal; those that `memory` knows are not made.
    Parameters without data become inputs of the entries that use them, after the declared inputs and in order of first
    use.

    Raises:
        CompileError: an operator has no lowering (the module was not legalized), an external call no code, an input
            or output more dims than the ABI has, or two symbolic dims of a function have one name.
    """
    pool = _Kernels(externals, memory)
    weights = _Weights(module)
    entries = tuple(_EntryLowering(function, weights, pool).entry() for function in module.functions.values())
    return Program(pool.drafts(), entries, MappingProxyType(weights.arrays), pool.externals())


def lower(module: Module, target: TargetModel | GpuTarget, externals: Sequence[External] = ()) -> Program:
    """The program that `draft` gives, with its kernels scheduled for `target`.

    Raises:
        CompileError: as `draft`.
    """
    return scheduled(draft(module, externals), target)


def scheduled(program: Program, target: TargetModel | GpuTarget) -> Program:
    """The program with each draft scheduled by the first rule that matches."""
    kernels = {
        name: kernel if isinstance(kernel, Kernel) else schedule_func(kernel.func, target, origin=kernel.origin)
        for name, kernel in program.kernels.items()
    }
    return replace(program, kernels=MappingProxyType(kernels))


def lower_prim_func(source: PrimFunc | Schedule, target: TargetModel | GpuTarget) -> Program:
    """The program that `draft_prim_func` gives, with its kernel scheduled for `target`.

    Raises:
        CompileError: as `draft_prim_func`.
    """
    return scheduled(draft_prim_func(source), target)


def draft_prim_func(source: PrimFunc | Schedule) -> Program:
    """The program whose only entry calls a function; inputs and outputs are named as its parameters.

    A `Schedule` is taken as it is, and so is a function that shows a schedule already (see `is_scheduled`); any other
    becomes a draft.

    Raises:
        CompileError: a symbol of the function is not a whole dim of any input, or an input or output has more dims
            than the ABI.
    """
    func = source.func if isinstance(source, Schedule) else source
    split = len(func.params) - func.n_outputs
    inputs = tuple(_port(buffer) for buffer in func.params[:split])
    outputs = tuple(_port(buffer) for buffer in func.params[split:])
    bare = {id(dim) for port in inputs for dim in port.type.shape}
    hidden = [var.name for var in func.sizes if id(var) not in bare]
    if hidden:
        raise CompileError(f"{func.name}: {', '.join(hidden)} is not a whole dim of any input")
    slots = [Slot("input", port.type, index) for index, port in enumerate(inputs)]
    slots += [Slot("output", port.type, index) for index, port in enumerate(outputs)]
    step = Step(func.name, tuple(slots), func.sizes)
    kernel: Kernel | Draft
    if isinstance(source, Schedule):
        kernel = Kernel(func, "by hand", MappingProxyType({}), source.trace)
    elif is_scheduled(func):
        kernel = Kernel(func, "by hand", MappingProxyType({}), ())
    else:
        kernel = Draft(func, canonical(func))
    entry = _callable(Entry(func.name, inputs, outputs, func.sizes, (step,), 0))
    return Program(MappingProxyType({func.name: kernel}), (entry,))


def _callable(entry: Entry) -> Entry:
    """`entry`, if the ABI can call it: its tensors have few enough dims, and a name means one symbolic dim."""
    for port in (*entry.inputs, *entry.outputs):
        if len(port.type.shape) > MAX_NDIM:
            raise CompileError(
                f"{entry.name}: {port.name} has {len(port.type.shape)} dims; what is called takes at most {MAX_NDIM}",
                hint="reshape it: dims of 1 and those that stay side by side can be one",
            )
    names = [symbol.name for symbol in entry.symbols]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CompileError(
            f"{entry.name}: two symbolic dims are called {twice}",
            hint="use one variable where they are equal, and two names where they are not",
        )
    return entry


def _port(buffer: Buffer) -> Port:
    return Port(buffer.name, TensorType(buffer.shape, buffer.dtype))


class _Kernels:
    """The kernels of a program and its calls of external functions, each once."""

    def __init__(self, externals: Sequence[External], memory: Memory | None) -> None:
        self._codes = by_function(externals)
        self._memory = memory
        self._by_form: dict[str, str] = {}  # by SHA-256
        self._by_group: dict[tuple[str, object, object], _Callee] = {}
        self._by_digest: dict[tuple[str, str], Lowered] = {}  # groups that differ in their symbols only
        self._drafts: dict[str, Draft | Recalled] = {}
        self._externals: dict[str, ExternalKernel] = {}

    def add(self, value: Call | Fused, limits: Mapping[Var, Var]) -> _Callee:
        """What computes `value` in a function whose symbols have these bounds."""
        if isinstance(value, ExternalCall):
            return self._add_external(value)
        group = as_group(value)
        key = (kernel_name(value), group_key(group), tuple((symbol, limit.lower) for symbol, limit in limits.items()))
        known = self._by_group.get(key)
        if known is None:
            own, meanings = with_own_symbols(group, limits)
            known = self._callee(own, re.sub(r"\W", "_", kernel_name(value)))
            if meanings:
                symbols = tuple(substitute_expr(symbol, meanings) for symbol in known.symbols)
                known = replace(known, types=_types(group), symbols=symbols)
            if key[1] is not None:
                self._by_group[key] = known
        draft = self._drafts[known.name]
        self._drafts[known.name] = replace(draft, origin=tuple(dict.fromkeys((*draft.origin, *group.origin))))
        return replace(known, reads=group.inputs)

    def _callee(self, group: Fused, wanted: str) -> _Callee:
        """The kernel of a group: a new one, or one that is the same."""
        named = group_digest(group)
        if named is None:
            return self._lowered(group, wanted)[0]
        digest, variables = named
        known = self._by_digest.get((wanted, digest))
        if known is None and self._memory is not None:
            known = self._memory.recall(digest)
        if known is None:
            callee, draft = self._lowered(group, wanted)
            at = {var: index for index, var in enumerate(variables)}
            if at.keys() >= set(draft.func.symbols) and _are_same(callee.types, _types(group)):
                symbols = tuple(at[var] for var in draft.func.symbols)
                known = self._by_digest[wanted, digest] = Lowered(_sha256(draft.form), draft.digest, symbols)
                if self._memory is not None:
                    self._memory.remember(digest, known)
            return callee
        name = self._by_form.get(known.form)
        if name is None:
            name = self._by_form[known.form] = self._unique(wanted)
            self._drafts[name] = Recalled(name, known.digest, lambda own: _drafted(group, own))
        return _Callee(name, group.inputs, _types(group), tuple(variables[index] for index in known.symbols))

    def _lowered(self, group: Fused, wanted: str) -> tuple[_Callee, Draft]:
        made = _drafted(group, wanted)
        form = _sha256(made.form)
        name = self._by_form.get(form)
        if name is None:
            name = self._by_form[form] = self._unique(wanted)
            self._drafts[name] = replace(made, func=replace(made.func, name=name))
        types = tuple(TensorType(buffer.shape, buffer.dtype) for buffer in made.func.params)
        return _Callee(name, group.inputs, types, made.func.symbols), made

    def _add_external(self, value: ExternalCall) -> _Callee:
        """Each call by itself, so that a failure names its own operators."""
        kernel = external_kernel(value, self._codes)
        name = self._unique(value.body.name)
        self._externals[name] = kernel
        types = (*(own.type for own in value.body.inputs), *value.types)
        return _Callee(name, value.inputs, types, kernel.symbols)

    def externals(self) -> Mapping[str, ExternalKernel]:
        """All calls of external functions."""
        return MappingProxyType(self._externals)

    def drafts(self) -> Mapping[str, Draft | Recalled]:
        """All kernels."""
        return MappingProxyType(self._drafts)

    def _unique(self, wanted: str) -> str:
        name, count = wanted, 0
        while name in self._drafts or name in self._externals:
            count += 1
            name = f"{wanted}_{count}"
        return name


def _drafted(group: Fused, name: str) -> Draft:
    func = lower_group(group, name)
    return Draft(func, canonical(func))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _types(group: Fused) -> tuple[TensorType, ...]:
    """The types of what the kernel of a group takes: its inputs, then its results."""
    own = (*(value.type for value in group.body.inputs), *group.types)
    return tuple(TensorType(type_.shape, type_.dtype) for type_ in own)


def _are_same(a: Sequence[TensorType], b: Sequence[TensorType]) -> bool:
    """Whether types are written alike: then code that reads their dims is, too."""
    return [_written(type_) for type_ in a] == [_written(type_) for type_ in b]


def _written(type_: TensorType) -> object:
    return type_.dtype, tuple(expr_key(dim) if isinstance(dim, Expr) else dim for dim in type_.shape)


class _Weights:
    """Bound parameters and larger constants, in order of first use; equal constants are one."""

    def __init__(self, module: Module) -> None:
        self._params = module.params
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._slots: dict[str, int] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}

    def is_bound(self, param: Param) -> bool:
        """Whether the data of a parameter is known."""
        return param.name in self._params

    def index(self, value: Param | Constant) -> int:
        """The slot of a weight."""
        name = value.name if isinstance(value, Param) else self._constant(value.data)
        if name not in self._slots:
            assert isinstance(value, Param)  # constants are entered when they are named
            self._enter(name, self._params[name])
        return self._slots[name]

    def _enter(self, name: str, data: np.ndarray[Any, Any]) -> None:
        self._slots[name] = len(self._slots)
        self.arrays[name] = read_only(data)

    def _constant(self, data: np.ndarray[Any, Any]) -> str:
        # A digest, since constants may be most of the model: weights that were folded.
        key = (hashlib.sha256(frozen(data).reshape(-1).view(np.uint8).data).digest(), str(data.dtype), data.shape)
        if key not in self._constants:
            count = len(self._constants)
            while (name := f"constant_{count}") in self.arrays or name in self._params:
                count += 1
            self._constants[key] = name
            self._enter(name, data)
        return self._constants[key]


@dataclass(frozen=True, slots=True)
class _Callee:
    """A kernel by name: what it reads (views resolved later), and the types of its arguments, over `symbols`."""

    name: str
    reads: tuple[Value, ...]
    types: tuple[TensorType, ...]
    symbols: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """A kernel call to be, and the value it computes."""

    kernel: str
    reads: tuple[Value, ...]
    types: tuple[TensorType, ...]
    symbols: tuple[Expr, ...]
    result: Value
    output: int | None = None  # where a copy goes


class _EntryLowering:
    """Lowers one function."""

    def __init__(self, function: Function, weights: _Weights, kernels: _Kernels) -> None:
        self._function = function
        self._weights = weights
        self._kernels = kernels
        self._limits = least_sizes(function)
        self._ports = {value.name: Port(value.name, value.type) for value in function.inputs}
        for value in function.values():
            if isinstance(value, Param) and not weights.is_bound(value):
                self._ports.setdefault(value.name, Port(value.name, value.type))
        self._inputs = {name: index for index, name in enumerate(self._ports)}
        self._jobs: list[_Job] = []
        self._written: dict[int, int] = {}  # results that live in the buffer of an output
        self._in_place = concats_in_place(function)
        self._parts = self._parts_of_concats()
        self._offsets: dict[int, Dim] = {}

    def entry(self) -> Entry:
        """The lowered function."""
        self._collect()
        arena = self._plan()
        function = self._function
        outputs = tuple(
            Port(name, value.type) for name, value in zip(function.output_names, function.outputs, strict=True)
        )
        steps = tuple(self._step(job) for job in self._jobs)
        ports = tuple(self._ports.values())
        needed = equalities(function)
        right = right_at_zero(function)
        entry = _callable(Entry(function.name, ports, outputs, function.symbols, steps, arena, needed, right))
        return with_symbols(entry, self._limits)

    def _parts_of_concats(self) -> dict[int, Place]:
        """Where the operands of concatenations without a copy live, by id."""
        concats = (value for value in self._function.values() if id(value) in self._in_place)
        return {
            id(base(part)): place
            for concat in concats
            for part, place in zip(operands(concat), self._in_place[id(concat)], strict=True)
        }

    def _root(self, value: Value) -> tuple[Value, int]:
        """The value that a place in memory is planned for, and the byte offset of `value` in it."""
        value, offset = base(value), 0
        while (place := self._parts.get(id(value))) is not None:
            value, offset = base(place.whole), offset + place.offset
        return value, offset

    def _collect(self) -> None:
        for value in self._function.values():
            if isinstance(value, Item):
                raise CompileError("operators with several results must be legalized before lowering")
            if isinstance(value, Fused) or (
                isinstance(value, Call) and value.op not in VIEWS and id(value) not in self._in_place
            ):
                callee = self._kernels.add(value, self._limits)
                self._jobs.append(_Job(callee.name, callee.reads, callee.types, callee.symbols, value))
        for index, value in enumerate(self._function.outputs):
            owner = base(value)
            if isinstance(owner, (Call, Fused)) and id(owner) not in self._written:
                self._written[id(owner)] = index
            else:
                self._copy(value, index)

    def _copy(self, value: Value, index: int) -> None:
        """An output that is an input, a weight, or another output once more."""
        own = Input("p0", value.type)
        copy = Call("identity", (own,), MappingProxyType({}), (value.type,))
        callee = self._kernels.add(copy, self._limits)
        self._jobs.append(_Job(callee.name, (value,), callee.types, callee.symbols, make_group([copy]), index))

    def _plan(self) -> Dim:
        """Place what lives between kernels, and give the arena's size."""
        lives: dict[int, tuple[Value, int, int]] = {}  # from when to when a value that owns memory is used
        for position, job in enumerate(self._jobs):
            made = [job.result] if job.output is None and id(job.result) not in self._written else []
            for value in (*made, *job.reads):
                owner, _ = self._root(value)
                first = lives[id(owner)][1] if id(owner) in lives else position
                lives[id(owner)] = (owner, first, position)
        kept = [key for key, (owner, _, _) in lives.items() if self._is_planned(owner)]
        plan = plan_memory([Tenant(nbytes(lives[key][0].type), *lives[key][1:]) for key in kept])
        self._offsets = dict(zip(kept, plan.offsets, strict=True))
        return plan.size

    def _is_planned(self, owner: Value) -> bool:
        """Whether a value lives in the arena, not in an argument of the function or among the weights."""
        return isinstance(owner, (Call, Fused)) and id(owner) not in self._written

    def _step(self, job: _Job) -> Step:
        slots = [
            replace(self._slot(value), type=type_)
            for value, type_ in zip(job.reads, job.types[: len(job.reads)], strict=True)
        ]
        result = Slot("output", job.result.type, job.output) if job.output is not None else self._slot(job.result)
        return Step(job.kernel, (*slots, result), job.symbols, flops(job.result))

    def _slot(self, value: Value) -> Slot:
        owner, offset = self._root(value)
        if isinstance(owner, Constant) or (isinstance(owner, Param) and self._weights.is_bound(owner)):
            return Slot("weight", owner.type, self._weights.index(owner))
        if isinstance(owner, (Input, Param)):
            if owner.name not in self._ports:
                raise InputError(f"{owner.name!r} is not an input of {self._function.name}")
            return Slot("input", owner.type, self._inputs[owner.name])
        if id(owner) in self._written:
            return Slot("output", owner.type, self._written[id(owner)])
        return Slot("arena", base(value).type, offset=total([self._offsets[id(owner)], offset]))
