"""LoKr from the definition of the Kronecker product, entry by entry in float64.

Yeh et al. 2023, arXiv:2309.14859, section 4.3: the block (i, j) of w1 (x) w2 is w1[i, j] * w2.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def kronecker(w1: Array, w2: Array) -> Array:
    """(a, c) and (b, d, *kernel) to (a * b, c * d, *kernel)."""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    total = np.zeros((a * b, c * d, *kernel))
    for i in range(a):
        for j in range(c):
            for p in range(b):
                for q in range(d):
                    total[i * b + p, j * d + q] = w1[i, j] * w2[p, q]
    return total


def scale(alpha: float | None, rank_w1: int | None, rank_w2: int | None) -> float:
    """LyCORIS' rule: of w2's rank if w2 is decomposed, else of w1's, else 1 whatever alpha says."""
    rank = rank_w2 if rank_w2 is not None else rank_w1
    return 1.0 if rank is None or alpha is None else alpha / rank
