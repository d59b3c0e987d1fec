"""Layers of a merged adapter, as its dialect packs them, with everything that adds up in each.

What is low-rank adds up as products, differences of norms, biases and whole weights as plain sums.
What needs a base to say what it does cannot be part of an adapter without one: Unsupported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod

from merge.errors import BadRecipe, ShapeMismatch, Unsupported
from merge.families import FAMILIES, Layer
from merge.families.layers import OWN
from merge.formats.adapters import Entry
from merge.formats.dialects import naming_of
from merge.formats.grammar import NOTHING
from merge.terms import Name, Source, Term, terms_in
from merge.units import ELSEWHERE, BiasOf, Unit

# Differences that are stored whole.
_STORED = ("full", "norm")


@dataclass(frozen=True, slots=True)
class Module:
    """One layer and all contributions to it. Rows that no term reaches do not change.

    `terms` are of products, `differences` of weights that are stored whole, `biases` of biases; those
    of one entry stand together, entries in canonical order of the inputs. One of the three at least
    is not empty, and not both of the first two are full.
    """

    component: str
    layer: Layer
    terms: tuple[Term, ...]
    differences: tuple[Term, ...] = ()
    biases: tuple[Term, ...] = ()

    @property
    def module(self) -> str:
        """Our own path, or the layer's where it packs several modules."""
        return self.layer.module or self.layer.path

    @property
    def name(self) -> str:
        return f"{self.component}.{self.module}"

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.layer.shape[2:]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the flattened delta."""
        return self.layer.extent

    @property
    def entries(self) -> tuple[tuple[Term, ...], ...]:
        """The products' terms by entry: an entry counts once, however many runs of rows it has here."""
        return tuple(
            tuple(its) for _, its in groupby(self.terms, lambda t: (t.adapter, t.entry.name))
        )

    @property
    def rank(self) -> int:
        """The summed ranks: what an exact merge writes, or the most there can be."""
        return sum(_most_rank(its[0].entry) for its in self.entries)

    @property
    def is_dense(self) -> bool:
        """Whether a part of it is no low-rank product, so that it has to be approximated."""
        return any(its[0].entry.exact_rank is None for its in self.entries)

    @property
    def n_stored(self) -> int:
        """Numbers that are written beside the factors, whatever their rank."""
        return prod(self.shape) * bool(self.differences) + self.shape[0] * bool(self.biases)


@dataclass(slots=True)
class _Gathered:
    layer: Layer
    terms: list[Term] = field(default_factory=list)
    differences: list[Term] = field(default_factory=list)
    biases: list[Term] = field(default_factory=list)


def lay_out(
    sources: Mapping[Name, Sequence[Source]],
    names: Sequence[str],
    family: str | None,
    dialect: str,
    *,
    has_base: bool = False,
) -> tuple[Module, ...]:
    """The layers of the output with a contribution, by name; `names` are the inputs' files."""
    if family is None and dialect != "peft":
        why = f"{names[0]} is for a model of no family we know, which only peft can name"
        raise BadRecipe("output.dialect", why)
    found: dict[Name, _Gathered] = {}
    for name, its in sources.items():
        for source in its:
            _check_mergeable(source.entry, names[source.adapter], has_base)
        _check_shapes(".".join(name), its, names)
        active = [source for source in its if source.strength != 0]
        for layer, first, rows, begin in _targets(name, active, family, dialect):
            into = found.setdefault((name[0], layer.path), _Gathered(layer))
            for term in terms_in(active, first, rows, begin):
                _sort_in(term, into)
    modules = [_module(component, its) for (component, _), its in sorted(found.items())]
    for module in modules:
        _check_holds(module, names, dialect)
    return tuple(modules)


def _sort_in(term: Term, into: _Gathered) -> None:
    if term.entry.touches_weight:
        (into.differences if term.entry.layout in _STORED else into.terms).append(term)
    if term.entry.touches_bias:
        into.biases.append(term)


