"""Which input changes which of our own modules, and what of it can be measured. Headers only.

Our own modules and not the layers of the output: q, k and v that one input packs and another holds
apart meet in three modules, and the report is the same in whatever dialect the result is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from merge.bases import Base
from merge.families import FAMILIES, Layer
from merge.families.layers import OWN
from merge.formats.adapters import Entry
from merge.formats.grammar import NOTHING
from merge.formats.sources import File
from merge.modules import Module
from merge.patches import resolved
from merge.plan import Adapter, open_inputs
from merge.recipe import Recipe
from merge.terms import Name, Source, gather, terms_in

_EXPERTS = "lora-experts"
_STORED = ("full", "norm")


@dataclass(frozen=True, slots=True)
class Survey:
    """`modules` by name; their `differences` are whatever is no product. Adapters stand in the order
    of the recipe's inputs, and `unmeasured` has the names of what is in no module, with the reason.
    """

    adapters: tuple[Adapter, ...]
    families: tuple[str, ...]
    modules: tuple[Module, ...]
    unmeasured: tuple[Mapping[str, str], ...]
    left_out: tuple[str, ...]


def survey(recipe: Recipe, files: Mapping[str, File], base: Base | None) -> Survey:
    """`base` is the recipe's, where it has one, and all inputs fit it."""
    adapters, inputs, families = open_inputs(recipe, files, range(len(recipe.inputs)))
    sources, left_out = gather(inputs, [adapter.layout for adapter in adapters])
    unmeasured: list[dict[str, str]] = [{} for _ in adapters]
    modules = []
    for name, its in sorted(sources.items()):
        known = []
        for source in its:
            if source.strength == 0:
                continue
            if base is not None:
                source = resolved(source, base.shape(*name, kind=source.entry.layer.kind))
            why = _why_not(source.entry, has_base=base is not None)
            if why:
                unmeasured[source.adapter][".".join(name)] = why
            else:
                known.append(source)
        if known:
            modules.append(_module(name, known, families[0] if families else None))
    return Survey(
        adapters, tuple(families), tuple(modules), tuple(unmeasured), tuple(sorted(left_out))
    )


def _why_not(entry: Entry, *, has_base: bool) -> str:
    if entry.layout == _EXPERTS:
        return "packed experts"
    if entry.needs != NOTHING and not has_base:
        return f"what {entry.algorithm} does depends on the base"
    if 0 in entry.layer.shape:
        return f"the factors of {entry.algorithm} do not show the whole shape"
    return ""


def is_product(entry: Entry) -> bool:
    """Whether its change is one of factors, whatever the base is."""
    return entry.needs == NOTHING and entry.exact_rank is not None and entry.layout not in _STORED


def _module(name: Name, sources: Sequence[Source], family: str | None) -> Module:
    layer = _layer(name, sources[0].entry.layer, family)
    terms = [term for source in sources for term in terms_in([source], 0, layer.shape[0], 0)]
    terms.sort(key=lambda term: (term.adapter, term.entry.name, term.begin))
    weights = [term for term in terms if term.entry.touches_weight]
    return Module(
        name[0],
        layer,
        tuple(term for term in weights if is_product(term.entry)),
        tuple(term for term in weights if not is_product(term.entry)),
        tuple(term for term in terms if term.entry.touches_bias),
    )


def _layer(name: Name, found: Layer, family: str | None) -> Layer:
    """Our own layer, with as many inputs as the adapters have: variants of a base have more."""
    component, module = name
    if family is None:
        return found
    own = FAMILIES[family].tables[component].layers[OWN][module]
    if prod(own.shape[1:]) == prod(found.shape[1:]):
        return own
    return replace(own, shape=(own.shape[0], *found.shape[1:]))


# Where a block stands among others with another beginning, in the order a model runs them.
_FIRST = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks")
_LAST = ("single_transformer_blocks", "conv_norm_out", "conv_out", "norm_out", "proj_out")


def block_of(module: str) -> str:
    """The beginning of a module's path up to its first number, which is where in the model it is."""
    steps = module.removeprefix("text_model.encoder.").split(".")
    if steps[0] == "mid_block":
        return "mid_block"
    numbered = next((i for i, step in enumerate(steps) if step.isdecimal()), 0)
    return ".".join(steps[: numbered + 1])


def block_order(block: str) -> tuple[Any, ...]:
    """Sorts blocks as a model runs them."""
    steps = block.split(".")
    place = _FIRST.index(steps[0]) if steps[0] in _FIRST else len(_FIRST)
    place += 1 + _LAST.index(steps[0]) if steps[0] in _LAST else 0
    numbers = [int(step) if step.isdecimal() else -1 for step in steps]
    return place, steps[0], numbers, steps


def component_order(component: str) -> tuple[bool, str]:
    """Text encoders after the model that they serve."""
    return component.startswith("text_encoder"), component
