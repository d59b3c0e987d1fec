"""What an output says about itself: the recipe, its digest, the certificate, and honest hints.

Nothing here is needed to use the file; all of it is needed to know what the file is.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge import lineage
from merge.bases import Base
from merge.extract_plan import ExtractPlan
from merge.families import FAMILIES, Family
from merge.formats import metadata as names
from merge.packing import Notes
from merge.plan import Adapter, BakePlan, MergePlan, Plan
from merge.recipe import Input, Recipe, Source

# Raised when the same recipe on the same inputs may give other bytes than before.
ENGINE = "3"
# Hashes of the file's own content that a change makes false.
_STALE = ("sshs_", "modelspec.hash_sha256")


def of_merge(
    plan: MergePlan, ranks: Sequence[int], alpha: float, certificate: Mapping[str, Any]
) -> dict[str, str]:
    """`__metadata__` of a merged adapter; `ranks` are those written, `alpha` that of a kohya file."""
    words = triggers(plan.adapters)
    found = _ours(plan) | {
        names.GRAFT_CERTIFICATE: json.dumps(certificate, sort_keys=True, separators=(",", ":")),
        names.GRAFT_TRIGGERS: json.dumps(words, ensure_ascii=False),
    }
    if words:
        found[names.TRIGGER_PHRASE] = ", ".join(words)
    if plan.dialect == "kohya" and ranks:
        found |= {
            names.NETWORK_MODULE: _LORA_MODULES.get(plan.family or "", "networks.lora"),
            names.NETWORK_DIM: str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic",
            names.NETWORK_ALPHA: f"{alpha:g}",
        }
    base_version = _shared(plan.adapters, names.BASE_VERSION)
    if base_version is not None:
        found[names.BASE_VERSION] = base_version
    if plan.family is not None:
        found[names.ARCHITECTURE] = f"{FAMILIES[plan.family].architecture}/lora"
    if plan.recipe.kind == "resize":
        return _resized(plan, found, ranks, alpha)
    return found


def _resized(
    plan: MergePlan, found: Mapping[str, str], ranks: Sequence[int], alpha: float
) -> dict[str, str]:
    """The adapter's own metadata, for a smaller copy was trained as it was; its ranks are the new ones."""
    (adapter,) = plan.adapters
    changed = dict(found)
    stated = {
        key: value
        for key, value in adapter.header.metadata.items()
        if not key.startswith(_STALE) and key not in _OF_THE_SOURCE
    }
    is_plain = {entry.algorithm for entry in adapter.layout.entries} <= {"lora", "full", "norm"}
    if names.NETWORK_MODULE in stated and is_plain:
        changed[names.NETWORK_MODULE] = stated[names.NETWORK_MODULE]
        args = names.read_json(stated, names.NETWORK_ARGS)
        if isinstance(args, dict):
            # Ranks and alphas of convolutions, which are now among the others.
            kept = {key: value for key, value in args.items() if not key.startswith("conv_")}
            stated[names.NETWORK_ARGS] = json.dumps(kept, ensure_ascii=False)
    else:
        stated.pop(names.NETWORK_MODULE, None)
        stated.pop(names.NETWORK_ARGS, None)
    if names.NETWORK_DIM in stated and ranks:
        changed[names.NETWORK_DIM] = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
        changed[names.NETWORK_ALPHA] = f"{alpha:g}"
    return stated | changed


def of_extract(
    plan: ExtractPlan, ranks: Sequence[int], alpha: float, certificate: Mapping[str, Any]
) -> dict[str, str]:
    """`__metadata__` of an extracted adapter; the base is known, so what was tuned says the rest."""
    base, tuned = plan.recipe.base, plan.recipe.tuned
    assert base is not None
    assert tuned is not None
    found = _ours(plan) | {
        names.GRAFT_CERTIFICATE: json.dumps(certificate, sort_keys=True, separators=(",", ":")),
        names.GRAFT_BASE_SHA256: base.sha256 or "",
        "modelspec.merged_from": f"sha256:{tuned.sha256}, sha256:{base.sha256}",
    }
    if plan.dialect == "kohya" and ranks:
        found |= {
            names.NETWORK_MODULE: _LORA_MODULES.get(plan.family or "", "networks.lora"),
            names.NETWORK_DIM: str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic",
            names.NETWORK_ALPHA: f"{alpha:g}",
        }
    if plan.family is not None:
        found[names.BASE_VERSION] = FAMILIES[plan.family].base_versions[0]
        found[names.ARCHITECTURE] = f"{FAMILIES[plan.family].architecture}/lora"
    return found


