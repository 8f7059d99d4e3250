"""Random functions of tensor expressions, and schedules of the kinds that code generation has most to prove about."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kedge.compiler import te
from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import BlockRef, Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_on
from kedge.compiler.tir.expr import Const, Dim, Expr, Var, eq, logical_and, maximum, minimum, select
from kedge.compiler.tir.stmt import PrimFunc
from support.functions import Array, evaluate
from support.random_schedules import block_of, random_step

Index = list[Expr]
#: Arithmetic that is exact on small whole numbers; integers may wrap around.
DTYPES = ("float32",) * 6 + ("int32", "int8", "uint8", "int64", "float64", "int16")
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 17, 20)
#: Larger functions, and schedules that repeat work more often, are no use: the interpreter visits every instance.
MOST_INSTANCES = 3_000


def _literal(value: int, dtype: str) -> Const:
    return Const(float(value) if dtype.startswith("float") else value, dtype)


def _clamp(index: Expr, size: Dim) -> Expr:
    return minimum(maximum(index, 0), size - 1)


def _moved(index: Index, axis: int, place: Expr) -> tuple[Expr, ...]:
    return (*index[:axis], place, *index[axis + 1 :])


class _Maker:
    """Adds one tensor after the other, each computed from those before it or from a new input."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.size = Var("n", lower=1) if rng.random() < 0.35 else None
        self.dtype = rng.choice(DTYPES)
        self.inputs: list[te.Tensor] = []
        self.tensors: list[te.Tensor] = []

    def func(self) -> PrimFunc | None:
        """The function; None where its free dim is not that of an input."""
        steps = (
            self.elementwise, self.elementwise, self.pair, self.pad, self.stencil, self.clamped, self.clamped,
            self.transposed, self.gathered, self.reduced, self.reduced, self.product, self.chosen, self.pooled,
            self.strided, self.guarded, self.broadcast, self.cast, self.flattened, self.rotated,
        )  # fmt: skip
        for _ in range(self.rng.choice([1, 2, 2, 3, 3, 4, 5])):
            self.rng.choice(steps)()
        computed = [tensor for tensor in self.tensors if tensor not in self.inputs]
        if not computed:
            return None
        outputs = computed[-1:]
        if len(computed) > 1 and self.rng.random() < 0.2:
            outputs.insert(0, self.rng.choice(computed[:-1]))
        used = te.dataflow_order(outputs)
        func = te.create_prim_func([*(one for one in self.inputs if one in used), *outputs], "f")
        given = {dim for buffer in func.params[: -func.n_outputs] for dim in buffer.shape if isinstance(dim, Var)}
        return func if given.issuperset(func.symbols) else None

    # Where values come from ---------------------------------------------------------------------------------------

    def source(self, rank: int | None = None, dims: Sequence[Dim] | None = None, dtype: str | None = None) -> te.Tensor:
        """One of the last tensors that fit, or a new input."""
        fitting = [
            tensor for tensor in self.tensors
            if (dims is None or tuple(dims) == tensor.shape) and rank in (None, len(tensor.shape))
            and dtype in (None, tensor.dtype)
        ]  # fmt: skip
        if fitting and self.rng.random() < 0.8:
            return self.rng.choice(fitting[-3:])
        shape = dims or [self.dim() for _ in range(rank or self.rng.choice([1, 2, 2, 3]))]
        tensor = te.placeholder(shape, dtype or self.dtype, f"x{len(self.tensors)}")
        self.inputs.append(tensor)
        self.tensors.append(tensor)
        return tensor

    def dim(self) -> Dim:
        return self.size if self.size is not None and self.rng.random() < 0.5 else self.rng.choice(SIZES)

    def along(self) -> tuple[te.Tensor, int, Dim]:
        """A tensor, one of its axes, and that one's size."""
        tensor = self.source()
        axis = self.rng.randrange(len(tensor.shape))
        return tensor, axis, tensor.shape[axis]

    def add(self, dims: Sequence[Dim], element: Callable[[Index], Expr], name: str) -> None:
        rank = {
            1: lambda i: element([i]),
            2: lambda i, j: element([i, j]),
            3: lambda i, j, k: element([i, j, k]),
        }  # fmt: skip
        self.tensors.append(te.compute(dims, rank[len(dims)], name=f"{name}{len(self.tensors)}"))

    # What they become ---------------------------------------------------------------------------------------------

    def changed(self, value: Expr) -> Expr:
        one, dtype = _literal(1, value.dtype), value.dtype
        ways: list[Callable[[], Expr]] = [
            lambda: value + one, lambda: value * _literal(2, dtype), lambda: maximum(value, _literal(0, dtype)),
            lambda: minimum(value, _literal(3, dtype)), lambda: one - value,
            lambda: select(value > _literal(0, dtype), value, one - value),
        ]  # fmt: skip
        if not dtype.startswith("float"):
            ways += [lambda: value // _literal(3, dtype), lambda: value % _literal(3, dtype)]
        return self.rng.choice(ways)()

    def elementwise(self) -> None:
        x = self.source()
        self.add(x.shape, lambda i: self.changed(self.changed(x[tuple(i)])), "map")

    def pair(self) -> None:
        x = self.source()
        y = self.source(dims=x.shape, dtype=x.dtype)
        combine = self.rng.choice([lambda a, b: a + b, lambda a, b: a - b, maximum, minimum])
        self.add(x.shape, lambda i: combine(x[tuple(i)], self.changed(y[tuple(i)])), "pair")

    def pad(self) -> None:
        x = self.source()
        ends = [(self.rng.randrange(3), self.rng.randrange(3)) for _ in x.shape]

        def element(i: Index) -> Expr:
            inside = [at >= low for at, (low, _) in zip(i, ends, strict=True) if low]
            sizes = zip(i, ends, x.shape, strict=True)
            inside += [at < size + low for at, (low, high), size in sizes if high]
            value = x[tuple(at - low for at, (low, _) in zip(i, ends, strict=True))]
            return select(logical_and(*inside), value, _literal(0, x.dtype)) if inside else value

        self.add([size + low + high for size, (low, high) in zip(x.shape, ends, strict=True)], element, "pad")

    def stencil(self) -> None:
        x, axis, size = self.along()
        if not isinstance(size, int) or size < 4:
            return
        far, near = self.rng.choice([1, 2, 3]), self.rng.choice([0, 1])
        dims = (*x.shape[:axis], size - far, *x.shape[axis + 1 :])
        self.add(dims, lambda i: x[_moved(i, axis, i[axis] + far)] + x[_moved(i, axis, i[axis] + near)], "stencil")

    def clamped(self) -> None:
        """Neighbours that do not go beyond the ends, or the mirror image."""
        x, axis, size = self.along()
        near, far = self.rng.sample([-2, -1, 0, 1, 2], 2)
        if self.rng.random() < 0.4:
            self.add(x.shape, lambda i: x[_moved(i, axis, size - 1 - i[axis])], "mirror")
            return

        def at(i: Index, offset: int) -> Expr:
            return x[_moved(i, axis, _clamp(i[axis] + offset, size))]

        self.add(x.shape, lambda i: at(i, near) - at(i, far), "clamped")

    def transposed(self) -> None:
        x = self.source()
        order = self.rng.sample(range(len(x.shape)), len(x.shape))
        self.add([x.shape[axis] for axis in order], lambda i: x[tuple(i[order.index(a)] for a in range(len(i)))], "t")

    def gathered(self) -> None:
        x, axis, size = self.along()
        which = self.source(rank=1, dtype=self.rng.choice(["int32", "int64", "int8"]))
        dims = (*x.shape[:axis], which.shape[0], *x.shape[axis + 1 :])
        self.add(dims, lambda i: x[_moved(i, axis, _clamp(te.cast(which[i[axis]], "int64"), size))], "gather")

    def reduced(self) -> None:
        x, axis, size = self.along()
        k = te.reduce_axis(size, "k")
        few = isinstance(size, int) and size <= 4
        combine = self.rng.choice([te.sum, te.sum, te.max, te.min, *([te.prod] if few else [])])
        dims = (*x.shape[:axis], *x.shape[axis + 1 :])
        if dims:
            self.add(dims, lambda i: combine(x[(*i[:axis], k, *i[axis:])], k), "reduced")
        else:
            self.add([1], lambda i: combine(x[k], k), "reduced")

    def product(self) -> None:
        x = self.source(rank=2)
        y, k = self.source(dims=(x.shape[1], self.dim()), dtype=x.dtype), te.reduce_axis(x.shape[1], "k")
        self.add((x.shape[0], y.shape[1]), lambda i: te.sum(x[i[0], k] * y[k, i[1]], k), "product")

    def pooled(self) -> None:
        x, axis, size = self.along()
        width, stride = self.rng.choice([2, 3]), self.rng.choice([1, 2, 3])
        if not isinstance(size, int) or size < width:
            return
        k, combine = te.reduce_axis(width, "k"), self.rng.choice([te.sum, te.max, te.min])
        dims = (*x.shape[:axis], (size - width) // stride + 1, *x.shape[axis + 1 :])
        self.add(dims, lambda i: combine(x[_moved(i, axis, i[axis] * stride + k)], k), "pooled")

    def strided(self) -> None:
        x, axis, size = self.along()
        stride, first = self.rng.choice([2, 3]), self.rng.choice([0, 1])
        if not isinstance(size, int) or size <= first:
            return
        dims = (*x.shape[:axis], (size - first + stride - 1) // stride, *x.shape[axis + 1 :])
        self.add(dims, lambda i: x[_moved(i, axis, i[axis] * stride + first)], "strided")

    def chosen(self) -> None:
        x, axis, size = self.along()
        y, n = self.source(dims=x.shape, dtype=x.dtype), self.rng.choice([1, 2, 3])
        conditions: list[Callable[[Expr], Expr]] = [
            lambda at: at < n, lambda at: at >= n, lambda at: eq(at % 2, 0), lambda at: at + n < size,
        ]  # fmt: skip
        holds = self.rng.choice(conditions)
        self.add(x.shape, lambda i: select(holds(i[axis]), x[tuple(i)], y[tuple(i)]), "chosen")

    def guarded(self) -> None:
        """A neighbour where there is one and it is positive."""
        x, axis, _ = self.along()
        offset = self.rng.choice([1, 2])

        def element(i: Index) -> Expr:
            there = x[_moved(i, axis, i[axis] - offset)]
            return select(te.logical_and(i[axis] >= offset, there > _literal(0, x.dtype)), there, x[tuple(i)])

        self.add(x.shape, element, "guarded")

    def broadcast(self) -> None:
        x, n = self.source(), self.dim()
        if len(x.shape) < 3:
            axis = self.rng.randrange(len(x.shape) + 1)
            self.add((*x.shape[:axis], n, *x.shape[axis:]), lambda i: x[(*i[:axis], *i[axis + 1 :])], "broadcast")

    def cast(self) -> None:
        x, dtype = self.source(), self.rng.choice(DTYPES)

        def element(i: Index) -> Expr:
            value = x[tuple(i)]
            if x.dtype.startswith("float") and not dtype.startswith("float"):
                value = _clamp_value(value, x.dtype)
            return te.cast(value, dtype)

        self.add(x.shape, element, "cast")

    def flattened(self) -> None:
        x = self.source(rank=2)
        rows, columns = x.shape
        if isinstance(columns, int):
            self.add([rows * columns], lambda i: x[i[0] // columns, i[0] % columns], "flat")

    def rotated(self) -> None:
        x = self.source(rank=2)
        self.add(x.shape, lambda i: x[i[0], (i[0] + i[1]) % x.shape[1]], "rotated")


def _clamp_value(value: Expr, dtype: str) -> Expr:
    """Conversions of what an integer cannot hold have no result to compare."""
    return minimum(maximum(value, _literal(0, dtype)), _literal(100, dtype))


def random_function(rng: random.Random) -> tuple[PrimFunc, dict[str, int]]:
    """A small function and the value of its free dim, if it has one."""
    while True:
        maker = _Maker(rng)
        symbols = {"n": rng.choice([1, 2, 3, 5, 7, 8, 13, 17])} if maker.size is not None else {}
        func = maker.func()
        if func is not None and instances(func, symbols) <= MOST_INSTANCES:
            return func, {var.name: symbols[var.name] for var in func.symbols}


def random_inputs(func: PrimFunc, symbols: Mapping[str, int], rng: random.Random) -> list[Array]:
    """Small whole numbers, of either sign where there is one."""
    env = {var: symbols[var.name] for var in func.symbols}
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    arrays = []
    for buffer in func.params[: -func.n_outputs]:
        shape = [dim if isinstance(dim, int) else int(evaluate(dim, env)) for dim in buffer.shape]
        low = 0 if buffer.dtype == "uint8" else -4
        arrays.append(numbers.integers(low, 5, shape).astype(buffer.dtype))
    return arrays


class _Somewhere(dict[Var, int]):
    """Loop variables at their first value."""

    def __missing__(self, var: Var) -> int:
        return 0


def instances(func: PrimFunc, symbols: Mapping[str, int]) -> int:
    """About how often blocks run."""
    env = _Somewhere({var: symbols[var.name] for var in func.symbols})
    total = 0
    for block in blocks_in(func.body):
        times = 1
        for loop in loops_on(block_path(func, block.name)):
            times *= int(evaluate(loop.extent, env))
        total += times
    return total


# Schedules --------------------------------------------------------------------------------------------------------


def tiled(func: PrimFunc, symbols: Mapping[str, int], rng: random.Random) -> Schedule:
    """A schedule as one would write it for a CPU, at random in every choice, and a few steps of any kind."""
    sch = Schedule(func)
    for step in (_inline, _tile, _fuse_into_tiles, _reduce, _vectorize, _fetch, _parallelize):
        for name in [block.name for block in blocks_in(sch.func.body)]:
            if any(block.name == name for block in blocks_in(sch.func.body)):
                _attempt(step, sch, sch.get_block(name), rng)
    for _ in range(rng.choice([0, 0, 2, 4])):
        if instances(sch.func, symbols) <= 2 * MOST_INSTANCES:
            _attempt(random_step, sch, rng)
    return sch


def _attempt(step: Callable[..., None], *args: object) -> None:
    """A step that may be refused; what it did before that stays."""
    try:
        step(*args)
    except ScheduleError as error:
        assert str(error)


def _is_last(sch: Schedule, block: BlockRef) -> bool:
    return blocks_in(sch.func.body)[-1].name == block.name


def _inline(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    if rng.random() < 0.25:
        sch.compute_inline(block)


def _tile(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    if not _is_last(sch, block):
        return
    loops = list(sch.get_loops(block))
    if len(loops) > 1 and rng.random() < 0.3:
        loops = [sch.fuse(*loops[:2]), *loops[2:]]
    chosen = rng.choice(loops) if rng.random() < 0.4 else loops[-1]
    sch.split(chosen, rng.choice([[None, 4], [None, 8], [None, 3], [None, 16], [None, 2, 4]]))
    loops = list(sch.get_loops(block))
    if rng.random() < 0.5:
        sch.reorder(*rng.sample(loops, rng.choice([2, len(loops)])))
    if rng.random() < 0.4:
        sch.cache_write(block, rng.choice(sch.get_loops(block)), rng.choice(["local", "global", "register"]))


def _fuse_into_tiles(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    if not _is_last(sch, block) and rng.random() < 0.75:
        last = sch.get_block(blocks_in(sch.func.body)[-1].name)
        sch.compute_at(block, rng.choice(sch.get_loops(last)))


def _reduce(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    loops = list(sch.get_loops(block))
    if block_of(sch, block).init is None or not loops:
        return
    if rng.random() < 0.4:
        sch.decompose_reduction(block, rng.choice(loops))
    elif rng.random() < 0.6:
        sch.rfactor(block, rng.choice(sch.split(loops[-1], rng.choice([[None, 4], [None, 8], [4, None]]))))


def _vectorize(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    loops = sch.get_loops(block)
    if rng.random() < 0.2:
        sch.set_scope(block, rng.choice(["local", "register", "global"]))
    if loops and rng.random() < 0.3:
        loops = sch.split(loops[-1], rng.choice([[None, 4], [None, 8], [None, 3]]))
    if loops and rng.random() < 0.7:
        sch.vectorize(loops[-1])


def _fetch(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    reads, loops = block_of(sch, block).reads, sch.get_loops(block)
    if reads and loops and rng.random() < 0.2:
        sch.cache_read(block, rng.choice(reads).buffer.name, rng.choice(loops), rng.choice(["local", "global"]))


def _parallelize(sch: Schedule, block: BlockRef, rng: random.Random) -> None:
    loops = sch.get_loops(block)
    if not loops or not _is_last(sch, block) or rng.random() < 0.5:
        return
    if rng.random() < 0.6:
        sch.parallel(loops[0])
    else:
        sch.parallel(loops[0], schedule="dynamic", chunk=rng.choice([1, 2]))
