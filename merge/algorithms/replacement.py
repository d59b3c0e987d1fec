"""New values in place of old ones: f(W) = R, so f(W) - W = R - W, and a strength goes part of the way.

- replacement: `weight` and `bias` (PEFT's modules_to_save and bias="all"; its LN tuning of norm
  layers, Qi et al. 2022, arXiv:2211.08682), `set_weight` (ComfyUI).
- tokens: rows of an embedding (PEFT's trainable_tokens_delta, which despite its name holds the new
  rows themselves); which rows is in the configuration: facts["token_ids"].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.full import as_matrix
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import check_bias, extent

ROLES = "weight bias set_weight"
TOKENS_ROLES = "trainable_tokens_delta"


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    if "weight" in tensors and "set_weight" in tensors:
        raise ValueError("weight and set_weight both replace the weight")
    weight = tensors.get("weight", tensors.get("set_weight"))
    bias = tensors.get("bias")
    if bias is not None:
        check_bias(bias, shape)
        bias = bias.flatten()
    return Replacement(None if weight is None else as_matrix(weight, shape), bias, shape)


class Replacement(Change):
    """Of the weight, the bias or both."""

    def __init__(
        self,
        weight: Float[Tensor, "out in"] | None,
        bias: Float[Tensor, " out"] | None,
        shape: tuple[int, ...],
    ) -> None:
        self.needs = Needs.NOTHING if weight is None else Needs.ROWS
        self.is_product = weight is None
        self._weight, self._bias, self._extent = weight, bias, extent(shape)

    def factors(self) -> Factors | None:
        """Rank 0 where the weight stays as it is."""
        if self._weight is not None or self._bias is None:
            return None
        out, inner = self._extent
        return Factors(self._bias.new_empty(out, 0), self._bias.new_empty(0, inner))

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        if self._weight is None:
            assert self._bias is not None
            return self._bias.new_zeros(rows, self._extent[1])
        assert base is not None
        return self._weight[first : first + rows] - base

    def replaces(self, first: int, rows: int) -> Bool[Tensor, " rows"] | None:
        return None if self._weight is None else torch.ones(rows, dtype=torch.bool)

    def new_bias(self) -> Float[Tensor, " out"] | None:
        return self._bias

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        if self._bias is None or bias is None:
            return self._bias
        return self._bias - bias


def read_tokens(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    rows = tensors["trainable_tokens_delta"]
    if "token_ids" not in facts:
        raise ValueError("which rows are replaced is in a configuration, and there is none")
    ids = [int(token) for token in facts["token_ids"]]
    if len(ids) != rows.shape[0] or rows.shape[1:] != shape[1:]:
        raise ValueError(f"{tuple(rows.shape)} rows for {len(ids)} tokens of {shape}")
    if len(set(ids)) != len(ids):
        raise ValueError("a token is replaced twice")
    if any(not 0 <= token < shape[0] for token in ids):
        raise ValueError(f"tokens {min(ids)} to {max(ids)}, of an embedding with {shape[0]}")
    return Tokens(rows, ids)


class Tokens(Change):
    """Some rows replaced, all others as they are."""

    needs = Needs.ROWS

    def __init__(self, values: Float[Tensor, "n in"], ids: Sequence[int]) -> None:
        self._values, self._ids = values, ids

    def replaces(self, first: int, rows: int) -> Bool[Tensor, " rows"] | None:
        is_new = torch.zeros(rows, dtype=torch.bool)
        is_new[[token - first for token in self._ids if first <= token < first + rows]] = True
        return is_new

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        change = base.new_zeros(rows, self._values.shape[1])
        for value, token in zip(self._values, self._ids, strict=True):
            if first <= token < first + rows:
                change[token - first] = value - base[token - first]
        return change
