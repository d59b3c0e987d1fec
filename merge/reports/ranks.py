"""Size against error: what every choice of rank will cost, from the spectra alone.

The best merge of rank k leaves out the singular values after the k-th (Eckart & Young 1936), so its
error is known before it is made: sqrt(sum over layers and j > k of s_j^2) / |M|.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from merge.methods import linear
from merge.recipe import Rank
from merge.reports.report import Choice, Ranks

_ENERGIES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999)
_COMMON = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ERRORS = (0.1, 0.05, 0.02, 0.01, 0.001)
_FRONTIER_POINTS = 96


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that a merge writes as factors: its spectrum, the bytes of one rank, its exact rank
    and the largest that a lower one is computed at.
    """

    values: NDArray[np.float64]
    bytes_per_rank: int
    exact: int
    most: int


@dataclass(frozen=True, slots=True)
class Prices:
    """Of a layer's factors beside their ranks, of what is stored whole, and its energy."""

    bytes_per_layer: int
    stored_bytes: int
    stored_energy: float


def measure_ranks(curves: "Curves", asked: Rank) -> Ranks:
    """Every choice that a recipe can make."""
    most = max(layer.most for layer in curves.layers)
    common = sorted({rank for rank in _COMMON if rank < most} | {most})
    every = range(1, most + 1) if most <= 256 else common
    return Ranks(
        asked=curves.asked(asked),
        exact=curves.exact(),
        fixed=tuple(curves.fixed(rank) for rank in every),
        energy=tuple(curves.energy(share) for share in _ENERGIES),
        shared=tuple(curves.shared(rank) for rank in common),
        least=tuple(filter(None, (curves.least(error) for error in _ERRORS))),
        frontier=curves.frontier(),
    )


