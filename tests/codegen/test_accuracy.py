"""The errors that docs/numerics.md states hold on every instruction set, through the road that models take."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge.compiler.cache import KernelCache
from support import accuracy

DTYPES = ("float32", "float64", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", accuracy.ISAS)
def test_no_error_is_larger_than_stated(isa: str, dtype: str, kernels: KernelCache, tmp_path: Path) -> None:
    """All values of the types of 16 bits, and samples of the others; NaN, infinities, zeros, denormals among them."""
    if not accuracy.runs_here(isa):
        pytest.skip(f"no {isa} here")
    worst = accuracy.measure(isa, dtype, tmp_path, kernels, 1 << 13)
    stated = {case.name: case.ulp[dtype] for case in accuracy.CASES if dtype in case.limits}
    assert worst.keys() == stated.keys()
    assert not {name: error for name, error in worst.items() if error > stated[name]}


def test_the_table_is_the_one_that_is_tested() -> None:
    text = accuracy.DOCS.read_text()
    for case in accuracy.CASES:
        for dtype in case.limits:
            assert f"| {case.name} | {dtype} | {accuracy.stated(case, dtype)} |" in text
