"""Linear merge: M = sum of strength_i * delta_i, kept in factors all the way.

Exact: the factors side by side. M = [s_1 up_1 ... s_n up_n] @ [down_1; ...; down_n], so ranks add up.
Best at a lower rank: Eckart & Young 1936 say that the truncated singular value decomposition of M
is the nearest matrix of that rank. M is never formed: with thin QR factorisations
[s_i up_i] = Q_u R_u and [down_i]^T = Q_d R_d, M = Q_u (R_u R_d^T) Q_d^T, and the core R_u R_d^T is
only as large as the summed ranks. For two SDXL attention adapters that is 26 GFLOP, not 40 TFLOP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import frexp, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.lora import Factors
from merge.method_parameters import Linear


def coefficients(
    gram: Float[Tensor, "n n"], strengths: Sequence[float], parameters: Linear
) -> list[float]:
    """The strengths themselves, or all divided by one number.

    "energy" scales the sum to the norm that the changes at their strengths have apart,
    sqrt(sum |s_i D_i|^2): what points the same way no longer adds up to more. Where the sum is 0
    there is nothing to scale.
    """
    if parameters.normalise == "strengths":
        total = sum(abs(strength) for strength in strengths)
        return [strength / total for strength in strengths] if total else list(strengths)
    if parameters.normalise == "energy":
        s = torch.tensor(strengths, dtype=torch.float64)
        apart, together = (s * s * gram.diagonal()).sum().item(), (s @ gram @ s).item()
        # Below this nothing but rounding is left of the sum.
        scale = sqrt(apart / together) if together > 1e-12 * apart else 1.0
        return [scale * strength for strength in strengths]
    return list(strengths)


def concatenate(parts: Sequence[Factors], strengths: Sequence[float]) -> Factors:
    """The weighted sum with nothing lost: factors side by side, of scale 1."""
    scaled = [times(part, strength) for part, strength in zip(parts, strengths, strict=True)]
    return Factors(torch.cat([part.up for part in scaled], 1), torch.cat([p.down for p in scaled]))


def times(part: Factors, strength: float) -> Factors:
    """strength times the change, as factors of scale 1.

    Sign and strength go on `up`. The magnitude's power of two is shared with `down`, which costs no
    rounding and keeps both inside float16's normal range (kohya's alpha of 1 makes scales of 1/128).
    """
    coefficient = part.scale * strength
    shared = 2.0 ** (frexp(coefficient)[1] // 2)
    return Factors(part.up * (coefficient / shared), part.down * shared)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular value decomposition of a sum of adapters, with the outer factors still apart.

    The left singular vectors are `outer_up @ inner_up`, the right ones `inner_down @ outer_down`.
    """

    outer_up: Float[Tensor, "out k"]
    inner_up: Float[Tensor, "k j"]
    values: Float[Tensor, " j"]
    inner_down: Float[Tensor, "j l"]
    outer_down: Float[Tensor, "l in"]


def decompose(parts: Sequence[Factors], strengths: Sequence[float]) -> Spectrum:
    """Singular values and vectors of the weighted sum, largest first, in the factors' dtype.

    Of the QR factorisations up = Q_u R_u and down^T = Q_d R_d only R is computed, which is half the
    work: with R_u R_d^T = U S V^T the left vectors Q_u U are up R_d^T V / S, the right ones alike.
    """
    stacked = concatenate(parts, strengths)
    r_up = torch.linalg.qr(stacked.up, mode="r").R  # (k, rank)
    r_down = torch.linalg.qr(stacked.down.mT, mode="r").R  # (l, rank)
    inner_up, values, inner_down = singular(r_up @ r_down.mT)
    # A value that is rounding has no vector that could be told from rounding.
    least = torch.linalg.matrix_norm(r_up) * torch.linalg.matrix_norm(r_down)
    share = torch.where(values > torch.finfo(values.dtype).eps * least, 1 / values, 0.0)
    left, right = r_down.mT @ inner_down.mT * share, share[:, None] * (inner_up.mT @ r_up)
    return Spectrum(stacked.up, left, values, right, stacked.down)


def singular(
    matrix: Float[Tensor, "k l"],
) -> tuple[Float[Tensor, "k j"], Float[Tensor, " j"], Float[Tensor, "j l"]]:
    """U, the singular values and V^T; OverflowError where the dtype does not hold them."""
    if matrix.isfinite().all():
        up, values, down = torch.linalg.svd(matrix, full_matrices=False)
        if values.isfinite().all():
            return up, values, down
    raise OverflowError


def truncate(spectrum: Spectrum, rank: int) -> Factors:
    """The nearest change of this rank, with the singular values shared between both factors.

    A singular vector's sign is free; its largest entry on the `up` side is made positive, so that
    the result does not depend on what the linear algebra library happened to return.
    """
    root = spectrum.values[:rank].sqrt()
    left = spectrum.outer_up @ spectrum.inner_up[:, :rank]
    right = spectrum.inner_down[:rank] @ spectrum.outer_down
    largest = left.gather(0, left.abs().argmax(0, keepdim=True)).squeeze(0)
    sign = torch.where(largest < 0, -1.0, 1.0).to(root.dtype)
    return Factors(left * (root * sign), right * (root * sign).unsqueeze(1))


def lost(values: Float[Tensor, " j"], rank: int) -> float:
    """Frobenius norm of what truncation to `rank` leaves out, from the discarded values."""
    return sqrt(values[rank:].double().square().sum().item())


def rank_for_energy(values: Float[Tensor, " j"], energy: float) -> int:
    """The least rank, at least 1, that keeps this share of the squared Frobenius norm."""
    kept = values.double().square().cumsum(0)
    reached = (kept >= energy * kept[-1]).nonzero()
    return int(reached[0]) + 1


def ranks_for_budget(
    values: Sequence[Float[Tensor, " _"]],
    bytes_per_rank: Sequence[int],
    bytes_per_module: int,
    budget_bytes: int,
) -> list[int]:
    """Ranks with the least total squared error whose factors fit the budget; 0 drops a module.

    One more rank of a module removes values[j]**2 of error and costs the same at every j, and the
    values fall with j, so taking candidates by error removed per byte is optimal, but for the last
    few that no longer fit.
    """
    candidates = sorted(
        (
            (-(value * value) / cost, module, j)
            for module, (spectrum, cost) in enumerate(zip(values, bytes_per_rank, strict=True))
            for j, value in enumerate(spectrum.double().tolist())
            if value > 0
        ),
    )
    ranks = [0] * len(values)
    left = budget_bytes
    for _, module, j in candidates:
        cost = bytes_per_rank[module] + (bytes_per_module if j == 0 else 0)
        # A rank is only worth something after all the ranks before it.
        if ranks[module] == j and cost <= left:
            ranks[module] += 1
            left -= cost
    return ranks
