"""Winograd's convolution as machine code, on every kind of vector unit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.compiler.cache import KernelCache
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.pipeline import compile_prim_func
from kedge.compiler.target import parse
from kedge.compiler.tir import interp
from kedge.compiler.tir.stmt import PrimFunc
from support.compiled import opened
from support.emulated import emulated, run_program
from support.functions import inputs as inputs_of
from support.winograd import case


def expected(func: PrimFunc, symbols: Mapping[str, int]) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    data = inputs_of(func, symbols)
    return data, interp.run(func, data, symbols)[0]


@pytest.mark.parametrize("name", ["tails", "four", "free sizes"])
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_machine_code(name: str, cpu: str, kernels: KernelCache) -> None:
    func, symbols = case(name)
    target = parse(f"llvm -mtriple=x86_64-linux-gnu -mcpu={cpu} -num-cores=2")
    data, want = expected(func, symbols)
    with opened(compile_prim_func(func, target, cache=kernels), threads=2) as model:
        got = model.run({buffer.name: array for buffer, array in zip(func.params, data, strict=False)})
    np.testing.assert_allclose(got["relu"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["raspberry-pi/3b", "raspberry-pi/2b"])
def test_machine_code_for_arm(text: str, kernels: KernelCache, tmp_path: Path) -> None:
    target = emulated(text)
    func, symbols = case("tails")
    data, want = expected(func, symbols)
    (got,) = run_program(lower_prim_func(func, target), target, data, tmp_path, kernels)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
