"""LyCORIS' GLoRA in float64: what the layers A and B around a frozen one do to its weight.

docs/GLoRA.md of LyCORIS 4.1.3: f(x) = W(x + A(x)) + B(x), with A and B two layers each and the
scale alpha / rank before both. A is 1x1 in a convolution, so it mixes the input channels.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(
    weight: Array, a_down: Array, a_up: Array, b_down: Array, b_up: Array, alpha: float | None
) -> Array:
    """(alpha / r) * (W A + B) for a weight (out, in) or (out, in, kh, kw).

    a_down (r, in) and a_up (in, r) make A; b_down (r, in, *kernel) and b_up (out, r) make B.
    """
    rank = a_down.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    a = a_up.reshape(-1, rank) @ a_down.reshape(rank, -1)  # (in, in): channel j of x into channel i
    change = np.zeros_like(weight)
    for o in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            for i in range(weight.shape[1]):
                change[o, j] += weight[o, i] * a[i, j]
            for n in range(rank):
                change[o, j] += (
                    b_up.reshape(-1, rank)[o, n] * b_down.reshape(rank, *weight.shape[1:])[n, j]
                )
    return scale * change
