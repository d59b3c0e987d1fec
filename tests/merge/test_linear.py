"""The linear merge against dense float64 references, over everything that can go wrong with ranks."""

import numpy as np
import pytest
import torch

from merge.algorithms.lora import Factors, delta
from merge.methods import linear
from tests.oracles import linear as oracle

# out, in, ranks of the parts
CASES = [
    (20, 30, (4,)),
    (30, 20, (4, 7)),
    (24, 24, (1, 1, 1)),
    (6, 40, (4, 5)),  # summed rank above `out`
    (40, 6, (4, 5)),  # summed rank above `in`
    (5, 4, (9, 16)),  # above both
    (1, 9, (2, 2)),
]
STRENGTHS = (0.7, -0.5, 1.25)


def _parts(
    out: int, inner: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> list[Factors]:
    generator = torch.Generator().manual_seed(7)
    return [
        Factors(
            torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rank, inner, generator=generator, dtype=torch.float64).to(dtype),
            scale,
        )
        for rank, scale in zip(ranks, (1.0, 0.25, 1 / 128), strict=False)
    ]


def _dense(parts: list[Factors], strengths: list[float]) -> np.ndarray:
    deltas = [part.scale * part.up.double().numpy() @ part.down.double().numpy() for part in parts]
    return oracle.merged(deltas, strengths)


@pytest.mark.parametrize(("out", "inner", "ranks"), CASES)
def test_concatenation_is_the_weighted_sum(out: int, inner: int, ranks: tuple[int, ...]) -> None:
    parts, strengths = _parts(out, inner, ranks), list(STRENGTHS[: len(ranks)])
    merged = linear.concatenate(parts, strengths)
    assert merged.rank == sum(ranks)
    np.testing.assert_allclose(delta(merged).numpy(), _dense(parts, strengths), atol=1e-12)


def test_concatenation_of_one_adapter_at_strength_one_keeps_its_factors() -> None:
    (part,) = _parts(20, 30, (4,))
    merged = linear.concatenate([part], [1.0])
    assert torch.equal(merged.up, part.up)
    assert torch.equal(merged.down, part.down)


def test_a_tiny_scale_is_shared_between_both_factors() -> None:
    """kohya's alpha of 1 at rank 128 must not push `up` into float16's subnormal numbers."""
    up, down = torch.full((4, 1), 1e-3), torch.full((1, 4), 0.5)
    merged = linear.concatenate([Factors(up, down, 1 / 128)], [0.7])
    stored = Factors(merged.up.half().float(), merged.down.half().float())
    wanted = 0.7 / 128 * 1e-3 * 0.5
    assert delta(stored)[0, 0].item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("out", "inner", "ranks"), CASES)
@pytest.mark.parametrize("rank", [1, 3, 8, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_truncation_is_the_nearest_of_its_rank(
    out: int, inner: int, ranks: tuple[int, ...], rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    parts, strengths = _parts(out, inner, ranks, dtype), list(STRENGTHS[: len(ranks)])
    dense = _dense(parts, strengths)
    spectrum = linear.decompose(parts, strengths)
    nearest = linear.truncate(spectrum, rank)
    scale = np.linalg.norm(dense)
    np.testing.assert_allclose(
        delta(nearest).numpy() / scale, oracle.nearest(dense, rank) / scale, atol=tolerance
    )
    assert linear.lost(spectrum.values, rank) / scale == pytest.approx(
        oracle.relative_error(dense, rank), abs=tolerance
    )


def test_both_factors_carry_the_same_size() -> None:
    nearest = linear.truncate(linear.decompose(_parts(20, 30, (4, 7)), [1.0, 1.0]), 6)
    torch.testing.assert_close(nearest.up.norm(dim=0), nearest.down.norm(dim=1))


def test_signs_do_not_depend_on_the_order_of_inputs() -> None:
    parts = _parts(20, 30, (4, 7))
    one = linear.truncate(linear.decompose(parts, [0.7, 0.5]), 5)
    two = linear.truncate(linear.decompose(parts[::-1], [0.5, 0.7]), 5)
    torch.testing.assert_close(one.up, two.up)
    torch.testing.assert_close(one.down, two.down)
    largest = one.up.gather(0, one.up.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_adapter_twice_is_the_adapter_at_the_summed_strength(dtype: torch.dtype) -> None:
    (part,) = _parts(20, 30, (4,), dtype)
    merged = linear.truncate(linear.decompose([part, part], [0.7, 0.5]), 4)
    wanted = 1.2 * delta(part)
    torch.testing.assert_close(delta(merged), wanted, rtol=1e-4, atol=1e-4)


def test_strengths_that_cancel_leave_nothing() -> None:
    (part,) = _parts(20, 30, (4,))
    merged = linear.truncate(linear.decompose([part, part], [0.7, -0.7]), 8)
    assert delta(merged).abs().max() < 1e-12


def test_zero_factors_merge_to_zero() -> None:
    part = Factors(torch.zeros(20, 4), torch.zeros(4, 30))
    spectrum = linear.decompose([part, part], [1.0, 1.0])
    assert torch.equal(delta(linear.truncate(spectrum, 3)), torch.zeros(20, 30))
    assert linear.rank_for_energy(spectrum.values, 0.99) == 1


@pytest.mark.parametrize("energy", [1e-6, 0.5, 0.9, 0.99, 1.0])
def test_energy_keeps_the_asked_share_with_the_least_rank(energy: float) -> None:
    spectrum = linear.decompose(_parts(20, 30, (4, 7)), [1.0, 1.0])
    rank = linear.rank_for_energy(spectrum.values, energy)
    squares = spectrum.values.numpy() ** 2
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-12)
    assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum()


@pytest.mark.parametrize("budget", [0, 5, 10, 14, 23, 37, 50, 200])
def test_a_budget_is_kept_and_spent_as_well_as_any_choice_could(budget: int) -> None:
    spectra = [
        torch.tensor([5.0, 2.0, 1.0]),
        torch.tensor([4.0, 3.9]),
        torch.tensor([0.5, 0.1, 0.0]),
    ]
    costs = [5, 10, 3]
    ranks = linear.ranks_for_budget(spectra, costs, 0, budget)
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    error = sum(linear.lost(s, r) ** 2 for s, r in zip(spectra, ranks, strict=True))
    best = oracle.least_error_within([s.double().numpy() for s in spectra], costs, budget)
    # Greedy is optimal up to the one candidate that no longer fits.
    slack = max(
        (s[r].item() ** 2 for s, r in zip(spectra, ranks, strict=True) if r < len(s)), default=0
    )
    assert best - 1e-9 <= error <= best + slack


def test_a_budget_pays_for_each_modules_alpha() -> None:
    spectra = [torch.tensor([5.0, 4.0]), torch.tensor([3.0, 2.0])]
    assert linear.ranks_for_budget(spectra, [10, 10], 4, 24) == [2, 0]
    assert linear.ranks_for_budget(spectra, [10, 10], 4, 23) == [1, 0]
    assert linear.ranks_for_budget(spectra, [10, 10], 4, 38) == [2, 1]


def test_a_budget_never_takes_a_rank_without_the_ones_before_it() -> None:
    spectra = [torch.tensor([5.0, 4.0]), torch.tensor([1.0])]
    assert linear.ranks_for_budget(spectra, [100, 10], 0, 50) == [0, 1]
    # The first rank pays for the alpha and does not fit; the second alone would.
    assert linear.ranks_for_budget([torch.tensor([5.0, 4.0])], [10], 4, 12) == [0]
