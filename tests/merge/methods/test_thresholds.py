"""The largest elements of a change, found without sorting it, against a stable sort."""

import numpy as np
import pytest
import torch
from torch import Tensor

from merge.methods import thresholds
from merge.methods.elements import Delta, Dense, tiles
from merge.methods.thresholds import Cuts, share_of
from tests.merge.methods.changes import SHAPES, random_changes
from tests.oracles import elementwise as oracle


def _kept(delta: Delta, count: int) -> np.ndarray:
    (cut,) = Cuts(delta, [count]).get()
    width = delta.shape[1]
    return torch.cat(
        [cut.keep(delta.rows(first, rows), first * width) for first, rows in tiles(delta.shape)]
    ).numpy()


def _expected(dense: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(dense.size, dtype=dense.dtype)
    largest = oracle.order(dense)[:count]
    kept[largest] = dense.ravel()[largest]
    return kept.reshape(dense.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_as_asked_for_are_kept_and_they_are_the_largest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    (change,) = random_changes(shape, 1, dtype)
    n = shape[0] * shape[1]
    for count in sorted({0, 1, n // 100, n // 2, n - 1, n}):
        np.testing.assert_array_equal(_kept(change, count), _expected(change.dense(), count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "values", [[0.0], [0.5], [0.0, 1.0], [0.0, -2.0, 2.0], [1.0, 1.0 + 2**-20]]
)
def test_equal_magnitudes_are_kept_in_the_order_of_their_index(
    values: list[float], dtype: torch.dtype
) -> None:
    # Few elements, which are collected, and more than that, of which the first tile holds 261,600.
    for shape, counts in [((6, 8), (1, 30, 47)), ((500, 800), (1, 100_000, 261_600, 399_999))]:
        generator = torch.Generator().manual_seed(5)
        picked = torch.randint(len(values), shape, generator=generator)
        dense = torch.tensor(values, dtype=dtype)[picked]
        for count in counts:
            found = _kept(Dense(dense), count)
            np.testing.assert_array_equal(found, _expected(dense.numpy(), count))


def test_several_cuts_are_found_in_the_same_looks() -> None:
    looks = 0

    class Counted(Dense):
        def rows(self, first: int, count: int) -> Tensor:
            nonlocal looks
            looks += first == 0 and count > 1
            return super().rows(first, count)

    (change,) = random_changes((600, 1000), 1)
    dense = torch.from_numpy(change.dense())
    both = Cuts(Counted(dense), [1_000, 300_000]).get()
    assert looks == 2
    assert both == [Cuts(Dense(dense), [count]).get()[0] for count in (1_000, 300_000)]


def test_subnormal_numbers_are_numbers() -> None:
    dense = torch.tensor([[1e-310, -3e-310, 2e-310, 0.0]], dtype=torch.float64)
    np.testing.assert_array_equal(_kept(Dense(dense), 1), [[0.0, -3e-310, 0.0, 0.0]])
    np.testing.assert_array_equal(_kept(Dense(dense), 3), dense.numpy())


@pytest.mark.parametrize(
    ("share", "elements", "count"),
    [(0.2, 24, 5), (0.5, 5, 3), (0.1, 15, 2), (0.01, 24, 1), (1.0, 7, 7), (0.3, 10, 3)],
)
def test_a_share_is_the_nearest_number_and_at_least_one(
    share: float, elements: int, count: int
) -> None:
    assert share_of(share, elements) == oracle.kept_count(share, elements) == count


def test_magnitudes_are_told_apart_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is collected, all four digits of a float64 are counted."""
    monkeypatch.setattr(thresholds, "_FEW", 0)
    (change,) = random_changes((30, 40), 1)
    np.testing.assert_array_equal(_kept(change, 333), _expected(change.dense(), 333))
