"""Index arithmetic: what must come out clean, what can be proved, and that nothing changes its value."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kedge.compiler.tir import interp
from kedge.compiler.tir.expr import (
    Binary,
    Cast,
    Const,
    Expr,
    Load,
    Var,
    binary,
    call,
    ceildiv,
    const,
    eq,
    logical_and,
    maximum,
    minimum,
    select,
)  # fmt: skip
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import (
    Simplifier,
    bounds,
    over,
    prove,
    prove_equal,
    simplify,
    simplify_dim,
    simplify_stmt,
)
from kedge.compiler.tir.stmt import Buffer, For, If, PrimFunc, Range, Seq, Store
from kedge.compiler.tir.verify import verify
from kedge.compiler.tir.visitor import children, free_vars, map_children, walk_expr
from support.functions import evaluate

P, J, K, F = Var("i"), Var("j"), Var("k"), Var("f")
N, M = Var("n", lower=1), Var("m", lower=1)
RANGES = {P: over(N), J: over(16), K: over(4)}


@pytest.mark.parametrize(
    ("expr", "text"),
    [
        ((P * 16 + J) // 16, "i"),
        ((P * 16 + J) % 16, "j"),
        ((P * 16 + J * 4 + K) // 64, "(i * 4 + j) // 16"),
        ((K * 16 + J) // 32, "k // 2"),
        ((F // 4) // 8, "f // 32"),
        ((F % 64) // 16, "f // 16 % 4"),
        ((F % 64) % 16, "f % 16"),
        (F // 16 * 16 + F % 16, "f"),
        (F // M * M + F % M, "f"),
        ((F // 16) % 4 * 16 + F % 16 + F // 64 * 64, "f"),
        (F // 16 * 16 + 3, "f // 16 * 16 + 3"),
        ((P * M + F % M) // M, "i"),
        ((P * M + F % M) % M, "f % m"),
        ((P * N * 4 + K * N + J) // 4 - (P * N * 4 + K * N + J) // 4, "0"),
        (minimum(J, 20), "j"),
        (maximum(J, 20), "20"),
        (minimum(16, N * 16 - P * 16), "16"),
        (select(J < 16, P, J), "i"),
        ((P * 16 + J) * N + F - P * N * 16, "j * n + f"),
        (P - P, "0"),
        (0 - P + J, "j - i"),
        (eq(J, 16), "False"),
        (P + 1 <= N, "True"),
        (P * 2 < 40, "i < 20"),
        (logical_and(J < 16, P < 3), "i < 3"),
        (binary("or", J < 16, P < 3), "True"),
        (call("not", J < 16), "False"),
        (binary("truncdiv", P * 16 + J, 16), "i"),
        (binary("truncmod", P * 16 + J, 16), "j"),
        (Cast(Cast(P, "int64"), "float32"), "float32(i)"),
        (Cast(const(3), "float32"), "3.0"),
    ],
)
def test_comes_out_clean(expr, text):
    assert print_expr(simplify(expr, RANGES)) == text


def test_unchanged_is_the_same_object():
    expr = P * 16 + J
    assert simplify(expr) is expr
    assert simplify(expr, RANGES) is expr


def test_floats_keep_their_operations():
    x = Buffer("x", (4,), "float32")
    value = Load(x, ((P * 4 + K) // 4 * 0,)) * 1.0 + 0.0
    assert print_expr(simplify(value, RANGES)) == "x[0] * 1.0 + 0.0"


@pytest.mark.parametrize(
    "fact",
    [
        P < N,
        P * 16 + J < N * 16,
        ceildiv(N, 16) * 16 >= N,
        (N + 15) // 16 * 16 < N + 16,
        ceildiv(N, 16) > P // 16,
        P * M + F % M < N * M,
        minimum(N, 4) <= 4,
        maximum(N, 4) >= N,
        select(P < 3, J, K) < 16,
        (N * M + 1) % M < M,
        logical_and(P >= 0, J <= 15),
        binary("ne", J, 16),
    ],
)
def test_proved(fact):
    assert prove(fact, RANGES)


@pytest.mark.parametrize("claim", [P < N - 1, P * 16 + J < N, eq(P, J), P < 100, F >= 0, F % N >= 1])
def test_not_proved(claim):
    assert not prove(claim, RANGES)


def test_fused_loop_stays_in_its_dims():
    ranges = {F: over(N * M)}
    assert prove(F // M < N, ranges)
    assert prove(F % M < M, ranges)


def test_tail_of_a_split():
    outer, inner = Var("outer"), Var("inner")
    ranges = {outer: over(ceildiv(N, 16)), inner: over(16)}
    assert prove(outer * 16 + inner < N + 15, ranges)
    assert not prove(outer * 16 + inner < N + 14, ranges)


def test_dims():
    assert prove_equal((N + 15) // 16, (N - 1) // 16 + 1)
    assert prove_equal(N * (M + 1), M * N + N)
    assert not prove_equal(N, M)
    assert prove_equal(3, 3)
    assert not prove_equal(3, N)
    assert simplify_dim((N * 4) // N) == 4
    assert simplify_dim(7) == 7


def test_bounds():
    assert bounds(P * 16 + J, {P: over(4), J: over(16)}) == (0, 63)
    assert bounds(N) == (1, None)
    assert bounds(3 - J, RANGES) == (-12, 3)
    assert bounds(Cast(Load(Buffer("x", (1,), "uint8"), (const(0),)), "int64")) == (0, 255)
    assert bounds(F % 5) == (0, 4)


def test_statements_lose_decided_branches():
    n = Var("n", lower=1)
    x, y = Buffer("x", (n,), "float32"), Buffer("y", (n,), "float32")
    i = Var("i")

    def branch(condition: Expr) -> PrimFunc:
        body = If(condition, Store(y, (i,), Load(x, (i + 0,))), Store(y, (i,), const(0.0, "float32")))
        return PrimFunc("f", (x, y), 1, For(i, n, "serial", body), symbols=(n,))

    loop = simplify_stmt(verify(branch(i < n)).body)
    assert isinstance(loop, For)
    assert isinstance(loop.body, Store)
    other = simplify_stmt(branch(i >= n).body)
    assert isinstance(other, For)
    assert isinstance(other.body, Store)
    assert isinstance(other.body.value, Const)
    assert simplify_stmt(If(n < 1, Seq(()))) != Seq(())


VARS = (Var("p"), Var("q", lower=-3, upper=9), Var("r"))
LIMITS = {VARS[0]: range(5), VARS[1]: range(-3, 10), VARS[2]: range(2, 9)}
KNOWN = {VARS[0]: over(5), VARS[2]: Range(const(2), const(7))}


def exprs(depth: int = 4) -> st.SearchStrategy[Expr]:
    leaf = st.one_of(st.sampled_from(VARS), st.integers(-9, 9).map(const))
    if depth == 0:
        return leaf
    sub = exprs(depth - 1)
    ring = st.builds(Binary, st.sampled_from(["add", "sub", "mul", "min", "max"]), sub, sub)
    divisor = st.one_of(st.integers(1, 12).map(const), st.just(VARS[2]))
    quotient = st.builds(Binary, st.sampled_from(["floordiv", "floormod"]), sub, divisor)
    return st.one_of(leaf, ring, quotient)


def points() -> list[dict[Var, int]]:
    names = list(LIMITS)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*LIMITS.values())]


POINTS = points()


@settings(max_examples=250, deadline=None)
@given(exprs())
def test_value_is_kept(expr):
    simple = simplify(expr, KNOWN)
    low, high = bounds(expr, KNOWN)
    for env in POINTS[::7]:
        value = evaluate(expr, env)
        assert evaluate(simple, env) == value
        assert low is None or low <= value
        assert high is None or value <= high


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), exprs(3), exprs(3))
def test_proofs_hold_everywhere(op, a, b):
    claim = Binary(op, a, b)
    simple = simplify(claim, KNOWN)
    proved = prove(claim, KNOWN)
    for env in POINTS[::5]:
        value = evaluate(claim, env)
        assert evaluate(simple, env) == value
        assert value or not proved


@settings(max_examples=100, deadline=None)
@given(exprs(3))
def test_simplifying_twice_only_reorders(expr):
    # Terms stand in the order in which their variables first appear, so a second pass may order them anew.
    once = simplify(expr, KNOWN)
    twice = simplify(once, KNOWN)
    assert prove_equal(once, twice, KNOWN)
    assert len(list(walk_expr(twice))) <= len(list(walk_expr(once)))


def test_products_of_sizes_have_one_form():
    height, width = (Var("h", lower=1) + 7) // 8, (Var("w", lower=1) + 7) // 8
    for product in (height * width * 16, height * 16 * width, width * 16 * height):
        simple = simplify(product)
        assert print_expr(simple).count("//") == 2
        assert prove_equal(simple, width * height * 16)
        assert not prove_equal(simple, width * height * 8)


# Choices, conditions, what is known ------------------------------------------------------------------------------


def conditions(depth: int = 2) -> st.SearchStrategy[Expr]:
    compare = st.builds(Binary, st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), exprs(2), exprs(1))
    if depth == 0:
        return compare
    inner = conditions(depth - 1)
    logic = st.builds(Binary, st.sampled_from(["and", "or"]), inner, inner)
    return st.one_of(compare, logic, st.builds(lambda c: call("not", c, dtype="bool"), inner))


def mixed(depth: int = 3) -> st.SearchStrategy[Expr]:
    """Expressions with choices, and with divisors that are products."""
    sub = exprs(2) if depth == 0 else mixed(depth - 1)
    r = VARS[2]
    divisor = st.sampled_from([r, r * 2, r * r, r * (VARS[0] + 1), r + 1])
    quotient = st.builds(Binary, st.sampled_from(["floordiv", "floormod"]), sub, divisor)
    total = st.builds(Binary, st.just("add"), sub, sub)
    return st.one_of(exprs(2), quotient, st.builds(select, conditions(1), sub, sub), total)


def comparisons() -> st.SearchStrategy[Expr]:
    """Facts that say something: of choices too."""
    return st.builds(Binary, st.sampled_from(["lt", "le", "gt", "ge", "eq"]), mixed(1), exprs(1))


@settings(max_examples=300, deadline=None)
@given(mixed())
def test_choices_and_symbolic_divisors_keep_their_value(expr):
    simple = simplify(expr, KNOWN)
    low, high = bounds(expr, KNOWN)
    for env in POINTS[::7]:
        value = evaluate(expr, env)
        assert evaluate(simple, env) == value
        assert low is None or low <= value
        assert high is None or value <= high


@settings(max_examples=300, deadline=None)
@given(conditions())
def test_conditions_keep_their_value(condition):
    simple = simplify(condition, KNOWN)
    proved = prove(condition, KNOWN)
    for env in POINTS[::5]:
        value = evaluate(condition, env)
        assert evaluate(simple, env) == value
        assert value or not proved


@settings(max_examples=300, deadline=None)
@given(conditions(1), conditions(1), mixed(1))
def test_facts_count_only_where_they_hold(fact, claim, expr):
    simplifier = Simplifier(KNOWN, (fact,))
    simple, proved = simplifier.simplify(expr), simplifier.prove(claim)
    low, high = simplifier.bounds(expr)
    for env in POINTS[::3]:
        if evaluate(fact, env):
            value = evaluate(expr, env)
            assert evaluate(simple, env) == value
            assert evaluate(claim, env) or not proved
            assert low is None or low <= value
            assert high is None or value <= high


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KNOWN, key=lambda var: var.name)), comparisons(), comparisons(), mixed(1))
def test_who_learns_step_by_step_answers_as_who_knew_all(var, fact, more, expr):
    first = Simplifier({other: known for other, known in KNOWN.items() if other is not var}, (fact,))
    first.simplify(expr)  # what one is asked counts for itself alone
    grown, whole = first.within({var: KNOWN[var]}).assuming((more,)), Simplifier(KNOWN, (fact, more))
    assert print_expr(grown.simplify(expr)) == print_expr(whole.simplify(expr))
    assert grown.bounds(expr) == whole.bounds(expr)


def test_a_choice_in_a_fact_is_made_with_the_facts_before_it():
    x, y, n = Var("x", lower=0), Var("y", lower=0), Var("n", lower=1)
    chosen = select(logical_and(x > 1, x < 5), y, 0)
    facts = (x < 4, chosen < n)
    for simplifier in (Simplifier({}, facts), Simplifier({}, facts[:1]).assuming(facts[1:])):
        assert simplifier.prove(chosen < n)
        assert simplifier.within({x: over(8)}).prove(chosen < n)


def test_facts_are_learned_once(monkeypatch):
    learned = []
    monkeypatch.setattr(Simplifier, "_learn", lambda self, fact: learned.append(fact))
    known = Simplifier({P: over(N)}, (P < 9,))
    for level in range(8):
        known = known.within({Var(f"k{level}"): over(4)}).assuming((8 - level > P,))
    assert len(learned) == len(known.facts) == 9
    known.within({P: over(4)})  # other values of what the facts are about
    assert len(learned) == 18


def test_what_a_fact_is_made_of_is_worked_out_anew_with_the_facts_after_it():
    small = minimum(P, N)
    known = Simplifier({}, (small < 5, P < N))
    assert known.simplify(small) is P


@pytest.mark.parametrize(
    ("fact", "claim"),
    [
        (P * 4 + J < N, P * 4 < N),
        (P * 4 + 3 < N, P * 4 + K < N),
        (F < 5, F // 4 <= 1),
        (eq(F, N - 1), F < N),
        (logical_and(F >= 1, F <= M), F - 1 < M),
        (N >= 5, ceildiv(N, 4) >= 2),
    ],
)
def test_a_fact_proves_what_follows(fact, claim):
    known = {J: over(16), K: over(4)}
    assert Simplifier(known, (fact,)).prove(claim)
    assert not Simplifier(known).prove(claim)


@settings(max_examples=200, deadline=None)
@given(exprs(3), st.permutations(VARS), st.integers(0, 3))
def test_spans_hold_all_values(expr, order, count):
    """Bounds over some of the variables, for every value of the others."""
    inner = [var for var in order if var in KNOWN][:count]
    simplifier = Simplifier(KNOWN)
    span = simplifier.span(expr, inner)
    if span is None:
        return
    low, high = map(simplifier.expr_of, span)
    assert not {*free_vars(low), *free_vars(high)} & set(inner)
    for env in POINTS[::3]:
        assert evaluate(low, env) <= evaluate(expr, env) <= evaluate(high, env)


def test_spans_of_affine_indices_are_tight():
    simplifier = Simplifier({P: over(N), J: over(16), K: over(minimum(4, N - P * 4))})
    for expr, inner, low, high in (
        (P * 16 + J, [J], "i * 16", "i * 16 + 15"),
        (P * 16 - J * 2 + 1, [J], "i * 16 - 29", "i * 16 + 1"),
        (P * 4 + K, [K], "i * 4", "min(i * 4 + 4, n) - 1"),
        (J * N + P, [P, J], "0", "n * 16 - 1"),
        ((P * 16 + J) // 4, [J], "i * 4", "i * 4 + 3"),
        ((P * 16 + J) % 4, [J], "0", "3"),
    ):
        span = simplifier.span(expr, inner)
        assert span is not None
        assert [print_expr(simplifier.expr_of(end)) for end in span] == [low, high]
    assert simplifier.span(F + J, [F]) is None


def test_a_choice_that_stands_in_its_own_condition():
    value = Load(Buffer("x", (4,), "int64"), (const(0),))
    inner = select(value > 0, value, 1 - value)
    outer = select(inner > 2, inner, 1 - inner)
    assert simplify(select(outer > 3, outer, inner)).dtype == "int64"


DATA = Buffer("x", (2,), "int64"), *(Buffer(dtype, (1,), dtype) for dtype in ("uint64", "uint32", "int8"))
X = [Load(DATA[0], (const(at),)) for at in range(2)]
WIDE, SMALL, BYTE = (Cast(Load(buffer, (const(0),)), "int64") for buffer in DATA[1:])


@pytest.mark.parametrize(
    "condition",
    [
        WIDE >= 0,
        SMALL * SMALL >= 0,
        minimum(SMALL * SMALL, 5) >= 0,
        minimum(maximum(X[0], 0) + maximum(X[1], 0), 5) >= 0,
        minimum(maximum(X[0], 0) * N, 5) >= 0,
        maximum(X[0] + 1, 5) > X[0],
        maximum(X[0] + 1, X[0]) > X[0],
        X[0] + 1 > X[0],
    ],
    ids=print_expr,
)
def test_what_wrapping_data_makes_false_is_not_proved(condition):
    assert not prove(condition)
    assert print_expr(simplify(condition)) != "True"


def test_what_is_known_of_data():
    assert prove(SMALL >= 0) and prove(SMALL + SMALL * 7 <= 2**35)
    assert prove(SMALL * 4 + 3 > SMALL * 4)
    for index in (WIDE, SMALL * SMALL, X[0], X[0] + X[1]):
        safe = minimum(maximum(select(index < 0, index + N, index), 0), N - 1)
        assert prove(safe >= 0) and prove(safe < N)
        assert prove(safe * M + J >= 0, RANGES) and prove(safe * 16 + J < N * 16, RANGES)
        assert bounds(safe * 4) == (0, None)
        assert print_expr(simplify((safe * 16 + J) // 16 - safe, RANGES)) == "0"


def data():
    leaves = st.sampled_from([*X, WIDE, SMALL, BYTE, *map(const, (0, 1, -1, 3, 5))])
    ops = st.sampled_from(["add", "sub", "mul", "min", "max", "floordiv", "floormod", "truncdiv", "truncmod"])
    return st.recursive(leaves, lambda inner: st.builds(Binary, ops, inner, inner), max_leaves=5)


numbers = st.sampled_from([0, 1, 3, -1, 2**63 - 1, -(2**63), 2**62, 2**31, -5])


@given(data(), data(), st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), st.tuples(*[numbers] * 5))
def test_arithmetic_on_data_wraps_around(a, b, op, values):
    y = Buffer("y", (6,), "int64")
    exprs = [a, b, select(Binary(op, a, b), a, b)]
    simple = [simplify(expr) for expr in exprs]
    body = Seq(tuple(Store(y, (const(at),), expr) for at, expr in enumerate([*exprs, *simple])))
    parts = (values[:2], values[2:3], values[3:4], values[4:])
    feeds = [np.array(part, np.int64).astype(buffer.dtype) for buffer, part in zip(DATA, parts, strict=True)]
    with np.errstate(all="ignore"):
        (got,) = interp.run(PrimFunc("f", (*DATA, y), 1, body), feeds)
    assert got[:3].tolist() == got[3:].tolist(), [print_expr(expr) for expr in (*exprs, *simple)]


# How much work it is ---------------------------------------------------------------------------------------------


@pytest.fixture
def visits(monkeypatch) -> list[object]:
    """What the simplifier takes apart or proves about; more than the limit ends the test."""
    found: list[object] = []

    def counted(method):
        def call(self, subject, *rest):
            found.append(subject)
            assert len(found) <= MOST_VISITS, "the work grows faster than the expression"
            return method(self, subject, *rest)

        return call

    for name in ("_arithmetic", "_worst"):
        monkeypatch.setattr(Simplifier, name, counted(getattr(Simplifier, name)))
    return found


#: What 12 steps take at most; one visit for each path through the expression would be hundreds of thousands.
MOST_VISITS = 1_500
SIZES = (N, M, Var("k", lower=1))


def steps(count: int) -> st.SearchStrategy[list[tuple[str, int]]]:
    """Sizes that are computed of the one before and another one, as models write them."""
    ops = st.sampled_from(["max", "min", "add", "floordiv", "mul"])
    return st.lists(st.tuples(ops, st.integers(0, 5)), min_size=count, max_size=count)


def size_of(made: list[tuple[str, int]]) -> Expr:
    sizes: list[Expr] = list(SIZES)
    for op, by in made:
        other = const(by + 2) if op in ("floordiv", "mul") else sizes[-1 - by] if by < 3 else SIZES[by - 3]
        sizes.append(Binary(op, sizes[-1], other))
    return sizes[-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps(12))
def test_sizes_of_sizes_keep_their_value_in_little_work(visits, made):
    visits.clear()
    expr = size_of(made)
    simple = simplify(expr)
    low, high = bounds(expr)
    for values in itertools.product((1, 7), repeat=3):
        env = dict(zip(SIZES, values, strict=True))
        value = evaluate(expr, env)
        assert evaluate(simple, env) == value
        assert low is None or low <= value
        assert high is None or value <= high


def clamped(count: int) -> Expr:
    """A size to which another one is added and which is limited by a third, `count` times."""
    size: Expr = SIZES[0]
    for step in range(count):
        size = Binary("max" if step % 2 else "min", size + SIZES[step % 3], SIZES[(step + 1) % 3])
    return size


def shared(count: int) -> Expr:
    """Sizes that are used twice each."""
    size, limit = SIZES[0] + 0, SIZES[0] * SIZES[1]
    for step in range(count):
        more = maximum(size, SIZES[step % 3]) + SIZES[(step + 1) % 3]
        size, limit = minimum(more, limit) // (2 + step % 2), limit + more
    return size


def of_two_before(count: int) -> Expr:
    """Each size is the larger or the smaller one of what the two before it give."""
    first, second = SIZES[0] + SIZES[1], SIZES[1] + SIZES[2]
    for step in range(count):
        sides = second + SIZES[step % 3], first // (2 + step % 3)
        first, second = second, Binary("max" if step % 2 else "min", *sides) + SIZES[step % 3]
    return second


@pytest.mark.parametrize("made", [clamped, shared, of_two_before])
def test_work_grows_with_the_steps_and_not_with_the_paths_through_them(visits, made):
    expr = made(12)
    simple = simplify(expr)
    assert visits
    short = made(8)
    for whole, part in ((expr, simple), (short, simplify(short))):
        for env in ({SIZES[0]: 1, SIZES[1]: 7, SIZES[2]: 3}, {SIZES[0]: 50, SIZES[1]: 2, SIZES[2]: 9}):
            assert valued(part, env) == valued(whole, env)


def valued(expr: Expr, env: dict[Var, int]) -> int:
    """The value of a size whose parts are shared: each is worked out once."""
    known: dict[Expr, Expr] = {}
    for node in in_order(expr):
        with_values = map_children(node, known.__getitem__)
        known[node] = const(evaluate(with_values, env))
    return int(evaluate(known[expr], env))


def in_order(expr: Expr) -> list[Expr]:
    """Each node of `expr` once, after its operands."""
    found: dict[Expr, None] = {}
    waiting = [expr]
    while waiting:
        node = waiting[-1]
        missing = [child for child in children(node) if child not in found]
        waiting.extend(missing)
        if not missing:
            found[waiting.pop()] = None
    return list(found)


@pytest.mark.parametrize(
    ("nest", "text"),
    [
        (lambda e: e + N, "j + n * 1200"),
        (lambda e: N + e, "n * 1200 + j"),
        (lambda e: N - e, "j"),
        (lambda e: minimum(N, e), "min(n, j)"),
        (lambda e: N - (e + 1 - N), "j"),
    ],
)
def test_sums_are_simplified_on_whichever_side_they_are_long(nest, text):
    total = J
    for _ in range(1_200):
        total = nest(total)
    assert print_expr(simplify(total)) == text


def test_a_sum_of_very_many_variables_stays_the_same_object():
    total = J
    for i in range(1_200):
        total = total + Var(f"v{i}", lower=1)
    assert simplify(total) is total
