"""The accuracy of compiled elementary functions: what is stated, and what is measured on each instruction set.

PYTHONPATH=tests python -m support.accuracy            # measure everything, print the table
PYTHONPATH=tests python -m support.accuracy --write    # and put it into docs/numerics.md
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kedge.compiler import te
from kedge.compiler.cache import KernelCache
from kedge.compiler.lower.lower import lower_prim_func
from kedge.compiler.target import Target, parse
from kedge.compiler.tir.expr import Expr, call
from support.emulated import emulator, run_program

Array = np.ndarray[Any, Any]
Longer = np.longdouble
DOCS = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"

#: The instruction sets, by the targets that stand for them.
ISAS: Mapping[str, str] = {
    "SSE2": "x86-64",
    "AVX2": "x86-64-v3",
    "AVX-512": "x86-64-v4",
    "NEON, 64 bits": "raspberry-pi/4b",
    "NEON, 32 bits": "raspberry-pi/2b",
    "Arm VFP, scalar": "llvm -mtriple=armv7-linux-gnueabihf",
    "RISC-V, scalar": "visionfive/2",
    "RISC-V vectors": "bananapi/f3",
}
#: Their vector units take float32 denormals for zeros.
FLUSHING = frozenset({"NEON, 32 bits"})


@dataclass(frozen=True)
class Case:
    """A function: its meaning for long doubles, its bound on |x|, and the largest error stated, by dtype.

    Errors are in units of the last place of the result, or of the argument where `of_argument`.
    """

    name: str
    reference: Callable[..., Array]
    limits: Mapping[str, float]
    ulp: Mapping[str, float]
    body: Callable[..., Expr]
    positive: bool = False
    of_argument: bool = False
    normal: bool = False  # results below the least normal number are 0
    second: Callable[[Array], Array] | None = None  # the other argument, for given first ones


def sigmoid(x: Array) -> Array:
    """Without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def erf(x: Array) -> Array:
    """By libm's double-precision erf, which is within an ULP of double."""
    return np.array([math.erf(float(v)) for v in x]).astype(Longer)


def erfc(x: Array) -> Array:
    """By libm's double-precision erfc."""
    return np.array([math.erfc(float(v)) for v in x]).astype(Longer)


def gelu(x: Array) -> Array:
    """`x` times the normal distribution function; what it is multiplied with is accurate for negative `x`, too."""
    return x * erfc(-x / np.sqrt(Longer(2))) / 2


def gelu_tanh(x: Array) -> Array:
    """The approximation that ONNX's Gelu(approximate="tanh") defines."""
    return x * sigmoid(2 * _GELU_SCALE * (x + Longer("0.044715") * x**3))


def exponents(bases: Array) -> Array:
    """Powers for which results are of every magnitude, down to 0 and up to infinity; every third one is whole."""
    rng, info = np.random.default_rng(1), ml_dtypes.finfo(bases.dtype)
    sizes = np.abs(bases.astype(Longer))
    with np.errstate(all="ignore"):
        powers = rng.uniform(info.minexp - info.nmant - 4, info.maxexp + 4, bases.size) / np.log2(sizes)
        powers = np.where(np.isfinite(powers), powers, rng.standard_normal(bases.size))
        powers[::3] = np.rint(powers[::3])
        return powers.astype(bases.dtype)


_GELU_SCALE = np.sqrt(2 / (4 * np.arctan(Longer(1))))


def _gelu_body(x: Expr) -> Expr:
    return x * 0.5 * (call("erf", x * math.sqrt(0.5)) + 1.0)


