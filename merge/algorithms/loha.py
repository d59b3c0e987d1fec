"""LoHa: the elementwise product of two low-rank products.

f(W) - W = c * (w1_a @ w1_b) o (w2_a @ w2_b), c = alpha / rank: Hyeon-Woo et al. 2022,
arXiv:2108.06098 (FedPara), proposition 1; named LoHa in Yeh et al. 2023, arXiv:2309.14859, section 4.2.
The Tucker form for convolutions (FedPara, proposition 3; hada_t1, hada_t2) stores w_a as (rank, out)
and each side as sum over i, j of t[i, j, y, x] w_a[i, o] w_b[j, n]; it folds into the plain form.

Row o of the result is a sum over pairs (i, j) of w1_a[o, i] w2_a[o, j] times w1_b[i] o w2_b[j], so it
is exactly a LoRA of rank r1 * r2. For large ranks that is more than the weight's own, and the rows
themselves are the cheaper way.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.locon import folded
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import check_extent
from merge.algorithms.scale import scale_of

ROLES = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 alpha scale scalar"


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    scale = scale_of(tensors, tensors["hada_w1_b"].shape[0], facts)
    first, second = _side(tensors, "1"), _side(tensors, "2")
    for up, down in (first, second):
        if up.shape[1] != down.shape[0]:
            raise ValueError(f"w_a has rank {up.shape[1]} and w_b has rank {down.shape[0]}")
        check_extent((up.shape[0], down.shape[1]), shape)
    return LoHa(*first, *second, scale)


def _side(
    tensors: Mapping[str, Tensor], number: str
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r2 in"]]:
    up, down = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"].flatten(1)
    core = tensors.get(f"hada_t{number}")
    if core is None:
        return up.flatten(1), down  # OneTrainer stores w_b with its kernel
    return up.mT, folded(core, down)


class LoHa(Change):
    needs = Needs.NOTHING

    def __init__(
        self,
        up1: Float[Tensor, "out r1"],
        down1: Float[Tensor, "r1 in"],
        up2: Float[Tensor, "out r2"],
        down2: Float[Tensor, "r2 in"],
        scale: float,
    ) -> None:
        self._up1, self._down1, self._up2, self._down2 = up1, down1, up2, down2
        self._scale = scale
        # Rows of 3072 x 3072 take as long as a product of rank 100 to 200, on one core.
        self.is_product = up1.shape[1] * up2.shape[1] <= 64

    def factors(self) -> Factors:
        """Products of rows and of columns (Khatri-Rao), of rank r1 * r2."""
        up = self._up1.unsqueeze(2) * self._up2.unsqueeze(1)  # (out, r1, r2)
        down = self._down1.unsqueeze(1) * self._down2.unsqueeze(0)  # (r1, r2, in)
        return Factors(up.flatten(1), down.flatten(0, 1), self._scale)

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        some = slice(first, first + rows)
        product = self._up1[some] @ self._down1
        return product.mul_(self._up2[some] @ self._down2).mul_(self._scale)
