"""Random numbers that belong to an element and not to a moment.

Philox 4x64 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405, as numpy computes it) turns
a key and a counter into a number. The key is made of the recipe's seed, the module and the adapter,
the counter is the element, so that neither tiles, threads, the order of modules nor that of adapters
changes a draw, and the same adapter given twice draws the same.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_PER_COUNT = 4  # numbers for each value of the counter


@dataclass(frozen=True, slots=True)
class Draws:
    """Of one module; `adapters` name the inputs by content (merge.recipe: a SHA-256)."""

    seed: int
    module: str
    adapters: tuple[str, ...]

    def uniform(self, adapter: int, first: int, count: int) -> Float[Tensor, " count"]:
        """Numbers in [0, 1), float64, of the elements `first` to `first + count` of an adapter."""
        name = f"{self.seed}\0{self.module}\0{self.adapters[adapter]}".encode()
        digest = hashlib.blake2b(name, digest_size=16).digest()
        skipped = first % _PER_COUNT
        bits = np.random.Philox(key=np.frombuffer(digest, "<u8"), counter=first // _PER_COUNT)
        drawn = np.random.Generator(bits).random(skipped + count)
        return torch.from_numpy(drawn[skipped:])
