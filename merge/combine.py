"""Adapters -> one adapter: the linear merge of every layer, in memory, then one file.

Products add up as `merge.methods.linear` says; differences that are stored whole and changes of
biases add up as they are. The certificate says for every layer and in total what truncation and
storage rounding changed, as a share of the Frobenius norm of the exact result.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge import provenance
from merge.algorithms import lora
from merge.cost import FACTOR_BYTES, alpha_bytes
from merge.encode import encode
from merge.errors import BadRecipe, Overflow, Unsupported
from merge.families import FAMILIES
from merge.formats.adapters import CONFIG_NAME, read_config
from merge.formats.writer import write_file
from merge.inputs import Inputs, OpenBase
from merge.joined import Given
from merge.methods import linear
from merge.methods.draws import Draws
from merge.modules import Module
from merge.packing import NotExact, Part
from merge.plan import MergePlan, planned_rank
from merge.rangefinder import approximate, approximate_energy
from merge.threads import run_in_order

PEFT_WEIGHTS = "adapter_model.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Lost:
    """Frobenius norms: of an exact result, and of what truncation and rounding changed in it."""

    norm: float
    truncated: float
    rounded: float


@dataclass(frozen=True, slots=True)
class Merged:
    """One layer's result as it will be stored: factors of `rank` (none of rank 0), and what is
    stored whole, by what it changes: "weight" or "bias".
    """

    module: Module
    rank: int
    factors: dict[str, Tensor]
    stored: dict[str, Tensor]
    lost: dict[str, Lost]  # of "product", "weight", "bias"
    given: Given | None = None  # coefficients that the method has found, by adapter


def combine(
    plan: MergePlan,
    out: Path,
    name: str,
    workers: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Write the merged adapter to `out`, which will be called `name`, and give its certificate."""
    modules = plan.modules
    products = [module for module in modules if module.terms]
    budget = _budget_bytes(plan, products)
    steps = len(modules) + (0 if budget is None else len(products))
    ranks: dict[str, int] = {}
    with (
        nullcontext() if plan.base is None else OpenBase(plan.base) as base,
        Inputs(plan.adapters, plan.recipe, base) as inputs,
    ):
        if budget is not None:
            spectra = run_in_order(
                products,
                lambda module: _values(plan, module, inputs, name),
                workers=workers,
                finished=lambda index: progress(index + 1, steps),
                cancelled=cancelled,
            )
            ranks = _within_budget(plan, products, spectra, budget)
        results = run_in_order(
            modules,
            lambda module: _merge_module(plan, module, ranks.get(module.name), inputs, name),
            workers=workers,
            finished=lambda index: progress(steps - len(modules) + index + 1, steps),
            cancelled=cancelled,
        )
    certificate = _certificate(plan, results)
    write_adapter(plan, out, name, results, certificate)
    return certificate


def _budget_bytes(plan: MergePlan, products: Sequence[Module]) -> int | None:
    """Bytes of factors that all modules share, where the recipe says so."""
    shared = plan.recipe.rank.shared
    if shared is None:
        return plan.recipe.rank.budget_bytes
    ranks = [min(shared, module.rank, *module.shape) for module in products]
    numbers = sum(rank * sum(module.shape) for rank, module in zip(ranks, products, strict=True))
    return numbers * FACTOR_BYTES[plan.dtype] + len(products) * alpha_bytes(plan.dialect)


def _values(plan: MergePlan, module: Module, inputs: Inputs, out: str) -> Tensor:
    with _computed(plan, module, out):
        values = _decompose(plan, module, inputs).values
    inputs.forget(module.terms, _working_dtype(plan))
    return values


@contextmanager
def _computed(plan: MergePlan, module: Module, out: str) -> Iterator[None]:
    """Names the layer of which a number is too large to be computed with."""
    try:
        yield
    except OverflowError as error:
        numerics = plan.recipe.numerics
        dtype = str(_working_dtype(plan)).removeprefix("torch.")
        raise Overflow(out, module.name, f"{dtype}, which {numerics} numerics use") from error


def _decompose(plan: MergePlan, module: Module, inputs: Inputs) -> linear.Spectrum:
    return inputs.spectrum(module, _working_dtype(plan))


def _working_dtype(plan: MergePlan) -> torch.dtype:
    return torch.float64 if plan.recipe.numerics == "reproducible" else torch.float32


