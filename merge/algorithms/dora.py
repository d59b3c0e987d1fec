"""DoRA: the direction comes from another algorithm, the magnitude of each row or column is stored.

V = W + delta, f(W) = m * V / ||V||: Liu et al. 2024, arXiv:2402.09353, eq. 5. The norm is taken
over each row of V (PEFT, LyCORIS since 3.1.1) or over each input channel (older LyCORIS, the
default of OneTrainer); which one a file means is in the shape of its magnitudes. Rows that are
zero have no direction and stay zero, where PEFT and ComfyUI make them NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs

ROLE = "dora_scale"


class Axis(StrEnum):
    """What each magnitude belongs to."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True, slots=True)
class DoRA(Change):
    """`magnitude` has one entry for each row of W or each input channel; `kernel` counts its elements."""

    needs: Needs
    inner: Change
    magnitude: Float[Tensor, " n"]
    axis: Axis
    kernel: int
    epsilon: float

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        assert base is not None
        if self.axis is Axis.INPUT:
            moved = base + self.inner.weight(0, len(base), self._seen(base))
            norm = torch.linalg.vector_norm(moved.reshape(len(moved), -1, self.kernel), dim=(0, 2))
            ratio = self._ratio(self.magnitude, norm).repeat_interleave(self.kernel)
            here = slice(first, first + rows)
            return moved[here] * ratio - base[here]
        here = slice(first, first + rows)
        old = base[here] if self.needs is Needs.WHOLE else base
        moved = old + self.inner.weight(first, rows, self._seen(base))
        norm = torch.linalg.vector_norm(moved, dim=1)
        return moved * self._ratio(self.magnitude[here], norm)[:, None] - old

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return self.inner.bias(bias, base)

    def _seen(self, base: Tensor) -> Tensor | None:
        return None if self.inner.needs is Needs.NOTHING else base

    def _ratio(self, magnitude: Float[Tensor, " n"], norm: Float[Tensor, " n"]) -> Tensor:
        norm = norm + self.epsilon
        return torch.where(norm > 0, magnitude / norm, 0.0)


def wrap(
    inner: Change,
    magnitude: Tensor,
    shape: Sequence[int],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Change:
    """`inner` with magnitudes of its own, for a weight of `shape`.

    facts["dora_axis"], "output" or "input", is of files that say it in another way than by the
    shape of the magnitudes; facts["dora_eps"] is added to every norm (OneTrainer's norm_epsilon).
    ValueError for magnitudes that fit neither axis.
    """
    axis = axis_of(magnitude, shape, facts)
    is_whole = axis is Axis.INPUT or inner.needs is Needs.WHOLE
    return DoRA(
        Needs.WHOLE if is_whole else Needs.ROWS,
        inner,
        magnitude.flatten(),
        axis,
        prod(shape[2:]),
        float(facts.get("dora_eps", 0.0)),
    )


def axis_of(
    magnitude: Tensor, shape: Sequence[int], facts: Mapping[str, Any] = MappingProxyType({})
) -> Axis:
    """The axis that magnitudes mean for a weight of `shape`: facts["dora_axis"], else by their shape.

    (out, 1, ...) is the output and (1, in, ...) the input. PEFT writes (1, out, 1, 1) for
    convolutions, which is the output unless out == in, and plain vectors, which are the output
    where both fit.
    """
    stored, size = tuple(magnitude.shape), magnitude.numel()
    if "dora_axis" in facts:
        axis = Axis(facts["dora_axis"])
        if size == shape[0 if axis is Axis.OUTPUT else 1]:
            return axis
    else:
        is_row = len(stored) > 1 and stored[0] == 1 and stored[1] == size
        if is_row and size == shape[1]:
            return Axis.INPUT
        if size == shape[0] and (is_row or stored[:1] == (size,)):
            return Axis.OUTPUT
        if size == shape[1] and len(stored) == 1:
            return Axis.INPUT
    raise ValueError(
        f"the magnitudes are {stored}, which fit no axis of a weight of {tuple(shape)}"
    )
