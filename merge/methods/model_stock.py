"""Model Stock: the average of the changes, shortened by how little they agree.

Jang et al. 2024, https://arxiv.org/abs/2403.19522, section 4: t = N cos / (1 + (N - 1) cos) with the
mean cosine between the N changes, and M = t * average. Models that were tuned for one task share an
angle, and M is then the point nearest to where all such models would lie. Adapters of different
subjects are nearly orthogonal, cos is about 0, and t takes almost everything away; `least` keeps t
from that, and the certificate says for every layer what was used.

A negative mean cosine, of which the paper does not speak, counts as 0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import ModelStock


def coefficients(
    gram: Float[Tensor, "n n"], strengths: Sequence[float], parameters: ModelStock
) -> list[float]:
    """t / N times the strengths; N counts the adapters that change this layer. Of one, t is 1."""
    s = torch.tensor(strengths, dtype=torch.float64)
    norms = s.abs() * gram.diagonal().sqrt()
    present = norms.nonzero().flatten()
    count = len(present)
    if count < 2:
        return list(strengths)
    cosines = (torch.outer(s, s) * gram)[present][:, present] / torch.outer(
        norms[present], norms[present]
    )
    mean = ((cosines.sum() - cosines.trace()) / (count * (count - 1))).clamp(0, 1).item()
    t = max(count * mean / (1 + (count - 1) * mean), parameters.least)
    return [t * strength / count for strength in strengths]
