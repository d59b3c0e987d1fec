"""HiRA: a weight changes by itself times a low-rank matrix, elementwise: W' = W + W * (B @ A).

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
ICLR 2025, eq. 4, as PEFT 0.21 stores it: A is `hira_A`, B is `hira_B`, and there is no alpha.
An embedding is (vocabulary, dim) and its factors are of the transposed product.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import low_rank

ROLES = "hira_A hira_B hira_embedding_A hira_embedding_B"


@dataclass(frozen=True, slots=True)
class HiRA(Change):
    """W * (up @ down)."""

    product: Factors

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        return base * (self.product.up[first : first + rows] @ self.product.down)


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> HiRA:
    if "hira_embedding_A" in tensors:
        up, down = tensors["hira_embedding_A"].mT, tensors["hira_embedding_B"].mT
    else:
        up, down = tensors["hira_B"], tensors["hira_A"]
    return HiRA(low_rank(up, down, 1.0, shape).factors())
