"""Core Space: the rules of TIES and DARE on small matrices in a basis that all adapters share.

Panariello et al. 2025, arXiv:2509.17786, as their code does it (task_merger.py of
https://github.com/apanariello4/core-space-merging at 85176fa, Apache-2.0): with U the left singular vectors of the stacked
B = [B_1 ... B_n] and V the right ones of the stacked A = [A_1; ...; A_n], every change is exactly
U M_i V^T; the rule is applied to the M_i and the result turned back.

B and A say the same as B G and G^-1 A, but the paper's bases differ: halve one adapter's B and double
its A, and the result changes though no change did. Here each change is first split evenly, as
B_i = P sqrt(S), A_i = sqrt(S) Q^T of its own SVD P S Q^T, so the result depends on the changes alone.
For adapters that are stored so, it is the paper's.

Signs of singular vectors do not matter, and vectors of equal strength are any basis of theirs: see
merge.methods.knots.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import CoreDare, CoreTies, Dare, Ties
from merge.methods import dare, ties
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.elements import Dense
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import rank_of


def merge_ties(core: Core, parameters: CoreTies, draws: Draws) -> Spectrum:
    """TIES on the M_i."""
    up, aligned, down = _align(core)
    rule = Ties(name="ties", density=parameters.density, scale=parameters.scale)
    return spectrum_of(core, up @ ties.merge(aligned, rule, draws).rows(0, up.shape[1]) @ down)


def merge_dare(core: Core, parameters: CoreDare, draws: Draws) -> Spectrum:
    """DARE on the M_i, whose elements the draws are for."""
    up, aligned, down = _align(core)
    rule = Dare(name="dare", **parameters.model_dump(include={"density", "elect", "scale"}))
    return spectrum_of(core, up @ dare.merge(aligned, rule, draws).rows(0, up.shape[1]) @ down)


def _align(core: Core) -> tuple[Float[Tensor, "k a"], list[Dense], Float[Tensor, "b l"]]:
    """U and V^T within the core, without directions that nobody has, and every M_i (a, b)."""
    ups, downs = [], []
    for change in core.cores:
        u, values, vh = torch.linalg.svd(change, full_matrices=False)
        root = values[: rank_of(values, torch.linalg.vector_norm(change).item())].sqrt()
        ups.append(u[:, : len(root)] * root)
        downs.append(vh[: len(root)].mT * root)
    up, down = _basis(torch.cat(ups, 1)), _basis(torch.cat(downs, 1))
    return up, [Dense(up.mT @ change @ down) for change in core.cores], down.mT


def _basis(halves: Float[Tensor, "k r"]) -> Float[Tensor, "k j"]:
    """An orthonormal basis of the columns, the strongest direction first."""
    if (
        halves.shape[1] == 0
    ):  # a change of nothing; one direction, so that there is something to merge
        return torch.eye(halves.shape[0], 1, dtype=halves.dtype)
    u, values, _ = torch.linalg.svd(halves, full_matrices=False)
    squares = values.square()  # the halves hold square roots
    rank = max(1, rank_of(squares, torch.linalg.vector_norm(squares).item()))
    basis: Tensor = u[:, :rank]
    return basis