class Curves:
    """The spectra of all layers of a merge, of which there is at least one."""

    def __init__(self, layers: Sequence[Layer], prices: Prices) -> None:
        self.layers, self._prices = layers, prices
        # What is lost at rank 0, 1, ...: the reversed sum adds the small values first.
        self._tails = [np.append(np.cumsum((layer.values**2)[::-1])[::-1], 0.0) for layer in layers]
        energy = sum(float(tail[0]) for tail in self._tails) + prices.stored_energy
        self._norm = sqrt(energy)

    def asked(self, rank: Rank) -> Choice:
        if rank.fixed is not None:
            return self.fixed(rank.fixed)
        if rank.energy is not None:
            return self.energy(rank.energy)
        if rank.budget_bytes is not None:
            return self.budget(rank.budget_bytes)
        return self.exact() if rank.shared is None else self.shared(rank.shared)

    def ranks(self, rank: Rank) -> list[int]:
        """Of every layer, as a merge with this choice will have them."""
        if rank.fixed is not None:
            return self._at(rank.fixed)
        if rank.energy is not None:
            return self._holding(rank.energy)
        if rank.budget_bytes is not None:
            return self._within(rank.budget_bytes)
        if rank.shared is not None:
            return self._sharing(rank.shared)
        return [layer.exact for layer in self.layers]

    def exact(self) -> Choice:
        return self._choice("exact", 1.0, [layer.exact for layer in self.layers], is_exact=True)

    def fixed(self, rank: int) -> Choice:
        return self._choice("fixed", rank, self._at(rank))

    def energy(self, share: float) -> Choice:
        return self._choice("energy", share, self._holding(share))

    def budget(self, budget_bytes: int) -> Choice:
        return self._choice("budget_bytes", budget_bytes, self._within(budget_bytes))

    def shared(self, rank: int) -> Choice:
        return self._choice("shared", rank, self._sharing(rank))

    def least(self, error: float) -> Choice | None:
        """The smallest shared rank with at most this error; None where only the exact sum has."""
        most = max(layer.most for layer in self.layers)
        rank = bisect_left(range(1, most), True, key=lambda k: self.shared(k).error <= error) + 1
        found = self.shared(rank)
        return found if found.error <= error else None

    def _choice(
        self, name: str, value: float, ranks: Sequence[int], *, is_exact: bool = False
    ) -> Choice:
        lost = 0.0
        if not is_exact:
            pairs = zip(self._tails, ranks, strict=True)
            lost = sum(float(tail[min(rank, len(tail) - 1)]) for tail, rank in pairs)
        kept = [rank for rank in ranks if rank] or [0]
        return Choice(
            name,
            value,
            self._size(ranks),
            sqrt(lost) / self._norm if self._norm else 0.0,
            (min(kept), max(kept)),
            sum(rank == 0 for rank in ranks),
        )

    def _size(self, ranks: Sequence[int]) -> int:
        return self._prices.stored_bytes + sum(
            rank * layer.bytes_per_rank + self._prices.bytes_per_layer * (rank > 0)
            for layer, rank in zip(self.layers, ranks, strict=True)
        )

    def _at(self, rank: int) -> list[int]:
        return [min(rank, layer.most) for layer in self.layers]

    def _holding(self, share: float) -> list[int]:
        return [linear.rank_for_energy(torch.from_numpy(its.values), share) for its in self.layers]

    def _sharing(self, rank: int) -> list[int]:
        return self._within(self._size(self._at(rank)) - self._prices.stored_bytes)

    def _within(self, budget_bytes: int) -> list[int]:
        """As merge.methods.linear.ranks_for_budget, with the candidates sorted once for all budgets."""
        candidates = self._candidates
        n = int(np.searchsorted(candidates.sizes, budget_bytes, side="right"))
        ranks = np.bincount(candidates.layers[:n], minlength=len(self.layers))
        left = budget_bytes - (int(candidates.sizes[n - 1]) if n else 0)
        least = min((layer.bytes_per_rank for layer in self.layers), default=0)
        for index in range(n, len(candidates.sizes)):
            if left < least:
                break
            layer = int(candidates.layers[index])
            cost = int(candidates.costs[index])
            if ranks[layer] == candidates.number[index] and cost <= left:
                ranks[layer] += 1
                left -= cost
        return [int(rank) for rank in ranks]

    def frontier(self) -> tuple[tuple[int, float], ...]:
        """The least error at some sizes: each more rank is that which removes most error per byte."""
        candidates = self._candidates
        left = np.append(np.cumsum(candidates.removed[::-1])[::-1], 0.0)[1:]
        errors = np.sqrt(left) / (self._norm or 1.0)
        stored = self._prices.stored_bytes
        return tuple(
            (int(candidates.sizes[i]) + stored, float(errors[i])) for i in _spread(candidates.sizes)
        )

    @cached_property
    def _candidates(self) -> "_Candidates":
        lengths = [len(layer.values) for layer in self.layers]
        layers = np.repeat(np.arange(len(lengths)), lengths)
        number = np.concatenate([np.arange(length) for length in lengths])
        removed = np.concatenate([layer.values for layer in self.layers]) ** 2
        price = np.array([layer.bytes_per_rank for layer in self.layers])[layers]
        order = np.lexsort((number, layers, -removed / price))
        order = order[removed[order] > 0]
        costs = price[order] + self._prices.bytes_per_layer * (number[order] == 0)
        return _Candidates(layers[order], number[order], removed[order], costs, np.cumsum(costs))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """One more rank of a layer each, those that remove most error per byte first."""

    layers: NDArray[np.int64]
    number: NDArray[np.int64]  # the rank that the layer has before
    removed: NDArray[np.float64]  # squared error
    costs: NDArray[np.int64]
    sizes: NDArray[np.int64]  # of this one and all before it


def _spread(sizes: NDArray[np.int64]) -> list[int]:
    """Indices that are about equally far apart in the logarithm of the size."""
    if not len(sizes):
        return []
    wanted = np.geomspace(sizes[0], sizes[-1], _FRONTIER_POINTS)
    return sorted({int(i) for i in np.searchsorted(sizes, wanted).clip(0, len(sizes) - 1)})
