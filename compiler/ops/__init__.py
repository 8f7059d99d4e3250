"""The graph operators. Each family is one file; importing this package declares all of them.

Attribute values are plain: ints, floats, bools, strings, tuples. Where the table says *dims* a value may be an int or
a symbolic int64 expression. Axes may be negative. A name without `=` has no default. Shapes broadcast as in numpy;
both sides of a binary operator have one dtype (insert `cast`). Layouts are the front ends' (ONNX's): N, C, spatial….

| operator                                                 | inputs            | attributes                         |
|----------------------------------------------------------|-------------------|------------------------------------|
| relu sigmoid tanh exp log sqrt rsqrt erf abs neg floor   | x                 |                                    |
| ceil round (half to even) sin cos identity               |                   |                                    |
| isnan (gives bool), not (bool)                           | x                 |                                    |
| leaky_relu                                               | x                 | alpha=0.01                         |
| clip                                                     | x                 | min=None, max=None                 |
| cast                                                     | x                 | dtype (numpy name)                 |
| add sub mul pow minimum maximum                          | a, b              |                                    |
| div (integers round towards zero)                        | a, b              |                                    |
| mod                                                      | a, b              | fmod=False (sign of b; True: of a) |
| equal not_equal less less_equal greater greater_equal    | a, b              | (gives bool)                       |
| logical_and logical_or logical_xor                       | a, b (bool)       |                                    |
| where                                                    | condition, a, b   |                                    |
| broadcast_to                                             | x                 | shape (dims)                       |
| conv: x (N, C, S…), w (O, C/groups, K…), b (O)           | x, w[, b]         | strides=None, pads=None,           |
|   pads are all begins then all ends; None: 1, 0, 1       |                   | dilations=None, groups=1           |
| conv_transpose: x (N, C, S…), w (C, O/groups, K…), b (O) | x, w[, b]         | the same, output_padding=None      |
| matmul (numpy's: batch dims broadcast, 1-D operands)     | a, b              |                                    |
| packed_matmul: panels (…, P, K, width) of b's columns    | a, panels         | columns                            |
| gemm: alpha·A·B + beta·C; A, B of rank 2                 | a, b[, c]         | alpha=1.0, beta=1.0,               |
|                                                          |                   | trans_a=False, trans_b=False       |
| batch_norm (inference, channels are axis 1)              | x, scale, bias,   | epsilon=1e-5                       |
|                                                          | mean, var         |                                    |
| max_pool                                                 | x (N, C, S…)      | kernel, strides=None, pads=None,   |
|                                                          |                   | dilations=None, ceil_mode=False    |
| avg_pool                                                 | x (N, C, S…)      | the same, count_include_pad=False  |
| reduce_sum reduce_mean reduce_max reduce_min reduce_prod | x                 | axes=None (all), keepdims=False    |
|   (global pooling is a reduction over the spatial axes)  |                   |                                    |
| softmax log_softmax                                      | x                 | axis=-1                            |
| argmax argmin (int64)                                    | x                 | axis, keepdims=False,              |
|                                                          |                   | select_last=False                  |
| reshape (one dim may be -1)                              | x                 | shape (dims)                       |
| expect_shape (dims that running programs must prove)     | x                 | shape (dims)                       |
| flatten (to rank 2)                                      | x                 | axis=1                             |
| squeeze                                                  | x                 | axes=None (all known ones)         |
| unsqueeze (axes of the result)                           | x                 | axes                               |
| transpose                                                | x                 | perm=None (reversed)               |
| concat                                                   | one or more       | axis                               |
| split (several results)                                  | x                 | axis, sizes (dims)                 |
| slice (ONNX's clamping; negative steps; huge ends fine)  | x                 | starts (dims), ends (dims),        |
|                                                          |                   | axes=None, steps=None              |
| pad: pads are all begins then all ends, not negative     | x                 | pads (dims), mode="constant"       |
|                                                          |                   | ("reflect", "edge", "wrap"),       |
|                                                          |                   | value=0                            |
| resize (ONNX's: mode nearest, linear or cubic)           | x                 | sizes (dims, of all axes),         |
|   coordinates: those of ONNX but tf_crop_and_resize      |                   | scales=None (those of the sizes),  |
|   rounding of nearest: ONNX's nearest_mode               |                   | mode="nearest",                    |
|                                                          |                   | coordinates="half_pixel",          |
|                                                          |                   | rounding="round_prefer_floor",     |
|                                                          |                   | cubic_a=-0.75,                     |
|                                                          |                   | exclude_outside=False              |
| resample: sums of weights[i, t] · x[…, indices[i, t], …] | x, indices (N, T) | axis                               |
|   over taps t; without weights T is 1                    | [, weights (N, T)]|                                    |
| cumsum                                                   | x                 | axis, exclusive=False,             |
|                                                          |                   | reverse=False                      |
| iota: 0, 1, … (int64)                                    | none              | size (dim)                         |
| dims: sizes as data (int64, rank 1)                      | none              | values (dims)                      |
| gather (numpy's take; indices are clamped)               | x, indices        | axis=0                             |
| depth_to_space: channels are phases first (ONNX's DCR);  | x (N, C, S…)      | blocks (one per spatial axis),     |
|   with lanes x is blocked, (N, C/c, S…, c)               |                   | lanes=False                        |
| conv_blocked: x (N, I/i, S…, i) or (N, I, S…),           | x, w              | strides, pads, dilations, groups   |
|   w (O/o, I/groups/i, K…, i, o), the pass over layouts's |                   |   as conv; channels=None (all)     |
| to_blocks: (N, C, S…) to (N, ceil(C/c), S…, c)           | x                 | lanes (c)                          |
| from_blocks: (N, B, S…, c) to (N, channels, S…)          | x                 | channels                           |
| depthwise_blocked: x (N, C/c, S…, c), w (C/c, K…, c)     | x, w              | strides, pads, dilations           |
| conv_winograd: x (N, I/i, H, W, i), u as given by        | x, u              | m (2 or 4), pads=None              |
| winograd_weights: (O, I, 3, 3) to                        | w                 | m, lanes (i, o)                    |
|   (m + 2, m + 2, O/o, I/i, i, o)                         |                   |                                    |
"""

from __future__ import annotations

from kedge.compiler.ops import (  # noqa: F401 (declares the operators)
    blocked,
    broadcast,
    conv,
    conv_transpose,
    elementwise,
    matmul,
    movement,
    normalize,
    pool,
    reduce,
    registry,
    reshape,
    resize,
    scan,
    softmax,
    winograd,
)

registry.seal()
