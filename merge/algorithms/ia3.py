"""IA3: every row, or every input channel, of a weight is multiplied by a number of its own.

Liu et al. 2022, arXiv:2205.05638, section 3.3. LyCORIS stores the offset from 1 as `weight`, on the
side that `on_input` says, and leaves the bias alone. PEFT stores the factor itself as `ia3_l`; on
rows (layers that are no feedforward layers) it also multiplies the bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lowrank import extent
from merge.algorithms.scale import one_number

ROLES = "weight on_input"
PEFT_ROLES = "ia3_l"


@dataclass(frozen=True, slots=True)
class RowFactors(Change):
    """W[o] * (1 + offset[o])."""

    offset: Float[Tensor, " out"]
    is_on_bias: bool

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        return base * self.offset[first : first + rows, None]

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return bias * self.offset if self.is_on_bias and bias is not None else None


@dataclass(frozen=True, slots=True)
class ColumnFactors(Change):
    """W[:, i] * (1 + offset[i]), with one entry for each column of the matrix."""

    offset: Float[Tensor, " in"]

    needs = Needs.ROWS

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        return base * self.offset


def read(tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]) -> Change:
    offset = tensors["weight"]
    if one_number(tensors, "on_input"):
        return _columns(offset, shape, "weight")
    return _rows(offset, shape, "weight", is_on_bias=False)


def read_peft(
    tensors: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
) -> Change:
    factor = tensors["ia3_l"]
    if is_on_inputs(factor, shape, facts):
        return _columns(factor - 1, shape, "ia3_l")
    return _rows(factor - 1, shape, "ia3_l", is_on_bias=True)


def is_on_inputs(ia3_l: Tensor, shape: tuple[int, ...], facts: Mapping[str, Any]) -> bool:
    """PEFT multiplies the inputs of feedforward layers: facts["is_feedforward"], else by the shape.

    (1, in) is on the inputs and (out, 1) is not; of convolutions it writes (1, n, 1, 1) either way.
    """
    if "is_feedforward" in facts:
        return bool(facts["is_feedforward"])
    factor = tuple(ia3_l.shape)
    if len(factor) == 2 and factor != (1, 1):
        return factor[0] == 1
    if shape[0] == shape[1]:
        raise ValueError(
            f"ia3_l is {factor} for a weight of {shape}: whether it is on the inputs is in "
            "feedforward_modules of adapter_config.json, which is not there"
        )
    return max(factor) == shape[1]


def _rows(offset: Tensor, shape: tuple[int, ...], role: str, *, is_on_bias: bool) -> RowFactors:
    _check(offset, shape[0], shape, role)
    return RowFactors(offset.flatten(), is_on_bias)


def _columns(offset: Tensor, shape: tuple[int, ...], role: str) -> ColumnFactors:
    _check(offset, shape[1], shape, role)
    return ColumnFactors(offset.flatten().repeat_interleave(extent(shape)[1] // shape[1]))


def _check(offset: Tensor, size: int, shape: tuple[int, ...], role: str) -> None:
    if offset.numel() != size:
        raise ValueError(f"{role} is {tuple(offset.shape)}, base weight is {shape}")
