"""A recipe and its files -> the report on it, from the factors alone; nothing is written.

Memory: per worker thread, the largest module's stacked factors in float64 three times over; where a
change is dense, one matrix as large as the weight for every input and one in float64. The spectra
and Gram matrices of all modules stay, some kilobytes each.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.algorithms.change import Needs
from merge.cost import FACTOR_BYTES, alpha_bytes
from merge.errors import BadRecipe, Unsupported, counted
from merge.formats.grammar import NOTHING
from merge.formats.sources import File
from merge.inputs import Inputs, OpenBase
from merge.method_parameters import Linear
from merge.modules import Module
from merge.plan import BakePlan, MergePlan, plan
from merge.recipe import Output, Rank, Recipe, Source
from merge.reports import storage
from merge.reports.geometry import Measured, measure_dense, measure_products
from merge.reports.ranks import Curves, Layer, Prices, measure_ranks
from merge.reports.report import Group, InputReport, Place, Ranks, Report, Storage, group, leaks
from merge.reports.suggest import with_suggestion
from merge.reports.survey import Survey, block_of, block_order, component_order, survey
from merge.threads import default_workers, run_in_order

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def measure(
    recipe: Recipe,
    files: Mapping[str, File],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Report:
    """What the weighted sum of the recipe's inputs is like, and what each way to write it loses.

    `files` has what every `recipe.refs()` names; sources need no SHA-256. A recipe with a base is
    also measured on it. `progress(done, total)` counts steps in this thread. MergeError as from
    `merge.plan.plan`, but inputs that cannot be merged without a base are named in the notes.
    """
    if not recipe.inputs:
        raise BadRecipe("kind", f"a report is about adapters, and {recipe.kind} has none")
    baked = _plan_bake(recipe, files)
    found = survey(recipe, files, None if baked is None else baked.base)
    merged, why_not = _plan_merge(recipe, files)
    steps = _Steps(workers or default_workers(), progress, cancelled)
    steps.total = _count_steps(found, merged, baked)
    n = len(found.adapters)
    with ExitStack() as stack:
        base = None if baked is None else stack.enter_context(OpenBase(baked.base))
        inputs = stack.enter_context(Inputs(found.adapters, recipe, base))
        places = _measure_places(found, inputs, base, steps)
        sizes, stored = _measure_merge(merged, places, base, steps)
        if baked is not None and base is not None:
            stored = _measure_bake(baked, base, stored, steps)
    return with_suggestion(
        Report(
            method=recipe.method.name,
            family=found.families[0] if found.families else None,
            dialect=None if merged is None else merged.dialect,
            dtype=None if merged is None else merged.dtype,
            base=recipe.base.name if recipe.base is not None and _needs_base(found) else None,
            inputs=tuple(_input(recipe, found, i) for i in range(n)),
            total=group("", "", places, n),
            components=_components(places, n),
            blocks=_blocks(places, n),
            leaks=leaks(places, n),
            ranks=sizes,
            storage=stored,
            places=tuple(places),
            notes=tuple(_notes(recipe, found, places, why_not)),
        )
    )


@dataclass(slots=True)
class _Steps:
    """Runs lists of steps, one list after the other, and counts them together."""

    workers: int
    progress: Callable[[int, int], None] | None
    cancelled: Callable[[], bool] | None
    done: int = 0
    total: int = 0

    def run(self, items: Sequence[ItemT], work: Callable[[ItemT], ResultT]) -> list[ResultT]:
        def finished(index: int) -> None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)

        stop = self.cancelled or (lambda: False)
        return run_in_order(items, work, workers=self.workers, finished=finished, cancelled=stop)


def _count_steps(found: Survey, merged: MergePlan | None, baked: BakePlan | None) -> int:
    total = len(found.modules)
    if merged is not None:
        total += len(storage.sampled(merged.modules))
        total += 0 if _is_own(merged) else len(_products(merged))
    return total + (0 if baked is None else len(storage.patches_of(baked)))


def _plan_bake(recipe: Recipe, files: Mapping[str, File]) -> BakePlan | None:
    if recipe.base is None:
        return None
    update = {"kind": "bake", "method": Linear(), "rank": Rank(exact=True), "output": Output()}
    planned = plan(recipe.model_copy(update=update), files)
    assert isinstance(planned, BakePlan)
    return planned


def _plan_merge(recipe: Recipe, files: Mapping[str, File]) -> tuple[MergePlan | None, str]:
    """The merge into an adapter, on the base only if it takes one; or why there can be none."""
    update: dict[str, Any] = {"kind": "merge", "method": Linear(), "base": None}
    if recipe.kind == "bake":
        update |= {"rank": Rank(exact=True), "output": Output()}
    wanted = recipe.model_copy(update=update)
    try:
        return _planned(wanted, recipe.base, files), ""
    except Unsupported as error:
        return None, str(error)
    except BadRecipe as error:
        if error.param == "rank" and wanted.rank.exact:
            return _planned(wanted.model_copy(update={"rank": _OF_FULL}), recipe.base, files), ""
        if error.param != "output.dialect" or recipe.output.dialect is not None:
            raise
        return None, error.detail


# What is asked for where changes have full rank and nobody said how much of it is to stay.
_OF_FULL = Rank(energy=0.99)


def _planned(recipe: Recipe, base: Source | None, files: Mapping[str, File]) -> MergePlan:
    try:
        planned = plan(recipe, files)
    except Unsupported:
        if base is None:
            raise
        planned = plan(recipe.model_copy(update={"base": base}), files)
    assert isinstance(planned, MergePlan)
    return planned


def _measure_places(
    found: Survey, inputs: Inputs, base: OpenBase | None, steps: _Steps
) -> list[Place]:
    n = len(found.adapters)
    both = steps.run(found.modules, lambda module: list(_places(module, inputs, base, n)))
    return [place for places in both for place in places]


def _places(module: Module, inputs: Inputs, base: OpenBase | None, n: int) -> Iterator[Place]:
    """The weight of a module and its bias, as far as they change."""
    if module.differences:
        dense = _dense(module, inputs)
        yield _place(module, "dense", measure_dense(dense, n), dense, {})
    elif module.terms:
        adapters = [terms[0].adapter for terms in module.entries]
        parts = list(zip(adapters, *inputs.parts(module, torch.float32), strict=True))
        ranks = {i: sum(part.rank for j, part, _ in parts if j == i) for i in adapters}
        yield _place(module, "product", measure_products(parts, n), ranks, ranks)
    if module.biases:
        biases = _biases(module, inputs, base)
        yield _place(module, "bias", measure_dense(biases, n), biases, {})


def _dense(module: Module, inputs: Inputs) -> dict[int, Tensor]:
    """The whole change of the weight by each input that changes it."""
    terms = sorted(
        (*module.terms, *module.differences), key=lambda t: (t.adapter, t.entry.name, t.begin)
    )
    return {
        adapter: inputs.delta(replace(module, terms=tuple(its)), torch.float32).rows(
            0, module.shape[0]
        )
        for adapter, its in groupby(terms, lambda term: term.adapter)
    }


def _place(
    module: Module,
    kind: str,
    measured: Measured,
    touched: Mapping[int, object],
    ranks: Mapping[int, int],
) -> Place:
    n = len(measured.gram)
    return Place(
        component=module.component,
        module=module.module,
        block=block_of(module.module),
        kind=kind,
        shape=module.shape if kind != "bias" else (module.shape[0], 1),
        ranks=tuple(ranks.get(i, None if i in touched else 0) for i in range(n)),
        touched=tuple(i in touched for i in range(n)),
        gram=measured.gram,
        values=measured.values,
        overlaps=measured.overlaps,
    )


def _biases(module: Module, inputs: Inputs, base: OpenBase | None) -> dict[int, Tensor]:
    """The change of the bias by each input that changes it, as a column."""
    found: dict[int, Tensor] = {}
    for term in module.biases:
        change = inputs.change(term.adapter, term.entry, torch.float32)
        bias = None if base is None else base.read(term.entry, "bias", torch.float32)
        weight = None
        if base is not None and change.needs is not Needs.NOTHING:
            weight = base.read(term.entry, "weight", torch.float32)
        total = found.setdefault(term.adapter, torch.zeros(module.shape[0], 1))
        delta = change.bias(bias, weight)
        if delta is not None:
            taken = delta[term.first : term.first + term.rows]
            total[term.begin : term.begin + term.rows, 0] += taken * term.strength
    return found


def _measure_merge(
    merged: MergePlan | None, places: Sequence[Place], base: OpenBase | None, steps: _Steps
) -> tuple[Ranks | None, Storage | None]:
    """Sizes, errors and rounding of the merge into an adapter."""
    if merged is None:
        return None, None
    products = _products(merged)
    with Inputs(merged.adapters, merged.recipe, base) as inputs:
        layers = _layers(merged, products, places, inputs, steps) if products else None
        curves = None if layers is None else Curves(layers, _prices(merged, layers, places))
        ranks = [0] * len(products) if curves is None else curves.ranks(merged.recipe.rank)
        rank_of = {module.name: rank for module, rank in zip(products, ranks, strict=True)}
        samples = [merged.modules[i] for i in storage.sampled(merged.modules)]
        rounded = steps.run(
            samples,
            lambda module: storage.round_factors(
                merged, module, rank_of.get(module.name, 0), inputs
            ),
        )
    found = Storage(storage.roundings(rounded, merged.dtype), len(samples))
    sizes = None if curves is None else measure_ranks(curves, merged.recipe.rank)
    return sizes, found


def _products(merged: MergePlan) -> list[Module]:
    return [module for module in merged.modules if module.terms]


def _is_own(merged: MergePlan) -> bool:
    """Whether the output has our own modules, so that their spectra are those of its layers."""
    return all(module.layer.module is not None for module in merged.modules)


def _layers(
    merged: MergePlan,
    products: Sequence[Module],
    places: Sequence[Place],
    inputs: Inputs,
    steps: _Steps,
) -> list[Layer] | None:
    """None where a spectrum is not known, because a large change is no product."""
    if _is_own(merged):
        known = {place.name: place.values for place in places if place.kind != "bias"}
        spectra = [known[module.name] for module in products]
    else:
        spectra = steps.run(products, lambda module: _spectrum(module, inputs))
    layers = []
    for module, values in zip(products, spectra, strict=True):
        if values is None:
            return None
        price = sum(module.shape) * FACTOR_BYTES[merged.dtype]
        layers.append(Layer(values, price, module.rank, min(module.rank, *module.shape)))
    return layers


def _spectrum(module: Module, inputs: Inputs) -> NDArray[np.float64] | None:
    if module.is_dense:
        return measure_dense(
            {0: inputs.delta(module, torch.float32).rows(0, module.shape[0])}, 1
        ).values
    parts = zip(*inputs.parts(module, torch.float32), strict=True)
    return measure_products([(0, *part) for part in parts], 1).values


def _prices(merged: MergePlan, layers: Sequence[Layer], places: Sequence[Place]) -> Prices:
    numbers = sum(module.n_stored for module in merged.modules)
    energy = sum(float(place.gram.sum()) for place in places)
    in_factors = sum(float((layer.values**2).sum()) for layer in layers)
    return Prices(
        bytes_per_layer=alpha_bytes(merged.dialect),
        stored_bytes=FACTOR_BYTES[merged.dtype] * numbers,
        stored_energy=max(energy - in_factors, 0.0) if numbers else 0.0,
    )


def _measure_bake(
    baked: BakePlan, base: OpenBase, stored: Storage | None, steps: _Steps
) -> Storage:
    """What is already known of storage, and the loss in the base's dtype and in others."""
    with Inputs(baked.adapters, baked.recipe, base) as inputs:
        found = steps.run(
            storage.patches_of(baked), lambda place: storage.round_base(place, inputs, base)
        )
    return storage.with_bake(stored, found)


