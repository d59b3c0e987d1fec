"""BOFT in float64, with whole matrices for permutations and stages.

Liu et al. 2023, arXiv:2311.06243, section 4: R = product over stages of P_i^T B_i P_i, B_i block-
diagonal, P_i the butterfly permutation of stage i.
"""

import numpy as np
from numpy.typing import NDArray

from tests.oracles import oft

Array = NDArray[np.float64]


def lycoris(weight: Array, rotations: Array, rescale: Array | None = None) -> Array:
    """W' = B_m ... B_1 W: stage i pairs rows that are 2^i * size / 2 apart; then the rescale.

    `rotations` (stages, blocks, size, size) are R itself. Within a group of 2^(i+1) * size / 2 rows,
    the two halves are dealt out alternately, blocks take them in that order, and it is undone.
    """
    flat = weight.reshape(len(weight), -1).copy()
    _, _, size, _ = rotations.shape
    for i, stage in enumerate(rotations):
        half = 2**i * size // 2
        dealt = [
            group + k + which * half
            for group in range(0, len(flat), 2 * half)
            for k in range(half)
            for which in (0, 1)
        ]
        turned = oft.block_diagonal(list(stage)) @ flat[dealt]
        for place, row in enumerate(dealt):
            flat[row] = turned[place]
    if rescale is not None:
        flat = flat * rescale.reshape(-1, 1)
    return flat.reshape(weight.shape)


def peft(weight: Array, stored: Array, factor: Array) -> Array:
    """W' = (R W^T)^T * s, R = M_m ... M_1, M_i = P_i B_i P_i^T, blocks (I - S)(I + S)^-1.

    P_i takes, from each 2^i * size entries, the even half blocks before the odd ones.
    """
    flat = weight.reshape(len(weight), -1)
    width, (_, _, size, _) = flat.shape[1], stored.shape
    total = np.eye(width)
    for i, stage in enumerate(stored):
        q = -(stage - stage.transpose(0, 2, 1)) / 2
        blocks = oft.block_diagonal([oft.cayley(block) for block in q])
        permutation, place = np.zeros((width, width)), 0
        for group in range(0, width, 2**i * size):
            for odd in (0, 1):
                for half in range(2**i):
                    for k in range(size // 2):
                        permutation[place, group + (2 * half + odd) * size // 2 + k] = 1
                        place += 1
        total = permutation @ blocks @ permutation.T @ total
    return np.asarray((total @ flat.T).T * factor.reshape(-1, 1)).reshape(weight.shape)
