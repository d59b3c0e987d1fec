"""Dense changes as rows that are asked for: what element-wise methods take and give.

A dense change may be larger than memory should hold, so nothing here is ever whole.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class Delta(ABC):
    """A change of `shape` (out, in); asking for the same rows again gives the same numbers."""

    shape: tuple[int, int]

    @abstractmethod
    def rows(self, first: int, count: int) -> Float[Tensor, "count in"]:
        """`count` rows from row `first`; the caller may change the result."""
