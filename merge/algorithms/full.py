"""Changes that are stored as they are: no factors, no scale.

- full: `diff` of the weight's shape and `diff_b` of the bias' (LyCORIS Full; Kohya's and ComfyUI's
  keys for norms and biases beside LoRA). An alpha beside them means nothing, as in ComfyUI.
- norm: `w_norm` and `b_norm`, the same for norm layers (LyCORIS).
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import LowRank, check_bias, check_extent, extent

FULL_ROLES = "diff diff_b alpha"
NORM_ROLES = "w_norm b_norm"


def read_full(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    return _change(tensors.get("diff"), tensors.get("diff_b"), shape)


def read_norm(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    return _change(tensors.get("w_norm"), tensors.get("b_norm"), shape)


def _change(weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> Change:
    if bias is not None:
        check_bias(bias, shape)
        bias = bias.flatten()
    if weight is not None:
        return Stored(as_matrix(weight, shape), bias)
    assert bias is not None  # the grammar's rows have one or both
    return bias_only(bias, shape)


def as_matrix(weight: Tensor, shape: tuple[int, ...]) -> Float[Tensor, "out in"]:
    check_extent(extent(tuple(weight.shape)), shape)
    return weight.reshape(extent(shape))


def bias_only(bias: Float[Tensor, " out"], shape: tuple[int, ...]) -> LowRank:
    """A change of the bias; that of the weight is a product of rank 0."""
    out, inner = extent(shape)
    return LowRank(Factors(bias.new_empty(out, 0), bias.new_empty(0, inner)), bias)


class Stored(Change):
    """f(W) - W and f(b) - b as they are in the file."""

    needs = Needs.NOTHING

    def __init__(self, matrix: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> None:
        self._matrix, self._bias = matrix, bias

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        return self._matrix[first : first + rows]

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return self._bias
