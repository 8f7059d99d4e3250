"""Grouping operators that one kernel computes.

The grouping follows Relay's (Roesch et al., "Relay: A High-Level Compiler for Deep Learning", 2019): a value joins the
group of its immediate post-dominator, the first value that all its users lead to, together with everything between
them, if what the operators on the way do to elements allows it. So a group has one result and no way leads out of it
and back in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.dims import same_shape
from kedge.compiler.graph.ir import Call, Constant, Function, Fused, Input, Module, Value, operands
from kedge.compiler.graph.passes.base import with_functions, with_operands
from kedge.compiler.graph.placement import VIEWS, concats_in_place
from kedge.compiler.ops import registry
from kedge.compiler.ops.movement import permutation
from kedge.compiler.ops.registry import FusionKind

#: Too dear to compute again for every element of a broadcast.
_EXPENSIVE = frozenset({
    "exp", "log", "tanh", "erf", "sigmoid", "pow", "div", "mod", "sqrt", "rsqrt", "sin", "cos", "resample",
})  # fmt: skip
#: Reads elements more than once: what is dear is computed before, not again for each reading.
_REPEATING = frozenset({"resample"})
_ANCHORS = (FusionKind.REDUCTION, FusionKind.CONTRACTION)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Put chains of element-wise, broadcasting and injective operators, and the element-wise operators after a
    contraction or reduction, into `Fused` groups of at most `limit` operators.

    relu(add(conv(x, w), b)) -> fused conv_add_relu(x, w, b)
    """

    limit: int = 32
    name: str = "fuse"

    def __call__(self, module: Module) -> Module:
        """The module with groups; calls that stand alone stay calls."""
        functions = {name: self._fuse(function) for name, function in module.functions.items()}
        if all(function is module.functions[name] for name, function in functions.items()):
            return module
        return with_functions(module, functions)

    def _fuse(self, function: Function) -> Function:
        groups = _Groups(function, self.limit)
        groups.grow()
        members = {id(group[-1]): group for group in groups.members() if len(group) > 1}
        done: dict[int, Value] = {}
        for old in function.values():
            group = members.get(id(old))
            value = old if group is None else make_group(group)
            done[id(old)] = with_operands(value, [done[id(operand)] for operand in operands(value)])
        if not members:
            return function
        return replace(function, outputs=tuple(done[id(value)] for value in function.outputs))


def make_group(calls: Sequence[Call]) -> Fused:
    """The group of `calls` (operands first; the last is the result) applied to what they take from outside.

    Literals of one element stay inside of the group.
    """
    inner: dict[int, Value] = {}
    outer: dict[int, tuple[Input, Value]] = {}
    own = {id(call) for call in calls}
    for call in calls:
        for operand in call.inputs:
            if id(operand) in own or id(operand) in inner:
                continue
            if isinstance(operand, Constant) and operand.data.size == 1:
                inner[id(operand)] = operand
            else:
                argument = Input(f"p{len(outer)}", operand.type)
                inner[id(operand)], outer[id(operand)] = argument, (argument, operand)
        inner[id(call)] = with_operands(call, [inner[id(operand)] for operand in call.inputs])
    result = calls[-1]
    arguments = tuple(argument for argument, _ in outer.values())
    body = Function(_name(calls), arguments, (inner[id(result)],), ("out0",))
    origin = tuple(dict.fromkeys(name for call in calls for name in call.origin))
    return Fused(body, tuple(value for _, value in outer.values()), result.types, origin)


def _name(calls: Sequence[Call]) -> str:
    """The operators in order, at most six of them: `conv_add_relu`."""
    names = [call.op for call in calls]
    return "_".join(names if len(names) <= 6 else [*names[:5], f"and_{len(names) - 5}"])


