"""Units: the layers that a merge method sees, with everything that changes the weight of each.

A linear merge may be done row by row, other methods look at a layer as a whole. The layer is the one
that the inputs themselves pack: usually a module of ours, and where some adapter has q, k and v in
one pair of factors, all three. Neither the dialect of the output nor the layout of a base is asked,
so that neither changes what a method gives.

A unit stands in for the entries it was made of: it is an entry itself, whose change is computed from
theirs (merge.joined), and planning goes on as if one adapter of strength 1 had it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from merge.bases import Base
from merge.errors import BadRecipe, ShapeMismatch, Unsupported
from merge.families import Layer
from merge.formats.adapters import Entry
from merge.formats.grammar import NOTHING
from merge.method_parameters import Linear, Parameters, Space
from merge.patches import adds_bias, resolved
from merge.recipe import Rank, Recipe
from merge.terms import Name, Source, Term, terms_in

LAYOUT = "unit"
# So many that are in several layers of the output are kept at a time while those are computed.
KEPT_UNITS = 8
# Summed at their strengths whatever the method: what is stored whole, and new values.
_SUMMED = ("full", "norm", "replacement", "tokens")
# Factors of something else than a layer's weight, which of all adapters only PEFT's can name.
ELSEWHERE = {
    "lora-embedding": "an embedding",
    "lora-experts": "packed experts",
    "lora-mha": "the packed projection of an nn.MultiheadAttention",
}


@dataclass(frozen=True, slots=True)
class Unit(Entry):
    """`terms` are all changes of the weight, at rows of this layer, those of one adapter together."""

    terms: tuple[Term, ...] = ()

    @property
    def touches_bias(self) -> bool:
        return False

    @property
    def touches_weight(self) -> bool:
        return True

    @property
    def is_dense(self) -> bool:
        """Whether its change is no low-rank product that the factors alone give."""
        return self.exact_rank is None

    def is_within(self, terms: Iterable[Term]) -> bool:
        """Whether all of its rows that change are in these terms, so that nothing else needs it."""
        rows = sum(
            term.rows
            for term in terms
            if isinstance(term.entry, Unit) and term.entry.name == self.name
        )
        return rows == sum(run.rows for run in self.layer.runs)

    @property
    def adapters(self) -> tuple[int, ...]:
        """Those that change it, in canonical order."""
        return tuple(dict.fromkeys(term.adapter for term in self.terms))


@dataclass(frozen=True, slots=True)
class BiasOf(Entry):
    """An entry of which the unit has taken the change of the weight."""

    @property
    def touches_weight(self) -> bool:
        return False


def join(
    sources: Mapping[Name, Sequence[Source]],
    recipe: Recipe,
    names: Sequence[str],
    base: Base | None,
) -> dict[Name, list[Source]]:
    """The sources with the changes of weights that the method combines replaced by units.

    `names` are the inputs' files. A linear merge needs units only where a change is no product.
    """
    found: dict[Name, list[Source]] = {name: [] for name in sources}
    joined: dict[Name, list[Source]] = {}
    for name, its in sources.items():
        for source in its:
            _check(source.entry, recipe, names[source.adapter])
            taken = source if base is None else resolved(source, _shape(base, name, source))
            if _is_joined(source):
                joined.setdefault(name, []).append(taken)
            else:
                found[name].append(source if recipe.kind == "bake" else taken)
    for component, modules in _connected(joined):
        its = [source for module in modules for source in joined[component, module]]
        if not _needs_unit(its, recipe):
            for module in modules:
                found[component, module] += joined[component, module]
            continue
        unit = _unit(component, modules, joined, recipe, names)
        for source in its:
            if source.entry.touches_bias and not _is_idle(source, component, recipe, base):
                kept = Source(source.adapter, _bias_of(source.entry), source.run, source.strength)
                found[component, source.run.module].append(kept)
        for run in unit.layer.runs:
            if run.module in modules:
                found[component, run.module].append(Source(unit.adapters[0], unit, run, 1.0))
    return {name: its for name, its in found.items() if its}


def _is_joined(source: Source) -> bool:
    entry = source.entry
    is_summed = entry.layout in _SUMMED or entry.layout in ELSEWHERE
    return entry.touches_weight and not is_summed and source.strength != 0


def _shape(base: Base, name: Name, source: Source) -> tuple[int, ...] | None:
    return base.shape(*name, kind=source.entry.layer.kind)


def _check(entry: Entry, recipe: Recipe, name: str) -> None:
    if entry.layout in ELSEWHERE and recipe.method != Linear():
        why = (
            f"{entry.name} is {ELSEWHERE[entry.layout]}, which only a plain sum can hold, in a bake"
        )
        raise Unsupported(name, why)


def _is_idle(source: Source, component: str, recipe: Recipe, base: Base | None) -> bool:
    """Whether what it does to a bias finds none in the base that an adapter is made for."""
    if recipe.kind == "bake" or base is None or adds_bias(source.entry):
        return False
    return not base.find(component, source.run.module, "bias")


def _needs_unit(sources: Sequence[Source], recipe: Recipe) -> bool:
    """Factors of a plain sum are put side by side, and a bake sums as it goes."""
    if recipe.method != Linear():
        return True
    is_dense = any(_is_dense(source.entry) for source in sources)
    is_said = recipe.base is not None or recipe.rank != Rank(exact=True)
    return recipe.kind != "bake" and is_dense and is_said


def _is_dense(entry: Entry) -> bool:
    return entry.needs != NOTHING or entry.exact_rank is None


def _connected(sources: Mapping[Name, Sequence[Source]]) -> Iterable[tuple[str, list[str]]]:
    """(component, modules) that entries tie to each other, in the order of their names."""
    groups: dict[Name, set[Name]] = {name: {name} for name in sources}
    for name, its in sources.items():
        for source in its:
            for run in source.entry.layer.runs:
                other = (name[0], run.module)
                if other in sources and groups[other] is not groups[name]:
                    groups[name] |= groups[other]
                    for member in groups[other]:
                        groups[member] = groups[name]
    seen: set[Name] = set()
    for name in sorted(sources):
        if name not in seen:
            seen |= groups[name]
            yield name[0], sorted(module for _, module in groups[name])


def _unit(
    component: str,
    modules: Sequence[str],
    joined: Mapping[Name, Sequence[Source]],
    recipe: Recipe,
    names: Sequence[str],
) -> Unit:
    its = [source for module in modules for source in joined[component, module]]
    # The widest layer packs all the others; of equals the one whose name comes first.
    widest = min((s.entry.layer for s in its), key=lambda at: (-at.shape[0], at.naming, at.path))
    for source in its:
        _check_fits(component, source, widest, names)
    terms = [
        term
        for run in widest.runs
        if run.module in modules
        for term in terms_in(joined[component, run.module], run.first, run.rows, run.begin)
    ]
    terms.sort(key=lambda term: (term.adapter, term.entry.name, term.begin))
    method = recipe.method
    is_dense = method.space is Space.ELEMENTS or any(_is_dense(source.entry) for source in its)
    if is_dense and method.space is Space.CORE:
        dense = next(source for source in its if _is_dense(source.entry))
        why = (
            f"{method.name} needs low-rank factors, and {dense.entry.name} "
            f"({dense.entry.algorithm}) has none; linear and ties can combine it"
        )
        raise Unsupported(names[dense.adapter], why)
    if is_dense and recipe.kind != "bake":
        _check_approximated(its, recipe, names)
    unit = Unit(
        component=component,
        layer=widest,
        algorithm=method.name,
        layout=LAYOUT,
        keys={},
        rank=None,
        exact_rank=None if is_dense else _summed_rank(terms),
        needs=NOTHING,
        dims=its[0].entry.dims,
        terms=tuple(terms),
    )
    if method.takes_shares:
        _check_shares(unit, method, recipe)
    return unit


def _check_approximated(sources: Sequence[Source], recipe: Recipe, names: Sequence[str]) -> None:
    """A dense change is written as factors of a lower rank, and may need the base to be known."""
    for source in sources:
        entry = source.entry
        if entry.needs != NOTHING and recipe.base is None:
            why = (
                f"what {entry.algorithm} does to {entry.name} depends on the base; name it, or bake"
            )
            raise Unsupported(names[source.adapter], why)
        if recipe.rank == Rank(exact=True):
            detail = (
                f"the change of {entry.name} ({entry.algorithm}) has full rank; say a lower one"
            )
            raise BadRecipe("rank", detail)


def _summed_rank(terms: Sequence[Term]) -> int:
    entries = {(term.adapter, term.entry.name): term.entry for term in terms}
    return sum(entry.exact_rank or 0 for entry in entries.values())


def _check_fits(component: str, source: Source, layer: Layer, names: Sequence[str]) -> None:
    own = source.entry.layer
    name = f"{component}.{source.run.module}"
    if 0 in own.shape:
        why = (
            f"the factors of {source.entry.name} ({source.entry.algorithm}) do not show its whole "
            "shape; name the base, or bake it"
        )
        raise Unsupported(names[source.adapter], why)
    if own.extent[1] != layer.extent[1] or (own.path == layer.path and own.extent != layer.extent):
        detail = f"the change is {own.extent}, where another input's is {layer.extent}"
        raise ShapeMismatch(names[source.adapter], name, detail)
    run = source.run
    covered = (
        min(run.first + run.rows, other.first + other.rows) - max(run.first, other.first)
        for other in layer.runs
        if other.module == run.module
    )
    if sum(max(rows, 0) for rows in covered) < run.rows:
        why = f"it packs {name} otherwise than another input, so no layer holds both; linear needs none"
        raise Unsupported(names[source.adapter], why)


def _check_shares(unit: Unit, method: Parameters, recipe: Recipe) -> None:
    """Strengths that share one result are positive, and one for each adapter of a layer."""
    strengths: dict[int, set[float]] = defaultdict(set)
    for term in unit.terms:
        strengths[term.adapter].add(term.strength)
    order = recipe.in_canonical_order()
    for adapter, found in strengths.items():
        param = f"inputs[{order[adapter]}].strength"
        if min(found) <= 0:
            detail = (
                f"{recipe.method.name} shares one result, so strengths are positive ({unit.name})"
            )
            raise BadRecipe(param, detail)
        if len(found) > 1:
            detail = (
                f"{recipe.method.name} needs one strength for all of {unit.name}, whose rows have "
                f"{', '.join(f'{s:g}' for s in sorted(found))}"
            )
            raise BadRecipe(param, detail)
    if recipe.method.name == "slerp" and len(strengths) > 2:
        detail = f"slerp is between two, and {len(strengths)} inputs change {unit.name}; karcher is for more"
        raise BadRecipe("method.name", detail)


def _bias_of(entry: Entry) -> BiasOf:
    values: dict[str, Any] = {field.name: getattr(entry, field.name) for field in fields(Entry)}
    return BiasOf(**values)
