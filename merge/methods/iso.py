"""Isotropic merging: directions from the adapters, and one strength for all of them.

Marczak et al. 2025, https://arxiv.org/abs/2502.04959. Iso-C (section 4.1): D = sum of D_i = U S V^T,
and every singular value becomes their mean. Iso-CTS (section 4.2, algorithm 1): the weakest
directions of D make room for those of each D_i that lie outside the common ones; U and V are then
made orthonormal, and all strengths are again the mean.

The paper has full-rank changes. An adapter's has min(out, in) - R singular values that are 0, with
arbitrary vectors: the published code makes them as strong as the others, and most of its result
then has nothing to do with the adapters. Here everything is restricted to the span of the
adapters: R takes the place of min(out, in). The mean is larger for that, so the lambda of papers
does not carry over. One adapter does not come back as itself: its spectrum is flattened too.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from merge.method_parameters import IsoC, IsoCts
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import polar, present, rank_of


def merge_common(core: Core, parameters: IsoC, draws: Draws) -> Spectrum:
    """Iso-C on the span of the sum; a lower rank keeps what is strongest in the sum."""
    spectrum = spectrum_of(core, sum(core.cores, torch.zeros_like(core.cores[0])))
    rank = rank_of(spectrum.values, _scale(core.cores))
    if not rank:
        return spectrum
    return _flat(
        core,
        spectrum.inner_up[:, :rank],
        spectrum.inner_down[:rank],
        parameters.scale * spectrum.values[:rank].mean(),
    )


def merge_common_and_specific(core: Core, parameters: IsoCts, draws: Draws) -> Spectrum:
    """Iso-CTS on the joint span; a lower rank keeps what is common first."""
    changes = present(core.cores)
    if not changes:
        return spectrum_of(core, core.cores[0])
    scale = _scale(changes)
    u, values, vh = torch.linalg.svd(torch.stack(changes).sum(0), full_matrices=False)
    common, specific = _sizes(_joint_rank(changes, scale), parameters.common, len(changes))
    common = min(common, rank_of(values, scale))
    ups, strengths, downs = [u[:, :common]], [values[:common]], [vh[:common].mT]
    for change in changes:
        beyond = change - ups[0] @ (ups[0].mT @ change)
        u_own, values_own, vh_own = torch.linalg.svd(beyond, full_matrices=False)
        kept = min(specific, rank_of(values_own, scale))
        ups.append(u_own[:, :kept])
        strengths.append(values_own[:kept])
        downs.append(vh_own[:kept].mT)
    values = torch.cat(strengths)
    if not len(values):
        return spectrum_of(core, torch.zeros_like(changes[0]))
    up, up_whole = polar(torch.cat(ups, 1))
    down, down_whole = polar(torch.cat(downs, 1))
    strength = parameters.scale * values.mean()
    if up_whole and down_whole:
        return _flat(core, up, down.mT, strength)
    return spectrum_of(core, strength * up @ down.mT)


def _flat(
    core: Core, up: Float[Tensor, "k j"], down: Float[Tensor, "j l"], strength: Float[Tensor, ""]
) -> Spectrum:
    """Orthonormal directions, all of one strength, in the order given."""
    values = strength.abs().expand(up.shape[1])
    return Spectrum(core.up, up * strength.sign(), values, down, core.down)


def _scale(cores: Sequence[Float[Tensor, "k l"]]) -> float:
    return max(float(torch.linalg.vector_norm(core)) for core in cores)


def _joint_rank(changes: Sequence[Float[Tensor, "k l"]], scale: float) -> int:
    """The largest rank that anything made of these changes' rows and columns can have."""
    columns = torch.linalg.svdvals(torch.cat(list(changes), 1))
    rows = torch.linalg.svdvals(torch.cat(list(changes)))
    return min(rank_of(columns, scale), rank_of(rows, scale))


def _sizes(rank: int, share: float, count: int) -> tuple[int, int]:
    """(directions in common, directions of each adapter): the paper's split, so that both add up.

    The published code rounds up even where that leaves less than nothing for what is common.
    """
    specific = min(round((rank - int(rank * share)) / count), rank // count)
    return rank - count * specific, specific