class _Groups:
    """Union-find over the calls of a function."""

    def __init__(self, function: Function, limit: int) -> None:
        self._limit = limit
        self._calls = [value for value in function.values() if isinstance(value, Call)]
        self._index = {id(call): index for index, call in enumerate(self._calls)}
        self._parent = list(range(len(self._calls)))
        still = concats_in_place(function)
        self._own = [FusionKind.OPAQUE if id(call) in still else _kind(call) for call in self._calls]
        self._kind = list(self._own)  # of the group that a call belongs to
        self._size = [1] * len(self._calls)
        self._expensive = [call.op in _EXPENSIVE for call in self._calls]
        self._users: list[list[int]] = [[] for _ in self._calls]
        exposed = {id(value) for value in function.outputs}
        for value in function.values():
            for operand in operands(value):
                if isinstance(value, Call) and id(operand) in self._index:
                    self._users[self._index[id(operand)]].append(self._index[id(value)])
                else:
                    exposed.add(id(operand))
        self._exposed = [id(call) in exposed for call in self._calls]
        self._dominator = self._post_dominators()

    def grow(self) -> None:
        """Merge: first epilogues into contractions and reductions, then chains of the rest."""
        for epilogues in (True, False):
            for node in range(len(self._calls)):
                sink = self._dominator[node]
                if sink is None or self._find(sink) == self._find(node):
                    continue
                between = self._between(node, sink)
                anchored = self._kind[self._find(node)] in _ANCHORS
                if anchored == epilogues and self._may_join(node, sink, between, anchored):
                    self._merge([node, *between, sink])

    def members(self) -> Iterable[list[Call]]:
        """The calls of each group, operands first."""
        groups: dict[int, list[Call]] = {}
        for index, call in enumerate(self._calls):
            groups.setdefault(self._find(index), []).append(call)
        return groups.values()

    def _find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _merge(self, nodes: Iterable[int]) -> None:
        roots = {self._find(node) for node in nodes}
        target = min(roots)
        for root in roots - {target}:
            self._parent[root] = target
            self._kind[target] = max(self._kind[target], self._kind[root])
            self._size[target] += self._size[root]
            self._expensive[target] |= self._expensive[root]

    def _may_join(self, node: int, sink: int, between: Sequence[int], anchored: bool) -> bool:
        on_the_way = {*between, sink}
        roots = {self._find(other) for other in (node, *on_the_way)}
        if sum(self._size[root] for root in roots) > self._limit:
            return False
        edges = [
            self._edge(source, target)
            for source in (node, *between)
            for target in self._users[source]
            if target in on_the_way
        ]
        if anchored:
            # The result of a contraction must be used where it is made: element by element.
            calm = all(self._kind[self._find(other)] <= FusionKind.BROADCAST for other in on_the_way)
            return calm and max(edges) == FusionKind.ELEMENTWISE
        if any(self._own[other] > FusionKind.INJECTIVE for other in (node, *between)):
            return False
        if self._kind[self._find(node)] > FusionKind.INJECTIVE or sum(self._anchors(roots)) > 1:
            return False
        repeated = FusionKind.BROADCAST in edges or any(self._calls[other].op in _REPEATING for other in on_the_way)
        if self._expensive[self._find(node)] and repeated:
            return False
        if self._own[sink] <= FusionKind.INJECTIVE:
            return True
        # A prologue is computed inside the sum: fine where the sum reads every element once, or where nothing is.
        return self._calls[sink].op.startswith("reduce_") or (not between and self._is_turned_operand(node, sink))

    def _is_turned_operand(self, node: int, sink: int) -> bool:
        """Whether a transpose alone gives one operand of a product of floats, whose dims that move stay its last two.

        The product then reads the operand as it came, and both come from different places still.
        """
        call, product = self._calls[node], self._calls[sink]
        if call.op != "transpose" or product.op != "matmul" or self._size[self._find(node)] > 1:
            return False
        others = [operand for operand in product.inputs if operand is not call]
        sources = [self._source(operand) for operand in others]
        rank = call.type.rank
        near = rank > 1 and rank - 1 in permutation(call.attrs, rank)[-2:]
        return product.type.dtype in FLOATS and near and len(others) == 1 and call.inputs[0] not in sources

    @staticmethod
    def _source(value: Value) -> Value:
        """What a transpose reads; anything else as it is."""
        return value.inputs[0] if isinstance(value, Call) and value.op == "transpose" else value

    def _anchors(self, roots: Iterable[int]) -> list[bool]:
        return [self._kind[root] in _ANCHORS for root in roots]

    def _edge(self, source: int, target: int) -> FusionKind:
        """What `target` does to the elements of `source`."""
        kind = self._own[target]
        if kind is FusionKind.BROADCAST:
            same = same_shape(self._calls[source].type.shape, self._calls[target].type.shape)
            return FusionKind.ELEMENTWISE if same else kind
        return kind

    def _between(self, node: int, sink: int) -> list[int]:
        """The calls on ways from `node` to its post-dominator, without both."""
        seen: set[int] = set()
        stack = list(self._users[node])
        while stack:
            current = stack.pop()
            if current != sink and current not in seen:
                seen.add(current)
                stack.extend(self._users[current])
        return sorted(seen)

    def _post_dominators(self) -> list[int | None]:
        """For each call the nearest one that every way to an output passes; None where it is an output itself."""
        result: list[int | None] = [None] * len(self._calls)
        depth = [0] * len(self._calls)
        for node in reversed(range(len(self._calls))):
            meet: int | None = None if self._exposed[node] or not self._users[node] else self._users[node][0]
            for user in self._users[node][1:] if meet is not None else ():
                meet = self._meet(meet, user, result, depth)
            result[node] = meet
            depth[node] = 0 if meet is None else depth[meet] + 1
        return result

    @staticmethod
    def _meet(a: int | None, b: int | None, parent: Sequence[int | None], depth: Sequence[int]) -> int | None:
        while a != b:
            if a is None or b is None:
                return None
            if depth[a] >= depth[b]:
                a = parent[a]
            else:
                b = parent[b]
        return a


def _kind(call: Call) -> FusionKind:
    return FusionKind.OPAQUE if call.op in VIEWS or len(call.types) != 1 else registry.get(call.op).kind
