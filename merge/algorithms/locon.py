"""LoRA and LoCon as kohya, LyCORIS, diffusers and PEFT store them: `down` (A) before `up` (B).

f(W) - W = c * (up @ down), c = alpha / rank: Hu et al. 2021, arXiv:2106.09685, eq. 3 and section 4.1;
LoCon, the same for convolutions: Yeh et al. 2023, arXiv:2309.14859, section 4.1.

- `mid` (m, n, *kernel) between 1x1 factors is the Tucker form (arXiv:2309.14859, eq. 8):
  sum over m, n of up[o, m] mid[m, n, y, x] down[n, i]. It folds into a `down` with the kernel.
- `up_bias` (PEFT's lora_bias, BFL's lora_B.bias) is added to the bias, times c.
- `bias_indices`, `bias_values`, `bias_size` (LyCORIS' extraction with use_sparse_bias) hold a sparse
  matrix that is added to up @ down before c: despite its name nothing of the layer's bias.

The weight is taken as (out, in). Where the base stores it as (in, out), as PEFT's fan_in_fan_out says
of GPT-2's Conv1D, the place in the base is transposed and not the change.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lowrank import LowRank, extent, low_rank
from merge.algorithms.scale import scale_of

ROLES = (
    "down up mid alpha scale scalar up_bias bias_indices bias_values bias_size"  # as in the grammar
)


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    down, up = tensors["down"], tensors["up"]
    scale = scale_of(tensors, down.shape[0], facts)
    if "mid" in tensors:
        down = folded(tensors["mid"], down.flatten(1))
    bias = scale * tensors["up_bias"] if "up_bias" in tensors else None
    product = low_rank(up, down, scale, shape, bias)
    if "bias_values" in tensors:
        return Residual(product, scale * _residual(tensors, shape))
    return product


def folded(mid: Float[Tensor, "m n *kernel"], down: Float[Tensor, "n2 in"]) -> Float[Tensor, "m _"]:
    """`down` with the kernel of the core in it, flattened to (m, in * kernel)."""
    if mid.shape[1] != down.shape[0]:
        raise ValueError(
            f"the Tucker core is {tuple(mid.shape)}, its factor is {tuple(down.shape)}"
        )
    return torch.einsum("mn...,ni->mi...", mid, down).flatten(1)


def _residual(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Float[Tensor, "out in"]:
    size = tuple(int(n) for n in tensors["bias_size"].tolist())
    indices, values = tensors["bias_indices"].long(), tensors["bias_values"].flatten()
    if indices.shape != (len(size), len(values)):
        raise ValueError(
            f"bias_indices is {tuple(indices.shape)}, for {len(values)} values of a {size} matrix"
        )
    limits = torch.tensor(size).unsqueeze(1)
    if bool((indices < 0).any()) or bool((indices >= limits).any()):
        raise ValueError(f"bias_indices point outside of the {size} matrix")
    dense = torch.zeros(size, dtype=values.dtype)
    dense.index_put_(tuple(indices), values, accumulate=True)
    if dense.numel() != extent(shape)[0] * extent(shape)[1]:
        raise ValueError(f"the residual is {size}, base weight is {shape}")
    return dense.reshape(extent(shape))


class Residual(Change):
    """A low-rank product and a matrix beside it."""

    needs = Needs.NOTHING

    def __init__(self, product: LowRank, matrix: Float[Tensor, "out in"]) -> None:
        self._product = product
        self._matrix = matrix

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        return self._product.weight(first, rows, base) + self._matrix[first : first + rows]

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return self._product.bias(bias, base)
