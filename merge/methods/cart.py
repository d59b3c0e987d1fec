"""CART: the average, plus the strongest part of what each adapter has beyond it.

Choi et al. 2024, https://arxiv.org/abs/2412.12153, eq. 6: M = mean + lambda * sum over i of
trunc_k(D_i - mean), with the truncated singular value decomposition. The mean of the changes takes
the place of the paper's average of weights, from which the base cancels. The paper keeps 8 % of the
smaller side of full weights; of an adapter that would be all of its rank, so `keep` is a share of
the rank that D_i - mean has.

D_i - mean sum to 0, so with keep 1, and with two adapters whatever is kept, this is their average.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import Cart
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import part_of, present, rank_of


def merge(core: Core, parameters: Cart, draws: Draws) -> Spectrum:
    """Exact in the core; the mean is of the adapters that change this layer."""
    changes = present(core.cores)
    if not changes:
        return spectrum_of(core, core.cores[0])
    scale = max(torch.linalg.vector_norm(change).item() for change in changes)
    mean = torch.stack(changes).mean(0)
    own = torch.stack([_strongest(change - mean, parameters.keep, scale) for change in changes])
    return spectrum_of(core, mean + parameters.scale * own.sum(0))


def _strongest(change: Float[Tensor, "k l"], share: float, scale: float) -> Float[Tensor, "k l"]:
    u, values, vh = torch.linalg.svd(change, full_matrices=False)
    kept = part_of(rank_of(values, scale), share)
    strongest: Tensor = (u[:, :kept] * values[:kept]) @ vh[:kept]
    return strongest
