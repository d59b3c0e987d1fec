"""GLoRA's paper in float64, entry by entry.

Chavan et al. 2023, arXiv:2306.07967: W* = W0 + W0 A + B and b* = b0 + b0 D + E + W0 C, with the
products of W0 A and b0 D elementwise, as in the released code.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weight_change(weight: Array, a: Array, b: Array) -> Array:
    """W0 * A + B, where A and B may be (out, in), (out, 1) or a single number."""
    change = np.zeros_like(weight)
    wide_a, wide_b = np.broadcast_to(a, weight.shape), np.broadcast_to(b, weight.shape)
    for place in np.ndindex(*weight.shape):
        change[place] = weight[place] * wide_a[place] + wide_b[place]
    return change


def bias_change(weight: Array, bias: Array | None, c: Array, d: Array, e: Array) -> Array:
    """b0 * D + E + W0 C, where b0 is 0 for a layer without one and C meets every kernel element."""
    out = weight.shape[0]
    b0 = np.zeros(out) if bias is None else bias
    wide_d, wide_e = np.broadcast_to(d, (out,)), np.broadcast_to(e, (out,))
    change = np.zeros(out)
    for o in range(out):
        change[o] = b0[o] * wide_d[o] + wide_e[o]
        for i in range(weight.shape[1]):
            change[o] += np.sum(weight[o, i]) * c[i]
    return change
