"""CtM, Compress then Merge: one shared basis for all adapters, and their sum inside of it.

He et al. 2026, https://arxiv.org/abs/2606.03723. U (out, r) and V (in, r), orthonormal, keep as much
of all changes as a shared basis can, max sum over i of |U^T D_i V|^2, found by alternating between
the leading eigenvectors for U and for V from those of all D_i D_i^T and D_i^T D_i (the Tucker
decomposition with the adapters as the free mode, De Lathauwer et al. 2000,
https://doi.org/10.1137/S0895479898346995). Adapters are then merged as their r x r coordinates
U^T D_i V. The result has rank r, whatever the number of adapters.

The formulas are those of the published code (ZhengbaoHe/compress-then-merge, 6017d1e, Apache-2.0),
of which `balance` is 1 - beta: for the choice of U and V, changes are scaled to their mean norm.
Our reading: of the "standard merging rules" that the paper puts inside, the plain sum, which keeps
what a strength means everywhere else; and the iteration ends when the basis gains no more than a
billionth, where the code looks at the error of reconstruction.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import Ctm
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import present, rank_of

_GAIN = 1e-9
_ROUNDS = 200


def merge(core: Core, parameters: Ctm, draws: Draws) -> Spectrum:
    """Exact in the core; without `rank`, r is the largest rank of the changes in this layer."""
    changes = present(core.cores)
    if not changes:
        return spectrum_of(core, core.cores[0])
    # Eigenvectors of squared matrices need the digits.
    doubles = torch.stack(changes).double()
    rank = parameters.rank or max(_rank(change) for change in doubles)
    up, down = _shared_basis(_balanced(doubles, parameters.balance), min(rank, *doubles.shape[1:]))
    merged = (up.mT @ doubles.sum(0) @ down).to(changes[0].dtype)
    inner_up, values, inner_down = torch.linalg.svd(merged)
    up, down = up.to(merged.dtype), down.to(merged.dtype)
    return Spectrum(core.up, up @ inner_up, values, inner_down @ down.mT, core.down)


def _rank(change: Float[Tensor, "k l"]) -> int:
    return rank_of(torch.linalg.svdvals(change), torch.linalg.vector_norm(change).item())


def _balanced(changes: Float[Tensor, "n k l"], balance: float) -> Float[Tensor, "n k l"]:
    norms: Tensor = torch.linalg.vector_norm(changes, dim=(1, 2), keepdim=True)
    return changes * ((1 - balance) + balance * norms.mean() / norms)


def _shared_basis(
    changes: Float[Tensor, "n k l"], rank: int
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
    """Orthonormal (up, down) that keep a maximum of the energy; it never falls from round to round."""
    down = _leading(changes.mT, rank)
    kept = 0.0
    for _ in range(_ROUNDS):
        up = _leading(changes @ down, rank)
        down = _leading(changes.mT @ up, rank)
        energy = (up.mT @ changes @ down).square().sum().item()
        if energy <= kept * (1 + _GAIN):
            break
        kept = energy
    return up, down


def _leading(columns: Float[Tensor, "n k j"], rank: int) -> Float[Tensor, "k r"]:
    """The strongest directions of all these columns together."""
    vectors: Tensor = torch.linalg.eigh((columns @ columns.mT).sum(0)).eigenvectors
    return vectors.flip(1)[:, :rank]
