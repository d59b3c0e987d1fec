"""What an adapter does to one layer, whatever its algorithm.

Every algorithm is a function f on weights, and what enters a sum is f(W) - W at strength 1:
W' = W + sum of strength_i * (f_i(W) - W), each f_i taken at the weight of the base. So strength 0
is the base bit for bit, the order of adapters never matters, and no algorithm knows of strengths.

Weights are matrices here: (out, in * kernel) for convolutions, (n, 1) for norms and biases.
"""

from abc import ABC, abstractmethod
from enum import StrEnum

from jaxtyping import Bool, Float
from torch import Tensor

from merge.algorithms.lora import Factors


class Needs(StrEnum):
    """How much of the base's weight the change of some rows depends on."""

    NOTHING = "nothing"
    ROWS = "rows"  # these rows alone
    WHOLE = "whole"


class Change(ABC):
    """f(W) - W and f(b) - b of one layer; all tensors are in the dtype of computation."""

    needs: Needs
    # Whether the product of `factors` is also the cheapest way to the change: not for LoKr, nor for
    # LoHa of large ranks.
    is_product = False

    def factors(self) -> Factors | None:
        """The change of the weight as an exact low-rank product, where it is one without a base."""
        return None

    @abstractmethod
    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        """f(W) - W for `rows` rows from row `first`.

        `base` is None, those rows of W, or all of W, as `needs` says; it is not changed. Nor may the
        caller change the result, which can be the file's own tensor.
        """

    def replaces(self, first: int, rows: int) -> Bool[Tensor, " rows"] | None:
        """Which of these rows f gives new values whatever W is; None from all but replacements."""
        return None

    def new_bias(self) -> Float[Tensor, " out"] | None:
        """The bias that f puts in place of any other; None from all but replacements."""
        return None

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        """f(b) - b for all of the bias; None from an algorithm that leaves it alone.

        `bias` is None for a layer without one. `base` is all of W wherever `needs` is not NOTHING.
        """
        return None
