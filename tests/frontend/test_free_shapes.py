"""Shapes that are worked out from shapes, and sizes at the edge of what a model takes: through machine code.

Each model is compiled once and run at several sizes, against onnx's reference evaluator.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import kedge
from kedge.compiler.errors import CompileError, FrontendError
from kedge.compiler.frontend.onnx import load_onnx
from kedge.compiler.graph import interp
from kedge.rpc.errors import InputError
from support.onnx_models import check_compiled, one_operator

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> Array:
    return np.array(values, np.int64)


def model(body: str, consts: Mapping[str, Array], opset: int = 18) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{body}')
    proto.graph.initializer.extend(numpy_helper.from_array(data, name) for name, data in consts.items())
    return proto


def check(proto: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]) -> None:
    """The model gives what the reference gives, dtypes and shapes included."""
    reference = ReferenceEvaluator(proto)
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        for feed in feeds:
            expected = reference.run(None, dict(feed))
            got = loaded.run(feed)
            for output, want in zip(proto.graph.output, expected, strict=True):
                assert got[output.name].dtype == want.dtype
                np.testing.assert_allclose(got[output.name], want, rtol=1e-5, atol=1e-6, strict=True)


ROWS = "g (float[N,6] x) => (float[] y) { s=Shape(x) n=Slice(s,zero,one) "


@pytest.mark.parametrize(
    ("rest", "sizes"),
    [
        ("e=Sub(n,five) y=Slice(x,zero,e,zero) }", (2, 3, 5, 6, 9)),  # x[:N-5]
        ("h=Sub(n,four) y=Slice(x,h,n,zero) }", (1, 3, 4, 7)),  # x[N-4:]
        ("d=Div(n,two) h=Mul(d,minus) y=Slice(x,zero,h,zero) }", (2, 3, 6)),  # x[:-(N/2)]
        ("h=Sub(zero,n) y=Slice(x,h,n,zero) }", (1, 6)),  # x[-N:]
        ("h=Sub(zero,one) y=Slice(x,zero,h,zero) }", (1, 6)),  # x[:-1]
        ("e=Sub(n,five) h=Div(e,two) q=Add(h,two) y=Slice(x,zero,q,zero) }", (2, 4, 9)),  # truncated, not floored
        ("e=Sub(n,five) y=Slice(x,n,e,zero,minus) }", (2, 4, 9)),  # backwards
    ],
)
def test_slices_whose_bounds_may_turn_out_negative(rest: str, sizes: Sequence[int]) -> None:
    consts = {"zero": i64(0), "one": i64(1), "two": i64(2), "four": i64(4), "five": i64(5), "minus": i64(-1)}
    check(model(ROWS + rest, consts), [{"x": f(n, 6)} for n in sizes])


def test_elements_are_gathered_from_a_free_dim_wherever_they_are_counted_from() -> None:
    """The last tokens of a sequence: by constants, and by indices that come with the call."""
    last = model("g (float[N,2] x) => (float[] y) { y=Gather(x,at) }", {"at": i64(-1, 0, -2)})
    check(last, [{"x": f(n, 2)} for n in (2, 3, 7)])
    asked = model("g (float[N,2] x, int64[K] at) => (float[] y) { y=Gather(x,at) }", {})
    check(asked, [{"x": f(n, 2), "at": i64(*at)} for n, at in ((1, (0, -1)), (5, (-5, 4, -1)))])


def test_shape_arithmetic_keeps_its_dtype() -> None:
    body = "g (float[N,3] x, int32[1] k) => (int32[1] y, int32[1] z)"
    body += " { s=Shape(x) c=Cast<to=6>(s) z=Slice(c,one,two) y=Add(z,k) }"
    check(model(body, {"one": i64(1), "two": i64(2)}), [{"x": f(2, 3), "k": np.array([5], np.int32)}])


IMAGE = "g (float[1,2,H,W] x) => (float[] y) { s=Shape(x) b=Slice(s,zero,two) h=Slice(s,two,four) f=Cast<to=1>(h) "


@pytest.mark.parametrize(
    "rest",
    [
        "m=Mul(f,double) r=Floor(m)",
        "m=Mul(f,k) r=Floor(m)",  # times 1.5 and 0.625
        "m=Mul(f,k) r=Identity(m)",  # truncated by the cast
        "d=Div(f,three) r=Ceil(d)",
        "d=Div(f,eight) c=Ceil(d) r=Mul(c,eight)",  # up to multiples of 8
        "d=Div(f,eight) m=Mul(d,eight) r=Add(m,three)",
        "m=Mul(f,third) n=Mul(third,f) c=Cast<to=7>(h) r=Cast<to=11>(c)",  # what rounds is not needed
    ],
)
@pytest.mark.parametrize("floats", [1, 11])
def test_sizes_that_are_scaled_as_floats(rest: str, floats: int) -> None:
    """As exporters write an interpolation by a factor."""
    text = IMAGE.replace("to=1", f"to={floats}") + rest + " t=Cast<to=7>(r) z=Concat<axis=0>(b,t) "
    text += 'y=Resize<mode="nearest">(x,,,z) }'
    dtype = {1: np.float32, 11: np.float64}[floats]
    factors = {"double": [2.0], "k": [1.5, 0.625], "three": [3.0], "eight": [8.0], "third": [1 / 3]}
    consts = {"zero": i64(0), "two": i64(2), "four": i64(4)}
    check(
        model(text, consts | {name: np.array(data, dtype) for name, data in factors.items()}),
        [{"x": f(1, 2, h, w)} for h, w in ((4, 8), (5, 9), (17, 2))],
    )


def chained(ops: Sequence[tuple[str, str]], count: int) -> str:
    """`count` operations on the number of rows, one after the other; the result has as many rows."""
    text = "g (float[N,4] x) => (float[] y) { s=Shape(x) d0=Slice(s,zero,one) "
    text += " ".join(f"d{i + 1}={op}(d{i},{by})" for i, (op, by) in zip(range(count), itertools.cycle(ops)))
    return f"{text} r=Concat<axis=0>(d{count},four) y=Expand(row,r) }}"


CHAINED = {"zero": i64(0), "one": i64(1), "two": i64(2), "three": i64(3), "four": i64(4), "row": f(1, 4)}


def test_thousands_of_operations_one_after_the_other_are_loaded() -> None:
    """No stack of Python's is as deep, neither for sizes nor for elements."""
    sizes = chained([("Add", "three"), ("Mul", "two"), ("Div", "two"), ("Sub", "three")], 3_000)
    assert load_onnx(model(sizes, CHAINED)).functions["main"].outputs[0].type.shape[1] == 4
    nodes = " ".join(f"t{i + 1}={'Neg' if i % 2 else 'Abs'}(t{i})" for i in range(3_000))
    body = f"g (float[N,4] t0) => (float[] y) {{ {nodes} y=Relu(t3000) }}"
    check_compiled(model(body, {}), {"t0": f(3, 4)})


