"""BOFT: a weight is rotated in several stages of blocks, with the entries shuffled between stages.

Liu et al. 2023, arXiv:2311.06243, section 4: a product of m block-diagonal rotations with the
butterfly permutation of each stage. Two formats:

- LyCORIS 4.1.3: `oft_blocks` with four dimensions, on the rows, first stage first; clamped and
  rescaled as in Diag-OFT, but every block is R and not its transpose.
- PEFT 0.21: `boft_R` on the columns, W' = (W R_total^T) * boft_s, with its own Cayley form
  (I - S)(I + S)^-1 of S = (R - R^T) / 2 and permutations that are rebuilt from the shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lowrank import extent
from merge.algorithms.oft import cayley, legacy_turn, limit_of, rescale_of, shrinkage, skew

ROLES = "oft_blocks alpha rescale"
LEGACY_ROLES = "oft_diag alpha"
PEFT_ROLES = "boft_R boft_s"


@dataclass(frozen=True, slots=True)
class RowButterfly(Change):
    """Stages of blocks on the rows, each as R - I."""

    turns: Float[Tensor, "stages blocks size size"]
    rescale: Float[Tensor, " out"] | None

    needs = Needs.WHOLE

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        change = torch.zeros_like(base)
        for stage, turn in enumerate(self.turns):
            change = change + _stage(turn, base + change, stage)
        here = slice(first, first + rows)
        if self.rescale is None:
            return change[here]
        factor = self.rescale[here, None]
        return factor * change[here] + (factor - 1) * base[here]


def _stage(
    turn: Float[Tensor, "blocks size size"], weight: Float[Tensor, "out in"], stage: int
) -> Float[Tensor, "out in"]:
    """What one stage adds: its blocks take rows that are 2^stage * size / 2 apart, in pairs."""
    size = turn.shape[1]
    distance = 2**stage * size // 2
    width = weight.shape[1]
    shuffled = weight.reshape(-1, 2, distance, width).transpose(1, 2)
    added = turn @ shuffled.reshape(-1, size, width)
    return added.reshape(-1, distance, 2, width).transpose(1, 2).reshape(-1, width)


@dataclass(frozen=True, slots=True)
class ColumnButterfly(Change):
    """Stages of blocks on the columns, each as R - I with the order it takes them in."""

    turns: Float[Tensor, "stages blocks size size"]
    orders: Int[Tensor, "stages in"]
    factor: Float[Tensor, " out"]

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        change = torch.zeros_like(base)
        for turn, order in zip(self.turns, self.orders, strict=True):
            # P B P^T on columns: entry order[i] of a row goes to place i only after the blocks.
            taken = (base + change)[:, order.argsort()]
            blocks = taken.reshape(len(base), -1, turn.shape[1]).transpose(0, 1)
            added = (blocks @ turn.mT).transpose(0, 1).flatten(1)
            change = change + added[:, order]
        factor = self.factor[first : first + rows, None]
        return factor * change + (factor - 1) * base


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> RowButterfly:
    blocks = tensors["oft_blocks"]
    _check(blocks, shape, shape[0])
    turned = skew(blocks) * shrinkage(blocks, limit_of(tensors, shape[0]))
    return RowButterfly(cayley(turned), rescale_of(tensors, shape))


def read_legacy(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> RowButterfly:
    """LyCORIS 2.1 before its release saved the rotations themselves, as `oft_diag`."""
    _check(tensors["oft_diag"], shape, shape[0])
    return RowButterfly(legacy_turn(tensors["oft_diag"]), None)


def read_peft(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> ColumnButterfly:
    blocks, factor = tensors["boft_R"], tensors["boft_s"]
    width = extent(shape)[1]
    _check(blocks, shape, width)
    if factor.numel() != shape[0]:
        raise ValueError(f"boft_s is {tuple(factor.shape)}, base weight is {shape}")
    orders = torch.stack([_order(stage, blocks.shape, width) for stage in range(len(blocks))])
    return ColumnButterfly(cayley(-skew(blocks) / 2), orders, factor.flatten())


def _order(stage: int, shape: torch.Size, width: int) -> Int[Tensor, " in"]:
    """PEFT's block_butterfly_perm: in groups of 2^stage * size, even half blocks before odd ones."""
    stages, _, size, _ = shape
    columns = torch.arange(width)
    if stages == 1:
        return columns
    halves = columns.reshape(-1, 2**stage, 2, size // 2)
    return halves.transpose(1, 2).flatten()


def _check(blocks: Tensor, shape: tuple[int, ...], turned: int) -> None:
    if blocks.ndim != 4 or blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"the blocks are {tuple(blocks.shape)}, not stages of square blocks")
    stages, count, size, _ = blocks.shape
    if count * size != turned:
        raise ValueError(f"{count} blocks of {size} do not make the {turned} of {shape}")
    if stages > 1 and (size % 2 or turned % (2 ** (stages - 1) * size)):
        raise ValueError(f"{stages} stages of {count} blocks of {size} make no butterfly")