def _within_budget(
    plan: MergePlan, modules: Sequence[Module], spectra: Sequence[Tensor], budget_bytes: int
) -> dict[str, int]:
    per_rank = [sum(module.shape) * FACTOR_BYTES[plan.dtype] for module in modules]
    ranks = linear.ranks_for_budget(spectra, per_rank, alpha_bytes(plan.dialect), budget_bytes)
    if not any(ranks):
        raise BadRecipe("inputs", "the inputs cancel each other, so there is nothing to write")
    return {module.name: rank for module, rank in zip(modules, ranks, strict=True)}


def _merge_module(
    plan: MergePlan, module: Module, wanted_rank: int | None, inputs: Inputs, out: str
) -> Merged:
    """One layer; its product at `wanted_rank`, or at what the recipe says where that is None."""
    rank = 0
    factors: dict[str, Tensor] = {}
    lost: dict[str, Lost] = {}
    if module.terms:
        with _computed(plan, module, out):
            rank, factors, lost["product"] = _merge_products(plan, module, wanted_rank, inputs)
    dtype, storage = _working_dtype(plan), _DTYPES[plan.dtype]
    exact = {}
    if module.differences:
        exact["weight"] = inputs.summed(module.differences, module.shape, dtype)
    if module.biases:
        exact["bias"] = inputs.summed_biases(module.biases, module.shape[0], dtype)
    stored = {kind: tensor.to(storage) for kind, tensor in exact.items()}
    for kind, tensor in exact.items():
        lost[kind] = _rounded(tensor, stored[kind])
    if "weight" in stored:
        stored["weight"] = stored["weight"].reshape(module.layer.shape)
    for role, tensor in [*factors.items(), *stored.items()]:
        if not tensor.isfinite().all():
            raise Overflow(out, f"{module.name} ({role})", plan.dtype)
    given = inputs.given(module, dtype)
    inputs.forget(module.terms, dtype)
    return Merged(module, rank, factors, stored, lost, given)


def _merge_products(
    plan: MergePlan, module: Module, rank: int | None, inputs: Inputs
) -> tuple[int, dict[str, Tensor], Lost]:
    """(rank, the tensors of plain LoRA, what was lost); rank 0 drops the product."""
    wanted = plan.recipe.rank
    if module.is_dense:
        exact, norm, truncated = _approximate(plan, module, inputs)
    elif wanted.exact:
        exact = linear.concatenate(*inputs.parts(module, _working_dtype(plan)))
        norm, truncated = lora.norm(exact), 0.0
    else:
        spectrum = _decompose(plan, module, inputs)
        if rank is None and wanted.energy is not None:
            rank = linear.rank_for_energy(spectrum.values, wanted.energy)
        elif rank is None:
            rank = planned_rank(plan.recipe, module)
        exact = linear.truncate(spectrum, rank)
        norm, truncated = linear.lost(spectrum.values, 0), linear.lost(spectrum.values, rank)
    alpha = stored_alpha(plan, exact.rank)
    share = exact.rank / alpha if exact.rank else 1.0
    stored = linear.times(exact, share)
    tensors = {
        role: tensor if role == "alpha" else tensor.to(_DTYPES[plan.dtype])
        for role, tensor in lora.write(stored, module.kernel).items()
    }
    tensors["alpha"] = torch.tensor(alpha, dtype=torch.float32)
    rounded = lora.distance(stored, tensors) / share
    return exact.rank, tensors, Lost(norm, truncated, rounded)


def _approximate(
    plan: MergePlan, module: Module, inputs: Inputs
) -> tuple[lora.Factors, float, float]:
    """(factors, norm, truncated) of a change that is no low-rank product."""
    wanted, delta = plan.recipe.rank, inputs.delta(module, _working_dtype(plan))
    draws = Draws(plan.recipe.seed, module.name, ("range",))
    if wanted.energy is not None:
        found = approximate_energy(delta, draws, wanted.energy)
    else:
        found = approximate(delta, draws, planned_rank(plan.recipe, module))
    rank = len(found.spectrum.values)
    return linear.truncate(found.spectrum, rank), found.norm, found.lost(rank)


