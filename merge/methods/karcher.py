"""Karcher mean: the centre of several directions on the sphere, and SLERP's form for more than two.

Karcher 1977, https://doi.org/10.1002/cpa.3160300502: the point with the least sum of share * angle^2
to the directions of the changes. It is found by his fixed-point iteration, x <- exp_x(sum of
share * log_x(direction)), which Buss & Fillmore 2001, https://doi.org/10.1145/502122.502124,
algorithm A1, describe for spheres. The result has the mean norm of the changes, by shares.

The iteration runs in as many dimensions as there are adapters: all that it needs of the changes
are their angles.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import Karcher

_CONVERGED = 1e-12  # length of a step, in radians
_STEPS = 10_000  # neighbours take about 10, and 8 unrelated adapters about 50
_AMBIGUOUS = 1e-6


def coefficients(
    gram: Float[Tensor, "n n"], strengths: Sequence[float], parameters: Karcher
) -> list[float]:
    """A change of norm 0 has no direction and counts as absent; one change comes back whole.

    ValueError where directions point so far apart that no point is the nearest to all.
    """
    norms = gram.diagonal().sqrt()
    present = norms.nonzero().flatten()
    found = torch.zeros(len(strengths), dtype=torch.float64)
    if len(present) == 1:
        found[present] = 1.0
    elif len(present) > 1:
        shares = torch.tensor(strengths, dtype=torch.float64)[present]
        shares, norms = shares / shares.sum(), norms[present]
        cosines = gram[present][:, present] / torch.outer(norms, norms)
        found[present] = (shares @ norms) * _centre(cosines, shares) / norms
    values: list[float] = found.tolist()
    return values


def _centre(cosines: Float[Tensor, "n n"], shares: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """What to multiply each of these unit vectors with, so that the sum is their centre."""
    values, vectors = torch.linalg.eigh(cosines)
    points = vectors * values.clamp(min=0).sqrt()  # unit vectors with these cosines, as rows
    length = torch.linalg.vector_norm(shares @ points)
    if length < _AMBIGUOUS:
        raise ValueError(_NO_CENTRE)
    x: Tensor = shares / length
    for _ in range(_STEPS):
        at = x @ points
        along = points @ at
        across = torch.linalg.vector_norm(points - along[:, None] * at, dim=1)
        angles = torch.atan2(across, along)
        if ((across < _AMBIGUOUS) & (along < 0)).any():
            raise ValueError(_NO_CENTRE)
        # log_x(p) = angle * (p - cos(angle) x) / sin(angle), and angle / sin(angle) is 1 at 0.
        stretch = shares * torch.where(across > 0, angles / across, 1.0)
        step = stretch - (stretch @ along) * x
        size = torch.linalg.vector_norm(step @ points)
        if size < _CONVERGED:
            break
        x = size.cos() * x + torch.sinc(size / torch.pi) * step
        x = x / torch.linalg.vector_norm(x @ points)
    else:
        raise ValueError(_NO_CENTRE)
    return x


_NO_CENTRE = "karcher: the changes point too far apart for one centre; use linear"
