"""LoRA on a packed parameter of n experts: each expert changes by c * up[e] @ down[e].

PEFT's target_parameters (ParamWrapper.get_delta_weight, peft 0.21, Apache-2.0) stores all of A as
(n * rank, in), expert after expert, and all of B as (out, rank * n), the expert running fastest.
The parameter is (n, out, in), or (n, in, out) and changes by the transposes; as a matrix it has
one row for each expert.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import low_rank
from merge.algorithms.scale import scale_of

ROLES = "down up alpha"


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    down, up = tensors["down"], tensors["up"]
    n = shape[0] if len(shape) == 3 else 1
    if down.shape[0] % n or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"down is {tuple(down.shape)} and up is {tuple(up.shape)}, for {n} experts in {shape}"
        )
    scale = scale_of(tensors, down.shape[0] // n, facts)
    if len(shape) == 2:
        return low_rank(up, down, scale, shape)
    ups = up.reshape(up.shape[0], -1, n).permute(2, 0, 1)
    downs = down.reshape(n, -1, down.shape[1])
    if _is_transposed(ups, downs, shape, facts):
        ups, downs = downs.mT, ups.mT
    found = (n, ups.shape[1], downs.shape[2])
    if found != shape:
        raise ValueError(f"delta is {found}, base weight is {shape}")
    return Experts(ups, downs, scale)


def _is_transposed(
    up: Tensor, down: Tensor, shape: tuple[int, ...], facts: Mapping[str, Any]
) -> bool:
    """Whether the parameter is (n, in, out): its shape says so, or a fact where it is square."""
    stated = facts.get("experts_transposed")
    if stated is not None:
        return bool(stated)
    if up.shape[1] == down.shape[2]:
        raise ValueError(f"experts of {shape} may be stored (in, out) or (out, in); none is said")
    return shape[1] == down.shape[2]


class Experts(Change):
    """One row of the matrix is one expert's whole product."""

    needs = Needs.NOTHING

    def __init__(
        self, up: Float[Tensor, "n out rank"], down: Float[Tensor, "n rank in"], scale: float
    ) -> None:
        self._up, self._down, self._scale = up, down, scale

    def expert(self, number: int) -> Factors:
        """The change of one expert's own matrix."""
        return Factors(self._up[number], self._down[number], self._scale)

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        some = slice(first, first + rows)
        return self._scale * torch.bmm(self._up[some], self._down[some]).flatten(1)
