"""SVC, Singular Value Calibration: the sum, with what several adapters share counted once.

Li et al. 2026, https://arxiv.org/abs/2602.05536, algorithm 1. M = sum of D_i = sum of
sigma_j u_j v_j^T. Along u_j the sum answers a_j = u_j^T M and adapter i alone a_j^i = u_j^T D_i (eq.
4); s_j^i = <a_j, a_j^i> / |a_j^i|^2 (eq. 8) is how many times its own answer adapter i finds in the
sum, and sigma_j becomes sigma_j * N / sum over i of max(floor, s_j^i).

With floor 1, the published code's default, a direction of one adapter alone stays as it is and N
equal adapters give one. Lower floors also raise what only some adapters have, by up to
N / (1 + (N - 1) floor), and restore what the adapters cancel. An adapter that has nothing along u_j
finds nothing there: s = 0, so the floor counts.
"""

import torch

from merge.method_parameters import Svc
from merge.methods.core import Core, spectrum_of
from merge.methods.draws import Draws
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import NEGLIGIBLE, present


def merge(core: Core, parameters: Svc, draws: Draws) -> Spectrum:
    """Exact in the core; N counts the adapters that change this layer."""
    changes = present(core.cores)
    spectrum = spectrum_of(core, sum(core.cores, torch.zeros_like(core.cores[0])))
    if not changes:
        return spectrum
    stacked = torch.stack(changes)
    alone = spectrum.inner_up.mT @ stacked  # (n, j, l): a_j^i
    together = spectrum.values[:, None] * spectrum.inner_down  # (j, l): a_j
    squares = alone.square().sum(-1)
    # What rounding has left of nothing would say that the sum holds it a million times.
    least = (NEGLIGIBLE * torch.linalg.vector_norm(stacked, dim=(1, 2))).square()
    answers = squares > least[:, None]
    found = (alone * together).sum(-1) / torch.where(answers, squares, torch.inf)
    times = found.clamp(min=parameters.floor).mean(0)
    values, order = (spectrum.values / times).sort(descending=True, stable=True)
    return Spectrum(
        core.up, spectrum.inner_up[:, order], values, spectrum.inner_down[order], core.down
    )
