"""What an output says about itself: the recipe, its digest, the certificate, and honest hints.

Nothing here is needed to use the file; all of it is needed to know what the file is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from merge.families import FAMILIES
from merge.formats import metadata as names
from merge.plan import Adapter, BakePlan, MergePlan
from merge.recipe import Recipe

# Raised when the same recipe on the same inputs may give other bytes than before.
_ENGINE = "1"
# Hashes of the file's own content that a change makes false.
_STALE = ("sshs_", "modelspec.hash_sha256")


def of_merge(
    plan: MergePlan, ranks: Sequence[int], certificate: Mapping[str, Any]
) -> dict[str, str]:
    """`__metadata__` of a merged adapter; `ranks` are those written, one per module."""
    rank = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    words = triggers(plan.adapters)
    found = _ours(plan.recipe) | {
        names.GRAFT_CERTIFICATE: json.dumps(certificate, sort_keys=True, separators=(",", ":")),
        names.GRAFT_TRIGGERS: json.dumps(words, ensure_ascii=False),
    }
    if words:
        found[names.TRIGGER_PHRASE] = ", ".join(words)
    if plan.dialect == "kohya":
        # alpha equals rank in every module, so that readers of these hints get the right scale.
        found |= {
            names.NETWORK_MODULE: "networks.lora",
            names.NETWORK_DIM: rank,
            names.NETWORK_ALPHA: rank,
        }
    base_version = _shared(plan.adapters, names.BASE_VERSION)
    if base_version is not None:
        found[names.BASE_VERSION] = base_version
    return found | {names.ARCHITECTURE: f"{FAMILIES[plan.family].architecture}/lora"}


def of_bake(plan: BakePlan, base: Mapping[str, str]) -> dict[str, str]:
    """`__metadata__` of a baked file: the base's own, without its hashes, and where it comes from.

    The certificate is not in it: it is known when the last byte is written, and the header, which
    comes first, is by then part of the file's SHA-256.
    """
    kept = {key: value for key, value in base.items() if not key.startswith(_STALE)}
    assert plan.recipe.base is not None  # a bake without a base is no recipe
    base_sha256 = plan.recipe.base.sha256 or ""
    return kept | _ours(plan.recipe) | {names.GRAFT_BASE_SHA256: base_sha256}


def triggers(adapters: Sequence[Adapter]) -> list[str]:
    """The trigger words of all inputs, each once, in the order of the inputs."""
    words = (word for adapter in adapters for word in names.trigger_words(adapter.header.metadata))
    return list(dict.fromkeys(words))


def _ours(recipe: Recipe) -> dict[str, str]:
    return {
        names.FORMAT: "pt",
        names.GRAFT_VERSION: _ENGINE,
        names.GRAFT_RECIPE: recipe.canonical_json(),
        names.GRAFT_RECIPE_DIGEST: recipe.digest(),
        # By digest: names are not in the recipe's digest, so they must not decide bytes either.
        "modelspec.merged_from": ", ".join(_digests(recipe)),
    }


def _digests(recipe: Recipe) -> list[str]:
    return [f"sha256:{one['sha256']}" for one in json.loads(recipe.canonical_json())["inputs"]]


def _shared(adapters: Sequence[Adapter], key: str) -> str | None:
    values = {adapter.header.metadata.get(key) for adapter in adapters}
    return values.pop() if len(values) == 1 else None
