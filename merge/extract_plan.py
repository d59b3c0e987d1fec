"""What an extraction will do: two checkpoints + a recipe -> the layers that may differ. No torch.

Which layers do differ is in their tensors and not in the headers, so a plan names all of them, and
its cost is that of a tuned checkpoint that differs everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from merge.cost import DTYPES, FACTOR_BYTES, WORKERS, Cost, alpha_bytes
from merge.errors import BadRecipe
from merge.families import FAMILIES, Layer
from merge.families.layers import CONV, LINEAR, NORM
from merge.formats.dialects import naming_of
from merge.formats.sources import File
from merge.pairs import Pair, check_globs, open_pair
from merge.recipe import Recipe

# Columns of a layer's subspace for each rank that is asked for (merge.rangefinder).
_COLUMNS = 3
# Copies of a subspace that its decomposition takes, as measured with what the allocator keeps for
# threads (471 MB for a UNet of 860 M numbers at rank 16), and tiles in float64 that are alive at once.
_COPIES, _TILES = 9, 6
TILE_ELEMENTS = 512 * 1024
# How many times a fair share of ranks is looked at first.
MORE_RANKS = 2


@dataclass(frozen=True, slots=True)
class Site:
    """One layer as the output packs it. `kind` is that of the modules it is made of: factors are for
    linear layers and convolutions, norms are stored whole, and of others no adapter holds a change.
    """

    component: str
    layer: Layer
    kind: str

    @property
    def name(self) -> str:
        return f"{self.component}.{self.layer.module or self.layer.path}"

    @property
    def takes_factors(self) -> bool:
        return self.kind in (LINEAR, CONV)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.extent


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """A tuned checkpoint less its base, as an adapter."""

    recipe: Recipe
    pair: Pair
    sites: tuple[Site, ...]
    dialect: str
    dtype: str
    cost: Cost
    adapters: tuple[()] = ()

    @property
    def family(self) -> str | None:
        return self.pair.family

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.pair.left_out

    @property
    def writes_folder(self) -> bool:
        return self.dialect == "peft"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "extract",
            "family": self.family,
            "dialect": self.dialect,
            "dtype": self.dtype,
            "base": {"layout": self.pair.base.layout, "files": len(self.pair.base.files)},
            "tuned": {"layout": self.pair.tuned.layout, "files": len(self.pair.tuned.files)},
            "inputs": [],
            "modules": self.cost.modules,
            "left_out": list(self.left_out),
            "bytes_to_write": self.cost.bytes_to_write,
            "memory_bytes": self.cost.memory_bytes,
        }


def plan_extract(recipe: Recipe, files: Mapping[str, File]) -> ExtractPlan:
    """The checked steps of an extraction; `files` has what every `recipe.refs()` names."""
    assert recipe.base is not None, "an extraction without a base is no recipe"
    assert recipe.tuned is not None, "an extraction without a tuned checkpoint is no recipe"
    base, tuned = (
        _file(source.name, param, files)
        for param, source in (("base", recipe.base), ("tuned", recipe.tuned))
    )
    pair = open_pair(base, tuned, recipe.tuned.leaves_out)
    check_globs(pair, recipe.tuned.leave_out, recipe.tuned.only)
    dialect = recipe.output.dialect or ("peft" if pair.family is None else "kohya")
    if pair.family is None and dialect != "peft":
        detail = "the checkpoints are of a family we do not know, which only peft can name"
        raise BadRecipe("output.dialect", detail)
    sites = tuple(_sites(pair, dialect))
    if not sites:
        raise BadRecipe("tuned", "every layer is left out, so there is nothing to compare")
    dtype = DTYPES.get(recipe.output.dtype) or _stored_dtype(pair)
    return ExtractPlan(recipe, pair, sites, dialect, dtype, _cost(recipe, sites, dialect, dtype))


def most_ranks(recipe: Recipe, site: Site) -> int:
    """The largest rank that a layer is written with, as far as the recipe says."""
    wanted = recipe.rank.fixed
    return min(*site.shape, wanted) if wanted is not None else min(site.shape)


def _file(name: str, param: str, files: Mapping[str, File]) -> File:
    file = files.get(name)
    if file is None or (isinstance(file, Path) and not file.exists()):
        raise BadRecipe(param, f"{name} was not found")
    return file


def _sites(pair: Pair, dialect: str) -> Iterator[Site]:
    """The layers that the dialect has for what both checkpoints have, by name."""
    if pair.family is None:
        for (component, _), layer in sorted(pair.modules.items()):
            yield Site(component, layer, layer.kind)
        return
    family = FAMILIES[pair.family]
    for component in sorted({component for component, _ in pair.modules}):
        layers = family.layers[component][naming_of(dialect, component, family)]
        for path in sorted(layers):
            layer = layers[path]
            runs = tuple(run for run in layer.runs if (component, run.module) in pair.modules)
            held = [pair.modules[component, run.module] for run in runs]
            if held:
                # Variants of a base may have more inputs than the family's table says.
                shape = (layer.shape[0], *held[0].shape[1:])
                is_same = prod(shape) == prod(layer.shape)
                has_bias = any(its.has_bias for its in held)
                shape = layer.shape if is_same else shape
                its = replace(layer, shape=shape, has_bias=has_bias, runs=runs)
                yield Site(component, its, held[0].kind)


def _stored_dtype(pair: Pair) -> str:
    """The half precision that both checkpoints are in, else float32."""
    found = {
        base.info(piece).dtype
        for base in (pair.base, pair.tuned)
        for (component, path), layer in pair.modules.items()
        if layer.kind != NORM
        for piece in base.find(component, path, kind=layer.kind)
    }
    found -= {"F8_E4M3", "F8_E5M2"}
    return found.pop() if len(found) == 1 and found <= {"F16", "BF16"} else "F32"


def _cost(recipe: Recipe, sites: tuple[Site, ...], dialect: str, dtype: str) -> Cost:
    item, alpha = FACTOR_BYTES[dtype], alpha_bytes(dialect)
    factors = [
        min(most_ranks(recipe, site) * sum(site.shape), prod(site.shape)) * item + alpha
        for site in sites
        if site.takes_factors
    ]
    stored = sum(site.shape[0] * item * (1 + (site.kind == NORM)) for site in sites)
    written = sum(factors)
    if recipe.rank.budget_bytes is not None:
        written = min(written, recipe.rank.budget_bytes)
    elif recipe.rank.shared is not None:
        ranks = [(min(recipe.rank.shared, *s.shape), s) for s in sites if s.takes_factors]
        written = sum(rank * sum(site.shape) * item + alpha for rank, site in ranks)
    depth = _depth(recipe, [site for site in sites if site.takes_factors], item, alpha)
    largest = max((_working(site, depth) for site in sites), default=0)
    # Factors are kept in float32 until all ranks are known, then rounded.
    kept = written // item * 4
    return Cost(len(sites), written + stored, kept + written + WORKERS * largest)


def _depth(recipe: Recipe, sites: Sequence[Site], item: int, alpha: int) -> int | None:
    """How many ranks of a layer are computed; None where an energy may ask for all of them.

    Of a shared size a layer may get more than is looked at first, which takes more for that layer.
    """
    wanted = recipe.rank
    if wanted.fixed is not None:
        return wanted.fixed
    if wanted.shared is not None:
        return MORE_RANKS * wanted.shared
    if wanted.budget_bytes is not None:
        per_rank = sum(sum(site.shape) for site in sites) * item
        return MORE_RANKS * fair_rank(wanted.budget_bytes, per_rank, alpha * len(sites))
    return None


def fair_rank(budget_bytes: int, bytes_per_rank: int, bytes_beside: int) -> int:
    """The rank that all layers could have."""
    return max(1, (budget_bytes - bytes_beside) // max(bytes_per_rank, 1))


def _working(site: Site, depth: int | None) -> int:
    """Bytes that a layer takes while it is decomposed."""
    least = min(site.shape)
    columns = least if depth is None else min(_COLUMNS * (depth + 10), least)
    return 8 * (_COPIES * columns * sum(site.shape) + _TILES * TILE_ELEMENTS)
