"""The nearest change of low rank to rows that are asked for, against the dense decomposition."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from merge import rangefinder
from merge.methods import linear
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.rangefinder import approximate, approximate_energy

DRAWS = Draws(0, "unet.mid_block", ())


class Rows(Delta):
    """A dense matrix as rows; `asked` counts how often every row was."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape = matrix, (matrix.shape[0], matrix.shape[1])
        self.asked = torch.zeros(len(matrix), dtype=torch.int64)

    def rows(self, first: int, count: int) -> Tensor:
        assert first + count <= self.shape[0]
        self.asked[first : first + count] += 1
        return self.matrix[first : first + count].clone()


def with_values(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((columns, len(values))))[0]
    return torch.from_numpy(left * values @ right.T)


def falling(j: np.ndarray) -> np.ndarray:
    return j**-1.0


def slowly(j: np.ndarray) -> np.ndarray:
    return j**-0.5


def ending(j: np.ndarray) -> np.ndarray:
    return np.exp(-j / 8)


def flat(j: np.ndarray) -> np.ndarray:
    return np.ones_like(j)


@pytest.mark.parametrize(
    ("spectrum", "excess"), [(falling, 1e-6), (slowly, 3e-4), (ending, 1e-9), (flat, 5e-3)]
)
@pytest.mark.parametrize("shape", [(400, 520), (520, 400)])
def test_the_error_is_nearly_the_least_possible(
    spectrum: Callable[[np.ndarray], np.ndarray], excess: float, shape: tuple[int, int]
) -> None:
    values = spectrum(np.arange(1, 401, dtype=np.float64))
    dense = with_values(values, *shape)
    found = approximate(Rows(dense), DRAWS, 16)
    kept = linear.truncate(found.spectrum, 16)
    error = torch.linalg.vector_norm(dense - kept.up @ kept.down).item()
    least = np.sqrt((values[16:] ** 2).sum())
    assert least * (1 - 1e-9) <= error <= least * (1 + excess)
    # And it is known exactly, not estimated.
    assert found.lost(16) == pytest.approx(error, rel=1e-6)
    assert found.norm == pytest.approx(np.sqrt((values**2).sum()), rel=1e-12)


def test_singular_values_and_vectors_are_those_of_the_dense_decomposition() -> None:
    dense = with_values(0.5 ** np.arange(60), 300, 280)
    its = approximate(Rows(dense), DRAWS, 12).spectrum
    np.testing.assert_allclose(its.values.numpy(), 0.5 ** np.arange(12), rtol=1e-9)
    left, right = its.outer_up @ its.inner_up, its.inner_down @ its.outer_down
    torch.testing.assert_close(left.mT @ left, torch.eye(12).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(right @ right.mT, torch.eye(12).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(dense @ right.mT, left * its.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", [(320, 300), (30, 400), (400, 30), (7, 5), (1, 9), (9, 1)])
def test_a_change_of_low_rank_is_found_exactly(shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape)
    dense = with_values(np.linspace(1, 1e-3, rank), *shape)
    found = approximate(Rows(dense), DRAWS, rank)
    kept = linear.truncate(found.spectrum, rank)
    assert torch.linalg.vector_norm(dense - kept.up @ kept.down) < 1e-10
    assert found.lost(rank) < 1e-10


@pytest.mark.parametrize("shape", [(300, 300), (5, 7)])
def test_zero_has_no_direction_and_nothing_is_lost(shape: tuple[int, int]) -> None:
    for found in (
        approximate(Rows(torch.zeros(shape)), DRAWS, 2),
        approximate_energy(Rows(torch.zeros(shape)), DRAWS, 0.9),
    ):
        assert found.norm == found.outside == 0
        assert not linear.truncate(found.spectrum, 1).up.any()


def test_small_changes_and_large_ranks_are_decomposed_exactly() -> None:
    values = slowly(np.arange(1, 41, dtype=np.float64))
    for rank in (4, 39, 40, 100):
        found = approximate(Rows(with_values(values, 50, 40)), DRAWS, rank)
        np.testing.assert_allclose(found.spectrum.values.numpy(), values[:rank], rtol=1e-12)
        assert found.outside == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("shape", [(320, 330), (64, 80)])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 0.99999999])
def test_energy_takes_the_least_rank_that_keeps_it(shape: tuple[int, int], energy: float) -> None:
    values = np.exp(-np.arange(60) / 4.0)
    found = approximate_energy(Rows(with_values(values, *shape)), DRAWS, energy)
    share = np.cumsum(values**2) / (values**2).sum()
    assert len(found.spectrum.values) == int((share >= energy).nonzero()[0][0]) + 1
    assert (found.outside / found.norm) ** 2 <= 1 - energy + 1e-12


def test_all_the_energy_is_the_rank_of_the_change_and_never_more() -> None:
    low = with_values(np.linspace(2, 1, 20), 400, 400)
    assert len(approximate_energy(Rows(low), DRAWS, 1.0).spectrum.values) == 20
    full = with_values(np.linspace(2, 1, 48), 48, 60)
    assert len(approximate_energy(Rows(full), DRAWS, 1.0).spectrum.values) == 48


def test_what_is_left_is_known_where_next_to_nothing_is_left() -> None:
    values = np.concatenate([np.ones(8), np.full(292, 1e-7)])
    found = approximate(Rows(with_values(values, 400, 300)), DRAWS, 8)
    # The difference of the squared norms, 8 + 3e-12 and 8, has four digits of it at most.
    assert found.lost(8) == pytest.approx(1e-7 * np.sqrt(292), rel=1e-6)


def test_rows_are_asked_for_four_times_and_in_pieces() -> None:
    dense = Rows(with_values(slowly(np.arange(1, 301.0)), 2000, 900))
    largest = 0

    def rows(first: int, count: int) -> Tensor:
        nonlocal largest
        largest = max(largest, count)
        return Rows.rows(dense, first, count)

    dense.rows = rows  # type: ignore[method-assign]
    approximate(dense, DRAWS, 16)
    assert dense.asked.unique().tolist() == [4]
    assert largest * 900 <= 512 * 1024


def test_the_same_key_gives_the_same_bytes_and_another_key_the_same_change() -> None:
    dense = Rows(with_values(slowly(np.arange(1, 301.0)), 320, 300))
    first, second = (approximate(dense, DRAWS, 4).spectrum for _ in range(2))
    assert torch.equal(first.outer_up, second.outer_up)
    assert torch.equal(first.outer_down, second.outer_down)
    other = approximate(dense, Draws(1, "unet.mid_block", ()), 4).spectrum
    assert not torch.equal(first.outer_up, other.outer_up)
    torch.testing.assert_close(first.values, other.values, rtol=1e-5, atol=0)


def test_start_vectors_are_standard_normal_and_do_not_depend_on_their_number() -> None:
    few, many = (rangefinder.Gaussian(DRAWS).columns(5000, count) for count in (2, 6))
    assert torch.equal(few, many[:, :2])
    assert abs(many.mean().item()) < 0.03
    assert abs(many.std().item() - 1) < 0.02
    for one, other in pairwise(many.T):
        assert abs((one * other).mean().item()) < 0.05


def test_float32_rows_are_added_up_in_float64() -> None:
    dense = with_values(falling(np.arange(1, 301.0)), 320, 300).float()
    found = approximate(Rows(dense), DRAWS, 8)
    assert found.norm == pytest.approx(np.linalg.norm(dense.double().numpy()), rel=1e-12)
    assert found.spectrum.values.dtype == torch.float64