def stored_alpha(plan: MergePlan, rank: int) -> float:
    """The alpha that a layer is written with: its rank, so that readers without it are right too.

    One alpha for all of a kohya file, for where ranks differ so would alphas: diffusers 0.42 takes
    the most common one for all attention layers, and LyCORIS 4.1 reads no file without any.
    """
    if plan.dialect != "kohya":
        return float(rank)
    return float(plan.most_rank)


def _rounded(exact: Tensor, stored: Tensor) -> Lost:
    change = torch.linalg.vector_norm(exact.double() - stored.double())
    return Lost(torch.linalg.vector_norm(exact.double()).item(), 0.0, change.item())


def _certificate(plan: MergePlan, results: Sequence[Merged]) -> dict[str, Any]:
    lost = [its for result in results for its in result.lost.values()]
    norm = hypot(*(its.norm for its in lost))
    truncated = hypot(*(its.truncated for its in lost))
    rounded = hypot(*(its.rounded for its in lost))
    found = {
        "kind": plan.recipe.kind,
        **provenance.facts(plan.recipe, plan.adapters),
        "numerics": plan.recipe.numerics,
        "dtype": plan.dtype,
        "norm": shortened(norm),
        "truncation": share(truncated, norm),
        "rounding": share(rounded, norm),
        "error": share(hypot(truncated, rounded), norm),
        "left_out": list(plan.left_out),
        "modules": {
            result.module.name: {"rank": result.rank}
            | described(result.lost["product"])
            | (
                {}
                if result.given is None
                else {"coefficients": provenance.by_input(plan, result.given)}
            )
            for result in results
            if "product" in result.lost
        },
    }
    summed = {
        f"{result.module.name}.{kind}": described(its)
        for result in results
        for kind, its in result.lost.items()
        if kind != "product"
    }
    return found | ({"summed": summed} if summed else {})


def described(lost: Lost) -> dict[str, float]:
    """A certificate's numbers of one layer."""
    return {
        "norm": shortened(lost.norm),
        "truncation": share(lost.truncated, lost.norm),
        "rounding": share(lost.rounded, lost.norm),
    }


def share(part: float, whole: float) -> float:
    return shortened(part / whole) if whole else 0.0


def shortened(value: float) -> float:
    """Digits enough for a reader, and few enough that the last bits of a library change no file."""
    return float(f"{value:.4g}")


def write_adapter(
    plan: MergePlan,
    out: Path,
    name: str,
    results: Sequence[Merged],
    certificate: Mapping[str, Any],
) -> None:
    """The adapter in the plan's dialect: a file, or for PEFT the two files of a folder `out`."""
    family = None if plan.family is None else FAMILIES[plan.family]
    parts = [part for result in results for part in _parts(result, plan.dialect)]
    try:
        encoded = encode(parts, plan.dialect, family, _peft_options(plan))
    except NotExact as error:
        raise Unsupported(name, str(error)) from error
    ranks = [result.rank for result in results if result.rank > 0]
    alpha = stored_alpha(plan, ranks[0]) if ranks else 0.0
    metadata = provenance.of_merge(plan, ranks, alpha, certificate) | dict(encoded.metadata)
    if encoded.config is not None:
        write_text(out / CONFIG_NAME, json.dumps(encoded.config, indent=2) + "\n")
        out = out / PEFT_WEIGHTS
    write_file(out, encoded.tensors, metadata)


def _parts(result: Merged, dialect: str) -> list[Part]:
    """The layer's factors, and what is stored whole."""
    component, layer = result.module.component, result.module.layer
    parts = []
    stored = {_STORED_ROLES[kind]: tensor for kind, tensor in result.stored.items()}
    if result.rank > 0:
        factors = dict(result.factors)
        if dialect in ("diffusers", "peft") and "diff_b" in stored:
            factors["up_bias"] = stored.pop("diff_b")
        parts.append(Part(component, layer, "lora", factors, float(factors["alpha"].item())))
    if stored:
        parts.append(Part(component, layer, "full", stored))
    return parts


_STORED_ROLES = {"weight": "diff", "bias": "diff_b"}


def _peft_options(plan: MergePlan) -> dict[str, Any]:
    """What the inputs' configurations agree on about the base."""
    configs = [read_config(adapter.path) or {} for adapter in plan.adapters]
    found = {}
    for field in ("base_model_name_or_path", "task_type", "fan_in_fan_out"):
        values = [config.get(field) for config in configs]
        if all(value == values[0] for value in values) and values[0]:
            found[field] = values[0]
    return found


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