@pytest.mark.parametrize(
    "step", ["e=Add(d,n) d=Mul(e,m)", "e=Mul(d,n) d=Add(e,d)", "e=Div(d,three) f=Add(e,n) d=Mul(f,d)"]
)
def test_sizes_of_too_many_operations_are_refused(step: str) -> None:
    """They doubled with each step, and were as deep as no stack of Python's."""
    text = "g (float[N,M] x) => (float[] y) { s=Shape(x) n=Slice(s,zero,one) m=Slice(s,one,two) d0=Add(n,m)"
    for i in range(5_000):
        names = {"e": f"e{i}", "f": f"f{i}"}
        nodes = [node.split("=") for node in step.split()]
        for name, call in nodes:
            call = call.replace("(d,", f"(d{i},").replace(",d)", f",d{i})")
            call = call.replace("(e,", f"(e{i},").replace("(f,", f"(f{i},")
            text += f" {names.get(name, f'd{i + 1}')}={call}"
    proto = model(text + " r=Concat<axis=0>(d5000,four) y=Expand(row,r) }", CHAINED)
    with pytest.raises(
        FrontendError, match=r"node '[def]\d+' \(\w+\): it makes a size of more than 512 operations"
    ) as refused:
        load_onnx(proto)
    assert "shapes={...}" in str(refused.value.hint)


def test_sizes_clamped_by_each_other_are_compiled() -> None:
    """Simplifying took five times as long for each two more of them."""
    text = "g (float[N,M,K] x) => (float[] y) { s=Shape(x) n=Slice(s,zero,one) m=Slice(s,one,two) k=Slice(s,two,three)"
    text += " d0=Max(n,m)"
    for i in range(16):
        text += f" e{i}=Add(d{i},{'nmk'[i % 3]}) d{i + 1}={'Max' if i % 2 else 'Min'}(e{i},{'nmk'[(i + 1) % 3]})"
    proto = model(text + " h=Div(d16,two) r=Concat<axis=0>(h,four) y=Expand(row,r) }", CHAINED)
    check(proto, [{"x": f(3, 9, 5)}, {"x": f(8, 2, 2)}])


def test_divisions_deep_inside_of_each_other_are_refused() -> None:
    """Simplifying them took minutes and more."""
    ops = [("Mul", "three"), ("Add", "one"), ("Div", "four")]
    check_compiled(model(chained(ops, 24), CHAINED), {"x": f(70, 4)})
    with pytest.raises(
        FrontendError, match=r"node 'd\d+' \(Div\): it makes a size of more than 32 divisions"
    ) as refused:
        load_onnx(model(chained(ops, 3_000), CHAINED))
    assert "shapes={...}" in str(refused.value.hint)


#: The height and the width of x and of z, as floats.
TWO_IMAGES = (
    "g (float[1,2,H,W] x, float[1,2,P,Q] z) => (float[] y) { sx=Shape(x) sz=Shape(z) hx=Slice(sx,two,four,zero)"
    " hz=Slice(sz,two,four,zero) fx=Cast<to=1>(hx) fz=Cast<to=1>(hz) "
)
RESIZED = {"zero": i64(0), "two": i64(2), "four": i64(4), "ones": np.ones(2, np.float32)}
NEAREST = 'mode="nearest",nearest_mode="floor",coordinate_transformation_mode="asymmetric"'


