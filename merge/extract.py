"""Tuned checkpoint - base -> an adapter: the nearest one of the asked size, and exactly how near.

Linear layers and convolutions become factors (merge.rangefinder), or the whole difference where that
takes fewer numbers; biases and norms are stored whole; what did not change is left out. A change of
anything else (an embedding, a VAE) cannot be in an adapter that tools load, and is refused by name.

First all tensors are compared, then the layers that differ are decomposed one by one, so that in
memory there are the adapter and, for each worker, a layer's subspace. All sums are of float64,
whatever `numerics` says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import hypot, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge import provenance
from merge.algorithms import lora
from merge.combine import PEFT_WEIGHTS, Lost, described, share, shortened, write_text
from merge.cost import FACTOR_BYTES, alpha_bytes
from merge.differences import Difference
from merge.encode import encode
from merge.errors import BadRecipe, Overflow, Unsupported, counted
from merge.extract_plan import MORE_RANKS, ExtractPlan, Site, fair_rank, most_ranks
from merge.families import FAMILIES
from merge.families.layers import NORM
from merge.formats import dialects
from merge.formats.adapters import CONFIG_NAME
from merge.formats.writer import write_file
from merge.inputs import OpenBase
from merge.methods import linear
from merge.methods.draws import Draws
from merge.packing import NotExact, Part
from merge.rangefinder import Approximation, approximate, approximate_energy
from merge.threads import run_in_order

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Found:
    """What one layer becomes: factors of scale 1 in float32, or the differences that are stored
    whole, by what they change. Nothing of both is a layer that a budget has dropped.
    """

    site: Site
    factors: lora.Factors | None = None
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    lost: Mapping[str, Lost] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors.rank


def extract(
    plan: ExtractPlan,
    out: Path,
    name: str,
    workers: int,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Write the adapter to `out`, which will be called `name`, and give its certificate."""
    with OpenBase(plan.pair.base) as base, OpenBase(plan.pair.tuned) as tuned:
        work = _Work(plan, base, tuned, workers, progress, cancelled)
        changed = work.compare()
        ranks = work.share_ranks(changed)
        found = work.decompose(changed, ranks, name)
    alpha = float(max(its.rank for its in found))
    stored = [_store(plan, its, alpha, name) for its in _with_equal_biases(plan, found)]
    certificate = _certificate(plan, stored, len(plan.sites) - len(changed))
    _write(plan, out, name, stored, alpha, certificate)
    return certificate


@dataclass(frozen=True, slots=True)
class _Changed:
    site: Site
    weight: bool
    bias: bool