def _components(places: Sequence[Place], n: int) -> tuple[Group, ...]:
    by_component = _grouped(places, lambda place: place.component)
    names = sorted(by_component, key=component_order)
    return tuple(group(name, "", by_component[name], n) for name in names)


def _blocks(places: Sequence[Place], n: int) -> tuple[Group, ...]:
    by_block = _grouped(places, lambda place: (place.component, place.block))
    names = sorted(by_block, key=lambda name: (component_order(name[0]), block_order(name[1])))
    return tuple(group(*name, by_block[name], n) for name in names)


KeyT = TypeVar("KeyT", bound=Hashable)


def _grouped(places: Sequence[Place], key: Callable[[Place], KeyT]) -> dict[KeyT, list[Place]]:
    found: dict[KeyT, list[Place]] = {}
    for place in places:
        found.setdefault(key(place), []).append(place)
    return found


def _needs_base(found: Survey) -> bool:
    entries = (entry for adapter in found.adapters for entry in adapter.layout.entries)
    return any(entry.needs != NOTHING for entry in entries)


def _input(recipe: Recipe, found: Survey, index: int) -> InputReport:
    source, adapter = recipe.inputs[index], found.adapters[index]
    entries = adapter.layout.entries
    ranks = [entry.rank for entry in entries if entry.rank is not None]
    return InputReport(
        name=source.name,
        sha256=source.sha256,
        strength=source.strength,
        dialect=adapter.layout.dialect,
        algorithms=tuple(sorted({entry.algorithm for entry in entries})),
        rank=(min(ranks), max(ranks)) if ranks else None,
        unmeasured=tuple(sorted(found.unmeasured[index])),
    )


def _notes(recipe: Recipe, found: Survey, places: Sequence[Place], why_not: str) -> Iterator[str]:
    """What the numbers leave out, in sentences."""
    if recipe.method != Linear():
        yield (
            f"everything here is about the plain weighted sum; {recipe.method.name} will give "
            "another result"
        )
    for source, missing in zip(recipe.inputs, found.unmeasured, strict=True):
        for why in sorted(set(missing.values())):
            names = [name for name, its in missing.items() if its == why]
            more = "" if recipe.base else "; --base measures them"
            yield f"{counted(names, 'module', 'modules')} of {source.name} not measured: {why}{more}"
    if why_not:
        yield f"no adapter can hold the sum, so there are no sizes: {why_not}"
    dense = [place for place in places if place.kind == "dense" and place.values is None]
    if dense:
        yield f"no spectrum of {counted(dense, 'dense change', 'dense changes')}: too large"
    if found.left_out:
        yield f"left out as asked: {counted(found.left_out, 'module', 'modules')}"
