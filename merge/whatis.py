"""Which adapters are in a checkpoint, and how strongly: the difference from its base, explained.

Every layer that differs is read once in tiles of rows, beside the changes that the adapters would make
of the base; from their inner products in float64 follow the best strengths of all layers together, of
a component, of a block and of a layer (merge.fits). The coarsest of these that leaves no more than
rounding, or that the finer ones hardly improve, is the answer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.differences import Difference, tiles
from merge.errors import BadRecipe, UnknownModules, Unsupported
from merge.families import Layer
from merge.fits import Fit, Products, cosine, fit
from merge.formats.grammar import NOTHING
from merge.formats.sources import File
from merge.inputs import Inputs, OpenBase
from merge.modules import Module
from merge.pairs import Pair, open_overlap
from merge.patches import resolved
from merge.plan import Adapter, open_inputs
from merge.recipe import Recipe
from merge.reports.survey import block_of
from merge.terms import Name, Source, Term, gather, terms_in
from merge.threads import default_workers, run_in_order

LEVELS = ("everywhere", "component", "block", "layer")
# A finer level is the answer where it explains at least this much more of what a coarser one leaves.
_WORTH_IT = 0.05
# Two adapters whose changes are this parallel cannot be told apart.
_PARALLEL = 0.995
# A strength that is not this many times its standard error is not there.
_SURE = 6.0
# Nor is one that explains less of the difference than this.
_LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class Answer:
    """What explains the difference. `names` are the adapters', in the order of all strengths.

    `fits` are of the level's groups, by name: "" everywhere, "unet", "unet.down_blocks.1", … `alike`
    are adapters by index that cannot be told apart: the first of a group stands for all of it. `other` are tensors of no layer that differ too,
    `unmatched` what only one checkpoint has, `ignored` layers of adapters that are not in both.
    """

    names: tuple[str, ...]
    dtype: str
    whole: Fit
    level: str
    fits: Mapping[str, Fit]
    alike: tuple[tuple[int, ...], ...]
    differing: int
    same: int
    other: tuple[str, ...]
    unmatched: tuple[str, ...]
    ignored: Mapping[str, int]

    @property
    def is_same(self) -> bool:
        return self.differing == 0

    @property
    def left(self) -> float:
        """What the answer does not explain, as a share of the difference's squared norm."""
        whole = self.whole.products.inner[0, 0]
        parts = (its.left * its.products.inner[0, 0] for its in self.fits.values())
        return float(sum(parts) / whole) if whole else 0.0

    @property
    def rounding(self) -> float:
        """The most that rounding could leave, as a share of the same."""
        return self.whole.products.rounding_share

    @property
    def is_rounding(self) -> bool:
        """Whether nothing but rounding is left."""
        return self.left <= self.rounding

    def is_in(self, index: int) -> bool:
        """Whether an adapter takes part beyond doubt."""
        first = next((group[0] for group in self.alike if index in group), index)
        return any(_is_there(its, first) for its in self.fits.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "adapters": [
                {
                    "file": name,
                    "is_in": self.is_in(i),
                    "strength": self.whole.strengths[i],
                    "standard_error": self.whole.errors[i],
                    "explains": self.whole.alone[i],
                    "layers_not_compared": self.ignored.get(name, 0),
                }
                for i, name in enumerate(self.names)
            ],
            "alike": [[self.names[i] for i in group] for group in self.alike],
            "dtype": self.dtype,
            "norm": self.whole.products.norm,
            "level": self.level,
            "strengths": {
                name or "everywhere": {
                    "strengths": list(its.strengths),
                    "standard_errors": list(its.errors),
                    "norm": its.products.norm,
                    "left": its.left,
                }
                for name, its in self.fits.items()
            },
            "left": self.left,
            "left_by_rounding_at_most": self.rounding,
            "layers": {"differ": self.differing, "same": self.same},
            "other_tensors_that_differ": list(self.other),
            "not_compared": list(self.unmatched),
        }


