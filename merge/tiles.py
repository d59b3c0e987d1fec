"""The change of a patch, ready to be added to tiles of its rows.

Where every contribution is a low-rank product that needs no base, the factors are stacked once and a
tile costs one product. Otherwise each contribution is evaluated at the base's own rows, or once for
the patch where it depends on the whole weight. Everything is evaluated on the original base.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merge.algorithms import lora
from merge.algorithms.change import Change, Needs
from merge.algorithms.experts import Experts
from merge.algorithms.lora import Factors
from merge.formats.adapters import Entry
from merge.inputs import Inputs
from merge.methods import linear
from merge.patches import Patch
from merge.terms import Term

# Reads (entry, parameter, is_copy) from the base: the whole weight as a matrix (out, in), or the
# bias; None if the layer has none.
ReadBase = Callable[[Entry, str, bool], Tensor | None]


_LOW_RANK = 48


class Ready(ABC):
    """A patch's change. `norm` is its Frobenius norm where that is known beforehand."""

    norm: float | None = None

    @abstractmethod
    def add(self, total: Tensor, row: int) -> Tensor | None:
        """Add the change to `total`, which holds the base's rows of the patch from `row` on.

        Gives the change, or None where the norm is known.
        """


def prepare(patch: Patch, inputs: Inputs, read_base: ReadBase, dtype: torch.dtype) -> Ready:
    """Everything that is computed once for a patch, in `dtype`."""
    if not patch.terms:
        return Sum([])
    changes = [inputs.change(term.adapter, term.entry, dtype) for term in patch.terms]
    if patch.parameter == "bias":
        return _bias(patch, changes, read_base)
    factors = [
        _factors(change, term, patch) for change, term in zip(changes, patch.terms, strict=True)
    ]
    products = [its for its in factors if its is not None]
    if len(products) == len(factors):
        strengths = [term.strength for term in patch.terms]
        return Product(linear.concatenate(products, strengths))
    if patch.is_transposed:
        return _transposed(patch, changes, read_base, dtype)
    parts = [
        _part(change, term, patch, read_base)
        for change, term in zip(changes, patch.terms, strict=True)
    ]
    return Sum(parts)


class Product(Ready):
    """The common case: up @ down for all adapters at once.

    The norm of a high rank costs more by its Gram matrices than by looking at every tile.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self.norm = lora.norm(factors) if factors.rank <= _LOW_RANK else None

    def add(self, total: Tensor, row: int) -> Tensor | None:
        up, down = self._factors.up[row : row + total.shape[0]], self._factors.down
        if self.norm is not None:
            total.addmm_(up, down)
            return None
        delta = up @ down
        total.add_(delta)
        return delta


class Sum(Ready):
    """Contributions one by one; those that replace rows come first."""

    def __init__(self, parts: Sequence["Part"]) -> None:
        self._parts = sorted(parts, key=lambda part: not isinstance(part, Replaced | NewColumn))

    def add(self, total: Tensor, row: int) -> Tensor:
        base = total.clone()
        for part in self._parts:
            part.add(total, base, row)
        return total - base


class Part(ABC):
    """One contribution to a patch."""

    @abstractmethod
    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        """Add this contribution at the base's rows of the patch from `row` on to `total`."""


class Replaced(Part):
    """Rows that take new values at strength 1: exactly those, not the old ones plus a difference."""

    def __init__(self, change: Change, term: Term) -> None:
        self._change, self._term = change, term

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        zero = torch.zeros_like(base)
        new = self._change.weight(self._term.first + row, base.shape[0], zero)
        is_new = self._change.replaces(self._term.first + row, base.shape[0])
        total[is_new] = new[is_new]


class NewColumn(Part):
    """The same for a bias."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        total.copy_(self._values[row : row + total.shape[0]])


class AtRows(Part):
    """A change that these rows of the base decide, or that is dense as it stands."""

    def __init__(self, change: Change, term: Term) -> None:
        self._change, self._term = change, term

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        width = _columns(self._term.entry)
        own = None if self._change.needs is Needs.NOTHING else base[:, :width]
        delta = self._change.weight(self._term.first + row, base.shape[0], own)
        total[:, :width].add_(delta, alpha=self._term.strength)


class Dense(Part):
    """A change that was computed for the whole patch."""

    def __init__(self, delta: Tensor, strength: float) -> None:
        self._delta, self._strength = delta, strength

    def add(self, total: Tensor, base: Tensor, row: int) -> None:
        total.add_(self._delta[row : row + total.shape[0]], alpha=self._strength)


def _factors(change: Change, term: Term, patch: Patch) -> Factors | None:
    """The rows of this patch as a product of the columns it has, or None."""
    if isinstance(change, Experts):
        expert, row = divmod(term.first, term.entry.layer.shape[1])
        own = change.expert(expert)
        return Factors(own.up[row : row + term.rows], own.down, own.scale)
    factors = change.factors() if change.is_product else None
    if factors is None:
        return None
    up, down = factors.up, factors.down
    if patch.is_transposed:
        if term.rows < up.shape[0] or term.rows < patch.columns:
            rows = up.new_zeros(patch.columns, up.shape[1])
            rows[term.begin : term.begin + term.rows] = up[term.first : term.first + term.rows]
            up = rows
        return Factors(down.mT, up.mT, factors.scale)
    up = up[term.first : term.first + term.rows]
    if down.shape[1] < patch.columns:
        down = torch.nn.functional.pad(down, (0, patch.columns - down.shape[1]))
    return Factors(up, down, factors.scale)


def _part(change: Change, term: Term, patch: Patch, read_base: ReadBase) -> Part:
    if term.strength == 1 and change.replaces(term.first, term.rows) is not None:
        return Replaced(change, term)
    if change.needs is not Needs.WHOLE:
        return AtRows(change, term)
    whole = read_base(term.entry, "weight", patch.is_copy)
    return Dense(change.weight(term.first, term.rows, whole), term.strength)


def _transposed(
    patch: Patch, changes: Sequence[Change], read_base: ReadBase, dtype: torch.dtype
) -> Ready:
    total = torch.zeros(patch.columns, patch.rows, dtype=dtype)
    for change, term in zip(changes, patch.terms, strict=True):
        whole = read_base(term.entry, "weight", patch.is_copy)
        base = None if change.needs is Needs.NOTHING else whole
        if change.needs is Needs.ROWS and whole is not None:
            base = whole[term.first : term.first + term.rows]
        delta = change.weight(term.first, term.rows, base)
        total[term.begin : term.begin + term.rows].add_(delta, alpha=term.strength)
    return Sum([Dense(total.mT, 1.0)])


def _bias(patch: Patch, changes: Sequence[Change], read_base: ReadBase) -> Ready:
    """Biases are small: their change is computed whole, as a column."""
    parts: list[Part] = []
    for change, term in zip(changes, patch.terms, strict=True):
        weight = (
            None
            if change.needs is Needs.NOTHING
            else read_base(term.entry, "weight", patch.is_copy)
        )
        rows = slice(term.first, term.first + term.rows)
        new = change.new_bias()
        if new is not None and term.strength == 1:
            parts.append(NewColumn(new[rows, None]))
            continue
        bias = read_base(term.entry, "bias", patch.is_copy)
        delta = change.bias(bias, weight)
        if delta is not None:
            parts.append(Dense(delta[rows, None], term.strength))
    return Sum(parts)


def _columns(entry: Entry) -> int:
    return entry.layer.extent[1]
