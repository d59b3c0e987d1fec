"""LoKr: the Kronecker product of a small and a larger matrix.

f(W) - W = c * (w1 (x) w2): Yeh et al. 2023, arXiv:2309.14859, section 4.3; the layout is LyCORIS'.
w1 (a, c') or w1_a @ w1_b; w2 (b, d, *kernel), w2_a @ w2_b, or in Tucker form
sum over i, j of t2[i, j, y, x] w2_a[i, p] w2_b[j, q]. out = a * b, in = c' * d.

c = alpha / rank where a side is decomposed, the rank being w2's if w2 is. If neither is, c = 1 and
alpha means nothing: LyCORIS then stores the rank somebody asked for, often 10000 or more. PEFT's
configuration gives c for every case.

Entry (i * b + p, j * e + q) is w1[i, j] w2[p, q] with e = d * kernel, so a row of the change needs one
row of each side. With w1 = L1 R1 and w2 = L2 R2 it is (L1 (x) L2) @ (R1 (x) R2).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.locon import folded
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import check_extent
from merge.algorithms.scale import scale_of

ROLES = "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 alpha scale scalar"


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    left, right = _left(tensors), _right(tensors)
    for side in (left, right):
        if len(side) == 2 and side[0].shape[1] != side[1].shape[0]:
            raise ValueError(f"w_a has rank {side[0].shape[1]} and w_b has rank {side[1].shape[0]}")
    rows = left[0].shape[0] * right[0].shape[0]
    check_extent((rows, left[-1].shape[1] * right[-1].shape[1]), shape)
    return LoKr(left, right, _scale(tensors, facts))


Side = tuple[Tensor] | tuple[Tensor, Tensor]  # a matrix, or the two whose product it is


def _left(tensors: Mapping[str, Tensor]) -> Side:
    if "lokr_w1" in tensors:
        return (tensors["lokr_w1"].flatten(1),)
    return tensors["lokr_w1_a"], tensors["lokr_w1_b"]


def _right(tensors: Mapping[str, Tensor]) -> Side:
    if "lokr_w2" in tensors:
        return (tensors["lokr_w2"].flatten(1),)
    up, down = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    if "lokr_t2" in tensors:
        return up.mT.contiguous(), folded(tensors["lokr_t2"], down)
    return up.flatten(1), down


def _scale(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> float:
    for role in ("lokr_w2_b", "lokr_w1_b"):
        if role in tensors:
            return scale_of(tensors, tensors[role].shape[0], facts)
    without_alpha = {role: tensor for role, tensor in tensors.items() if role != "alpha"}
    return scale_of(without_alpha, 1, facts)


class LoKr(Change):
    """Rows cost one multiplication for each entry: a tenth or less of the product of its factors."""

    needs = Needs.NOTHING

    def __init__(self, left: Side, right: Side, scale: float) -> None:
        self._left_rows = left[0].shape[0]
        self._left, self._right, self._scale = left, right, scale

    def factors(self) -> Factors | None:
        """None if both sides are whole. One whole side (m, n) beside a product is w @ I or I @ w."""
        if len(self._left) == len(self._right) == 1:
            return None
        (l1, r1), (l2, r2) = _as_product(self._left), _as_product(self._right)
        return Factors(torch.kron(l1, l2), torch.kron(r1, r2), self._scale)

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        row = torch.arange(first, first + rows, device=self._left[0].device)
        n = self._right[0].shape[0]
        left, right = _rows(self._left, row // n), _rows(self._right, row % n)
        return (left.mul_(self._scale).unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def _rows(side: Side, index: Tensor) -> Tensor:
    picked = side[0][index]  # a copy
    return picked if len(side) == 1 else picked @ side[1]


def _as_product(side: Side) -> tuple[Tensor, Tensor]:
    if len(side) == 2:
        return side
    (whole,) = side
    m, n = whole.shape
    identity = torch.eye(min(m, n), dtype=whole.dtype, device=whole.device)
    return (identity, whole) if m < n else (whole, identity)
