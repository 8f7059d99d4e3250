"""What lowering hands to code generation: scheduled kernels, and functions that call them over a planned arena."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from kedge.compiler.tir.expr import Dim, Expr, Var, as_expr, const
from kedge.compiler.tir.simplify import prove, simplify_dim
from kedge.compiler.tir.stmt import Block, PrimFunc
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import substitute_expr, walk_stmt

if TYPE_CHECKING:  # what compiles kernels in a process of its own need not import the graph
    import numpy as np

    from kedge.compiler.graph.external import External
    from kedge.compiler.graph.ir import ExternalCall, TensorType

SlotKind = Literal["input", "output", "weight", "arena"]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an argument of a kernel lives.

    `index` counts inputs, outputs or weights; for "arena", `offset` is the byte offset, an int64 expression over
    the function's symbols that is a multiple of 64.
    """

    kind: SlotKind
    type: TensorType
    index: int = 0
    offset: Dim = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a kernel or an external function: arguments in their order, then its symbols as expressions.

    `flops` are the operations that its operators ask for (a multiply-add is two), however a kernel computes them; None
    where there are no operators to ask.
    """

    kernel: str
    args: tuple[Slot, ...]
    symbols: tuple[Expr, ...] = ()
    flops: Dim | None = None


@dataclass(frozen=True, slots=True)
class Port:
    """A named input or output of a compiled function."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Equality:
    """Two sizes over a function's symbols that a call must make equal; `of` names the operators that need it."""

    a: Dim
    b: Dim
    of: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A compiled function: steps in order over an arena of `arena_size` bytes (an expression over `symbols`).

    `equalities` are what was not known of shapes while compiling: the runtime refuses a call where one does not hold.
    With a symbol of `right_at_zero` outputs have the shapes that they say also where it is 0, whatever is in between.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    symbols: tuple[Var, ...]
    steps: tuple[Step, ...]
    arena_size: Dim
    equalities: tuple[Equality, ...] = ()
    right_at_zero: tuple[Var, ...] = ()

    @property
    def may_be_zero(self) -> tuple[Var, ...]:
        """Symbols of at least 1 that a call may give as 0 all the same, such as a batch: then no output has elements.

        Such a call runs no step, and kernels need not expect it. No size of it is negative, whichever of the symbols
        are 0; where one alone may be 0, what is between may have dims that are.
        """
        found: dict[Var, Expr] = {}
        sizes = self._sizes()
        for symbol in self.symbols:
            if symbol.lower != 1 or not self.outputs or not all(_is_empty(port.type, symbol) for port in self.outputs):
                continue
            if all(prove(as_expr(_at_zero(size, symbol, found)) >= 0) for size in sizes):
                found[symbol] = replace(symbol, lower=0)
        if not found:
            outer = [dim for port in self.outputs for dim in port.type.shape if isinstance(dim, Expr)]
            for symbol in self.right_at_zero:
                if symbol.lower == 1 and all(
                    prove(as_expr(_at_zero(as_expr(size), symbol, {})) >= 0) for size in (*outer, self.arena_size)
                ):
                    return (symbol,)
        return tuple(found)

    def least(self) -> Mapping[Var, int]:
        """The least size of each symbol that a call may give."""
        empty = self.may_be_zero
        return {symbol: 0 if symbol in empty else symbol.lower or 0 for symbol in self.symbols}

    def _sizes(self) -> Iterable[Expr]:
        """The symbolic dims of outputs and of what steps read and write, and the arena's size: each once."""
        types = (*(port.type for port in self.outputs), *(slot.type for step in self.steps for slot in step.args))
        dims = (*(dim for type_ in types for dim in type_.shape), self.arena_size)
        return {expr_key(dim): dim for dim in dims if isinstance(dim, Expr)}.values()


def _is_empty(type_: TensorType, symbol: Var) -> bool:
    """Whether a tensor has no elements where `symbol` is 0."""
    return any(isinstance(dim, Expr) and _at_zero(dim, symbol, {}) == 0 for dim in type_.shape)


def _at_zero(dim: Expr, symbol: Var, others: Mapping[Var, Expr]) -> Dim:
    """What `dim` is where `symbol` is 0, in terms of `others`."""
    return simplify_dim(substitute_expr(dim, {**others, symbol: const(0)}))


@dataclass(frozen=True, slots=True)
class Draft:
    """A function that is not scheduled yet: its schedule, like its code, is made where the kernel cache lacks it.

    `form` is its canonical form (see `tir.structural`).
    """

    func: PrimFunc
    form: str
    origin: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all that rules see but for the target, which is more than code generation does.

        Decisions and refusals name blocks, and a rule may ask what a function is for: so names of blocks are part of
        it, and so are the attributes, except where the function comes from.
        """
        blocks = [stmt.name for stmt in walk_stmt(self.func.body) if isinstance(stmt, Block)]
        facts = sorted((key, value) for key, value in self.func.attrs.items() if isinstance(value, (str, tuple)))
        facts = [fact for fact in facts if fact[0] != "origin"]
        return hashlib.sha256(repr((self.form, blocks, facts)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a group was lowered to: SHA-256 of the canonical form, the draft's digest, and the function's symbols.

    These are positions among the variables of the group, in order of appearance.
    """

    form: str
    digest: str
    symbols: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recalled:
    """A draft that an earlier compile made of an equal group: it is made again only where the cache lacks its code.

    `digest` is the draft's; `make` gives the draft under a name, without an origin.
    """

    name: str
    digest: str
    make: Callable[[str], Draft]
    origin: tuple[str, ...] = ()

    @property
    def draft(self) -> Draft:
        """The draft, made now."""
        return replace(self.make(self.name), origin=self.origin)

    @property
    def func(self) -> PrimFunc:
        """The draft's function, made now."""
        return self.draft.func


@dataclass(frozen=True, slots=True)
class Kernel:
    """A scheduled function, and how it came to be: the rule, its decisions and the replayable trace."""

    func: PrimFunc
    rule: str
    decisions: Mapping[str, Any]
    trace: tuple[Mapping[str, Any], ...]
    origin: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExternalKernel:
    """A C function from outside where a kernel would be, for one call in the graph.

    Types, attributes and workspace are those of `call`, over `symbols`; its body is what the function must compute.
    The step's arguments are the call's inputs and then its result; `order` says which of them each input of the C
    function is, None where the call lacks it.
    """

    code: External
    call: ExternalCall
    symbols: tuple[Var, ...]
    order: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A whole module, ready for code generation. `weights` are in slot order, arrays of any strides.

    Steps call what `kernels` or `externals` have under their name; no name is in both.
    """

    kernels: Mapping[str, Kernel | Draft | Recalled]
    entries: tuple[Entry, ...]
    weights: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    externals: Mapping[str, ExternalKernel] = field(default_factory=dict)
