"""Instructions that compute a small nest of loops at once: what `tensorize` matches, and code generation emits.

Each is described by a function of the tensor IR. Its buffers are the operands: a nest fits if it has the same loops and
the same value, and each of its accesses moves through memory as the description's does.

Sums of integers are exact. The instructions on bfloat16 multiply exactly and add in float32, in an order and with
roundings of their own, and take denormals for zeros, of what they read and of what they write:

    x86.bf16.dot  adds the second product of a pair, then the first; each sum is rounded to nearest, as by a fused
                  multiply-add
    arm.bfdot     adds the products of a pair, then the sum to the accumulator; both sums are rounded to odd (away from
    arm.bfmmla    zero where digits are lost and the last bit would be 0), unless the processor has FEAT_EBF16 and its
                  system turns it on

So over n products a result is within n * 2**-23 * (|c| + the sum of |a| * |b|) of the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Expr, Load, Select, Var
from kedge.compiler.tir.parser import parse_func
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc, Stmt, Store
from kedge.compiler.tir.structural import expr_equal

#: Which access of a nest is which operand.
Operands = Mapping[Buffer, Load]


@dataclass(frozen=True)
class TensorIntrin:
    """An instruction: its name, the target features that it needs, and the text of the function it computes."""

    name: str
    arch: str
    features: frozenset[str]
    text: str

    @cached_property
    def func(self) -> PrimFunc:
        """What it computes: one nest of loops around one block, which updates its output."""
        return parse_func(self.text)

    @cached_property
    def loops(self) -> tuple[For, ...]:
        """The loops, outermost first."""
        return nest_of(self.func.body)[0]

    @property
    def store(self) -> Store:
        """What its block does."""
        _, block = nest_of(self.func.body)
        assert isinstance(block, Block) and isinstance(block.body, Store)
        return block.body

    def operands(self, store: Store) -> Operands | None:
        """The accesses of `store` that stand for each operand, or None where it computes something else.

        The output's is the place where it is stored.
        """
        mine = self.store
        found: dict[Buffer, Load] = {mine.buffer: Load(store.buffer, store.indices)}
        same = mine.buffer.dtype == store.buffer.dtype and _binds(mine.value, store.value, found)
        return found if same else None


def nest_of(stmt: Stmt) -> tuple[tuple[For, ...], Stmt]:
    """The perfectly nested loops that `stmt` is, outermost first, and what is in them."""
    loops: list[For] = []
    while isinstance(stmt, For):
        loops.append(stmt)
        stmt = stmt.body
    return tuple(loops), stmt


def _binds(wanted: Expr, given: Expr, found: dict[Buffer, Load]) -> bool:
    """Whether `given` is built as `wanted` is, with one buffer for each of its buffers; fills `found`."""
    if isinstance(wanted, Load):
        if not isinstance(given, Load) or given.dtype != wanted.dtype:
            return False
        bound = found.setdefault(wanted.buffer, given)
        same = all(map(expr_equal, bound.indices, given.indices))  # one operand is at one place
        return bound.buffer is given.buffer and same
    match wanted, given:
        case (Binary(), Binary()) if wanted.op == given.op:
            return _binds(wanted.a, given.a, found) and _binds(wanted.b, given.b, found)
        case (Cast(), Cast()) if wanted.dtype == given.dtype:
            return _binds(wanted.value, given.value, found)
        case (Const(), Const()):
            return (wanted.value, wanted.dtype) == (given.value, given.dtype)
        case (Select(), Select()):
            pairs = zip((wanted.condition, wanted.a, wanted.b), (given.condition, given.a, given.b), strict=True)
            return all(_binds(a, b, found) for a, b in pairs)
        case (Call(), Call()) if wanted.name == given.name:
            return all(_binds(a, b, found) for a, b in zip(wanted.args, given.args, strict=True))
        case (Var(), Var()):
            return wanted is given
    return False


def _dot(left: str, right: str, lanes: int, total: str = "int32", depth: int = 4) -> str:
    """`c[i] += the product of neighbours a[:] and b[i, :]`, `depth` of them."""
    return f"""
func dot(a: {left}[{depth}], b: {right}[{lanes}, {depth}]) -> (c: {total}[{lanes}]):
  for i in range({lanes}):
    for k in range({depth}):
      block c:
        vi = spatial({lanes}, i)
        vk = reduce({depth}, k)
        reads c[vi], a[vk], b[vi, vk]
        writes c[vi]
        c[vi] = c[vi] + {total}(a[vk]) * {total}(b[vi, vk])"""


def _mmla(left: str, right: str, total: str = "int32", depth: int = 8) -> str:
    """A 2 x 2 tile of `a @ b.T` over `depth` neighbours."""
    return f"""
func mmla(a: {left}[2, {depth}], b: {right}[2, {depth}]) -> (c: {total}[2, 2]):
  for i in range(2):
    for j in range(2):
      for k in range({depth}):
        block c:
          vi = spatial(2, i)
          vj = spatial(2, j)
          vk = reduce({depth}, k)
          reads c[vi, vj], a[vi, vk], b[vj, vk]
          writes c[vi, vj]
          c[vi, vj] = c[vi, vj] + {total}(a[vi, vk]) * {total}(b[vj, vk])"""


def _bf16_dot(lanes: int) -> str:
    return _dot("bfloat16", "bfloat16", lanes, "float32", 2)


INTRINSICS: Mapping[str, TensorIntrin] = {
    intrin.name: intrin
    for intrin in (
        TensorIntrin("x86.vnni.dot", "x86_64", frozenset({"avx512vnni"}), _dot("uint8", "int8", 16)),
        TensorIntrin("x86.bf16.dot", "x86_64", frozenset({"avx512bf16"}), _bf16_dot(16)),
        TensorIntrin("arm.sdot", "aarch64", frozenset({"dotprod"}), _dot("int8", "int8", 4)),
        TensorIntrin("arm.udot", "aarch64", frozenset({"dotprod"}), _dot("uint8", "uint8", 4)),
        TensorIntrin("arm.smmla", "aarch64", frozenset({"i8mm"}), _mmla("int8", "int8")),
        TensorIntrin("arm.ummla", "aarch64", frozenset({"i8mm"}), _mmla("uint8", "uint8")),
        TensorIntrin("arm.usmmla", "aarch64", frozenset({"i8mm"}), _mmla("uint8", "int8")),
        TensorIntrin("arm.bfdot", "aarch64", frozenset({"bf16"}), _bf16_dot(4)),
        TensorIntrin("arm.bfmmla", "aarch64", frozenset({"bf16"}), _mmla("bfloat16", "bfloat16", "float32", 4)),
    )
}
