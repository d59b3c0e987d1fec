"""Which elements of a change are the largest, exactly and without sorting it.

Magnitudes are ordered as their bit patterns are, so the k-th largest is found digit by digit: a
histogram over the upper 16 bits says in which bin it lies, and once a bin holds few elements these
are collected and the k-th among them is taken. Two passes over the change are enough unless many
magnitudes are nearly equal. Elements of the same magnitude are taken in the order of their index,
so that exactly as many are kept as were asked for.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from merge.methods.elements import Delta, tiles
from merge.methods.rounds import Round

_DIGIT = 16
_FEW = 2**17  # elements that are collected rather than counted
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True, slots=True)
class Cut:
    """The k largest elements: those above `magnitude`, and those equal to it up to element `last`.

    `below` is the next smaller number.
    """

    magnitude: float
    below: float
    last: int

    def keep(self, tile: Float[Tensor, "count in"], element: int) -> Float[Tensor, "count in"]:
        """A tile that begins with `element` of its change, with zeros for all but the largest."""
        flat = tile.view(-1)
        split = min(max(self.last + 1 - element, 0), flat.numel())
        # hardshrink keeps what is above a threshold in magnitude, ten times as fast as a mask.
        kept = [
            torch.nn.functional.hardshrink(part, threshold)
            for part, threshold in ((flat[:split], self.below), (flat[split:], self.magnitude))
            if part.numel()
        ]
        return (kept[0] if len(kept) == 1 else torch.cat(kept)).view(tile.shape)


def share_of(density: float, elements: int, least: int = 1) -> int:
    """How many elements a share is: the nearest whole number, halves up, and no fewer than `least`.

    So a layer of few elements keeps its largest one.
    """
    return max(least, int(density * elements + 0.5))


def trimmed(deltas: Sequence[Delta], density: float) -> Callable[[int, Tensor, int], Tensor]:
    """Keeps the largest `density` of each change: of (its index, a tile, the tile's first element)."""
    found = [Cuts(delta, [share_of(density, prod(delta.shape))]) for delta in deltas]
    return lambda index, tile, element: found[index].get()[0].keep(tile, element)


class Cuts:
    """For each of some numbers, the cut that keeps as many elements of a change.

    They are found when they are first asked for, by all threads that ask.
    """

    def __init__(self, delta: Delta, kept: Sequence[int]) -> None:
        total = prod(delta.shape)
        self._delta, self._kept = delta, kept
        self._found = {0: Cut(inf, inf, -1), total: Cut(0.0, 0.0, total - 1)}
        dtype = delta.rows(0, 1).dtype
        self._searches = {
            count: _Search(count, total, dtype) for count in kept if count not in self._found
        }
        self._lock = threading.Lock()
        self._round = self._next_round()

    def get(self) -> list[Cut]:
        while (ended := self._round) is not None:
            ended.finish()
            with self._lock:
                if self._round is ended:
                    self._advance()
                    self._round = self._next_round()
        return [self._found[count] for count in self._kept]

    def _next_round(self) -> Round[tuple[int, int]] | None:
        return Round(tiles(self._delta.shape), self._look) if self._searches else None

    def _look(self, tile: tuple[int, int]) -> None:
        bits = _bits(self._delta, tile)
        for search in self._searches.values():
            search.look(tile[0] * self._delta.shape[1], bits)

    def _advance(self) -> None:
        for count in list(self._searches):
            if (cut := self._searches[count].advance(self._delta)) is not None:
                self._found[count] = cut
                del self._searches[count]


def _bits(delta: Delta, tile: tuple[int, int]) -> Int[Tensor, " elements"]:
    """The magnitudes of a tile as integers, which are in the same order."""
    rows = delta.rows(*tile)
    return rows.abs_().view(-1).view(_INTEGERS[rows.dtype])


class _Search:
    """For the `wanted`-th largest among `held` elements: those whose bits begin with `prefix`.

    Several threads may look; one of them advances after all have.
    """

    def __init__(self, wanted: int, held: int, dtype: torch.dtype) -> None:
        self._wanted, self._held, self._dtype = wanted, held, dtype
        self._prefix, self._is_all = 0, True
        self._unknown = 8 * dtype.itemsize - 1  # lower bits; a magnitude has no sign
        self._lock = threading.Lock()
        self._counts = torch.zeros(2**_DIGIT, dtype=torch.int64)
        self._collected: list[tuple[NDArray[np.intp], NDArray[np.integer]]] = []

    def look(self, element: int, bits: Int[Tensor, " elements"]) -> None:
        """Collect what is held of a tile, or count the values of the next digit in it."""
        if self._held <= _FEW:
            held = np.flatnonzero((bits >> self._unknown == self._prefix).numpy())
            self._collected.append((held + element, bits.numpy()[held]))
            return
        if not self._is_all:
            bits = bits[bits >> self._unknown == self._prefix]
        digits = (bits >> self._after()) & (2 ** (self._unknown - self._after()) - 1)
        counts = torch.bincount(digits, minlength=2**_DIGIT)
        with self._lock:
            self._counts += counts

    def advance(self, delta: Delta) -> Cut | None:
        """After all tiles: the cut, or None where another look is needed."""
        if self._held <= _FEW:
            elements, bits = (np.concatenate(its) for its in zip(*self._collected, strict=True))
            least = np.partition(bits, -self._wanted)[-self._wanted]
            ties = np.sort(elements[bits == least])
            n_above = np.count_nonzero(bits > least)
            return self._cut(int(least), int(ties[self._wanted - n_above - 1]))
        reached = self._counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = int((reached >= self._wanted).nonzero()[-1])
        self._wanted -= int(reached[digit] - self._counts[digit])
        self._held = int(self._counts[digit])
        self._prefix = self._prefix << (self._unknown - self._after()) | digit
        self._unknown, self._is_all = self._after(), False
        self._counts.zero_()
        if self._unknown > 0:
            return None
        last = prod(delta.shape) - 1
        if self._wanted < self._held and self._prefix > 0:  # which zeros are kept changes nothing
            last = _nth_equal(delta, self._prefix, self._wanted)
        return self._cut(self._prefix, last)

    def _after(self) -> int:
        """How many bits are unknown after the next digit."""
        return max(self._unknown - _DIGIT, 0)

    def _cut(self, bits: int, last: int) -> Cut:
        magnitude = torch.tensor(bits, dtype=_INTEGERS[self._dtype]).view(self._dtype)
        below = torch.nextafter(magnitude, torch.zeros_like(magnitude))
        return Cut(magnitude.item(), below.item(), last)


def _nth_equal(delta: Delta, magnitude: int, n: int) -> int:
    """The n-th element of exactly this magnitude."""
    for tile in tiles(delta.shape):
        equal = np.flatnonzero((_bits(delta, tile) == magnitude).numpy())
        if n <= len(equal):
            return tile[0] * delta.shape[1] + int(equal[n - 1])
        n -= len(equal)
    raise AssertionError("a change gave other numbers when it was asked again")
