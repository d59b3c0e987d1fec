"""KnOTS: the rules of TIES and DARE on changes that one SVD has aligned.

Stoica et al. 2024, arXiv:2410.19735, as their code does it (task_merger.py of
https://github.com/gstoica27/KnOTS at baa35e8, MIT): [D_1 ... D_n] = U S [V_1 ... V_n]^T side by side;
the rule is applied to the S V_i^T, which say what each adapter sends into the shared output
directions U, and the result is multiplied by U again. In the core, [K_1 ... K_n] has the same U and S, so
nothing larger than (summed rank, in) is ever there, and the result is factors as it stands.

The sign of a singular vector is free and does not matter: it turns the sign of one row of all S V_i^T,
which the rules carry through. Directions of equal strength are not told apart by an SVD, and which
basis of them the library returns decides what the rules see; on one machine it is always the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import Dare, KnotsDare, KnotsTies, Ties
from merge.methods import dare, ties
from merge.methods.core import Core
from merge.methods.draws import Draws
from merge.methods.elements import Dense
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import rank_of


def merge_ties(core: Core, parameters: KnotsTies, draws: Draws) -> Spectrum:
    """TIES on the aligned changes. The authors trim the whole model at once, here each layer."""
    basis, aligned = _align(core)
    rule = Ties(name="ties", density=parameters.density, scale=parameters.scale)
    return _spectrum(core, basis, ties.merge(aligned, rule, draws).rows(0, basis.shape[1]))


def merge_dare(core: Core, parameters: KnotsDare, draws: Draws) -> Spectrum:
    """DARE on the aligned changes; the elements that draws are for are those of the S V_i^T."""
    basis, aligned = _align(core)
    rule = Dare(name="dare", **parameters.model_dump(include={"density", "elect", "scale"}))
    return _spectrum(core, basis, dare.merge(aligned, rule, draws).rows(0, basis.shape[1]))


def _align(core: Core) -> tuple[Float[Tensor, "k j"], list[Dense]]:
    """U within the core, without directions that nobody has, and every S V_i^T (j, in)."""
    stacked = torch.cat(core.cores, 1)
    u, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    # A change of nothing has no direction, and keeps one so that there is something to merge.
    u = u[:, : max(1, rank_of(values, torch.linalg.vector_norm(stacked).item()))]
    return u, [Dense(u.mT @ change @ core.down) for change in core.cores]


def _spectrum(core: Core, basis: Float[Tensor, "k j"], merged: Float[Tensor, "j in"]) -> Spectrum:
    outer_down, r = torch.linalg.qr(merged.mT)  # (in, l), (l, j)
    inner_up, values, inner_down = torch.linalg.svd(r.mT, full_matrices=False)
    return Spectrum(core.up, basis @ inner_up, values, inner_down, outer_down.mT)
