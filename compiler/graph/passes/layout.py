"""Choosing layouts: convolutional networks run over blocks of channels, from the first convolution on.

The vector registers of a CPU are filled by channels of one place that lie together, (N, C/c, S…, c): every
convolution is then one loop nest of full vectors, whatever the width of an image (oneDNN's nChw16c, ONNX Runtime's
NCHWc, Liu et al., "Optimizing CNN Model Inference on CPUs", 2019). What follows a convolution stays in that layout
as far as it can; a tensor is packed or unpacked at most once, where somebody needs the other form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.builder import call, make_call, reshaped
from kedge.compiler.graph.dims import same_shape
from kedge.compiler.graph.ir import Call, Function, Module, Value, operands
from kedge.compiler.graph.passes.base import Context, Pass, with_functions, with_operands
from kedge.compiler.graph.passes.winograd import winograd_tile
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.movement import slice_plan
from kedge.compiler.ops.registry import FusionKind
from kedge.compiler.ops.resize import resized_axes
from kedge.compiler.target import AnyTarget, Target
from kedge.compiler.target.core import lanes_of
from kedge.compiler.tir.expr import Dim

#: The fewest channels in a block.
_LEAST_LANES = 4
#: From this many channels on an unblocked input is packed before a convolution; an image with fewer is read as it is.
_PACKED_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class BlockChannels:
    """Rewrite convolutions and what surrounds them to blocks of channels, where the target is a CPU.

    relu(add(conv(x, @w), b)) -> unpack(relu(add(conv_blocked(pack(x), pack(@w)), pack(b))))

    where pack is a reshape and a transpose (of weights folded away afterwards), and unpack their inverse.

    `winograd`: whether 3x3 convolutions may run by Winograd's algorithm, where infinities and NaN spread over a tile.
    """

    target: AnyTarget | None = None
    winograd: bool = True
    name: str = "layout"

    def for_target(self, target: AnyTarget) -> Pass:
        """The pass for `target`."""
        return replace(self, target=target)

    def __call__(self, module: Module) -> Module:
        """The module in the target's layouts; the same without a target, and for GPUs."""
        if not isinstance(self.target, Target):
            return module
        context = Context(module)
        functions = {
            name: _Blocker(each, self.target, context, winograd=self.winograd).run()
            for name, each in module.functions.items()
        }
        if all(new is module.functions[name] for name, new in functions.items()):
            return module
        return with_functions(module, functions)