@pytest.mark.parametrize(
    "attributes",
    [
        NEAREST,
        'mode="nearest",coordinate_transformation_mode="half_pixel"',
        'mode="linear",coordinate_transformation_mode="half_pixel"',
        'mode="linear",coordinate_transformation_mode="align_corners"',
        'mode="cubic",coordinate_transformation_mode="pytorch_half_pixel"',
    ],
)
@pytest.mark.parametrize(
    ("rest", "sizes"),
    [
        # To the size of another tensor, as pyramids of features have it.
        ("q=Div(fz,fx) s=Concat<axis=0>(ones,q) ", [(4, 5, 8, 10), (3, 3, 7, 5), (5, 4, 5, 4), (9, 7, 3, 2)]),
        # Scales of all axes; the double of a size, over that size, is 2.
        ("t=Mul(sx,ks) ft=Cast<to=1>(t) fs=Cast<to=1>(sx) s=Div(ft,fs) ", [(4, 5, 1, 1), (3, 3, 1, 1), (1, 2, 1, 1)]),
        # To a fixed size, and to half of the own one.
        ("q=Div(fixed,fx) s=Concat<axis=0>(ones,q) ", [(4, 5, 1, 1), (16, 20, 1, 1), (32, 41, 1, 1)]),
        ("h=Mul(fx,half) r=Floor(h) q=Div(r,fx) s=Concat<axis=0>(ones,q) ", [(4, 5, 1, 1), (2, 3, 1, 1), (7, 2, 1, 1)]),
    ],
)
def test_scales_are_sizes_over_sizes(rest: str, sizes: Sequence[tuple[int, ...]], attributes: str) -> None:
    consts = RESIZED | {"ks": i64(1, 1, 2, 2), "fixed": np.float32([16, 20]), "half": np.float32([0.5])}
    proto = model(f"{TWO_IMAGES}{rest} y=Resize<{attributes}>(x,,s) }}", consts)
    check_compiled(proto, *({"x": f(1, 2, h, w), "z": f(1, 2, p, q)} for h, w, p, q in sizes))


def test_scales_of_fixed_sizes_are_known_although_they_are_computed() -> None:
    text = (TWO_IMAGES + 'q=Div(fixed,fx) s=Concat<axis=0>(ones,q) y=Resize<mode="linear">(x,,s) }').replace(
        "H,W", "6,7"
    )
    proto = model(text, RESIZED | {"fixed": np.float32([16, 20])})
    check_compiled(proto, {"x": f(1, 2, 6, 7), "z": f(1, 2, 3, 3)})


def test_a_quotient_of_sizes_is_data_too() -> None:
    text = TWO_IMAGES + "q=Div(fz,fx) t=Mul(q,fx) y=Concat<axis=0>(q,t) }"
    check_compiled(model(text, RESIZED), *({"x": f(1, 2, 3, w), "z": f(1, 2, 7, 5)} for w in (1, 9)))


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("s=Div(fz,fx) u=Unsqueeze(s,zero) v=Squeeze(u,zero) q=Concat<axis=0>(v,ones) ", r"dim 1.*scaled by P / \(H\)"),
        ("t=Div(fx,fz) q=Concat<axis=0>(ones,t) ", r"axis 2 with the dim H is scaled by H / \(P\), which does not end"),
        ("t=Div(fz,fx) q=Concat<axis=0>(some,t) ", r"quotients of sizes for some axes, and 1.2 for axis 1"),
        (
            "r=Div(fz,fx) r0=Gather(r,azero) k=Range(fzero,r0,fone) q=Concat<axis=0>(ones,fz) ",
            r"Range.*its limit \(input 1\) is rounded: P / H",
        ),
    ],
)
def test_scales_that_end_at_no_size_are_refused(rest: str, message: str) -> None:
    consts = RESIZED | {"some": np.float32([1, 1.2]), "fzero": np.float32(0), "fone": np.float32(1)}
    consts["azero"] = np.array(0, np.int64)
    with pytest.raises(FrontendError, match=message):
        load_onnx(model(f"{TWO_IMAGES}{rest} y=Resize<{NEAREST}>(x,,q) }}", consts))


SPLIT = "g (float[2,C,3] x, float[2,D,3] z) => (float[] a, float[] b) { s=Shape(x) c=Slice(s,one,two) t=Shape(z) "
SPLIT += "d=Slice(t,one,two) "


@pytest.mark.parametrize(
    ("rest", "sizes"),
    [
        ("h=Div(c,two) r=Sub(c,h) n=Concat<axis=0>(h,r) a,b=Split<axis=1>(x,n) }", [(4, 1), (5, 1), (1, 1)]),
        ("h=Div(c,two) n=Concat<axis=0>(h,h) a,b=Split<axis=1>(x,n) }", [(4, 1), (6, 1)]),
        ("w=Concat<axis=1>(x,z) n=Concat<axis=0>(c,d) a,b=Split<axis=1>(w,n) }", [(4, 2), (5, 7)]),
        ("r=Sub(d,c) n=Concat<axis=0>(c,r) a,b=Split<axis=-2>(z,n) }", [(2, 4), (3, 7)]),
        ("n=Concat<axis=0>(d,d) a,b=Split<axis=1>(x,n) }", [(4, 2), (14, 7)]),
        ("a,b=Split<axis=1,num_outputs=2>(x) }", [(4, 1), (5, 1), (1, 1)]),
    ],
)
def test_parts_whose_sizes_come_from_shapes(rest: str, sizes: Sequence[tuple[int, int]]) -> None:
    proto = model(SPLIT + rest, {"one": i64(1), "two": i64(2)})
    check_compiled(proto, *({"x": f(2, c, 3), "z": f(2, d, 3)} for c, d in sizes))


def test_equal_parts_of_a_free_dim_are_made_where_it_divides() -> None:
    text = "g (float[2,C,3] x) => (float[] a, float[] b, float[] c) { a,b,c=Split<axis=1>(x) }"
    proto = model(text, {}, opset=17)
    check_compiled(proto, {"x": f(2, 3, 3)}, {"x": f(2, 9, 3)})
    compiled = kedge.compile(load_onnx(proto), target="native")
    with compiled.open(threads=1) as loaded, pytest.raises(InputError, match="node a"):
        loaded.run({"x": f(2, 4, 3)})
    three = model(text.replace("axis=1", "axis=1,num_outputs=3"), {})
    with pytest.raises(FrontendError, match="the dim C is not known to fill 3 parts of"):
        load_onnx(three)


