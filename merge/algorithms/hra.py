"""HRA: a weight is reflected in a few hyperplanes, one after the other.

Yuan et al. 2024, arXiv:2405.17484, eq. 6: W' = W H_1 ... H_r with H_i = I - 2 u_i u_i^T, u_i the
normalised columns of `hra_u`. With PEFT's apply_GS the columns are orthonormalised first (Gram-
Schmidt, in order), and W' = W (I - 2 U U^T). Either way W' - W = W U M with M of r rows, which is
two thin products in place of r rank-one updates (the compact form of Schreiber and Van Loan 1989).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import extent

ROLES = "hra_u"


@dataclass(frozen=True, slots=True)
class Reflections(Change):
    """W @ directions @ mix."""

    directions: Float[Tensor, "in rank"]
    mix: Float[Tensor, "rank in"]

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        return (base @ self.directions) @ self.mix


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Reflections:
    """facts["is_gram_schmidt"] is apply_GS of the configuration, false without one."""
    columns = tensors["hra_u"]
    if columns.ndim != 2 or len(columns) != extent(shape)[1]:
        raise ValueError(f"hra_u is {tuple(columns.shape)}, base weight is {shape}")
    if facts.get("is_gram_schmidt", False):
        directions = _orthonormal(columns)
        return Reflections(directions, -2 * directions.mT)
    directions = torch.stack([_normal(column, i) for i, column in enumerate(columns.mT)], 1)
    return Reflections(directions, _mix(directions))


def to_lora_given(change: Reflections, base: Float[Tensor, "out in"]) -> Factors:
    """The same change of this one base as a LoRA of rank r, exactly."""
    return Factors(base @ change.directions, change.mix)


def _mix(directions: Float[Tensor, "in rank"]) -> Float[Tensor, "rank in"]:
    """M with H_1 ... H_r = I + U M, by (I + U M)(I - 2 u u^T) for one column after the other."""
    mix = torch.zeros_like(directions.mT)
    for i, column in enumerate(directions.mT):
        onto = mix @ column
        onto[i] += 1
        mix = mix - 2 * torch.outer(onto, column)
    return mix


def _orthonormal(columns: Float[Tensor, "in rank"]) -> Float[Tensor, "in rank"]:
    found: list[Tensor] = []
    for i, column in enumerate(columns.mT):
        rest = column
        for other in found:
            rest = rest - (other @ rest) * other
        # Of a column that is made of those before it only rounding is left.
        found.append(_normal(rest, i, 64 * torch.finfo(column.dtype).eps * float(column.norm())))
    return torch.stack(found, 1)


def _normal(column: Float[Tensor, " in"], i: int, least: float = 0.0) -> Float[Tensor, " in"]:
    norm = torch.linalg.vector_norm(column).item()
    if norm <= least:
        raise ValueError(f"column {i} of hra_u has no direction")
    found: Tensor = column / norm
    return found