class _Work:
    """The passes over the layers; progress counts layers of all passes together."""

    def __init__(
        self,
        plan: ExtractPlan,
        base: OpenBase,
        tuned: OpenBase,
        workers: int,
        progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._plan, self._base, self._tuned = plan, base, tuned
        self._workers, self._progress, self._cancelled = workers, progress, cancelled
        self._done = 0
        self._total = 2 * len(plan.sites)

    def compare(self) -> list[_Changed]:
        """The layers that differ; Unsupported names what differs and is no layer for adapters."""
        plan = self._plan
        seen = self._run(plan.sites, self._compare)
        names = [
            other.name
            for other, is_same in zip(
                plan.pair.others, self._run(plan.pair.others, self._is_same), strict=True
            )
            if not is_same
        ]
        changed = [its for its in seen if its.weight or its.bias]
        names += [
            its.site.name for its in changed if not its.site.takes_factors and its.site.kind != NORM
        ]
        if names:
            raise Unsupported(plan.pair.tuned.path.name, _why_not(names))
        if not changed:
            raise BadRecipe("tuned", "nothing differs from the base, so there is nothing to write")
        _check_dialect(plan, changed)
        return changed

    def share_ranks(self, changed: Sequence[_Changed]) -> dict[str, tuple[int, int]]:
        """Name -> (rank, rank it was decomposed at) where all layers share a size; else nothing."""
        plan, wanted = self._plan, self._plan.recipe.rank
        sites = [its.site for its in changed if its.weight and its.site.takes_factors]
        if (wanted.budget_bytes is None and wanted.shared is None) or not sites:
            return {}
        item, alpha = FACTOR_BYTES[plan.dtype], alpha_bytes(plan.dialect)
        costs = [sum(site.shape) * item for site in sites]
        if wanted.shared is not None:
            fair = wanted.shared
            ranks = [min(fair, *site.shape) for site in sites]
            budget = sum(r * cost + alpha for r, cost in zip(ranks, costs, strict=True))
        else:
            assert wanted.budget_bytes is not None
            budget = wanted.budget_bytes
            fair = fair_rank(budget, sum(costs), alpha * len(sites))
            if budget < min(costs) + alpha:
                detail = f"the smallest layer that differs needs {min(costs) + alpha} bytes"
                raise BadRecipe("rank.budget_bytes", f"{detail} at rank 1")
        depths = [min(MORE_RANKS * fair, *site.shape) for site in sites]
        values: list[Tensor] = [torch.empty(0)] * len(sites)
        shallow = list(range(len(sites)))
        while True:
            self._total += len(shallow)
            again = self._run(
                shallow, lambda i: self._approximate(sites[i], depths[i]).spectrum.values
            )
            for i, its in zip(shallow, again, strict=True):
                values[i] = its
            shares = linear.ranks_for_budget(values, costs, alpha, budget)
            # What got all the ranks that were looked at might have got more.
            shallow = [
                i
                for i, site in enumerate(sites)
                if shares[i] == depths[i] and depths[i] < min(site.shape)
            ]
            if not shallow:
                names = (site.name for site in sites)
                return dict(zip(names, zip(shares, depths, strict=True), strict=True))
            for i in shallow:
                depths[i] = min(2 * depths[i], *sites[i].shape)

    def decompose(
        self, changed: Sequence[_Changed], ranks: Mapping[str, tuple[int, int]], out: str
    ) -> list[Found]:
        self._total = self._done + len(changed)
        return self._run(changed, lambda its: self._decompose(its, ranks.get(its.site.name), out))

    def _run(self, items: Sequence[Any], work: Callable[[Any], Any]) -> list[Any]:
        begun = self._done

        def finished(index: int) -> None:
            self._done = begun + index + 1
            self._progress(self._done, max(self._total, self._done))

        return run_in_order(
            items, work, workers=self._workers, finished=finished, cancelled=self._cancelled
        )

    def _difference(self, site: Site, parameter: str) -> Difference:
        return Difference(self._base, self._tuned, site.component, site.layer, parameter)

    def _compare(self, site: Site) -> _Changed:
        weight = not self._difference(site, "weight").is_zero()
        bias = site.layer.has_bias and not self._difference(site, "bias").is_zero()
        return _Changed(site, weight, bias)

    def _is_same(self, other: Any) -> bool:
        one = self._base.file(other.base[0]).read_tensor(other.base[1])
        two = self._tuned.file(other.tuned[0]).read_tensor(other.tuned[1])
        if one.dtype == two.dtype:
            return torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        pairs = ((one.to(dtype), two.to(dtype)) for dtype in (one.dtype, two.dtype))
        return any(torch.equal(mine, its) for mine, its in pairs)

    def _approximate(self, site: Site, rank: int | None) -> Approximation:
        delta = self._difference(site, "weight")
        wanted = self._plan.recipe
        draws = Draws(wanted.seed, site.name, ())
        if wanted.rank.energy is not None:
            return approximate_energy(delta, draws, wanted.rank.energy)
        return approximate(delta, draws, most_ranks(wanted, site) if rank is None else rank)

    def _decompose(self, its: _Changed, ranks: tuple[int, int] | None, out: str) -> Found:
        site, dtype = its.site, self._plan.dtype
        factors: lora.Factors | None = None
        whole: dict[str, Tensor] = {}
        lost: dict[str, Lost] = {}
        if its.weight and site.takes_factors:
            found = self._approximate(site, None if ranks is None else ranks[1])
            rank = len(found.spectrum.values) if ranks is None else ranks[0]
            if self._is_better_whole(site, rank):
                whole["weight"] = self._difference(site, "weight").whole()
            else:
                exact = linear.truncate(found.spectrum, rank)
                factors = None if rank == 0 else _single(exact)
                lost["product"] = Lost(found.norm, found.lost(rank), 0.0)
        elif its.weight:
            whole["weight"] = self._difference(site, "weight").whole()
        if its.bias:
            whole["bias"] = self._difference(site, "bias").whole().squeeze(1)
        stored = {}
        for kind, exact_values in whole.items():
            stored[kind] = exact_values.to(_DTYPES[dtype])
            lost[kind] = _rounded(exact_values, stored[kind])
            if not stored[kind].isfinite().all():
                raise Overflow(out, f"{site.name} ({kind})", dtype)
        return Found(site, factors, stored, lost)

    def _is_better_whole(self, site: Site, rank: int) -> bool:
        """Whether the exact difference takes no more numbers, in a dialect that has a key for it."""
        is_larger = rank * sum(site.shape) >= prod(site.shape)
        return is_larger and dialects.holds(self._plan.dialect, "full", ["diff"])


def _single(factors: lora.Factors) -> lora.Factors:
    return lora.Factors(factors.up.float(), factors.down.float())


def _rounded(exact: Tensor, stored: Tensor) -> Lost:
    change = torch.linalg.vector_norm(exact - stored.double())
    return Lost(torch.linalg.vector_norm(exact).item(), 0.0, change.item())


def _why_not(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = counted(names, "tensor differs", "tensors differ")
    groups = sorted({name.partition(".")[0] for name in names})
    glob = f"{groups[0]}.*" if len(names) > 3 and groups == ["vae"] else names[0]
    return (
        f"{what} from the base that no adapter can change ({shown}); "
        f"leave_out, as in {glob!r}, extracts the rest"
    )


def _check_dialect(plan: ExtractPlan, changed: Sequence[_Changed]) -> None:
    """Refuse before the work what the dialect has no key for."""
    dialect, wanted = plan.dialect, plan.recipe.rank
    family = None if plan.family is None else FAMILIES[plan.family]
    components = sorted({its.site.component for its in changed})
    if dialect == "peft" and len(components) > 1:
        detail = f"peft holds one model, not {', '.join(components)}; use leave_out or diffusers"
        raise BadRecipe("output.dialect", detail)
    for component in components:
        if family is not None and not dialects.is_named(component, dialect, family):
            detail = f"{dialect} has no name for {component}; diffusers has"
            raise BadRecipe("output.dialect", detail)
    if dialects.holds(dialect, "full", ["diff"]):
        return
    is_shared = wanted.budget_bytes is not None or wanted.shared is not None
    for its in changed:
        if its.site.kind == NORM or not its.weight:
            what = "a norm" if its.site.kind == NORM else "a bias alone"
            detail = f"{dialect} cannot hold a change of {what} ({its.site.name})"
            raise BadRecipe("output.dialect", f"{detail}; kohya and comfy can")
        if its.bias and is_shared:
            param = "rank.shared" if wanted.budget_bytes is None else "rank.budget_bytes"
            detail = f"{dialect} keeps biases beside factors, which a budget may drop; say a rank"
            raise BadRecipe(param, detail)


def _with_equal_biases(plan: ExtractPlan, found: Sequence[Found]) -> list[Found]:
    """Where biases lie beside factors, PEFT wants one in every layer of a component or in none."""
    biased = {its.site.component for its in found if "bias" in its.whole}
    if dialects.holds(plan.dialect, "full", ["diff_b"]) or not biased:
        return list(found)
    return [
        replace(its, whole={"bias": torch.zeros(its.site.shape[0], dtype=_DTYPES[plan.dtype])})
        if its.site.component in biased and not its.whole
        else its
        for its in found
    ]


@dataclass(frozen=True, slots=True)
class Stored:
    """A layer as it is written; rank 0 has no factors."""

    site: Site
    rank: int
    parts: Sequence[Part]
    lost: Mapping[str, Lost]


def _store(plan: ExtractPlan, found: Found, alpha: float, out: str) -> Stored:
    """One alpha for all of a kohya file (merge.combine says why), elsewhere each layer's rank."""
    site, lost = found.site, dict(found.lost)
    whole = dict(found.whole)
    parts = []
    if found.factors is not None:
        own = alpha if plan.dialect == "kohya" else float(found.rank)
        ratio = found.rank / own
        exact = linear.times(found.factors, ratio)
        tensors = {
            role: tensor.to(_DTYPES[plan.dtype])
            for role, tensor in lora.write(exact, site.layer.shape[2:]).items()
        }
        for role, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise Overflow(out, f"{site.name} ({role})", plan.dtype)
        tensors["alpha"] = torch.tensor(own, dtype=torch.float32)
        lost["product"] = replace(lost["product"], rounded=lora.distance(exact, tensors) / ratio)
        if plan.dialect in ("diffusers", "peft") and "bias" in whole:
            tensors["up_bias"] = whole.pop("bias")
        parts.append(Part(site.component, site.layer, "lora", tensors, own))
    if whole:
        parts.append(_stored_whole(site, whole))
    return Stored(site, found.rank, parts, lost)


# LyCORIS' readers know norms by other keys than weights.
_WHOLE = {
    "full": {"weight": "diff", "bias": "diff_b"},
    "norm": {"weight": "w_norm", "bias": "b_norm"},
}


def _stored_whole(site: Site, whole: Mapping[str, Tensor]) -> Part:
    layout = "norm" if site.layer.kind == NORM else "full"
    tensors = {_WHOLE[layout][kind]: tensor for kind, tensor in whole.items()}
    if "weight" in whole:
        tensors[_WHOLE[layout]["weight"]] = whole["weight"].reshape(site.layer.shape)
    return Part(site.component, site.layer, layout, tensors)


def _certificate(plan: ExtractPlan, found: Sequence[Stored], n_same: int) -> dict[str, Any]:
    lost = [its for result in found for its in result.lost.values()]
    norm = hypot(*(its.norm for its in lost))
    truncated = hypot(*(its.truncated for its in lost))
    rounded = hypot(*(its.rounded for its in lost))
    products = [result for result in found if "product" in result.lost]
    summed = {
        f"{result.site.name}.{kind}": described(its)
        for result in found
        for kind, its in result.lost.items()
        if kind != "product"
    }
    return {
        "kind": "extract",
        "engine": provenance.ENGINE,
        "numerics": plan.recipe.numerics,
        "dtype": plan.dtype,
        "norm": shortened(norm),
        "truncation": share(truncated, norm),
        "rounding": share(rounded, norm),
        "error": share(hypot(truncated, rounded), norm),
        "layers_unchanged": n_same,
        "left_out": list(plan.left_out),
        "notes": list(plan.pair.notes),
        "modules": {
            result.site.name: {"rank": result.rank} | described(result.lost["product"])
            for result in products
        },
    } | ({"summed": summed} if summed else {})


def _write(
    plan: ExtractPlan,
    out: Path,
    name: str,
    stored: Sequence[Stored],
    alpha: float,
    certificate: Mapping[str, Any],
) -> None:
    family = None if plan.family is None else FAMILIES[plan.family]
    parts = [part for its in stored for part in its.parts]
    options = {"fan_in_fan_out": True} if _has_conv1d(plan, parts) else {}
    try:
        encoded = encode(parts, plan.dialect, family, options)
    except NotExact as error:
        raise Unsupported(name, str(error)) from error
    ranks = [its.rank for its in stored if its.rank > 0]
    metadata = provenance.of_extract(plan, ranks, alpha, certificate) | dict(encoded.metadata)
    if encoded.config is not None:
        write_text(out / CONFIG_NAME, json.dumps(encoded.config, indent=2) + "\n")
        out = out / PEFT_WEIGHTS
    write_file(out, encoded.tensors, metadata)


def _has_conv1d(plan: ExtractPlan, parts: Sequence[Part]) -> bool:
    return any(plan.pair.base.is_conv1d(part.layer.path) for part in parts)
