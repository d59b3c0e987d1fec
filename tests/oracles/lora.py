"""What a LoRA does to a weight, in float64 and in the slowest obvious way.

Hu et al. 2021, arXiv:2106.09685: eq. 3, W0 x + B A x; section 4.1, scaled by alpha / r.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(down: Array, up: Array, alpha: float | None) -> Array:
    """(alpha / r) * B A as sums over the rank, in the shape of the base weight.

    A is `down` (r, in) or (r, in, kh, kw), B is `up` (out, r) or (out, r, 1, 1). Without an alpha
    the scale is 1, as kohya's trainer reads such a file.
    """
    rank = down.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    a = down.reshape(rank, -1).astype(np.float64)
    b = up.reshape(-1, rank).astype(np.float64)
    change = np.zeros((b.shape[0], a.shape[1]))
    for j in range(rank):
        change += np.outer(b[:, j], a[j])
    return (scale * change).reshape(up.shape[0], *down.shape[1:])


def tucker(down: Array, mid: Array, up: Array, alpha: float | None) -> Array:
    """LoCon's Tucker form, entry by entry: sum over m, n of up[o, m] mid[m, n, y, x] down[n, i].

    Yeh et al. 2023, arXiv:2309.14859, eq. 8.
    """
    (out, rank), inner, kernel = up.shape[:2], down.shape[1], mid.shape[2:]
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    change = np.zeros((out, inner, *kernel))
    for o in range(out):
        for i in range(inner):
            for m in range(rank):
                for n in range(mid.shape[1]):
                    change[o, i] += up[o, m].item() * mid[m, n] * down[n, i].item()
    return scale * change


def convolution(x: Array, weight: Array) -> Array:
    """Cross-correlation of x (in, h, w) with weight (out, in, kh, kw), no padding, in loops.

    Proves that a LoRA of a convolution is `down` with the kernel, then a 1x1 `up`.
    """
    out, _, kh, kw = weight.shape
    h, w = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    y = np.zeros((out, h, w))
    for o in range(out):
        for i in range(h):
            for j in range(w):
                y[o, i, j] = np.sum(weight[o] * x[:, i : i + kh, j : j + kw])
    return y
