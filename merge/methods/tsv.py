"""TSV-M, Task Singular Vectors: every adapter keeps its strengths, on directions made orthogonal.

Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081, section 4: D_i = U_i S_i V_i^T, of which the
k_i strongest directions are kept; U = [U_1 ... U_n] and V likewise are replaced by the nearest
orthonormal matrices (Procrustes, eq. 5 and 6), and M = lambda U S V^T with all singular values on
the diagonal. Unrelated adapters come out as their sum; what n adapters share is averaged.

The published code keeps min(out, in) / n directions of each, which is more than the rank of an
adapter: the rest are arbitrary vectors of the null space with strength 0, and they turn the result.
Here k_i is a share of the rank that D_i has.
"""

import torch

from merge.method_parameters import Tsv
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import part_of, polar, present, rank_of


def merge(core: Core, parameters: Tsv, draws: Draws) -> Spectrum:
    """Exact in the core. Where the kept directions are more than the layer has, they share."""
    changes = present(core.cores)
    if not changes:
        return spectrum_of(core, core.cores[0])
    ups, strengths, downs = [], [], []
    for change in changes:
        u, values, vh = torch.linalg.svd(change, full_matrices=False)
        scale = torch.linalg.vector_norm(change).item()
        kept = part_of(rank_of(values, scale), parameters.keep)
        ups.append(u[:, :kept])
        strengths.append(values[:kept])
        downs.append(vh[:kept].mT)
    up, _ = polar(torch.cat(ups, 1))
    down, _ = polar(torch.cat(downs, 1))
    return spectrum_of(core, parameters.scale * (up * torch.cat(strengths)) @ down.mT)
