"""The core of a sum of adapters: all that a method can know of them, in matrices as small as their ranks.

With thin QR factorisations of the stacked factors, [up_1 ... up_n] = Q_u R_u and [down_1; ...]^T =
Q_d R_d, the change of adapter i is Q_u K_i Q_d^T exactly, with K_i = R_u[:, i] R_d[:, i]^T. A method
that turns with its input (f(U X V) = U f(X) V for orthogonal U and V) gives the same result on the
K_i as on the dense changes: linear sums, truncation, SVC, CART, TSV, Iso-C. The zero directions
outside of the adapters' span are not in the core, which matters to Iso-C and TSV and is said there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.lora import Factors
from merge.methods.linear import Spectrum, concatenate


@dataclass(frozen=True, slots=True)
class Core:
    """Change i is `up @ cores[i] @ down`; the columns of `up` and the rows of `down` are orthonormal.

    Strengths are in the cores.
    """

    up: Float[Tensor, "out k"]
    cores: tuple[Float[Tensor, "k l"], ...]
    down: Float[Tensor, "l in"]


def core_of(parts: Sequence[Factors], strengths: Sequence[float]) -> Core:
    """k and l are the summed ranks, or the layer's own sides where those are smaller."""
    stacked = concatenate(parts, strengths)
    up, r_up = torch.linalg.qr(stacked.up)
    down, r_down = torch.linalg.qr(stacked.down.mT)
    ranks = [part.rank for part in parts]
    pairs = zip(r_up.split(ranks, 1), r_down.split(ranks, 1), strict=True)
    return Core(up, tuple(left @ right.mT for left, right in pairs), down.mT)


def spectrum_of(core: Core, merged: Float[Tensor, "k l"]) -> Spectrum:
    """The spectrum of the change whose core a method has made."""
    inner_up, values, inner_down = torch.linalg.svd(merged, full_matrices=False)
    return Spectrum(core.up, inner_up, values, inner_down, core.down)


def gram(parts: Sequence[Factors]) -> Float[Tensor, "n n"]:
    """Frobenius inner products of the changes in float64, from the factors alone."""
    ups, downs = [part.up.double() for part in parts], [part.down.double() for part in parts]
    found = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i, one in enumerate(parts):
        for j, other in enumerate(parts[: i + 1]):
            inner = ((ups[i].mT @ ups[j]) * (downs[i] @ downs[j].mT)).sum()
            found[i, j] = found[j, i] = one.scale * other.scale * inner
    return found
