"""The files of a plan, open: what adapters do to their layers, and weights of the base."""

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from math import isfinite
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from merge.algorithms import lora, read_change
from merge.algorithms.change import Change, Needs
from merge.algorithms.weighed import Weighed
from merge.bases import Base, Slice
from merge.errors import BadFile, NotFinite, ShapeMismatch
from merge.formats.adapters import Entry
from merge.formats.grammar import counts_alpha
from merge.formats.header import Header
from merge.formats.reader import TensorFile
from merge.formats.sources import File
from merge.joined import Dense, Given, Merged, ReadChange, ReadWeight, delta_of, join_changes
from merge.methods import linear
from merge.methods.elements import Delta
from merge.methods.linear import Spectrum
from merge.modules import Module
from merge.plan import Adapter
from merge.quantised import as_groups, read_scale, spread
from merge.recipe import Recipe
from merge.terms import Term
from merge.threads import Shared
from merge.units import KEPT_UNITS, Unit
from merge.vectors import KINDS


def open_as_planned(file: File, header: Header) -> TensorFile:
    """The file, if its header is still the one that was planned with."""
    opened = TensorFile(file)
    if opened.header != header:
        opened.close()
        raise BadFile(file.name, "st_changed", "the file changed after it was planned with")
    return opened


class Inputs:
    """Opens every adapter once; may be used from several threads.

    `base` is open for as long as this is, and is read for what depends on it.
    """

    def __init__(
        self, adapters: Sequence[Adapter], recipe: Recipe, base: "OpenBase | None" = None
    ) -> None:
        self._adapters, self._recipe, self._base = adapters, recipe, base
        self._units: Shared[tuple[str, torch.dtype], Change] = Shared(KEPT_UNITS)
        # By module: the coefficients that the method has given, by adapter.
        self.coefficients: dict[str, Given] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._files = [
                stack.enter_context(open_as_planned(adapter.path, adapter.header))
                for adapter in self._adapters
            ]
            self._vectors = [
                None
                if (found := adapter.vectors) is None
                else stack.enter_context(open_as_planned(found.path, found.header))
                for adapter in self._adapters
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def change(self, adapter: int, entry: Entry, dtype: torch.dtype) -> Change:
        """What an entry does at strength 1, computed in `dtype`; refuses NaN and Inf."""
        if isinstance(entry, Unit):
            return self._units.get((entry.name, dtype), lambda: self._join(entry, dtype))
        return self._weighed(adapter, entry, self._read_change(adapter, entry, dtype))

    def forget(self, terms: Sequence[Term], dtype: torch.dtype) -> None:
        """Let go of units that nothing but these terms is made of."""
        for unit in {term.entry.name: term.entry for term in terms}.values():
            if isinstance(unit, Unit) and unit.is_within(terms):
                self._units.forget((unit.name, dtype))

    def _join(self, unit: Unit, dtype: torch.dtype) -> Change:
        change = join_changes(unit, self._recipe, *self._readers(dtype))
        if isinstance(change, Merged | Dense) and change.given is not None:
            for module, runs in groupby(unit.layer.runs, lambda run: run.module):
                rows = [(run.begin, run.rows) for run in runs]
                given = _coefficients(unit, change.given, rows)
                self.coefficients[f"{unit.component}.{module}"] = given
        return change

    def _readers(self, dtype: torch.dtype) -> tuple[ReadChange, ReadWeight]:
        def read_change(term: Term) -> Change:
            return self.change(term.adapter, term.entry, dtype)

        def read_weight(entry: Entry) -> Tensor:
            assert self._base is not None, f"{entry.name} was planned with a base"
            weight = self._base.read(entry, "weight", dtype)
            assert weight is not None, f"{entry.name} was planned to be in the base"
            return weight

        return read_change, read_weight

    def delta(self, module: Module, dtype: torch.dtype) -> Delta:
        """The change of a module in rows, where it is no low-rank product."""
        return delta_of(module.shape, module.terms, *self._readers(dtype))

    def _weighed(self, adapter: int, entry: Entry, change: Change) -> Change:
        """The change with the vectors that the recipe gives its adapter."""
        vectors, file = self._adapters[adapter].vectors, self._vectors[adapter]
        if vectors is None or file is None or entry.name not in vectors.keys:
            return change
        read = {}
        for kind, key in vectors.keys[entry.name].items():
            read[kind] = file.read_tensor(key).to(torch.float64)
            if not read[kind].isfinite().all():
                raise NotFinite(file.name, key)
        return Weighed(change, *(read.get(kind) for kind in KINDS))

    def _read_change(self, adapter: int, entry: Entry, dtype: torch.dtype) -> Change:
        name = self._adapters[adapter].name
        unread = set() if counts_alpha(entry.keys) else {"alpha"}  # it may be Inf, and often is
        tensors = {
            role: self._read(adapter, key, dtype)
            for role, key in entry.keys.items()
            if role not in unread
        }
        try:
            return read_change(entry.layout, tensors, entry.layer.shape, entry.facts)
        except ValueError as error:
            raise ShapeMismatch(name, entry.name, str(error)) from error

    def parts(self, module: Module, dtype: torch.dtype) -> tuple[list[lora.Factors], list[float]]:
        """The change of a module by each entry as a product, and the strengths they come with."""
        products, strengths = [], []
        for terms in module.entries:
            first = terms[0]
            factors = self.change(first.adapter, first.entry, dtype).factors()
            assert factors is not None, f"{first.entry.name} was planned as a low-rank product"
            if len(terms) == 1 and first.rows == factors.up.shape[0] == module.shape[0]:
                products.append(factors)
                strengths.append(first.strength)
            else:
                products.append(_moved(factors, terms, module.shape[0]))
                strengths.append(1.0)
        return products, strengths

    def spectrum(self, module: Module, dtype: torch.dtype) -> Spectrum:
        """The spectrum of all products of a module; that of a unit, where it is one, is known."""
        if len(module.terms) == 1 and isinstance(module.terms[0].entry, Unit):
            (term,) = module.terms
            change = self.change(term.adapter, term.entry, dtype)
            is_whole = term.rows == term.entry.layer.extent[0] == module.shape[0]
            if is_whole and isinstance(change, Merged) and change.spectrum is not None:
                return change.spectrum
        return linear.decompose(*self.parts(module, dtype))

    def given(self, module: Module, dtype: torch.dtype) -> Given | None:
        """The coefficients that the method has given the adapters, where they are not their strengths
        and all of the module is of one unit.
        """
        units = {term.entry.name: term for term in module.terms if isinstance(term.entry, Unit)}
        if len(units) != 1:
            return None
        (term,) = units.values()
        change = self.change(term.adapter, term.entry, dtype)
        if not isinstance(change, Merged | Dense) or change.given is None:
            return None
        assert isinstance(term.entry, Unit)
        rows = [(its.first, its.rows) for its in module.terms]
        return _coefficients(term.entry, change.given, rows)

    def summed(self, terms: Sequence[Term], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weighted sum of changes that are stored whole, as a matrix of `shape`."""
        total = torch.zeros(shape, dtype=dtype)
        for term in terms:
            change = self.change(term.adapter, term.entry, dtype)
            rows = change.weight(term.first, term.rows, None)
            total[term.begin : term.begin + term.rows] += term.strength * rows
        return total

    def summed_biases(self, terms: Sequence[Term], rows: int, dtype: torch.dtype) -> Tensor:
        """The weighted sum of changes of a bias."""
        total = torch.zeros(rows, dtype=dtype)
        for term in terms:
            bias = self._bias(term, dtype)
            if bias is None:  # IA3 on the inputs, which only its factors' shape shows
                continue
            taken = bias[term.first : term.first + term.rows]
            total[term.begin : term.begin + term.rows] += term.strength * taken
        return total

    def _bias(self, term: Term, dtype: torch.dtype) -> Tensor | None:
        change = self.change(term.adapter, term.entry, dtype)
        if change.needs is Needs.NOTHING:
            return change.bias(None, None)
        assert self._base is not None, f"{term.entry.name} was planned with a base"
        bias = self._base.read(term.entry, "bias", dtype)
        return change.bias(bias, self._base.read(term.entry, "weight", dtype))

    def _read(self, adapter: int, key: str, dtype: torch.dtype) -> Tensor:
        stored = self._files[adapter].read_tensor(key)
        if not stored.is_floating_point():
            return stored
        tensor = stored.to(dtype)
        # One NaN or Inf makes the sum NaN or Inf; a finite sum of finite float32 may still
        # overflow, so only then is every value looked at.
        if not isfinite(tensor.sum().item()) and not tensor.isfinite().all():
            raise NotFinite(self._adapters[adapter].name, key)
        return tensor


def _coefficients(unit: Unit, given: Given, rows: Sequence[tuple[int, int]]) -> Given:
    """What the adapters have been given in these (first, number of) rows of a unit.

    One that has several strengths in the unit was given a factor on them: it has a coefficient where
    it has one strength, and none where rows differ.
    """
    found = {}
    for adapter, factor in given.items():
        terms = [term for term in unit.terms if term.adapter == adapter]
        strengths = {
            term.strength
            for term in terms
            if any(term.begin < first + n and first < term.begin + term.rows for first, n in rows)
        }
        is_one = len({term.strength for term in terms}) == 1
        if len(strengths) == 1:
            found[adapter] = factor if is_one else factor * strengths.pop()
    return found


def _moved(factors: lora.Factors, terms: Sequence[Term], rows: int) -> lora.Factors:
    """The product with its rows where the terms say, times their strengths, and zeros elsewhere."""
    up = factors.up.new_zeros(rows, factors.rank)
    for term in terms:
        taken = factors.up[term.first : term.first + term.rows]
        up[term.begin : term.begin + term.rows] = taken * term.strength
    return lora.Factors(up, factors.down, factors.scale)


class OpenBase:
    """Opens the base's files when they are first asked for; may be used from several threads."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._stack = ExitStack()
        self._files: dict[str, TensorFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def file(self, name: str) -> TensorFile:
        with self._lock:
            if name not in self._files:
                planned = self.base.files[name]
                opened = open_as_planned(planned.path, planned.header)
                self._files[name] = self._stack.enter_context(opened)
            return self._files[name]

    def read(
        self, entry: Entry, parameter: str, dtype: torch.dtype, *, is_copy: bool = False
    ) -> Tensor | None:
        """The weight of an entry's layer as a matrix (out, in), or its bias, from wherever its rows
        lie; None for a bias that the base lacks.
        """
        rows, columns = entry.layer.extent
        whole = torch.empty(rows, columns if parameter == "weight" else 1, dtype=dtype)
        for run in entry.layer.runs:
            pieces = self.base.find(entry.component, run.module, parameter, kind=entry.layer.kind)
            copies = [piece for piece in pieces if piece.is_copy == is_copy]
            if not copies:
                assert parameter == "bias", f"{run.module} was planned to be in the base"
                return None
            for piece in copies:
                held = self._read_slice(piece, dtype)
                low = max(run.first, piece.first)
                high = min(run.first + run.rows, piece.first + held.shape[0])
                begin = run.begin + low - run.first
                taken = held[max(low - piece.first, 0) : max(high - piece.first, 0)]
                whole[begin : begin + taken.shape[0]] = taken[:, : whole.shape[1]]
        return whole if parameter == "weight" else whole.squeeze(1)

    def _read_slice(self, piece: Slice, dtype: torch.dtype) -> Tensor:
        file = self.file(piece.file)
        tensor = file.read_tensor(piece.key)
        matrix = tensor.reshape(tensor.shape[0], -1)
        matrix = matrix[piece.first_row : piece.first_row + piece.rows].to(dtype)
        if (scale := self.base.scale(piece)) is not None:
            groups = as_groups(read_scale(file, scale), scale)
            matrix = matrix * spread(groups, scale, piece.first_row, matrix)
        if not matrix.isfinite().all():
            raise NotFinite(file.name, piece.key)
        return matrix.mT if piece.is_transposed else matrix