def whatis(
    checkpoint: File,
    recipe: Recipe,
    files: Mapping[str, File],
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
    *,
    workers: int | None = None,
) -> Answer:
    """`recipe` is the bake that is looked for: the base and the adapters, whose strengths count nothing."""
    assert recipe.base is not None, "a bake without a base is no recipe"
    adapters, inputs, families = open_inputs(recipe, files, range(len(recipe.inputs)))
    pair = open_overlap(files[recipe.base.name], checkpoint)
    if pair.family is not None and pair.family not in families:
        detail = f"{adapters[0].name} is for another model than the checkpoints"
        raise BadRecipe("inputs", detail)
    sources, _ = gather(inputs, [adapter.layout for adapter in adapters])
    placed, ignored = _placed(pair, sources, adapters)
    with (
        OpenBase(pair.base) as base,
        OpenBase(pair.tuned) as tuned,
        Inputs(adapters, recipe, base) as opened,
    ):
        work = _Work(base, tuned, opened, placed, len(adapters))
        names = list(pair.modules.items())
        total = len(names) + len(pair.others)
        found = run_in_order(
            names,
            lambda item: work.measure(*item),
            workers=workers or default_workers(),
            finished=lambda index: progress(index + 1, total),
            cancelled=cancelled,
        )
        others = run_in_order(
            pair.others,
            work.is_same,
            workers=workers or default_workers(),
            finished=lambda index: progress(len(names) + index + 1, total),
            cancelled=cancelled,
        )
    measured = {name: its for (name, _), its in zip(names, found, strict=True) if its is not None}
    alike = tuple(_alike(_sum(measured.values(), len(adapters)), len(adapters)))
    doubles = [index for group in alike for index in group[1:]]
    by_module = {name: its.without(doubles) for name, its in measured.items()}
    other = [its.name for its, same in zip(pair.others, others, strict=True) if not same]
    whole = fit(_sum(by_module.values(), len(adapters)))
    level, fits = _level(by_module, len(adapters))
    differing = sum(1 for its in by_module.values() if its.inner[0, 0] > 0)
    return Answer(
        names=tuple(adapter.name for adapter in adapters),
        dtype=_dtype(pair),
        whole=whole,
        level=level,
        fits=fits,
        alike=alike,
        differing=differing,
        same=len(names) - differing,
        other=tuple(other),
        unmatched=pair.unmatched,
        ignored=ignored,
    )


def _is_there(its: Fit, index: int) -> bool:
    strength = its.strengths[index]
    if strength is None or its.alone[index] < _LEAST_SHARE:
        return False
    return abs(strength) > _SURE * its.errors[index]


def _placed(
    pair: Pair, sources: Mapping[Name, Sequence[Source]], adapters: Sequence[Adapter]
) -> tuple[dict[Name, list[Source]], dict[str, int]]:
    """The adapters' sources by the layers of the checkpoints, and how many layers are not in both."""
    by_key = _by_key(pair) if pair.family is None else {}
    placed: dict[Name, list[Source]] = {}
    ignored: dict[str, int] = defaultdict(int)
    compared: set[int] = set()
    for (component, module), its in sources.items():
        name: Name | None = (component, module)
        if pair.family is None:
            pieces = pair.base.find(component, module, kind=its[0].entry.layer.kind)
            name = by_key.get((pieces[0].file, pieces[0].key)) if pieces else None
        for source in its:
            if source.entry.layout == "lora-experts":
                why = f"{source.entry.name} is packed experts, which are not compared"
                raise Unsupported(adapters[source.adapter].name, why)
            if name is None or name not in pair.modules:
                ignored[adapters[source.adapter].name] += 1
                continue
            compared.add(source.adapter)
            placed.setdefault(name, []).append(resolved(source, pair.modules[name].shape))
    for index, adapter in enumerate(adapters):
        if index not in compared:
            wanted = [
                f"{e.component}.{run.module}"
                for e in adapter.layout.entries
                for run in e.layer.runs
            ]
            raise UnknownModules(adapter.name, wanted, "both checkpoints")
    return placed, dict(ignored)


def _by_key(pair: Pair) -> dict[tuple[str, str], Name]:
    found = {}
    for (component, path), layer in pair.modules.items():
        for piece in pair.base.find(component, path, kind=layer.kind):
            found[piece.file, piece.key] = (component, path)
    return found


