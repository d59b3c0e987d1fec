"""8-bit floats: a stored weight is its fp8 value times a scale of the tensor, the row or the block.

A bake widens, adds in float32 or float64 and rounds to the nearest again. A scale is kept where the
largest new value still fits, and else recomputed, so that nothing is clipped. Values are coarse: a
change that is smaller than half a step is lost, so the share that survives is measured.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from merge.bases import Scale
from merge.errors import NotFinite
from merge.formats.reader import TensorFile

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# From here on a value is nearer to what would come after the largest number.
TOO_LARGE = {"F8_E4M3": 464.0, "F8_E5M2": 61440.0}


class Scales:
    """The scales of one stored matrix, (groups of rows, groups of columns), before and after a bake."""

    def __init__(self, scale: Scale, old: Tensor, new: Tensor) -> None:
        self._scale, self.old, self.new = scale, old, new

    def widen(self, stored: Tensor, first_row: int) -> None:
        """Multiply rows of stored values with their old scales, in place."""
        stored.mul_(spread(self.old, self._scale, first_row, stored))

    def narrow(self, values: Tensor, first_row: int) -> None:
        """Divide rows of new values by their new scales, in place; a scale of 0 is for zeros alone."""
        scales = spread(self.new, self._scale, first_row, values)
        values.div_(scales.masked_fill(scales == 0, 1.0))

    def restore(self, stored: Tensor, first_row: int) -> Tensor:
        """What rows that were stored with the new scales mean."""
        return stored * spread(self.new, self._scale, first_row, stored)


def spread(groups: Tensor, scale: Scale, first_row: int, like: Tensor) -> Tensor:
    """The scale of every entry of `like`, rows of the matrix from `first_row` on."""
    groups = groups.to(like.dtype)
    if groups.numel() == 1:
        return groups.reshape(1, 1)
    rows = torch.arange(first_row, first_row + like.shape[0]) // scale.rows
    columns = torch.arange(like.shape[1]) // scale.columns
    return groups[rows][:, columns]


def read_scale(file: TensorFile, scale: Scale) -> Tensor:
    """The scale tensor as it is stored; refuses NaN and Inf."""
    stored = file.read_tensor(scale.key)
    if not stored.float().isfinite().all():
        raise NotFinite(file.name, scale.key)
    return stored


def as_groups(stored: Tensor, scale: Scale) -> Tensor:
    """The scale tensor as (groups of rows, groups of columns), in float32."""
    return stored.float().reshape(scale.groups)


def new_scales(
    scale: Scale, stored: Tensor, dtype: str, values: Iterable[tuple[int, Tensor]]
) -> Scales:
    """Old scales where the new values fit, else the least that they fit.

    `values` gives (first row, new values) of all rows of the matrix, one part at a time.
    """
    largest = torch.zeros(scale.groups)
    for first_row, part in values:
        sizes = part.abs().float()
        by_columns = torch.stack([its.amax(1) for its in torch.split(sizes, scale.columns, 1)], 1)
        rows = torch.arange(first_row, first_row + sizes.shape[0]) // scale.rows
        np.maximum.at(largest.numpy(), rows.numpy(), by_columns.numpy())
    old = as_groups(stored, scale)
    limit = torch.finfo(FP8[dtype]).max
    least = largest / limit * (1 + 2 * torch.finfo(stored.dtype).eps)
    wider = least.to(stored.dtype).float()
    return Scales(scale, old, torch.where(largest < old.abs() * TOO_LARGE[dtype], old, wider))
