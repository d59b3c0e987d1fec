"""Dense changes as rows that are asked for: what element-wise methods take and give.

A dense change may be larger than memory should hold, so nothing here is ever whole. Methods read
their changes in tiles of whole rows that always begin at the same rows, because the last bits of a
product depend on how many rows it has, and an element-wise method may turn a last bit into a kept or
a dropped element. So on one machine a result is the same for any number of threads and whoever asks
for which rows; on machines whose products differ in their last bits, elements that tie to within
those bits may be chosen differently.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

TILE_ELEMENTS = 256 * 1024  # stays in a core's cache; bakes use tiles of the same rows


class Delta(ABC):
    """A change of `shape` (out, in); asking for the same rows again gives the same numbers."""

    shape: tuple[int, int]

    @abstractmethod
    def rows(self, first: int, count: int) -> Float[Tensor, "count in"]:
        """`count` rows from row `first`; the caller may change the result."""


class Dense(Delta):
    """A change that is small enough to be there as a whole."""

    def __init__(self, matrix: Float[Tensor, "out in"]) -> None:
        self._matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])

    def rows(self, first: int, count: int) -> Float[Tensor, "count in"]:
        return self._matrix[first : first + count].clone()


class Tiled(Delta):
    """A change that is computed tile by tile, and only in whole tiles; for any number of threads."""

    def __init__(
        self, shape: tuple[int, int], compute: Callable[[int, int], Float[Tensor, "count in"]]
    ) -> None:
        """`compute` is asked for (first row, rows) of a tile, and gives what is then the caller's."""
        self.shape = shape
        self._compute = compute
        self._held = threading.local()  # a thread's last tile, for those who ask for a few rows

    def rows(self, first: int, count: int) -> Float[Tensor, "count in"]:
        step = tile_rows(self.shape)
        if first % step == 0 and count == min(step, self.shape[0] - first):
            return self._compute(first, count)
        end = first + count
        return torch.cat(
            [
                self._tile(begin)[max(first - begin, 0) : end - begin]
                for begin in range(first - first % step, end, step)
            ]
        )

    def _tile(self, begin: int) -> Float[Tensor, "count in"]:
        if getattr(self._held, "begin", None) != begin:
            rows = min(tile_rows(self.shape), self.shape[0] - begin)
            self._held.tile, self._held.begin = self._compute(begin, rows), begin
        tile: Tensor = self._held.tile
        return tile


def tile_rows(shape: tuple[int, int]) -> int:
    """How many rows a tile of a change has; the last one may have fewer."""
    return max(1, TILE_ELEMENTS // shape[1])


def tiles(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, rows) of every tile."""
    step = tile_rows(shape)
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)