class _Work:
    """Inner products of one layer after the other; may be used from several threads."""

    def __init__(
        self,
        base: OpenBase,
        tuned: OpenBase,
        inputs: Inputs,
        placed: Mapping[Name, Sequence[Source]],
        n: int,
    ) -> None:
        self._base, self._tuned, self._inputs = base, tuned, inputs
        self._placed, self._n = placed, n

    def is_same(self, other: Any) -> bool:
        one = self._base.file(other.base[0]).read_tensor(other.base[1])
        two = self._tuned.file(other.tuned[0]).read_tensor(other.tuned[1])
        return one.shape == two.shape and torch.equal(one.double(), two.double())

    def measure(self, name: Name, layer: Layer) -> Products | None:
        """None where nothing differs and no adapter would change anything."""
        component, _ = name
        sources = self._placed.get(name, ())
        found = Products.none(self._n)
        for parameter in ("weight", "bias") if layer.has_bias else ("weight",):
            difference = Difference(self._base, self._tuned, component, layer, parameter)
            its = [
                source
                for source in sources
                if (
                    source.entry.touches_weight
                    if parameter == "weight"
                    else source.entry.touches_bias
                )
            ]
            if not its and difference.is_zero():
                continue
            found.add(self._products(difference, component, layer, parameter, its))
        return found if found.elements else None

    def _products(
        self,
        difference: Difference,
        component: str,
        layer: Layer,
        parameter: str,
        sources: Sequence[Source],
    ) -> Products:
        changes = self._changes(component, layer, parameter, sources)
        found = Products.none(self._n)
        at = [0, *(adapter + 1 for adapter in changes)]
        is_zero = difference.is_zero()
        stored = difference.base.stored_dtypes, difference.tuned.stored_dtypes
        for first, count in tiles(difference.shape):
            tuned = difference.tuned.read(first, count)
            delta = (
                torch.zeros_like(tuned) if is_zero else tuned - difference.base.read(first, count)
            )
            rows = [delta, *(change(first, count) for change in changes.values())]
            stacked = torch.stack([its.reshape(-1) for its in rows])
            found.inner[np.ix_(at, at)] += (stacked @ stacked.mT).numpy()
            found.elements += tuned.numel()
            found.rounding += _largest_rounding(tuned, stored[1])
            if stored[0] != stored[1]:
                # The base in hand may be a rounded copy of the one that was baked into.
                found.rounding += _largest_rounding(tuned, stored[0])
        return found

    def _changes(
        self, component: str, layer: Layer, parameter: str, sources: Sequence[Source]
    ) -> dict[int, Callable[[int, int], Tensor]]:
        """Adapter -> rows of what it would change at strength 1."""
        by_adapter: dict[int, list[Term]] = defaultdict(list)
        for source in sources:
            for term in terms_in([source], 0, layer.shape[0], 0):
                by_adapter[term.adapter].append(term)
        found: dict[int, Callable[[int, int], Tensor]] = {}
        for adapter, terms in by_adapter.items():
            if parameter == "weight":
                module = Module(component, layer, tuple(terms))
                found[adapter] = self._inputs.delta(module, torch.float64).rows
            else:
                bias = self._bias(terms, layer.shape[0])
                found[adapter] = lambda first, count, bias=bias: bias[first : first + count]  # type: ignore[misc]
        return found

    def _bias(self, terms: Sequence[Term], rows: int) -> Tensor:
        total = torch.zeros(rows, 1, dtype=torch.float64)
        for term in terms:
            change = self._inputs.change(term.adapter, term.entry, torch.float64)
            needs_base = term.entry.needs != NOTHING
            weight = self._base.read(term.entry, "weight", torch.float64) if needs_base else None
            bias = self._base.read(term.entry, "bias", torch.float64)
            delta = change.bias(bias, weight)
            if delta is not None:
                total[term.begin : term.begin + term.rows, 0] += delta[
                    term.first : term.first + term.rows
                ]
        return total


# Digits of the fraction of a number without the first, and the exponent below which steps do not shrink.
_STEPS = {
    torch.float32: (23, -125),
    torch.float16: (10, -13),
    torch.bfloat16: (7, -125),
    torch.float8_e4m3fn: (3, -1000),  # they have scales
    torch.float8_e5m2: (2, -1000),
}


def _largest_rounding(stored: Tensor, dtypes: Iterable[torch.dtype]) -> float:
    """The sum of squares of half a step of each number, as it is stored."""
    digits, least = min(_STEPS[dtype] for dtype in dtypes)
    _, exponent = torch.frexp(stored)
    half = torch.ldexp(torch.ones_like(stored), exponent.clamp(min=least) - 2 - digits)
    return half[stored != 0].square().sum().item()


def _sum(products: Iterable[Products], n: int) -> Products:
    total = Products.none(n)
    for its in products:
        total.add(its)
    return total


def _level(by_module: Mapping[Name, Products], n: int) -> tuple[str, dict[str, Fit]]:
    """The coarsest level that explains the difference as well as any."""
    chosen = ""
    fits: dict[str, Fit] = {}
    for level in LEVELS:
        finer = _fits_at(level, by_module, n)
        if not fits or _left(finer) < (1 - _WORTH_IT) * _left(fits):
            chosen, fits = level, finer
        if all(its.is_rounding for its in fits.values()):
            break
    return chosen, fits


def _left(fits: Mapping[str, Fit]) -> float:
    return sum(its.left * float(its.products.inner[0, 0]) for its in fits.values())


def _fits_at(level: str, by_module: Mapping[Name, Products], n: int) -> dict[str, Fit]:
    groups: dict[str, Products] = {}
    for (component, module), its in by_module.items():
        name = {
            "everywhere": "",
            "component": component,
            "block": f"{component}.{block_of(module)}",
            "layer": f"{component}.{module}",
        }[level]
        groups.setdefault(name, Products.none(n)).add(its)
    return {name: fit(its) for name, its in groups.items()}


def _alike(products: Products, n: int) -> Iterable[tuple[int, ...]]:
    """Groups of adapters each of which is parallel to the first of its group."""
    groups: list[list[int]] = []
    for one, other in combinations(range(n), 2):
        if abs(cosine(products, one, other)) < _PARALLEL:
            continue
        group = next((its for its in groups if one in its or other in its), None)
        if group is None:
            groups.append([one, other])
        else:
            group += [its for its in (one, other) if its not in group]
    return (tuple(group) for group in groups)


def _dtype(pair: Pair) -> str:
    """What most of the checkpoint's numbers are stored as."""
    sizes: dict[str, int] = defaultdict(int)
    for file in pair.tuned.files.values():
        for info in file.header.tensors.values():
            sizes[info.dtype] += info.n_elements
    return max(sizes, key=lambda dtype: sizes[dtype])
