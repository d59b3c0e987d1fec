"""Rows of a layer as two checkpoints have them, read when they are asked for, and their difference.

Everything is widened to float64: the difference of two stored numbers is exact there, but for
float32 numbers of very different size. Where the checkpoints are stored in different dtypes, a layer
of which one is the other rounded has not changed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from merge.bases import Slice
from merge.errors import NotFinite
from merge.families import Layer
from merge.formats.reader import TORCH_DTYPES
from merge.inputs import OpenBase
from merge.methods.elements import Delta
from merge.quantised import as_groups, read_scale, spread

_TILE_ELEMENTS = 512 * 1024


class _Piece(NamedTuple):
    """Rows `begin` to `begin + rows` of a layer are a slice's from its row `first` on."""

    begin: int
    rows: int
    first: int
    slice: Slice


class Rows:
    """One parameter of a layer; rows that the checkpoint lacks are zero. For one thread."""

    def __init__(self, checkpoint: OpenBase, component: str, layer: Layer, parameter: str) -> None:
        self._checkpoint = checkpoint
        self._pieces = list(_pieces(checkpoint, component, layer, parameter))
        self._columns = layer.extent[1] if parameter == "weight" else 1
        self._whole: dict[Slice, Tensor] = {}

    @property
    def stored_dtypes(self) -> set[torch.dtype]:
        names = {self._checkpoint.base.info(piece.slice).dtype for piece in self._pieces}
        return {getattr(torch, TORCH_DTYPES[name]) for name in names}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What the numbers were rounded to; empty where a scale makes others of them."""
        base = self._checkpoint.base
        is_scaled = any(base.scale(piece.slice) is not None for piece in self._pieces)
        return set() if is_scaled else self.stored_dtypes

    def read(self, first: int, count: int) -> Float[Tensor, "count in"]:
        """`count` rows from row `first`, in float64."""
        found = torch.zeros(count, self._columns, dtype=torch.float64)
        for piece in self._pieces:
            low, high = max(first, piece.begin), min(first + count, piece.begin + piece.rows)
            if low < high:
                rows = self._read(piece.slice, piece.first + low - piece.begin, high - low)
                found[low - first : high - first] = rows
        return found

    def _read(self, its: Slice, first: int, count: int) -> Tensor:
        if its.is_transposed:
            if its not in self._whole:
                self._whole[its] = self._stored(its, 0, its.rows).mT.contiguous()
            return self._whole[its][first : first + count]
        return self._stored(its, first, count)

    def _stored(self, its: Slice, first: int, count: int) -> Tensor:
        """Rows of the slice as they lie in the file, widened and scaled."""
        base = self._checkpoint.base
        file, info = self._checkpoint.file(its.file), base.info(its)
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        row = its.first_row + first
        raw = bytearray(count * its.columns * dtype.itemsize)
        file.read_into(its.key, memoryview(raw), row * its.columns * dtype.itemsize)
        rows = torch.frombuffer(raw, dtype=dtype).view(count, its.columns).double()
        if (scale := base.scale(its)) is not None:
            rows *= spread(as_groups(read_scale(file, scale), scale), scale, row, rows)
        if not rows.isfinite().all():
            raise NotFinite(file.name, its.key)
        return rows


class Difference(Delta):
    """tuned - base, of a weight as a matrix or of a bias as a column."""

    def __init__(
        self, base: OpenBase, tuned: OpenBase, component: str, layer: Layer, parameter: str
    ) -> None:
        self.base = Rows(base, component, layer, parameter)
        self.tuned = Rows(tuned, component, layer, parameter)
        self.shape = (layer.shape[0], layer.extent[1] if parameter == "weight" else 1)

    def rows(self, first: int, count: int) -> Float[Tensor, "count in"]:
        return self.tuned.read(first, count) - self.base.read(first, count)

    def whole(self) -> Float[Tensor, "out in"]:
        return self.rows(0, self.shape[0])

    def is_zero(self) -> bool:
        """Whether nothing changed but, where the dtypes differ, the rounding of one to the other."""
        one, two = self.base.dtypes, self.tuned.dtypes
        roundings = [None] if one == two else [None, *_only(two), *_only(one)]
        for first, count in tiles(self.shape):
            base, tuned = self.base.read(first, count), self.tuned.read(first, count)
            roundings = [dtype for dtype in roundings if _is_rounded(base, tuned, dtype)]
            if not roundings:
                return False
        return True


def tiles(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces that stay in a processor's cache."""
    rows, columns = shape
    step = max(1, _TILE_ELEMENTS // max(columns, 1))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _only(dtypes: set[torch.dtype]) -> Sequence[torch.dtype]:
    return list(dtypes) if len(dtypes) == 1 else []


def _is_rounded(one: Tensor, two: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether both are the same in this dtype; None asks for the same numbers."""
    if dtype is None:
        return torch.equal(one, two)
    return torch.equal(one.to(dtype).double(), two.to(dtype).double())


def _pieces(checkpoint: OpenBase, component: str, layer: Layer, parameter: str) -> Iterator[_Piece]:
    for run in layer.runs:
        found = checkpoint.base.find(component, run.module, parameter, kind=layer.kind)
        for its in found:
            if its.is_copy:
                continue
            held = its.columns if its.is_transposed else its.rows
            low, high = max(run.first, its.first), min(run.first + run.rows, its.first + held)
            if low < high:
                yield _Piece(run.begin + low - run.first, high - low, low - its.first, its)