def test_sizes_that_floats_round_are_refused_with_what_helps() -> None:
    """10 times the float32 next to 0.7 is 7 in float32, and less than that: which it is differs from size to size."""
    text = IMAGE + 'm=Mul(f,k) t=Cast<to=7>(m) z=Concat<axis=0>(b,t) y=Resize<mode="nearest">(x,,,z) }'
    consts = {"zero": i64(0), "two": i64(2), "four": i64(4), "k": np.float32([0.7])}
    with pytest.raises(FrontendError, match=r"its sizes \(input 3, 'z'\) is computed while running") as refused:
        load_onnx(model(text, consts))
    assert "shapes={...}" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("rest", "dtype"),
    [
        ("y=Identity(s)", "int64"),
        ("y=Size(x)", "int64"),
        ("y=Add(s,five)", "int64"),
        ("y=Add(at,n)", "int64"),
        ("e=Sub(n,one) y=Add(at,e)", "int64"),
        ("m=Neg(n) r=Mod(m,five) y=Concat<axis=0>(at,r,m)", "int64"),
        ("y=Greater(n,five)", "bool"),
        ("y=Equal(n,five)", "bool"),
        ("y=Cast<to=9>(n)", "bool"),
        ("c=Cast<to=1>(n) y=Div(x,c)", "float"),
        ("c=Cast<to=1>(n) r=Sqrt(c) y=Div(x,r)", "float"),  # attention over the tokens there are
        ("c=Cast<to=1>(s) p=ReduceProd<keepdims=0>(c) y=Div(x,p)", "float"),  # a mean by hand
        ("c=Cast<to=1>(n) h=Div(c,eight) q=Add(h,h) y=Mul(x,q)", "float"),
        ("c=Cast<to=11>(s) y=Mul(c,tenth)", "double"),
        ("c=Cast<to=10>(n) y=Identity(c)", "float16"),
        ("v=Squeeze(n) r=Range(start,v,step) c=Cast<to=1>(r) u=Unsqueeze(c,one) y=Add(x,u)", "float"),  # positions
        ("e=Greater(n,five) c=Cast<to=1>(e) y=Mul(x,c)", "float"),
        ("m=Neg(n) y=Mod<fmod=1>(m,five)", "int64"),  # with the dividend's sign
        ("m=Neg(n) a=Add(m,ten) r=Mod<fmod=1>(n,five) y=Concat<axis=0>(a,r)", "int64"),
        ("c=Cast<to=1>(n) y=Concat<axis=0>(c,denormal,eight)", "float"),
        ("c=Cast<to=11>(n) y=Concat<axis=0>(c,tiny,tenth)", "double"),
        ("c=Cast<to=1>(n) d=Div(c,eight) y=Concat<axis=0>(d,denormal,eight)", "float"),
    ],
)
def test_shapes_are_data_too(rest: str, dtype: str) -> None:
    text = f"g (float[N,3] x, int64[2] at) => ({dtype}[] y) {{ s=Shape(x) n=Slice(s,zero,one) {rest} }}"
    consts = {"zero": i64(0), "one": i64(1), "five": i64(5), "start": np.int64(0), "step": np.int64(1)}
    consts |= {"eight": np.float32([8]), "tenth": np.float64([0.1]), "ten": i64(10)}
    consts |= {"denormal": np.float32([1e-40]), "tiny": np.float64([1e-300])}
    check(model(text, consts), [{"x": f(n, 3), "at": i64(2, -3)} for n in (1, 5, 7)])


#: Code and name of the types that ranges have.
RANGES = {"float": (1, "float32"), "double": (11, "float64"), "int32": (6, "int32"), "int64": (7, "int64")}


def ranges(dtype: str, start: float, limit: str, delta: float) -> onnx.ModelProto:
    """start, start + delta, … up to what is worked out from `n`, a size that was cast."""
    code, numpy_name = RANGES[dtype]
    text = f"g (float[N,3] x) => ({dtype}[] y) {{ a=Shape(x) i=Gather(a,at) n=Cast<to={code}>(i) {limit}"
    numbers = {"start": start, "delta": delta, "zero": 0, "two": 2}
    consts = {name: np.array(number, numpy_name) for name, number in numbers.items()}
    return model(f"{text} y=Range(start,limit,delta) }}", {"at": np.int64(0)} | consts)


UP, DOWN = "limit=Identity(n)", "limit=Sub(zero,n)"


@pytest.mark.parametrize(
    ("start", "limit", "delta", "dtypes"),
    [
        (0, UP, 1, RANGES),
        (2, UP, 3, RANGES),
        (1, DOWN, -2, RANGES),
        (0.5, UP, 1, ("float", "double")),
        (0, UP, 0.5, ("float", "double")),
        (-0.25, UP, 1.5, ("float", "double")),
        (0, "limit=Div(n,two)", 1, ("float", "double")),
        (0.5, "limit=Div(n,two)", 0.25, ("float", "double")),
    ],
)
def test_ranges_up_to_a_free_dim_keep_their_dtype(
    start: float, limit: str, delta: float, dtypes: Sequence[str]
) -> None:
    """As positions of rotary embeddings are."""
    for dtype in dtypes:
        check(ranges(dtype, start, limit, delta), [{"x": f(n, 3)} for n in (2, 5, 8)])


