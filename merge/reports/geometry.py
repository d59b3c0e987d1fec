"""What the changes of one weight are to each other, in float64 and as small as their ranks.

With the factors stacked, U = [c_1 up_1 ... c_n up_n] and D = [down_1; ...; down_n], everything is in
the two Gram matrices U^T U and D D^T:

<D_i, D_j>         the sum of the products of their blocks (i, j)
subspaces          the blocks, made orthonormal by the eigenvectors of the diagonal ones
singular values    of U D: the roots of the eigenvalues of L^T (D D^T) L, with L L^T = U^T U

A squared singular value is right to 1e-16 of the largest, so a truncation error to about 1e-8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.algorithms.lora import Factors
from merge.reports.report import Gram, Overlap, Pair

# Directions of less than 1e-5 of the largest singular value are rounding, not a subspace.
_LEAST_EIGENVALUE = 1e-10
_SURE = 1e-3
# Squared singular values below this share of the parts' energy are rounding.
_NOTHING = 1e-15
# The spectrum of a dense change takes a second from here on.
_LARGEST_SIDE = 768


@dataclass(frozen=True, slots=True)
class Measured:
    gram: Gram
    values: NDArray[np.float64] | None
    overlaps: dict[Pair, tuple[Overlap, Overlap]]


def measure_products(parts: Sequence[tuple[int, Factors, float]], n: int) -> Measured:
    """Products by their input's index, those of one input together, and strengths; of `n` inputs."""
    scales = [part.scale * strength for _, part, strength in parts for _ in range(part.rank)]
    ups = torch.cat([part.up for _, part, _ in parts], 1).double() * torch.tensor(
        scales, dtype=torch.float64
    )
    downs = torch.cat([part.down for _, part, _ in parts]).double()
    up, down = ups.mT @ ups, downs @ downs.mT
    at = _places(parts)
    inner = up * down
    gram = np.zeros((n, n))
    for i, j in [(i, j) for i in at for j in at]:
        gram[i, j] = inner[at[i], at[j]].sum().item()
    np.fill_diagonal(gram, gram.diagonal().clip(0))
    left = {i: _basis(up[at[i], at[i]]) for i in at} if len(at) > 1 else {}
    right = {i: _basis(down[at[i], at[i]]) for i in at} if len(at) > 1 else {}
    overlaps = {}
    for i, j in combinations(at, 2):
        output = _overlap(left[i], up[at[i], at[j]], left[j], ups.shape[0])
        overlaps[i, j] = output, _overlap(right[i], down[at[i], at[j]], right[j], downs.shape[1])
    return Measured(gram, _singular_values(ups, downs, up, down, gram), overlaps)


def measure_dense(changes: Mapping[int, Tensor], n: int) -> Measured:
    """The same from the changes themselves; the spectrum of a large one is not measured."""
    gram = np.zeros((n, n))
    for i, j in [(i, j) for i in changes for j in changes if i <= j]:
        gram[i, j] = gram[j, i] = _inner(changes[i], changes[j])
    values = None
    if all(min(change.shape) <= _LARGEST_SIDE for change in changes.values()):
        total = sum(change.double() for change in changes.values())
        assert isinstance(total, Tensor)
        values = _roots(_smaller_gram(total), gram)
    return Measured(gram, values, {})


def _singular_values(
    ups: Tensor, downs: Tensor, up: Tensor, down: Tensor, gram: Gram
) -> NDArray[np.float64]:
    """Of ups @ downs, whose Gram matrices are `up` and `down`; as many as the sum has at most."""
    if up.shape[0] > min(ups.shape[0], downs.shape[1]):
        return _roots(_smaller_gram(ups @ downs), gram)
    root, info = torch.linalg.cholesky_ex(up)
    if info.item() > 0:  # of a lower rank than it has columns
        values, vectors = torch.linalg.eigh(up)
        root = vectors * values.clamp(min=0).sqrt()
    return _roots(root.mT @ down @ root, gram)


def _roots(squared: Tensor, gram: Gram) -> NDArray[np.float64]:
    values = torch.linalg.eigvalsh(squared).flip(0).numpy()
    return np.sqrt(np.where(values > _NOTHING * np.trace(gram), values, 0.0))


def _smaller_gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix


def _places(parts: Sequence[tuple[int, Factors, float]]) -> dict[int, slice]:
    """Where each input's directions are in the stacked factors."""
    found: dict[int, slice] = {}
    begin = 0
    for i, part, _ in parts:
        end = begin + part.rank
        found[i] = slice(found[i].start if i in found else begin, end)
        begin = end
    return found


def _basis(gram: Tensor) -> Tensor:
    """What makes the columns that have this Gram matrix orthonormal, without those that add nothing.

    A Cholesky factor does where it shows that none is near to the others' span.
    """
    root, info = torch.linalg.cholesky_ex(gram)
    pivots = root.diagonal()
    if info.item() == 0 and pivots.min() > _SURE * pivots.max():
        one = torch.eye(len(gram), dtype=gram.dtype)
        inverse: Tensor = torch.linalg.solve_triangular(root.mT, one, upper=True)
        return inverse
    values, vectors = torch.linalg.eigh(gram)
    keeps = values > max(_LEAST_EIGENVALUE * values[-1].item(), 0.0)
    basis: Tensor = vectors[:, keeps] / values[keeps].sqrt()
    return basis


def _overlap(left: Tensor, between: Tensor, right: Tensor, dimension: int) -> Overlap:
    cosines = left.mT @ between @ right
    ranks = left.shape[1], right.shape[1]
    return Overlap(cosines.square().sum().item(), ranks, dimension)


def _inner(one: Tensor, other: Tensor) -> float:
    """In float64, by rows, so that a large matrix is not copied whole."""
    rows = max(1, 2**20 // max(one.shape[1], 1))
    pairs = zip(torch.split(one, rows), torch.split(other, rows), strict=True)
    return sum(torch.vdot(a.double().flatten(), b.double().flatten()).item() for a, b in pairs)
