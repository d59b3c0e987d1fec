"""Adapters -> one adapter: the linear merge of every module, in memory, then one file.

The certificate says for every module and in total what truncation and storage rounding changed,
as a share of the Frobenius norm of the exact result.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge import provenance
from merge.algorithms import lora
from merge.errors import BadRecipe, Overflow
from merge.formats.dialects import diffusers_config, peft_config, write_keys
from merge.formats.metadata import DIFFUSERS_CONFIG
from merge.formats.writer import write_file
from merge.inputs import Inputs
from merge.methods import linear
from merge.plan import FACTOR_BYTES, MergePlan, Module, alpha_bytes, planned_rank
from merge.threads import run_in_order

PEFT_WEIGHTS = "adapter_model.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Merged:
    """One module's result as it will be stored, and what it lost on the way (Frobenius norms)."""

    module: Module
    rank: int
    tensors: dict[str, Tensor]
    norm: float
    truncated: float
    rounded: float


def combine(
    plan: MergePlan,
    out: Path,
    workers: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Write the merged adapter to the file `out` and give its certificate."""
    modules = plan.modules
    passes = 1 if plan.recipe.rank.budget_bytes is None else 2
    steps = passes * len(modules)
    ranks: Sequence[int | None] = [None] * len(modules)
    with Inputs(plan.adapters) as inputs:
        if plan.recipe.rank.budget_bytes is not None:
            spectra = run_in_order(
                modules,
                lambda module: _decompose(plan, module, inputs).values,
                workers=workers,
                finished=lambda index: progress(index + 1, steps),
                cancelled=cancelled,
            )
            ranks = _within_budget(plan, spectra, plan.recipe.rank.budget_bytes)
        results = run_in_order(
            list(zip(modules, ranks, strict=True)),
            lambda wanted: _merge_module(plan, *wanted, inputs, out.name),
            workers=workers,
            finished=lambda index: progress(steps - len(modules) + index + 1, steps),
            cancelled=cancelled,
        )
    certificate = _certificate(plan, results)
    write_adapter(plan, out, results, certificate)
    return certificate


def _decompose(plan: MergePlan, module: Module, inputs: Inputs) -> linear.Spectrum:
    return linear.decompose(*inputs.parts(module, _working_dtype(plan)))


def _working_dtype(plan: MergePlan) -> torch.dtype:
    return torch.float64 if plan.recipe.numerics == "reproducible" else torch.float32


def _within_budget(plan: MergePlan, spectra: Sequence[Tensor], budget_bytes: int) -> list[int]:
    per_rank = [sum(module.shape) * FACTOR_BYTES[plan.dtype] for module in plan.modules]
    ranks = linear.ranks_for_budget(spectra, per_rank, alpha_bytes(plan.dialect), budget_bytes)
    if not any(ranks):
        raise BadRecipe("inputs", "the inputs cancel each other, so there is nothing to write")
    return ranks


def _merge_module(
    plan: MergePlan, module: Module, rank: int | None, inputs: Inputs, out: str
) -> Merged:
    """One module at `rank`, or at what the recipe says where that is None; rank 0 drops it."""
    wanted = plan.recipe.rank
    if wanted.exact:
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
    tensors = {
        role: tensor if role == "alpha" else tensor.to(_DTYPES[plan.dtype])
        for role, tensor in lora.write(exact, module.kernel).items()
    }
    for role, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Overflow(out, f"{module.name} ({role})", plan.dtype)
    return Merged(module, exact.rank, tensors, norm, truncated, lora.distance(exact, tensors))


def _certificate(plan: MergePlan, results: Sequence[Merged]) -> dict[str, Any]:
    norm = hypot(*(result.norm for result in results))
    truncated = hypot(*(result.truncated for result in results))
    rounded = hypot(*(result.rounded for result in results))
    return {
        "kind": "merge",
        "numerics": plan.recipe.numerics,
        "dtype": plan.dtype,
        "norm": _digits(norm),
        "truncation": _share(truncated, norm),
        "rounding": _share(rounded, norm),
        "error": _share(hypot(truncated, rounded), norm),
        "left_out": list(plan.left_out),
        "modules": {
            result.module.name: {
                "rank": result.rank,
                "norm": _digits(result.norm),
                "truncation": _share(result.truncated, result.norm),
                "rounding": _share(result.rounded, result.norm),
            }
            for result in results
        },
    }


def _share(part: float, whole: float) -> float:
    return _digits(part / whole) if whole else 0.0


def _digits(value: float) -> float:
    # Enough for a reader, and few enough that the last bits of a library do not change the file.
    return float(f"{value:.4g}")


def write_adapter(
    plan: MergePlan, out: Path, results: Sequence[Merged], certificate: Mapping[str, Any]
) -> None:
    """The adapter in the plan's dialect: a file, or for PEFT the two files of a folder `out`."""
    kept = {(r.module.component, r.module.module): r for r in results if r.rank > 0}
    keys = write_keys(kept, plan.dialect, plan.family)
    ranks = {name: result.rank for name, result in kept.items()}
    # A file without alphas is read with scale 1 by every tool. Alphas that differ between modules
    # are not: diffusers 0.42 gives attention layers in kohya's names the most common one.
    left_out = {"alpha"} if plan.dialect == "kohya" and len(set(ranks.values())) > 1 else set()
    tensors = {
        key: result.tensors[role]
        for name, result in kept.items()
        for role, key in keys[name].items()
        if role not in left_out
    }
    metadata = provenance.of_merge(plan, list(ranks.values()), certificate)
    # Every alpha equals its rank, so that the scale is 1 wherever it is read from.
    alphas = {name: float(rank) for name, rank in ranks.items()}
    if plan.dialect == "peft":
        by_module = {module: rank for (_, module), rank in ranks.items()}
        config = peft_config(by_module, {m: float(rank) for m, rank in by_module.items()})
        write_text(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        out = out / PEFT_WEIGHTS
    elif plan.dialect == "diffusers":
        metadata[DIFFUSERS_CONFIG] = diffusers_config(ranks, alphas)
    write_file(out, tensors, metadata)


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
