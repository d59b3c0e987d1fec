"""LoRA on n packed experts by PEFT's storage, expert by expert in float64."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(down: Array, up: Array, n: int, scale: float) -> Array:
    """(n, out, in): A's rows are in runs of one expert, B's columns go round the experts."""
    rank = down.shape[0] // n
    total = np.zeros((n, up.shape[0], down.shape[1]))
    for e in range(n):
        for r in range(rank):
            total[e] += scale * np.outer(up[:, r * n + e], down[e * rank + r])
    return total