@pytest.mark.parametrize(
    ("start", "limit", "delta", "message"),
    [
        (0, UP, 0.7, "how many elements it has is rounded"),
        (0, UP, 0, "its delta is 0"),
        (0, UP, np.nan, "its inputs and attributes do not fit together"),
        (-1e300, UP, 1, "how many elements it has is rounded"),
        (3, UP, 1, "which may be negative"),
    ],
)
def test_ranges_of_floats_that_are_refused(start: float, limit: str, delta: float, message: str) -> None:
    with pytest.raises(FrontendError, match=rf"\(Range\): .*{message}"):
        load_onnx(ranges("double", start, limit, delta))


def test_a_fraction_of_a_size_is_no_dim() -> None:
    body = "g (float[N,3] x) => (float[] y) { s=Shape(x) n=Slice(s,zero,one) c=Cast<to=1>(n) h=Div(c,two) y=Tile(x,h) }"
    with pytest.raises(FrontendError, match=r"\(Tile\): its repeats \(input 1\) is a fraction: N / 2") as refused:
        load_onnx(model(body, {"zero": i64(0), "one": i64(1), "two": np.float32([2])}))
    assert "Floor" in str(refused.value.hint)


@pytest.mark.parametrize(
    "body",
    [
        "g (float[N,3] x) => (float[] y, float[] w) { s=Shape(x) e=Expand(c,s) w=Relu(x) y=ReduceSum<keepdims=0>(e) }",
        "g (float[N,3] x) => (float[] y) { s=Shape(x) e=ConstantOfShape<value=float[1]{1.0}>(s)"
        " t=ReduceSum<keepdims=0>(e) m=ReduceSum<keepdims=0>(x) y=Div(m,t) }",
        "g (float[N,3] x) => (float[] y, float[] w) { s=Shape(x) n=Slice(s,zero,one) e=Slice(many,zero,n,zero)"
        " y=ReduceSum(e,zero) w=Relu(x) }",
        "g (float[N,3] x) => (float[] y, float[] w) { s=Shape(x) n=Slice(s,zero,one) e=Slice(many,n,ten,zero)"
        " r=Relu(e) y=Slice(r,zero,one,zero) w=Relu(x) }",
    ],
)
def test_sizes_that_only_the_inside_of_a_kernel_knows(body: str) -> None:
    consts = {"c": np.float32([[2.0]]), "zero": i64(0), "one": i64(1), "ten": i64(10), "many": f(10, 3)}
    check(model(body, consts), [{"x": f(n, 3)} for n in (1, 4, 7)])


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("columns", [3, 4])
def test_batch_norm_after_a_sum_of_higher_rank(rank: int, columns: int) -> None:
    """The addend's rank decides which axis the channels are."""
    channels = 4 if rank > 2 else columns
    shape = {2: (1, columns), 3: (1, 1, columns), 4: (1, channels, 1, columns)}[rank]
    consts = {"w": f(5, columns), "b": f(*shape), "scale": f(channels), "shift": f(channels), "mean": f(channels)}
    consts["var"] = abs(f(channels)) + 1
    body = "g (float[4,5] x) => (float[] y)"
    body += " { m=MatMul(x,w) a=Add(m,b) y=BatchNormalization(a,scale,shift,mean,var) }"
    check(model(body, consts), [{"x": f(4, 5)}])


def test_a_reflection_longer_than_a_free_axis_is_refused_by_name() -> None:
    body = 'g (float[N,3] x) => (float[] y) { y=Pad<mode="reflect">(x,pads) }'
    proto = model(body, {"pads": i64(3, 0, 1, 0)})
    check(proto, [{"x": f(n, 3)} for n in (4, 5, 9)])
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        for n in (1, 2, 3):
            with pytest.raises(InputError, match=rf"dim 0 of input x \(N\) is {n}, expected at least 4"):
                loaded.run({"x": f(n, 3)})
    far = kedge.compile(load_onnx(model(body, {"pads": i64(3_000_000, 0, 0, 0)})), target="native")
    with far.open(threads=1) as loaded, pytest.raises(InputError, match="expected at least 3000001"):
        loaded.run({"x": f(5, 3)})


@pytest.mark.parametrize(
    "rest", ['y=Pad<mode="edge">(e,pads) }', "y=Gather<axis=0>(e,index) }"], ids=["edge", "gather"]
)  # fmt: skip
def test_axes_that_turn_out_empty_are_not_read(rest: str) -> None:
    """There is nothing to copy the edge of, or to pick from: zeros, and no element before the first one."""
    body = "g (float[N,6] x) => (float[] y) { s=Shape(x) n=Slice(s,zero,one) k=Sub(n,seven) e=Slice(x,zero,k,zero) "
    proto = model(
        body + rest, {"zero": i64(0), "one": i64(1), "seven": i64(7), "pads": i64(1, 0, 1, 0), "index": i64(0, 1)}
    )
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        got = loaded.run({"x": f(7, 6)})
    np.testing.assert_array_equal(got["y"], np.zeros((2, 6), np.float32))


