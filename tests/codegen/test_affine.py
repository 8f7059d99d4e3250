"""Linear forms: arithmetic, quotients and bounds agree with plain integers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.compiler.codegen.affine import LANE, Linear
from kedge.compiler.codegen.builder import Value

A, B = Value("%i1", "i64"), Value("%j2", "i64")
VALUES = (A, B, LANE)
BOUNDS = {A: (0, 6), B: (2, 3), LANE: (0, 3)}


def evaluate(form: Linear, env: dict[Value, int]) -> int:
    total = 0
    for term, c in form.terms.items():
        product = c
        for value in term:
            product *= env[value]
        total += product
    return total


atoms = st.one_of(st.sampled_from(VALUES).map(Linear.atom), st.integers(-9, 9).map(Linear.of))
forms = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner), st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner), st.builds(lambda a, k: a.scaled(k), inner, st.integers(-4, 4)),
    ),
    max_leaves=6,
)  # fmt: skip
environments = st.fixed_dictionaries({value: st.integers(low, high) for value, (low, high) in BOUNDS.items()})


@settings(max_examples=200, deadline=None)
@given(forms, forms, environments, st.integers(1, 9))
def test_forms_mean_what_integers_do(a: Linear, b: Linear, env: dict[Value, int], divisor: int) -> None:
    x, y = evaluate(a, env), evaluate(b, env)
    assert evaluate(a + b, env) == x + y
    assert evaluate(a - b, env) == x - y
    assert evaluate(a * b, env) == x * y
    assert all(c != 0 for form in (a + b, a - b, a * b) for c in form.terms.values())
    quotient, rest = a.divide(divisor)
    assert evaluate(quotient, env) * divisor + evaluate(rest, env) == x
    assert 0 <= rest.constant < divisor
    whole, left = rest.reduced(divisor)
    assert evaluate(whole, env) * divisor + evaluate(left, env) == evaluate(rest, env)
    assert all(c < divisor for c in left.terms.values())
    low, high = a.bounds(BOUNDS)
    assert low is None or low <= x
    assert high is None or x <= high
    base, constant = a.split_constant()
    assert evaluate(base, env) + constant == x and base.constant == 0
    lanes = a.split_lane()
    if lanes is not None:
        assert evaluate(lanes[0], env) + lanes[1] * env[LANE] == x and lanes[0].is_uniform
    assert a.single == next((value for value in VALUES if Linear.atom(value) == a), None)
    assert (a.value is None) == any(term for term in a.terms)