def _module(component: str, its: _Gathered) -> Module:
    return Module(
        component, its.layer, *(_in_order(t) for t in (its.terms, its.differences, its.biases))
    )


def _in_order(terms: Iterable[Term]) -> tuple[Term, ...]:
    return tuple(sorted(terms, key=lambda term: (term.adapter, term.entry.name, term.begin)))


def _most_rank(entry: Entry) -> int:
    return min(entry.layer.extent) if entry.exact_rank is None else entry.exact_rank


def _check_mergeable(entry: Entry, name: str, has_base: bool) -> None:
    if isinstance(entry, Unit) or (isinstance(entry, BiasOf) and has_base):
        return
    if entry.needs != NOTHING and has_base:
        why = f"{entry.name} gets new values ({entry.algorithm}), which no factors hold; bake it"
        raise Unsupported(name, why)
    if entry.needs != NOTHING:
        why = f"what {entry.algorithm} does to {entry.name} depends on the base; bake it, or name a base and a rank"
        raise Unsupported(name, why)
    if entry.layout in ELSEWHERE:
        raise Unsupported(name, f"{entry.name} is {ELSEWHERE[entry.layout]}; bake it")
    if 0 in entry.layer.shape:
        why = (
            f"the factors of {entry.name} ({entry.algorithm}) do not show its whole shape; "
            "name the base, or bake it"
        )
        raise Unsupported(name, why)
    is_product = entry.exact_rank is not None or not entry.touches_weight
    if not is_product and entry.layout not in _STORED:
        why = f"the change of {entry.name} ({entry.algorithm}) is no low-rank product; bake it, or say a rank"
        raise Unsupported(name, why)


def _check_holds(module: Module, names: Sequence[str], dialect: str) -> None:
    """A dialect either has keys for all that changes, or is not written."""
    if module.terms and module.differences:
        why = f"it changes {module.name} as a whole, and another input by factors; bake them"
        raise Unsupported(names[module.differences[0].adapter], why)
    if dialect in ("kohya", "comfy"):
        return
    if module.differences:
        what = "a difference that is stored whole"
    elif module.biases and not module.terms:
        what = "a change of the bias alone"
    else:
        return
    raise BadRecipe(
        "output.dialect", f"{dialect} cannot hold {what} ({module.name}); kohya and comfy can"
    )


def _targets(
    name: Name, sources: Sequence[Source], family: str | None, dialect: str
) -> list[tuple[Layer, int, int, int]]:
    """(layer of the output, first row of the module, rows, row of the layer) for a module's rows."""
    component, module = name
    if not sources:
        return []
    own = sources[0].entry.layer
    if family is None:
        return [(own, 0, own.shape[0], 0)]
    table = FAMILIES[family].tables[component]
    naming = naming_of(dialect, component, FAMILIES[family])
    if naming != OWN:
        packed = table.packed(naming)[module]
        found = [(layer, run.first, run.rows, run.begin) for layer, run in packed]
    else:
        layer = table.layers[naming][module]
        found = [(layer, 0, layer.shape[0], 0)]
    inner = own.shape[1:]
    return [(_with_inputs(layer, inner), first, rows, at) for layer, first, rows, at in found]


def _with_inputs(layer: Layer, inner: tuple[int, ...]) -> Layer:
    """The layer with as many inputs as the adapters have: the first layer of a variant has more."""
    if prod(layer.shape[1:]) == prod(inner):
        return layer
    return replace(layer, shape=(layer.shape[0], *inner))


def _check_shapes(name: str, sources: Sequence[Source], names: Sequence[str]) -> None:
    first = sources[0].entry.layer
    for other in sources[1:]:
        layer = other.entry.layer
        if prod(layer.shape[1:]) != prod(first.shape[1:]) or (
            layer.path == first.path and layer.extent != first.extent
        ):
            detail = (
                f"the change is {layer.extent}, in {names[sources[0].adapter]} it is {first.extent}"
            )
            raise ShapeMismatch(names[other.adapter], name, detail)