def test_a_least_size_is_not_larger_than_it_has_to_be() -> None:
    body = "g (float[N,N] x) => (float[] y) { s=Slice(x,begin,end,axes) y=Reshape(s,flat) }"
    consts = {"begin": i64(1, 1), "end": i64(1000, 1000), "axes": i64(0, 1), "flat": i64(-1)}
    check(model(body, consts), [{"x": f(n, n)} for n in (2, 3, 5, 7, 8)])


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("op", ["Div", "Mod"])
@pytest.mark.parametrize("n", [1, 5, 13, 16, 100])
def test_integers_divide_without_a_trap(op: str, dtype: str, n: int) -> None:
    """Lanes beyond the end divide nothing by nothing; the processor must not see it."""
    proto = model(f"g ({dtype}[{n}] a, {dtype}[{n}] b) => ({dtype}[{n}] y) {{ y = {op}(a,b) }}", {})
    a = (np.arange(n) * 7 % 120).astype(dtype)
    b = (np.arange(n) % 9 + 1).astype(dtype)
    check(proto, [{"a": a, "b": b}])


@pytest.mark.parametrize("target", ["native", "x86-64"])
def test_divisors_that_have_no_quotient(target: str) -> None:
    """What ONNX leaves open ends as numpy has it, and not in a signal."""
    for dtype in ("int8", "int32", "int64"):
        low = np.iinfo(dtype).min
        a = np.array([low, 7, low, -7, 0, 5, low], dtype)
        b = np.array([-1, 0, 0, 2, 0, -1, 1], dtype)
        proto = model(f"g ({dtype}[7] a, {dtype}[7] b) => ({dtype}[7] q, {dtype}[7] r) {{ q=Div(a,b) r=Mod(a,b) }}", {})
        with kedge.compile(load_onnx(proto), target=target).open(threads=1) as loaded:
            got = loaded.run({"a": a, "b": b})
        np.testing.assert_array_equal(got["q"], np.array([low, 0, 0, -3, 0, -5, low], dtype))
        np.testing.assert_array_equal(got["r"], np.array([0, 0, 0, 1, 0, 0, 0], dtype))


def test_the_mean_of_integers_is_truncated() -> None:
    body = "g (int32[3,4] x) => (int32[] y, int32[] z) { y=ReduceMean<keepdims=0>(x,axes) z=ReduceMean(x) }"
    proto = model(body, {"axes": i64(1)})
    x = np.array([[1, 2, 3, 5], [-1, -2, -3, -5], [7, 7, 7, 8]], np.int32)
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        got = loaded.run({"x": x})
    np.testing.assert_array_equal(got["y"], np.array([2, -2, 7], np.int32))
    np.testing.assert_array_equal(got["z"], np.array([[2]], np.int32))
    free = model("g (int32[N,4] x) => (int32[] y) { y=ReduceMean(x) }", {})
    with pytest.raises(FrontendError, match="the mean of int32 is over a free or empty dim"):
        load_onnx(free)


def test_a_fraction_of_an_integer_product_is_refused() -> None:
    body = "g (int32[2,3] a, int32[3,2] b) => (int32[] y) { y=Gemm<alpha=0.5>(a,b) }"
    with pytest.raises(CompileError, match=r"alpha 0\.5 of a product of int32 is not whole"):
        load_onnx(model(body, {}))


def test_casts_that_round_stay() -> None:
    proto = model("g (int64[2] x) => (int64[] y) { d=Cast<to=11>(x) y=Cast<to=7>(d) }", {})
    check(proto, [{"x": np.array([2**53 + 1, 3], np.int64)}])


def test_nothing_to_compute_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    proto = model("g (float[0,3] x) => (float[] y) { y=Pad(x,pads) }", {"pads": i64(0, 1, 0, 1)})
    check(proto, [{"x": f(0, 3)}])
    assert not caplog.records


def test_shape_arithmetic_with_an_input_left_out_before_others() -> None:
    """Slice without axes, but with steps."""
    body = "g (float[N,3,4,5] x) => (float[] y) { s=Shape(x) r=Slice(s,zero,four,,two) e=Expand(c,r) m=Add(e,k)"
    body += " t=ReduceSum<keepdims=0>(m) u=ReduceSum<keepdims=0>(x) y=Add(t,u) }"
    consts = {"zero": i64(0), "four": i64(4), "two": i64(2), "c": f(1, 1), "k": f(1)}
    check(model(body, consts), [{"x": f(2, 3, 4, 5)}, {"x": f(3, 3, 4, 5)}])


SKIP = "g (float[N,3,H,W] x) => (float[] y) { c=Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(x,w) r=Relu(c)"
SKIP += " p=MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) d=Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(p,v)"
#: What joins a path that went down and up again with one that did not.
JOINS = {
    "concat": " u=ConvTranspose<kernel_shape=[2,2],strides=[2,2]>(d,t) y=Concat<axis=1>(r,u) }",
    "add": ' u=Resize<mode="nearest">(d,,scales) y=Add(u,r) }',
    "both": " u=ConvTranspose<kernel_shape=[2,2],strides=[2,2]>(d,t) j=Concat<axis=1>(u,r)"
    ' q=Resize<mode="nearest">(p,,scales) a=Mul(q,r) s=Concat<axis=1>(a,j)'
    " y=Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(s,z) }",
}


def skip_connection(join: str) -> onnx.ModelProto:
    consts = {
        "w": f(16, 3, 3, 3), "v": f(16, 16, 3, 3), "t": f(16, 16, 2, 2), "z": f(16, 48, 3, 3) * np.float32(0.1),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }  # fmt: skip
    return model(SKIP + JOINS[join], consts)