def _gelu_tanh_body(x: Expr) -> Expr:
    return x * 0.5 * (call("tanh", (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1.0)


def _case(
    name: str, reference: Callable[..., Array], single: tuple[float, float], double: tuple[float, float], *,
    positive: bool = False, of_argument: bool = False, body: Callable[..., Expr] | None = None,
    halves: bool = True, second: Callable[[Array], Array] | None = None, normal: bool = False,
) -> Case:  # fmt: skip
    """`single` and `double` are the bound on |x| and the error stated for each type."""
    limits = {"float32": single[0], "float64": double[0]}
    ulp = {"float32": single[1], "float64": double[1]}
    if halves:  # computed in float32, and rounded
        exact = single[1] == 0
        limits |= {"float16": min(single[0], 65504.0), "bfloat16": single[0]}
        ulp |= {"float16": 0 if exact else 0.502, "bfloat16": 0 if exact else 0.502}
    return Case(
        name, reference, limits, ulp, body or (lambda *x: call(name, *x)), positive, of_argument, normal, second
    )


_HALF_PI = 2 * np.arctan(Longer(1))
BIG, HUGE = (3e38, 0.0), (1.7e308, 0.0)
CASES: tuple[Case, ...] = (
    _case("exp", np.exp, (110, 1), (760, 1)),
    _case("log", np.log, (3e38, 1), (1.7e308, 1), positive=True),
    _case("tanh", np.tanh, (3e38, 2), (1.7e308, 3)),
    _case("sigmoid", sigmoid, (110, 3), (750, 3), normal=True),
    _case("erf", erf, (3e38, 3), (1.7e308, 4)),  # 3 and libm's own
    _case("gelu", gelu, (100, 2), (100, 3), of_argument=True, body=_gelu_body, halves=False),
    _case("gelu, tanh form", gelu_tanh, (100, 4), (100, 4), of_argument=True, body=_gelu_tanh_body, halves=False),
    _case("sin", np.sin, (3e38, 1), (1.7e308, 3)),
    _case("cos", np.cos, (3e38, 1), (1.7e308, 3)),
    _case("pow", np.power, (3e38, 1), (1.7e308, 1), second=exponents),
    _case("rsqrt", lambda x: 1 / np.sqrt(x), (3e38, 2), (1.7e308, 2), positive=True),
    _case("sqrt", np.sqrt, (3e38, 0.5), (1.7e308, 0.5), positive=True),
    _case("floor", np.floor, BIG, HUGE),
    _case("ceil", np.ceil, BIG, HUGE),
    _case("round", np.round, BIG, HUGE),
    _case("abs", np.abs, BIG, HUGE),
)


def samples(case: Case, dtype: str, count: int) -> Array:
    """All values of a 16-bit type within the limit; else dense and even, normal, and of every magnitude, with edges."""
    limit, kind = case.limits[dtype], np.dtype(dtype)
    if kind.itemsize == 2:
        every = np.arange(1 << 16, dtype=np.uint16).view(kind)
        x = every[np.abs(every.astype(np.float32)) <= np.float32(limit)]
    else:
        rng, info = np.random.default_rng(0), np.finfo(kind)
        low = math.log(float(info.smallest_subnormal))
        part = count // 4
        spread = np.exp(rng.uniform(low, math.log(limit), part)) * rng.choice([-1, 1], part)
        near = min(limit, 50.0)
        edges = [0.0, -0.0, 0.5, 1.0, -1.0, 1.5, 2.5, info.smallest_subnormal, info.tiny, -info.tiny, limit, -limit]
        parts = [np.linspace(-near, near, part), rng.standard_normal(part), rng.normal(0, limit / 8, part), spread]
        if case.name in ("sin", "cos"):  # next to multiples of pi/2, of every magnitude
            parts.append(np.rint(np.exp(rng.uniform(0, math.log(limit / 2), part))).astype(Longer) * _HALF_PI)
            parts.append(np.full(1, 6381956970095103.0 * 2.0**797 if dtype == "float64" else 16367173.0 * 2.0**72))
        x = np.clip(np.concatenate([*parts, edges]), -limit, limit).astype(kind)
    x = np.concatenate([x, np.array([np.nan, np.inf, -np.inf], kind)])
    return np.abs(x) if case.positive else x


def bits(x: Array) -> int:
    """Digits of a dtype's mantissa, the leading one included."""
    return {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[str(x.dtype)]


def last_place(x: Array) -> Array:
    """The unit in the last place of each finite number; of the least normal number below that."""
    least = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}[str(x.dtype)]
    exponent = np.maximum(np.frexp(x.astype(Longer))[1] - 1, least)
    return np.ldexp(Longer(1), exponent - bits(x) + 1)


def errors(got: Array, want: Array, x: Array, *, of_argument: bool, flushes: bool) -> Array:
    """Of each result, in units of the last place; infinite where one is NaN or infinite and the other is not."""
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32).astype(got.dtype) if got.dtype.itemsize == 2 else want.astype(got.dtype)
    wide, expected = got.astype(Longer), rounded.astype(Longer)
    same = (wide == expected) | (np.isnan(wide) & np.isnan(expected))
    finite = np.isfinite(want) & np.isfinite(wide) & np.isfinite(expected)
    unit = last_place(x if of_argument else rounded)
    error = np.where(finite, np.abs(wide - np.where(finite, want, 0)) / np.where(finite, unit, 1), np.inf)
    error = np.where(same & ~finite, 0, error)
    if flushes:
        least = Longer(2) ** -126
        small = (np.abs(x.astype(Longer)) < least) | (np.abs(want) < least)
        error = np.where(small, 0, error)
    return np.asarray(error, np.float64)


def runs_here(isa: str) -> bool:
    """Whether code for an instruction set runs on this machine, be it under qemu."""
    target, here = parse(ISAS[isa]), parse("native")
    assert isinstance(target, Target) and isinstance(here, Target)
    if target.arch is here.arch:
        return set(target.features) <= set(here.features)
    return emulator(target) is not None


def measure(isa: str, dtype: str, folder: Path, cache: KernelCache, count: int) -> dict[str, float]:
    """The largest error of each function on an instruction set, which runs here."""
    target = parse(ISAS[isa])
    assert isinstance(target, Target)
    cases = [case for case in CASES if dtype in case.limits]
    data = [operands(case, samples(case, dtype, count)) for case in cases]
    inputs = [
        [te.placeholder(x.shape, dtype, f"x{at}_{place}") for place, x in enumerate(given)]
        for at, given in enumerate(data)
    ]
    outputs = [
        te.compute(given[0].shape, lambda i, case=case, given=given: case.body(*(x[i] for x in given)), name=f"y{at}")
        for at, (case, given) in enumerate(zip(cases, inputs, strict=True))
    ]
    func = te.create_prim_func([*itertools.chain(*inputs), *outputs], "accuracy")
    results = run_program(lower_prim_func(func, target), target, [*itertools.chain(*data)], folder, cache)
    worst = {}
    for case, given, got in zip(cases, data, results, strict=True):
        with np.errstate(all="ignore"):
            want = np.asarray(case.reference(*(x.astype(Longer) for x in given)))
        if case.normal:
            want = np.where(np.abs(want) < Longer(2) ** (-1022 if dtype == "float64" else -126), 0, want)
        flushes = isa in FLUSHING and dtype != "float64"
        found = errors(got, want, given[0], of_argument=case.of_argument, flushes=flushes)
        if flushes and len(given) > 1:
            found = np.where(np.abs(given[1].astype(Longer)) < Longer(2) ** -126, 0, found)
        worst[case.name] = float(found.max())
    return worst


def operands(case: Case, x: Array) -> list[Array]:
    """All arguments of a function for given first ones."""
    return [x] if case.second is None else [x, case.second(x)]


def table(count: int, cache: KernelCache) -> str:
    """The table of docs/numerics.md, measured."""
    lines = ["| function | dtype | stated | " + " | ".join(ISAS) + " |", "|" + "---|" * (3 + len(ISAS))]
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        columns = []
        for isa in ISAS:
            with tempfile.TemporaryDirectory() as folder:
                columns.append(measure(isa, dtype, Path(folder), cache, count) if runs_here(isa) else {})
        lines += [row(case, dtype, columns) for case in CASES if dtype in case.limits]
    return "\n".join(lines)


def row(case: Case, dtype: str, columns: Sequence[Mapping[str, float]]) -> str:
    """One line of the table."""
    measured = [f"{found[case.name]:.3g}" if found else "–" for found in columns]
    return f"| {case.name} | {dtype} | {stated(case, dtype)} | " + " | ".join(measured) + " |"


def stated(case: Case, dtype: str) -> str:
    """The error that is stated, and for which arguments."""
    limit = case.limits[dtype]
    largest = {"float16": 65504.0, "float32": 3e38, "bfloat16": 3e38, "float64": 1.7e308}[dtype]
    where = "" if limit == largest else f", \\|x\\| ≤ {limit:g}"
    return f"{case.ulp[dtype]:g}{' of x' if case.of_argument else ''}{where}"


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=1 << 16, help="arguments for each function of 32 and 64 bits")
    parser.add_argument("--write", action="store_true", help="into docs/numerics.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = table(options.samples, KernelCache(Path(folder)))
    sys.stdout.write(text + "\n")
    if options.write:
        before, _, rest = DOCS.read_text().partition("<!-- accuracy -->\n")
        _, _, after = rest.partition("<!-- /accuracy -->")
        DOCS.write_text(f"{before}<!-- accuracy -->\n{text}\n<!-- /accuracy -->{after}")


if __name__ == "__main__":
    main()