def of_bake(plan: BakePlan, base: Mapping[str, str]) -> dict[str, str]:
    """`__metadata__` of a baked file: the base's own, without its hashes, and where it comes from.

    The certificate is not in it: it is known when the last byte is written, and the header, which
    comes first, is by then part of the file's SHA-256.
    """
    kept = {
        key: value
        for key, value in base.items()
        if not key.startswith(_STALE) and key not in _OF_THE_SOURCE
    }
    assert plan.recipe.base is not None  # a bake without a base is no recipe
    base_sha256 = plan.recipe.base.sha256 or ""
    return kept | _ours(plan) | {names.GRAFT_BASE_SHA256: base_sha256}


def facts(recipe: Recipe, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What every certificate says beside its figures, all of it known before anything is computed.

    `inputs` are in the recipe's canonical order, and so are the numbers of `coverage` (modules that
    an input changes, by component) and of `strengths` (the modules in which one takes part at
    another strength than the recipe's first number for it; null where it has no such module).
    """
    wanted = [recipe.inputs[i] for i in recipe.in_canonical_order()]
    method = recipe.method.model_dump(mode="json", exclude_none=True)
    inputs = [
        _input(its, adapter.header.file_size) for its, adapter in zip(wanted, adapters, strict=True)
    ]
    found = {"engine": ENGINE, "method": method, "inputs": inputs}
    at = _strengths(adapters)
    coverage = {
        component: [sum(row[i] is not None for row in its.values()) for i in range(len(wanted))]
        for component, its in at.items()
    }
    groups = _groups(at, [its.strength for its in wanted])
    return found | {"coverage": coverage} | ({"strengths": groups} if groups else {})


def by_input(plan: Plan, numbers: Mapping[int, float]) -> list[float | None]:
    """Numbers of some adapters in the recipe's canonical order, null for the others."""
    found = (numbers.get(adapter) for adapter in range(len(plan.adapters)))
    return [None if number is None else float(f"{number:.4g}") for number in found]


def _input(wanted: Input, size: int) -> dict[str, Any]:
    pins = {"sha256": wanted.sha256, "config_sha256": wanted.config_sha256}
    if wanted.vectors is not None:
        pins["vectors_sha256"] = wanted.vectors.sha256
    said = {name: digest for name, digest in pins.items() if digest is not None}
    return {**said, "size_bytes": size, "strength": wanted.strength}


_Row = tuple[float | None, ...]  # by input


def _strengths(adapters: Sequence[Adapter]) -> dict[str, dict[str, _Row]]:
    """Component -> module -> the strength of each input there, where one is not 0."""
    found: dict[str, dict[str, list[float | None]]] = defaultdict(dict)
    for i, adapter in enumerate(adapters):
        its = adapter.wanted
        for entry in adapter.layout.entries:
            for run in entry.layer.runs:
                strength = its.strength_at(entry.component, run.module)
                if strength != 0 and not its.leaves_out(entry.component, run.module):
                    row = found[entry.component].setdefault(run.module, [None] * len(adapters))
                    row[i] = strength
    return {
        component: {module: tuple(row) for module, row in sorted(rows.items())}
        for component, rows in sorted(found.items())
    }


def _groups(at: Mapping[str, Mapping[str, _Row]], asked: Sequence[float]) -> list[dict[str, Any]]:
    """Modules with the same strengths together, a whole component as `component.*`."""
    groups: dict[_Row, list[str]] = defaultdict(list)
    for component, rows in at.items():
        alike = len(set(rows.values())) == 1
        for module, row in list(rows.items())[: 1 if alike else None]:
            if any(its not in (None, said) for its, said in zip(row, asked, strict=True)):
                groups[row].append(f"{component}.{'*' if alike else module}")
    return [{"of_inputs": list(row), "modules": names} for row, names in groups.items()]


def _histories(plan: Plan) -> dict[str, lineage.History | None]:
    """What every file that the recipe names says about itself, by its SHA-256."""
    wanted = [plan.recipe.inputs[i] for i in plan.recipe.in_canonical_order()]
    found = {
        its.sha256 or "": lineage.believed({"": adapter.header.metadata}, adapter.name)
        for its, adapter in zip(wanted, plan.adapters, strict=True)
    }
    for source, checkpoint in _checkpoints(plan):
        if source is not None and checkpoint is not None:
            files = {name: file.header.metadata for name, file in checkpoint.files.items()}
            found[source.sha256 or ""] = lineage.believed(files, source.name)
    return found


def _checkpoints(plan: Plan) -> list[tuple[Source | None, Base | None]]:
    if isinstance(plan, ExtractPlan):
        pair = plan.pair
        return [(plan.recipe.base, pair.base), (plan.recipe.tuned, pair.tuned)]
    return [(plan.recipe.base, plan.base)]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a converted file says about itself. `is_same`: every layer kept its algorithm."""

    source: str
    dialect: str
    family: Family | None
    algorithms: Mapping[str, int]
    ranks: Sequence[int]
    alphas: Sequence[float]
    is_same: bool
    notes: Notes


# What is true of the bytes it was written for alone.
_OF_THE_SOURCE = (
    names.DIFFUSERS_CONFIG,
    names.GRAFT_VERSION,
    names.GRAFT_RECIPE,
    names.GRAFT_RECIPE_DIGEST,
    names.GRAFT_CERTIFICATE,
    names.GRAFT_PARENTS,
    names.GRAFT_PACKED,
)
_NETWORK = (names.NETWORK_MODULE, names.NETWORK_DIM, names.NETWORK_ALPHA, names.NETWORK_ARGS)


def of_conversion(stated: Mapping[str, str], made: Conversion) -> dict[str, str]:
    """`__metadata__` of a converted adapter: the source's own, and what readers of the dialect want."""
    found = {
        key: value
        for key, value in stated.items()
        if not key.startswith(_STALE) and key not in _OF_THE_SOURCE
    }
    found |= {names.FORMAT: "pt", names.GRAFT_CONVERTED_FROM: made.source}
    if made.notes:
        found[names.GRAFT_PACKED] = json.dumps(made.notes, sort_keys=False, separators=(",", ":"))
    if made.family is not None:
        architecture = f"{made.family.architecture}/lora"
        found = {
            names.BASE_VERSION: made.family.base_versions[0],
            names.ARCHITECTURE: architecture,
        } | found
    is_described = names.NETWORK_MODULE in stated
    if made.dialect == "kohya" or (is_described and not made.is_same):
        kept = _NETWORK if is_described and made.is_same else ()
        network = {key: value for key, value in _network(made).items() if value}
        found = {key: value for key, value in found.items() if key in kept or key not in _NETWORK}
        found = network | found
    if names.NETWORK_DIM in found and made.ranks:
        found[names.NETWORK_DIM] = str(_most_common(made.ranks))
        found[names.NETWORK_ALPHA] = f"{_most_common(made.alphas):g}"
    return found


def _network(made: Conversion) -> dict[str, str]:
    """ss_network_…: which trainer's code loads the factors, their rank and alpha."""
    names_of = sorted(made.algorithms)
    found = {
        names.NETWORK_DIM: str(_most_common(made.ranks)) if made.ranks else "",
        names.NETWORK_ALPHA: f"{_most_common(made.alphas):g}" if made.alphas else "",
    }
    if names_of == ["lora"]:
        family = made.family.name if made.family is not None else ""
        return found | {names.NETWORK_MODULE: _LORA_MODULES.get(family, "networks.lora")}
    algorithm = next((name for name in names_of if name not in ("full", "norm")), names_of[0])
    algo = {"oft": "diag-oft", "dora": "lora"}.get(algorithm, algorithm)
    args = {"algo": algo} | ({"dora_wd": "True"} if algorithm == "dora" else {})
    return found | {names.NETWORK_MODULE: "lycoris.kohya", names.NETWORK_ARGS: json.dumps(args)}


# sd-scripts and musubi-tuner have a module for each kind of denoiser.
_LORA_MODULES = {
    "flux1": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "lumina2": "networks.lora_lumina",
    "sd3-medium": "networks.lora_sd3",
    "sd35-medium": "networks.lora_sd3",
    "sd35-large": "networks.lora_sd3",
}


def _most_common(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def triggers(adapters: Sequence[Adapter]) -> list[str]:
    """The trigger words of all inputs, each once, in the order of the inputs."""
    words = (word for adapter in adapters for word in names.trigger_words(adapter.header.metadata))
    return list(dict.fromkeys(words))


def _ours(plan: Plan) -> dict[str, str]:
    recipe = plan.recipe
    parents = lineage.parents_of(recipe, _histories(plan))
    found = {
        names.FORMAT: "pt",
        names.GRAFT_VERSION: ENGINE,
        names.GRAFT_RECIPE: recipe.canonical_json(),
        names.GRAFT_RECIPE_DIGEST: recipe.digest(),
        # By digest: names are not in the recipe's digest, so they must not decide bytes either.
        "modelspec.merged_from": ", ".join(_digests(recipe)),
    }
    return found | ({names.GRAFT_PARENTS: lineage.write_parents(parents)} if parents else {})


def _digests(recipe: Recipe) -> list[str]:
    return [f"sha256:{one['sha256']}" for one in json.loads(recipe.canonical_json())["inputs"]]


def _shared(adapters: Sequence[Adapter], key: str) -> str | None:
    values = {adapter.header.metadata.get(key) for adapter in adapters}
    return values.pop() if len(values) == 1 else None