@pytest.mark.parametrize("join", JOINS)
def test_shapes_that_agree_for_some_sizes_are_compared_when_called(join: str) -> None:
    """h and h // 2 * 2 are equal for even ones: others are refused by the names of the dims and of the operator."""
    proto = skip_connection(join)
    feeds = [{"x": f(n, 3, h, w)} for n, h, w in ((1, 2, 4), (2, 16, 34))]
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        reference = ReferenceEvaluator(proto)
        for feed in feeds:
            (want,) = reference.run(None, dict(feed))
            # Sums of hundreds cancel: they are right in relation to the largest.
            atol = 1e-5 * float(np.abs(want).max())
            np.testing.assert_allclose(loaded.run(feed)["y"], want, rtol=1e-3, atol=atol, strict=True)
        with pytest.raises(InputError, match=r"dim 2 of input x \(H\) is 33: node .* needs .* but they are 3[23] and"):
            loaded.run({"x": f(1, 3, 33, 4)})
        with pytest.raises(InputError, match=r"dim 3 of input x \(W\) is 5: node "):
            loaded.run({"x": f(1, 3, 8, 5)})


def test_inputs_of_dims_that_must_be_equal() -> None:
    """Names of their own say nothing of sizes; a size of 1 is not spread, since which one was meant is not known."""
    proto = model("g (float[N,3] x, float[M,3] z, float[4,1] k) => (float[] y) { a=Add(x,z) y=Mul(a,k) }", {})
    check(proto, [{"x": f(4, 3), "z": f(4, 3), "k": f(4, 1)}])
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        with pytest.raises(InputError, match=r"needs [NM4] and [NM] to be equal, but they are"):
            loaded.run({"x": f(4, 3), "z": f(5, 3), "k": f(4, 1)})
        with pytest.raises(InputError, match=r"node .* needs 4 and .* to be equal, but they are 4 and 2"):
            loaded.run({"x": f(2, 3), "z": f(2, 3), "k": f(4, 1)})


@pytest.mark.parametrize("optype", ["MatMul(x,z)", "Gemm<transA=1>(t,z)"])
def test_inner_dims_of_products_that_must_be_equal(optype: str) -> None:
    proto = model(f"g (float[N,K] x, float[L,3] z) => (float[] y) {{ t=Transpose(x) y={optype} }}", {})
    check(proto, [{"x": f(4, 5), "z": f(5, 3)}])
    artifact = kedge.compile(load_onnx(proto), target="native")
    message = r"needs [KL] and [KL] to be equal, but they are [56] and [56]"
    with artifact.open(threads=1) as loaded, pytest.raises(InputError, match=message):
        loaded.run({"x": f(4, 5), "z": f(6, 3)})


def test_addends_that_must_be_as_long_as_the_product() -> None:
    proto = model("g (float[N,5] x, float[5,P] z, float[M,C] c) => (float[] y) { y=Gemm<beta=0.5>(x,z,c) }", {})
    check(proto, [{"x": f(4, 5), "z": f(5, 3), "c": f(4, 3)}])
    body = "g (float[N,5] x, float[5,P] z, float[C] c) => (float[] y)"
    body += " { v=Transpose(x) w=Transpose(z) y=Gemm<transA=1,transB=1>(v,w,c) }"
    check(model(body, {}), [{"x": f(4, 5), "z": f(5, 3), "c": f(3)}])
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        for shape, there in (((3, 3), "[NM] and [NM]"), ((4, 2), "[PC] and [PC]"), ((4, 1), "[PC] and [PC]")):
            with pytest.raises(InputError, match=rf"node .* needs {there} to be equal, but they are"):
                loaded.run({"x": f(4, 5), "z": f(5, 3), "c": f(*shape)})


@pytest.mark.parametrize(("optype", "weight"), [("Conv<group=2>", (6, 2, 3, 3)), ("ConvTranspose", (4, 6, 3, 3))])
def test_channels_that_must_be_those_of_a_weight(optype: str, weight: tuple[int, ...]) -> None:
    """Those of an input, and a bias."""
    body = f"g (float[N,C,H,7] x, float[B] b) => (float[] y) {{ y={optype}(x,w,b) }}"
    proto = model(body, {"w": f(*weight)})
    check(proto, [{"x": f(n, 4, h, 7), "b": f(6)} for n, h in ((2, 5), (1, 3))])
    with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
        with pytest.raises(InputError, match=r"node .* needs 4 and C to be equal, but they are 4 and 3"):
            loaded.run({"x": f(2, 3, 5, 7), "b": f(6)})
        with pytest.raises(InputError, match=r"node .* needs 6 and B to be equal, but they are 6 and 1"):
            loaded.run({"x": f(2, 4, 5, 7), "b": f(1)})


def test_batch_dims_of_products_that_must_be_equal() -> None:
    proto = model("g (float[B,1,2,K] x, float[C,7,K,3] z) => (float[] y) { y=MatMul(x,z) }", {})
    check(proto, [{"x": f(4, 1, 2, 5), "z": f(4, 7, 5, 3)}])
    artifact = kedge.compile(load_onnx(proto), target="native")
    message = r"needs [BC] and [BC] to be equal, but they are [45] and [45]"
    with artifact.open(threads=1) as loaded, pytest.raises(InputError, match=message):
        loaded.run({"x": f(4, 1, 2, 5), "z": f(5, 7, 5, 3)})


def test_dims_that_are_never_equal_are_refused_while_loading() -> None:
    with pytest.raises(FrontendError, match=r"Concat.*not known to be equal"):
        load_onnx(
            model("g (float[N,3] x) => (float[] y) { p=Pad(x,pads) y=Concat<axis=1>(x,p) }", {"pads": i64(1, 0, 0, 0)})
        )


