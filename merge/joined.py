"""The change of a unit: what its method makes of all entries that change it.

Where the method stays in the factors the result is factors again. Element-wise methods, and sums with
a part that is no low-rank product, give a change that is computed in rows when they are asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors
from merge.algorithms.lowrank import LowRank
from merge.errors import BadRecipe
from merge.formats.adapters import Entry
from merge.method_parameters import Space
from merge.methods import linear
from merge.methods.core import core_of, gram
from merge.methods.draws import Draws
from merge.methods.elements import Delta
from merge.methods.linear import Spectrum
from merge.methods.numerical_rank import is_nothing
from merge.methods.rules import COEFFICIENTS, CORE, ELEMENTS
from merge.recipe import Recipe
from merge.terms import Term
from merge.units import Unit

ReadChange = Callable[[Term], Change]
ReadWeight = Callable[[Entry], Tensor]


# By adapter: what a method that gives coefficients has given each; a factor on its strengths where
# rows of the unit differ in them.
Given = Mapping[int, float]


class Merged(LowRank):
    """A change that a method has made in the factors, with its spectrum if it has one already."""

    def __init__(
        self, factors: Factors, spectrum: Spectrum | None = None, given: Given | None = None
    ) -> None:
        super().__init__(factors)
        self.spectrum, self.given = spectrum, given


class Dense(Change):
    """A change that is computed row by row; what depends on the base has read it already."""

    needs = Needs.NOTHING

    def __init__(self, delta: Delta, given: Given | None = None) -> None:
        self.delta, self.given = delta, given

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        return self.delta.rows(first, rows)


def join_changes(
    unit: Unit, recipe: Recipe, read_change: ReadChange, read_weight: ReadWeight
) -> Change:
    """What the recipe's method makes of the unit. `read_weight` gives the base's matrix of an entry."""
    changes = _changes(unit.terms, lambda term: _present(read_change(term)))
    by_adapter = [list(its) for _, its in groupby(changes, lambda one: one[0].adapter)]
    method, draws, shape = recipe.method, draws_of(unit, recipe), unit.layer.extent
    try:
        if method.space is Space.ELEMENTS:
            deltas = [_delta(shape, its, read_weight) for its in by_adapter]
            return Dense(ELEMENTS[method.name](deltas, method, draws))
        if method.space is Space.CORE:
            parts = [_product(unit, its) for its in by_adapter]
            # In float64 whatever the numerics: which directions count as zero decides the result.
            core = core_of([_double(part) for part in parts], [1.0] * len(parts))
            merged = CORE[method.name](core, method, draws)
            whole, dtype = linear.truncate(merged, len(merged.values)), parts[0].up.dtype
            return Merged(Factors(whole.up.to(dtype), whole.down.to(dtype)), merged)
        return _weighted(unit, recipe, by_adapter, read_weight)
    except ValueError as error:
        raise BadRecipe("method", f"{unit.name}: {error}") from error


Changed = Sequence[tuple[Term, Change]]


def delta_of(
    shape: tuple[int, int],
    terms: Sequence[Term],
    read_change: ReadChange,
    read_weight: ReadWeight,
) -> Delta:
    """The sum of all terms in rows of a layer of `shape`, terms of one entry together."""
    return _delta(shape, _changes(terms, read_change), read_weight)


def _changes(terms: Sequence[Term], read_change: ReadChange) -> list[tuple[Term, Change]]:
    """Every entry is read once, however many of its rows are apart."""
    read: dict[tuple[int, str], Change] = {}
    for term in terms:
        name = (term.adapter, term.entry.name)
        if name not in read:
            read[name] = read_change(term)
    return [(term, read[term.adapter, term.entry.name]) for term in terms]


def _present(change: Change) -> Change:
    """The change, or exactly nothing in the place of factors that cancel each other.

    A merge of opposites leaves such factors. A method that looks at directions, or counts adapters,
    would take what rounding leaves of them for a change like any other.
    """
    factors = change.factors() if change.is_product else None
    if factors is None or not is_nothing(factors):
        return change
    return LowRank(Factors(torch.zeros_like(factors.up), factors.down))


def _double(part: Factors) -> Factors:
    return Factors(part.up.double(), part.down.double(), part.scale)


def _weighted(
    unit: Unit, recipe: Recipe, by_adapter: Sequence[Changed], read_weight: ReadWeight
) -> Change:
    """A linear merge with the coefficients that the method finds."""
    method, shape = recipe.method, unit.layer.extent
    rule = COEFFICIENTS[method.name]
    strengths = [_one_strength(its) for its in by_adapter]
    if unit.is_dense:
        deltas = [
            _delta(shape, its, read_weight, strength)
            for its, strength in zip(by_adapter, strengths, strict=True)
        ]
        coefficients = rule(_inner_products(deltas), strengths, method)
        return Dense(Sum(deltas, coefficients), _given(unit, strengths, coefficients))
    parts = [
        _product(unit, its, strength) for its, strength in zip(by_adapter, strengths, strict=True)
    ]
    coefficients = rule(gram(parts), strengths, method)
    given = _given(unit, strengths, coefficients)
    return Merged(linear.concatenate(parts, coefficients), given=given)


def _given(unit: Unit, strengths: Sequence[float], coefficients: Sequence[float]) -> Given | None:
    """What each adapter has been given, where that is not what it came with."""
    if list(strengths) == list(coefficients):
        return None
    return dict(zip(unit.adapters, coefficients, strict=True))


def _one_strength(its: Changed) -> float:
    """The strength that an adapter has in all of the unit; 1 where it differs and goes into the rows."""
    found = {term.strength for term, _ in its}
    return found.pop() if len(found) == 1 else 1.0


def _product(unit: Unit, its: Changed, divided_by: float = 1.0) -> Factors:
    """One adapter's change of the unit at its strengths, divided by one of them."""
    products = []
    for _, of_entry in groupby(its, lambda one: one[0].entry.name):
        terms = list(of_entry)
        factors = terms[0][1].factors()
        assert factors is not None, f"{unit.name} was planned as a low-rank product"
        (first, _), rows = terms[0], unit.layer.extent[0]
        if len(terms) == 1 and first.rows == rows == factors.up.shape[0]:
            products.append((factors, first.strength / divided_by))
            continue
        up = factors.up.new_zeros(rows, factors.rank)
        for term, _ in terms:
            taken = factors.up[term.first : term.first + term.rows]
            up[term.begin : term.begin + term.rows] = taken * (term.strength / divided_by)
        products.append((Factors(up, factors.down, factors.scale), 1.0))
    if len(products) == 1 and products[0][1] == 1.0:
        return products[0][0]
    return linear.concatenate([one for one, _ in products], [strength for _, strength in products])


