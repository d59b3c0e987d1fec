"""A change whose directions, rows or columns each have a strength of their own.

diag(rows) @ up @ diag(directions) @ down @ diag(columns): ZipLoRA's merger vectors (Shah et al. 2023,
https://arxiv.org/abs/2311.13600, eq. 2) are columns. What needs the base is computed on the base as it is, and
its change is weighed. The bias is left alone.
"""

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change
from merge.algorithms.lora import Factors


class Weighed(Change):
    """`change` with vectors over the rank, out, and in * kernel, of any dtype; None is all ones."""

    def __init__(
        self,
        change: Change,
        directions: Float[Tensor, " rank"] | None,
        rows: Float[Tensor, " out"] | None,
        columns: Float[Tensor, " in"] | None,
    ) -> None:
        self._change, self._rows, self._columns = change, rows, columns
        self._directions = directions
        self.needs = change.needs
        self.is_product = change.is_product or directions is not None

    def factors(self) -> Factors | None:
        found = self._change.factors()
        if found is None:
            return None
        up, down = found.up, found.down
        if self._directions is not None:
            down = down * self._directions.to(down.dtype)[:, None]
        if self._columns is not None:
            down = down * self._columns.to(down.dtype)
        if self._rows is not None:
            up = up * self._rows.to(up.dtype)[:, None]
        return Factors(up, down, found.scale)

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        if self._directions is not None:
            found = self.factors()
            assert found is not None, "only what has directions is given strengths for them"
            return found.scale * (found.up[first : first + rows] @ found.down)
        delta = self._change.weight(first, rows, base)
        if self._columns is not None:
            delta = delta * self._columns.to(delta.dtype)
        if self._rows is not None:
            delta = delta * self._rows.to(delta.dtype)[first : first + rows, None]
        return delta

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return self._change.bias(bias, base)