def block_sizes(target: Target, dtype: str) -> tuple[int, ...]:
    """Channels that a block may have for tensors of `dtype`, the best first: a register, then a half, a quarter."""
    lanes = lanes_of(target, np.dtype(common.wide_dtype(dtype)).itemsize)
    return tuple(size for size in (lanes, lanes // 2, lanes // 4) if size == lanes or size >= _LEAST_LANES)


def block_of(channels: int, sizes: Sequence[int]) -> int | None:
    """The best block that divides `channels`, or None."""
    return next((size for size in sizes if size > 1 and channels % size == 0), None)


def padded_block(channels: int, sizes: Sequence[int]) -> int:
    """The block that costs least where channels are padded to a multiple: a narrow vector is not much cheaper."""
    full = sizes[0]
    return min(sizes, key=lambda size: (-(-channels // size) * (size + full / 4), -size))


class _Blocker:
    """Rewrites one function: every value has a plain form, a blocked one, or both once both are asked for."""

    def __init__(self, function: Function, target: Target, context: Context, *, winograd: bool) -> None:
        self._function = function
        self.winograd = winograd
        self.target = target
        self._context = context
        self._plain: dict[int, Value] = {}
        self._blocked: dict[int, dict[int, Value]] = {}  # by lanes; what came first is the value's own form
        self._joined = _joined(function)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all that is known when compiling."""
        return sum(data.nbytes for each in self._function.values() if (data := self._context.known(each)) is not None)

    def run(self) -> Function:
        for old in self._function.values():
            blocked = self._convert(old) if isinstance(old, Call) else None
            if blocked is None and id(old) not in self._plain:
                self._plain[id(old)] = with_operands(old, [self.plain(operand) for operand in operands(old)])
            elif blocked is not None:
                self._blocked[id(old)] = {_lanes(blocked): blocked}
        outputs = tuple(self.plain(value) for value in self._function.outputs)
        if all(new is old for new, old in zip(outputs, self._function.outputs, strict=True)):
            return self._function
        return replace(self._function, outputs=outputs)

    def _convert(self, old: Call) -> Value | None:
        """The blocked form of a call's result; None where it stays plain (or its plain form is already entered)."""
        rule, operator = _RULES.get(old.op), registry.get(old.op)
        if rule is None and operator.kind <= FusionKind.BROADCAST and operator.uniform:
            rule = _elementwise
        return None if rule is None or len(old.types) != 1 else rule(self, old)

    # Forms of values ------------------------------------------------------------------------------------------

    def plain(self, old: Value) -> Value:
        """`old` as the front ends have it."""
        found = self._plain.get(id(old))
        if found is None:
            blocked = self.own(old)
            assert blocked is not None
            found = self._plain[id(old)] = unpack(blocked, old.type.shape)
        return found

    def own(self, old: Value) -> Value | None:
        """The blocked form that `old` was computed in, or that was packed first."""
        return next(iter(self._blocked.get(id(old), {}).values()), None)

    def has(self, old: Value, lanes: int) -> bool:
        """Whether `old` is known in blocks of `lanes`, or is a weight, packed at no cost."""
        return lanes in self._blocked.get(id(old), {}) or self.known(old)

    def known(self, old: Value) -> bool:
        """Whether the value's data is known when compiling."""
        return self._context.known(old) is not None

    def blocked(self, old: Value, lanes: int) -> Value:
        """`old` (N, C, S…) in blocks of `lanes`."""
        forms = self._blocked.setdefault(id(old), {})
        if lanes not in forms:
            forms[lanes] = pack(self.plain(old), lanes)
        return forms[lanes]

    def enter_plain(self, old: Value, new: Value) -> None:
        """Say that the plain form of `old` is `new`."""
        self._plain[id(old)] = new

    def lanes_for(self, old: Value) -> int:
        """Lanes of the blocks that `old` is computed in.

        They divide its channels, unless narrow vectors cost more than lanes that mean nothing do.
        """
        sizes, channels = self.sizes(old.type.dtype), int(str(old.type.shape[1]))
        exact = block_of(channels, sizes)
        if exact is not None and (2 * exact >= sizes[0] or id(old) in self._joined):
            return exact
        return padded_block(channels, sizes)

    def sizes(self, dtype: str) -> tuple[int, ...]:
        """The blocks of the target for `dtype`."""
        return block_sizes(self.target, dtype)

    def beside(self, old: Value, rank: int, channels: Dim, lanes: int) -> Value:
        """An operand of an element-wise operator, to be broadcast to blocked tensors of that (plain) rank."""
        type_ = old.type
        axis = type_.rank - (rank - 1)
        if all(common.is_one(dim) for dim in type_.shape):
            return self.plain(old)
        if axis < 0 or common.is_one(type_.shape[axis]):
            return _reshaped(self.plain(old), (*type_.shape, 1))
        if axis == 1:
            return self.blocked(old, lanes)
        packed = pack(_reshaped(self.plain(old), (1, *type_.shape)), lanes)
        return _reshaped(packed, packed.type.shape[1:])


def _lanes(blocked: Value) -> int:
    return int(str(blocked.type.shape[-1]))


def _origin(value: Value) -> tuple[str, ...]:
    return value.origin if isinstance(value, Call) else ()


def _reshaped(value: Value, shape: Sequence[Dim]) -> Value:
    return reshaped(value, shape, _origin(value))


def _is_ragged(old: Value, blocked: Value) -> bool:
    """Whether the last block has lanes beyond the channels."""
    return int(str(old.type.shape[1])) % _lanes(blocked) != 0


def _joined(function: Function) -> set[int]:
    """The `id`s of values whose channels are put beside others', which blocks must divide to be left where they are.

    Where channels are moved one by one afterwards, as in a channel shuffle, that is not so.
    """
    values = list(function.values())
    moved = {id(operand) for value in values if _moves_channels(value) for operand in operands(value)}
    found: set[int] = set()
    for value in reversed(values):
        if not isinstance(value, Call):
            continue
        if value.op == "concat" and common.axis_of(value.attrs["axis"], value.type.rank) == 1:
            if id(value) not in moved:
                found |= {id(each) for each in value.inputs}
        elif id(value) in found and (value.op in _RULES or registry.get(value.op).kind <= FusionKind.BROADCAST):
            found |= {id(each) for each in value.inputs if each.type.shape[1:2] == value.type.shape[1:2]}
    return found


def _moves_channels(value: Value) -> bool:
    return isinstance(value, Call) and value.op in ("reshape", "transpose")


def pack(plain: Value, lanes: int) -> Value:
    """(N, C, S…) as (N, ceil(C / lanes), S…, lanes)."""
    batch, channels, *spatial = plain.type.shape
    if int(str(channels)) % lanes:
        return call("to_blocks", plain, lanes=lanes, origin=_origin(plain))
    blocks = int(str(channels)) // lanes
    if all(common.is_one(dim) for dim in spatial):
        return _reshaped(plain, (batch, blocks, *spatial, lanes))
    split = _reshaped(plain, (batch, blocks, lanes, *spatial))
    rank = split.type.rank
    return call("transpose", split, perm=(0, 1, *range(3, rank), 2), origin=_origin(plain))


def unpack(blocked: Value, shape: tuple[Dim, ...]) -> Value:
    """(N, C/c, S…, c) as `shape`, which is (N, C, S…)."""
    rank, channels = blocked.type.rank, int(str(shape[1]))
    if channels % _lanes(blocked):
        return call("from_blocks", blocked, channels=channels, origin=_origin(blocked))
    if not all(common.is_one(dim) for dim in shape[2:]):
        perm = (0, 1, rank - 1, *range(2, rank - 1))
        blocked = call("transpose", blocked, perm=perm, origin=_origin(blocked))
    return _reshaped(blocked, shape)


# -- convolutions ------------------------------------------------------------------------------------------------


def _conv(own: _Blocker, old: Call) -> Value | None:
    weight = old.inputs[1]
    if old.type.dtype not in FLOATS or not own.known(weight):
        return None
    filters, per_group = (int(str(dim)) for dim in weight.type.shape[:2])
    groups = old.attrs["groups"]
    if groups > 1 and per_group == 1 and filters == groups:
        return _depthwise(own, old)
    if groups > 1:
        return _grouped(own, old, filters // groups, per_group)
    return _dense(own, old, filters, per_group)


def _dense(own: _Blocker, old: Call, filters: int, channels: int) -> Value | None:
    lanes_out = own.lanes_for(old)
    source = _source(own, old.inputs[0], channels)
    blocked = source.type.rank > old.type.rank
    ragged = blocked and _is_ragged(old.inputs[0], source)
    m = winograd_tile(old, own.target, own.weight_bytes) if blocked and not ragged and own.winograd else None
    if m is not None:
        return _conv_winograd(own, old, source, m, lanes_out)
    return _conv_blocked(own, old, source, _lanes(source) if blocked else 1, lanes_out, channels if ragged else None)


def _source(own: _Blocker, x: Value, channels: int) -> Value:
    """The input of a convolution: in the blocks it has, packed if it has many channels, or plain."""
    found = own.own(x)
    if found is not None:
        return found
    return own.plain(x) if channels < _PACKED_CHANNELS else own.blocked(x, own.lanes_for(x))


def _grouped(own: _Blocker, old: Call, filters: int, channels: int) -> Value | None:
    """Blocks must not reach from one group into the next."""
    sizes = own.sizes(old.type.dtype)
    lanes_in, lanes_out = block_of(channels, sizes), block_of(filters, sizes)
    if lanes_in is None or lanes_out is None:
        return None
    return _conv_blocked(own, old, own.blocked(old.inputs[0], lanes_in), lanes_in, lanes_out)


def _conv_blocked(
    own: _Blocker, old: Call, source: Value, lanes_in: int, lanes_out: int, channels: int | None = None
) -> Value:
    weight = pack_weight(own.plain(old.inputs[1]), lanes_in, lanes_out)
    attrs = {name: old.attrs[name] for name in ("strides", "pads", "dilations", "groups")}
    result: Value = make_call("conv_blocked", (source, weight), {**attrs, "channels": channels}, old.origin)
    return _with_bias(own, old, result, lanes_out)


def _conv_winograd(own: _Blocker, old: Call, source: Value, m: int, lanes_out: int) -> Value:
    weight = own.plain(old.inputs[1])
    whole = _padded(weight, -int(str(weight.type.shape[0])) % lanes_out)
    transformed = call("winograd_weights", whole, m=m, lanes=(_lanes(source), lanes_out))
    attrs = {"m": m, "pads": old.attrs["pads"]}
    result: Value = make_call("conv_winograd", (source, transformed), attrs, old.origin)
    return _with_bias(own, old, result, lanes_out)


def pack_weight(weight: Value, lanes_in: int, lanes_out: int) -> Value:
    """(O, I, K…) as (O/lanes_out, I/lanes_in, K…, lanes_in, lanes_out); O and I are padded by zeros to multiples."""
    filters, channels, *kernel = (int(str(dim)) for dim in weight.type.shape)
    weight = _padded(_padded(weight, -filters % lanes_out), -channels % lanes_in, 1)
    shape = (-(-filters // lanes_out), lanes_out, -(-channels // lanes_in), lanes_in, *kernel)
    perm = (0, 2, *range(4, 4 + len(kernel)), 3, 1)
    return call("transpose", _reshaped(weight, shape), perm=perm)


def _padded(value: Value, count: int, axis: int = 0) -> Value:
    """`value` with `count` zeros behind an axis."""
    if count == 0:
        return value
    ends = [0] * value.type.rank
    ends[axis] = count
    return call("pad", value, pads=(*[0] * value.type.rank, *ends))


def _with_bias(own: _Blocker, old: Call, result: Value, lanes: int) -> Value:
    if len(old.inputs) < 3:
        return result
    bias = own.plain(old.inputs[2])
    bias = _padded(bias, -int(str(bias.type.shape[0])) % lanes)
    shape = (result.type.shape[1], *[1] * (result.type.rank - 3), lanes)
    return call("add", result, _reshaped(bias, shape), origin=old.origin)


def _depthwise(own: _Blocker, old: Call) -> Value | None:
    x, weight = old.inputs[0], own.plain(old.inputs[1])
    channels, _, *kernel = (int(str(dim)) for dim in weight.type.shape)
    found = own.own(x)
    lanes = _lanes(found) if found is not None else own.lanes_for(x)
    blocks = -(-channels // lanes)
    packed = call(
        "transpose",
        _reshaped(_padded(weight, blocks * lanes - channels), (blocks, lanes, *kernel)),
        perm=(0, *range(2, 2 + len(kernel)), 1),
    )
    attrs = {name: old.attrs[name] for name in ("strides", "pads", "dilations")}
    result: Value = make_call("depthwise_blocked", (own.blocked(x, lanes), packed), attrs, old.origin)
    return _with_bias(own, old, result, lanes)


# -- what surrounds them -----------------------------------------------------------------------------------------


def _elementwise(own: _Blocker, old: Call) -> Value | None:
    """Stay in blocks where that packs no more tensors than it saves from being unpacked."""
    full = [each for each in old.inputs if same_shape(each.type.shape, old.type.shape)]
    choices = {_lanes(found) for each in full if (found := own.own(each)) is not None}
    if not choices:
        return None
    channels = old.type.shape[1]
    floats = all(each.type.dtype in FLOATS or each.type.dtype == "bool" for each in (old, *old.inputs))
    if not floats and any(int(str(channels)) % size for size in choices):
        return None  # integers may not be divided by what is in lanes that mean nothing

    def packed(lanes: int) -> int:
        return sum(1 for each in full if not own.has(each, lanes))

    lanes = min(choices, key=lambda size: (packed(size), -size))
    unpacked = sum(1 for each in full if id(each) not in own._plain)
    if packed(lanes) > unpacked:
        return None
    rank = old.type.rank
    inputs = [own.blocked(x, lanes) if x in full else own.beside(x, rank, channels, lanes) for x in old.inputs]
    return make_call(old.op, inputs, old.attrs, old.origin)


def _pool(own: _Blocker, old: Call) -> Value | None:
    source = own.own(old.inputs[0])
    return None if source is None else make_call(old.op, (source,), {**old.attrs, "lanes": True}, old.origin)


def _reduce(own: _Blocker, old: Call) -> Value | None:
    """Over places a reduction stays in blocks; over channels too, it gives a plain tensor."""
    x = old.inputs[0]
    source = own.own(x)
    if source is None:
        return None
    axes = common.axes_of(old.attrs["axes"], x.type.rank)
    ragged = _is_ragged(x, source)
    if ragged and 1 in axes:
        return None
    last = source.type.rank - 1
    over = (*axes, last) if 1 in axes else axes
    keep = old.attrs["keepdims"]
    # To come out of blocks, channels have to be where they are in an image.
    keep_inside = keep or (ragged and 0 in axes)
    result: Value = make_call(old.op, (source,), {**old.attrs, "axes": over, "keepdims": keep_inside}, old.origin)
    spatial = range(2, x.type.rank)
    if 1 not in axes and keep:
        return result
    if 1 in axes or all(axis in axes for axis in spatial):
        if ragged:
            result = call("from_blocks", result, channels=int(str(x.type.shape[1])), origin=old.origin)
        own.enter_plain(old, _reshaped(result, old.type.shape))
    return None


def _concat(own: _Blocker, old: Call) -> Value | None:
    forms = [own.own(each) for each in old.inputs]
    found = [_lanes(form) for form in forms if form is not None]
    if not found or 2 * len(found) < len(forms):
        return None
    axis = common.axis_of(old.attrs["axis"], old.type.rank)
    counts = [each.type.shape[1] for each in old.inputs]
    fitting = [size for size in found if all(isinstance(count, int) and count % size == 0 for count in counts)]
    if not fitting:
        return None
    lanes = max(fitting, key=lambda size: (found.count(size), size))
    inputs = [own.blocked(each, lanes) for each in old.inputs]
    return make_call("concat", inputs, {"axis": axis}, old.origin)


def _slice(own: _Blocker, old: Call) -> Value | None:
    x = old.inputs[0]
    source = own.own(x)
    if source is None:
        return None
    lanes = _lanes(source)
    start, step, count = slice_plan(x.type.shape, old.attrs)[1]
    whole = (start, step) == (0, 1) and same_shape((count,), x.type.shape[1:2])
    by_blocks = isinstance(start, int) and isinstance(count, int) and step == 1 and start % lanes == count % lanes == 0
    if not whole and not by_blocks:
        return None
    axes = old.attrs["axes"] or tuple(range(len(old.attrs["starts"])))
    steps = old.attrs["steps"] or (1,) * len(axes)
    parts = []
    for given, begin, end, by in zip(axes, old.attrs["starts"], old.attrs["ends"], steps, strict=True):
        axis = common.axis_of(given, x.type.rank)
        if axis != 1:
            parts.append((axis, begin, end, by))
        elif not whole:
            parts.append((1, int(str(start)) // lanes, (int(str(start)) + int(str(count))) // lanes, 1))
    if not parts:
        return source
    names = ("axes", "starts", "ends", "steps")
    return make_call("slice", (source,), dict(zip(names, zip(*parts, strict=True), strict=True)), old.origin)


def _pad(own: _Blocker, old: Call) -> Value | None:
    source = own.own(old.inputs[0])
    rank = old.type.rank
    begins, ends = old.attrs["pads"][:rank], old.attrs["pads"][rank:]
    if source is None or begins[1] != 0 or ends[1] != 0:
        return None
    return make_call("pad", (source,), {**old.attrs, "pads": (*begins, 0, *ends, 0)}, old.origin)


def _depth_to_space(own: _Blocker, old: Call) -> Value | None:
    source = own.own(old.inputs[0])
    channels = old.type.shape[1]
    if source is None or not isinstance(channels, int) or channels % _lanes(source):
        return None
    return make_call(old.op, (source,), {**old.attrs, "lanes": True}, old.origin)


def _resample(own: _Blocker, old: Call) -> Value | None:
    source = own.own(old.inputs[0])
    axis = common.axis_of(old.attrs["axis"], old.type.rank)
    if source is None or axis == 1:
        return None
    tables = [own.plain(table) for table in old.inputs[1:]]
    return make_call("resample", (source, *tables), {**old.attrs, "axis": axis}, old.origin)


def _resize(own: _Blocker, old: Call) -> Value | None:
    """Sizes that only the running program knows: channels, which keep theirs, stay in blocks."""
    source = own.own(old.inputs[0])
    if source is None or 1 in resized_axes(old.inputs[0].type.shape, old.attrs):
        return None
    batch, _, *places = old.attrs["sizes"]
    scales = old.attrs["scales"]
    attrs = {
        **old.attrs,
        "sizes": (batch, source.type.shape[1], *places, _lanes(source)),
        "scales": None if scales is None else (*scales, 1.0),
    }
    return make_call("resize", (source,), attrs, old.origin)


def _expect_shape(own: _Blocker, old: Call) -> Value | None:
    source = own.own(old.inputs[0])
    if source is None:
        return None
    batch, _, *places = old.type.shape
    shape = (batch, source.type.shape[1], *places, _lanes(source))
    return make_call(old.op, (source,), {"shape": shape}, old.origin)


_RULES: Mapping[str, Callable[[_Blocker, Call], Value | None]] = MappingProxyType(
    {
        "conv": _conv,
        "max_pool": _pool,
        "avg_pool": _pool,
        "concat": _concat,
        "slice": _slice,
        "pad": _pad,
        "depth_to_space": _depth_to_space,
        "resample": _resample,
        "resize": _resize,
        "expect_shape": _expect_shape,
        **dict.fromkeys(("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod"), _reduce),
    }
)
