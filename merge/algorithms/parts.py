"""A layer's rows as parts of a packed layer: what rows.py and rows_on_base.py have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one layer among those of a packed one; no `tensors` where nothing changes it."""

    rows: int
    tensors: Mapping[str, Tensor] | None
    facts: Mapping[str, Any] = field(default_factory=dict)


def take(tensor: Tensor, index: Sequence[int], axis: int) -> Tensor:
    """These places along one axis, in this order; a range costs no gather."""
    if len(index) and list(index) == list(range(index[0], index[0] + len(index))):
        return tensor.narrow(axis, index[0], len(index)).contiguous()
    return tensor.index_select(axis, torch.tensor(index, dtype=torch.long))
