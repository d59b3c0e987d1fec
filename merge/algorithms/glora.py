"""GLoRA as LyCORIS writes it: a weight changes by (alpha / rank) * (W @ A + B), A and B low rank.

LyCORIS 4.1.3 modules/glora.py; the name is from Chavan et al. 2023, arXiv:2306.07967, but the
formula is not (theirs is merge.algorithms.glora_paper). In today's layout A = a1 @ a2 and
B = b1 @ b2; before LyCORIS 3 it was A = a2 @ a1 and B = b2 @ b1. A convolution has A on its input
channels, and the kernel in B's `down` or, in Tucker form, in `bm`. The bias is left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.locon import folded
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import check_extent
from merge.algorithms.scale import scale_of

ROLES = "a1 a2 b1 b2 bm alpha scale scalar"


@dataclass(frozen=True, slots=True)
class GLoRA(Change):
    """W @ left @ right on the input channels plus up @ down, all times scale."""

    left: Float[Tensor, "channels a"]
    right: Float[Tensor, "a channels"]
    up: Float[Tensor, "out b"]
    down: Float[Tensor, "b in"]
    scale: float

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        # (rows, channels, kernel) with the channels last, so that A multiplies them.
        channels = base.reshape(len(base), len(self.left), -1).mT
        changed = ((channels @ self.left) @ self.right).mT.flatten(1)
        return self.scale * (changed + self.up[first : first + rows] @ self.down)


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> GLoRA:
    """From a1, a2, b1, b2 of either layout, and perhaps bm between b1 and b2."""
    a1, a2, b1, b2 = (tensors[role] for role in ("a1", "a2", "b1", "b2"))
    if is_old([tuple(tensor.shape) for tensor in (a1, a2, b1, b2)], shape):
        a1, a2, b1, b2 = a2, a1, b2, b1
    left, right, up, down = (tensor.flatten(1) for tensor in (a1, a2, b1, b2))
    if "bm" in tensors:
        down = folded(tensors["bm"], down)
    if (len(left), right.shape[1]) != (shape[1], shape[1]):
        raise ValueError(f"A is {(len(left), right.shape[1])}, base weight is {shape}")
    check_extent((len(up), down.shape[1]), shape)
    return GLoRA(left, right, up, down, scale_of(tensors, len(right), facts))


def is_old(shapes: list[tuple[int, ...]], weight: tuple[int, ...]) -> bool:
    """Whether a1, a2, b1, b2 of these shapes are in the layout before LyCORIS 3.

    ComfyUI a125cd8 decides so. With rank == out == in both layouts fit, and the old one is taken.
    """
    if min(len(shape) for shape in shapes) < 2:
        raise ValueError(f"a1, a2, b1 and b2 are {shapes}, of which some are no matrices")
    a1, a2, b1, b2 = shapes
    fits_old = b2[1] == b1[0] == a1[0] == a2[1]
    fits_new = b2[0] == b1[1] == a1[1] == a2[0]
    if not fits_old and not fits_new:
        raise ValueError(f"a1, a2, b1 and b2 are {shapes}, which have no rank in common")
    return fits_old and (not fits_new or a2[0] == weight[0] == weight[1])


def to_lora_given(change: GLoRA, base: Float[Tensor, "out in"]) -> Factors:
    """The same change of this one base as a LoRA, exactly: rank 2r, or (kernel + 1) r for a kernel.

    up = [W a1, b1] and down = [a2; b2], where each element of a kernel has its own W a1.
    """
    channels, width = len(change.left), base.shape[1]
    kernel = width // channels
    moved = (base.reshape(-1, channels, kernel).mT @ change.left).flatten(1)  # (out, kernel * rank)
    # Row (y, r) of `placed` holds a2's row r at the places (channel, y) of a flattened kernel.
    eye = torch.eye(kernel, dtype=base.dtype)
    placed = torch.einsum("rc,yz->yrcz", change.right, eye).reshape(moved.shape[1], width)
    return Factors(
        torch.cat([moved, change.up], 1), torch.cat([placed, change.down], 0), change.scale
    )