def test_the_interpreter_compares_shapes_too() -> None:
    module = load_onnx(skip_connection("add"))
    assert interp.run(module, {"x": f(1, 3, 6, 4)})["y"].shape == (1, 16, 6, 4)
    with pytest.raises(InputError, match="is expected to have the shape"):
        interp.run(module, {"x": f(1, 3, 7, 4)})


@pytest.mark.parametrize(
    ("op", "kernel", "stride", "auto", "attrs"),
    [
        ("Conv", 3, 2, "SAME_UPPER", {}),
        ("Conv", 5, 3, "SAME_LOWER", {}),
        ("Conv", 1, 2, "SAME_UPPER", {}),
        ("Conv", 2, 3, "SAME_UPPER", {}),  # gaps between its windows
        ("MaxPool", 3, 2, "SAME_UPPER", {}),
        ("AveragePool", 3, 2, "SAME_LOWER", {"count_include_pad": 1}),
        ("AveragePool", 3, 2, "SAME_UPPER", {}),
        ("AveragePool", 2, 2, "SAME_LOWER", {}),
    ],
)
def test_strided_windows_padded_as_the_free_dims_ask(
    op: str, kernel: int, stride: int, auto: str, attrs: dict[str, Any]
) -> None:
    more = [RNG.standard_normal((8, 8, kernel, kernel)).astype(np.float32)] if op == "Conv" else []
    attrs = attrs if more else {**attrs, "kernel_shape": [kernel] * 2}
    images = [-RNG.random((1, 8, *size), np.float32) for size in [(9, 12), (1, 1), (2, 3), (10, 7)]]
    proto, feeds = one_operator(
        op, [images[0], *more], constant=list(range(1, 1 + len(more))), free={0: [2, 3]}, auto_pad=auto,
        strides=[stride] * 2, **attrs,
    )  # fmt: skip
    module = load_onnx(proto)
    for image, got in zip(images, check_compiled(proto, *({**feeds, "x0": image} for image in images)), strict=True):
        np.testing.assert_allclose(interp.run(module, {**feeds, "x0": image})["y0"], got["y0"], rtol=1e-4, atol=1e-5)


def test_an_empty_batch_gives_empty_outputs() -> None:
    """Nothing runs: no kernel of the model has to expect a loop without iterations."""
    body = "g (float[N,2,5,5] x, float[N,3] t) => (float[] y, float[] z, int64[] a)"
    body += " { m=ReduceMax<keepdims=0>(x,last) q=MatMul(m,w) p=Softmax(q) y=Mul(p,t) z=Concat<axis=0>(t,t)"
    body += " a=ArgMax<axis=1>(y) }"
    feeds = [{"x": f(n, 2, 5, 5), "t": f(n, 3)} for n in (0, 2, 0)]
    check(model(body, {"w": f(2, 3), "last": i64(2, 3)}), feeds)
    rolled = (
        "g (float[N,3] x) => (float[] y) { a=Slice(x,one,all,zero) b=Slice(x,zero,one,zero) y=Concat<axis=0>(a,b) }"
    )
    consts = {"zero": i64(0), "one": i64(1), "all": i64(1 << 62)}
    check(model(rolled, consts), [{"x": f(n, 3)} for n in (1, 4)])
    through_the_arena = (
        "g (float[N,3] x) => (float[] y) { r=MatMul(x,w) a=Slice(r,one,all,zero) b=Slice(r,zero,one,zero)"
        " p=MatMul(a,w) q=Softmax(p) h=MatMul(b,w) c=Concat<axis=0>(q,h) y=Softmax(c) }"
    )
    for text in (rolled, through_the_arena):
        proto = model(text, consts | {"w": f(3, 3)})
        check(proto, [{"x": f(n, 3)} for n in (1, 4)])
        with kedge.compile(load_onnx(proto), target="native").open(threads=1) as loaded:
            for n in (0, 2, 0):
                assert loaded.run({"x": f(n, 3)})["y"].shape == (n, 3)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("g (float[N,3] x) => (float[] y, float[] z) { y=Relu(x) z=ReduceSum<keepdims=0>(x) }", (0, 3)),  # one has some
        ("g (float[1,1,N,4] x) => (float[] y) { y=Conv(x,w) }", (1, 1, 0, 4)),  # there would be -1 rows
        # Nor where a row comes to those that are there, or a result would have -1 columns.
        (
            "g (float[N,3] x) => (float[] y) { t=Slice(x,one,all,zero) m=MatMul(t,v) p=Softmax(m) q=MatMul(p,v)"
            " y=Pad(q,row) }",
            (0, 3),
        ),
        ("g (float[N,3] x) => (float[] y) { s=Transpose(x) t=Slice(s,one,all,one) y=MatMul(x,t) }", (0, 3)),
    ],
)
def test_no_elements_are_too_few_where_results_have_some(body: str, shape: tuple[int, ...]) -> None:
    consts = {
        "w": f(1, 1, 2, 2),
        "v": f(3, 3),
        "row": i64(1, 0, 0, 0),
        "zero": i64(0),
        "one": i64(1),
        "all": i64(1 << 62),
    }
    compiled = kedge.compile(load_onnx(model(body, consts)), target="native")
    with compiled.open(threads=1) as loaded, pytest.raises(InputError, match=r"\(N\) is 0, expected at least"):
        loaded.run({"x": f(*shape)})
