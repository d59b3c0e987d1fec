"""Makers of changes and of draws for tests of element-wise methods."""

import numpy as np
import torch
from torch import Tensor

from merge.methods.draws import Draws
from merge.methods.elements import Delta

# Of many tiles, of one row, one column and one element; the first needs several looks to find a cut.
SHAPES = [(600, 1000), (7, 11), (1, 9), (9, 1), (1, 1), (3, 300_000)]


class Product(Delta):
    """As the engine gives a change: a product that is computed when rows are asked for."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up, self.down = up, down
        self.shape = (up.shape[0], down.shape[1])

    def rows(self, first: int, count: int) -> Tensor:
        return self.up[first : first + count] @ self.down

    def dense(self) -> np.ndarray:
        """The numbers that its rows have where they are asked for as methods do."""
        from merge.methods.elements import tiles

        return torch.cat([self.rows(*tile) for tile in tiles(self.shape)]).double().numpy()


def random_changes(
    shape: tuple[int, int], count: int = 3, dtype: torch.dtype = torch.float64, seed: int = 3
) -> list[Product]:
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    return [
        Product(
            torch.randn(out, 4, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(4, columns, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(count)
    ]


def draws(count: int = 3, seed: int = 0, module: str = "unet.q") -> Draws:
    return Draws(seed, module, tuple(f"sha-{i}" for i in range(count)))


def whole(delta: Delta) -> np.ndarray:
    return delta.rows(0, delta.shape[0]).double().numpy()