def _delta(
    shape: tuple[int, int], its: Changed, read_weight: ReadWeight, divided_by: float = 1.0
) -> Delta:
    """The same in rows, for changes of any kind; what depends on the base is computed on it now."""
    parts = []
    for _, of_entry in groupby(its, lambda one: (one[0].adapter, one[0].entry.name)):
        terms = list(of_entry)
        entry, change = terms[0][0].entry, terms[0][1]
        needs_base = change.needs is not Needs.NOTHING
        weight = read_weight(entry) if needs_base else None
        parts.append(_Rows(shape, change, [term for term, _ in terms], weight, divided_by))
    return parts[0] if len(parts) == 1 else Sum(parts, [1.0] * len(parts))


class _Rows(Delta):
    """The change of one entry, moved to where its rows are."""

    def __init__(
        self,
        shape: tuple[int, int],
        change: Change,
        terms: Sequence[Term],
        weight: Tensor | None,
        divided_by: float,
    ) -> None:
        self.shape = shape
        self._change, self._terms, self._weight = change, terms, weight
        self._divided_by = divided_by
        if change.needs is Needs.WHOLE:
            # Its rows do not come apart, so all of them are computed once.
            whole = change.weight(0, terms[0].entry.layer.extent[0], weight)
            self._change, self._weight = Held(whole), None

    def rows(self, first: int, count: int) -> Tensor:
        found = None
        for term in self._terms:
            low, high = max(first, term.begin), min(first + count, term.begin + term.rows)
            if low >= high:
                continue
            at = term.first + low - term.begin
            base = None if self._weight is None else self._weight[at : at + high - low]
            rows = self._change.weight(at, high - low, base)
            rows = rows * (term.strength / self._divided_by)
            if high - low == count:
                return rows
            if found is None:
                found = rows.new_zeros(count, self.shape[1])
            found[low - first : high - first] = rows
        if found is None:
            return torch.zeros(count, self.shape[1], dtype=self._change_dtype())
        return found

    def _change_dtype(self) -> torch.dtype:
        return self._change.weight(0, 1, None if self._weight is None else self._weight[:1]).dtype


class Held(Change):
    """A change that is there as a matrix."""

    needs = Needs.NOTHING

    def __init__(self, matrix: Float[Tensor, "out in"]) -> None:
        self._matrix = matrix

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        return self._matrix[first : first + rows]


class Sum(Delta):
    """The weighted sum of changes, in the order in which they are given."""

    def __init__(self, deltas: Sequence[Delta], coefficients: Sequence[float]) -> None:
        self.shape = deltas[0].shape
        self._deltas, self._coefficients = deltas, coefficients

    def rows(self, first: int, count: int) -> Tensor:
        pairs = zip(self._deltas, self._coefficients, strict=True)
        delta, coefficient = next(pairs)
        total = delta.rows(first, count) * coefficient
        for delta, coefficient in pairs:
            total.add_(delta.rows(first, count), alpha=coefficient)
        return total


# Rows of one tile hold about so many elements.
_TILE = 256 * 1024


def _inner_products(deltas: Sequence[Delta]) -> Float[Tensor, "n n"]:
    """As merge.methods.core.gram, from the rows."""
    out, inner = deltas[0].shape
    step = max(1, _TILE // inner)
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for first in range(0, out, step):
        rows = torch.stack(
            [delta.rows(first, min(step, out - first)).double().flatten() for delta in deltas]
        )
        found += rows @ rows.mT
    return found


def draws_of(unit: Unit, recipe: Recipe) -> Draws:
    order = recipe.in_canonical_order()
    inputs = [recipe.inputs[order[adapter]] for adapter in unit.adapters]
    names = tuple(f"{source.sha256}:{source.config_sha256 or ''}" for source in inputs)
    return Draws(recipe.seed, unit.name, names)
