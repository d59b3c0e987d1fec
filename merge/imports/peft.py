"""The arguments of PEFT's LoraModel.add_weighted_adapter (0.21.2), as a JSON object.

`cat` and `svd` and all that end in `_svd` combine changes, as we do. The others combine the two
factors by themselves: (sum of a_i B_i) (sum of b_i A_i) has cross terms between adapters, which are
as large as the result (huggingface/peft#3004). They become the method that was meant, on changes.
"""

from typing import Any

from merge.errors import BadRecipe
from merge.imports.naming import Imported, Named, Resolve, Wanted, merged

ARGUMENTS = frozenset(
    {
        *("adapters", "weights", "adapter_name", "combination_type", "svd_rank", "svd_clamp"),
        *("svd_full_matrices", "svd_driver", "density", "majority_sign_method"),
    }
)
_RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_VOTES = {"total": "mass", "frequency": "count"}


def read(document: dict[str, Any], resolve: Resolve) -> Imported:
    """The merge that the arguments mean."""
    names, weights = document["adapters"], document.get("weights")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRecipe("adapters", "is not a list of names")
    if not isinstance(weights, list) or len(weights) != len(names):
        raise BadRecipe("weights", f"is not a list of {len(names)} numbers, one for each adapter")
    if document.get("svd_clamp") is not None:
        why = "cuts off the largest entries of the factors, which is no part of any method here"
        raise BadRecipe("svd_clamp", why)
    kind = document.get("combination_type", "svd")
    if not isinstance(kind, str) or kind.removesuffix("_svd") not in (*_RULES, "cat", "svd"):
        raise BadRecipe("combination_type", f"{kind!r} is none of PEFT's")
    found = [resolve(Wanted(name, f"adapters[{i}]")) for i, name in enumerate(names)]
    inputs = [
        {**its.source(), "strength": _number(weight, f"weights[{i}]")}
        for i, (its, weight) in enumerate(zip(found, weights, strict=True))
    ]
    notes = _factor_notes(kind)
    method = _method(kind.removesuffix("_svd"), document)
    is_exact = method["name"] == "linear" and kind != "svd"
    rank = {"exact": True} if is_exact else {"fixed": _rank(kind, document, found)}
    if method.get("name") == "ties" and len(set(weights)) > 1:
        notes.append("PEFT elects signs before the weights count, and here they count first")
    if method["name"] == "dare":
        notes.append("other random numbers are drawn than PEFT draws")
    recipe = merged(inputs, method=method, rank=rank, output={"dialect": "peft"})
    return Imported(recipe, "PEFT's add_weighted_adapter", tuple(notes))


def _factor_notes(kind: str) -> list[str]:
    if kind in ("cat", "svd") or kind.endswith("_svd"):
        return []
    note = (
        f"{kind} of PEFT combines the two factors by themselves, so that its result has cross terms "
        f"between the adapters; this recipe combines the changes"
    )
    rank = ", and ranks add up: say a rank for a smaller file" if kind == "linear" else ""
    return [note + rank]


def _method(rule: str, document: dict[str, Any]) -> dict[str, Any]:
    if rule in ("cat", "svd", "linear"):
        return {"name": "linear"}
    density = document.get("density")
    if density is None:
        raise BadRecipe("density", f"{rule} needs the share of elements that are kept")
    density = _number(density, "density")
    vote = document.get("majority_sign_method", "total")
    if vote not in _VOTES:
        raise BadRecipe("majority_sign_method", f"{vote!r} is neither total nor frequency")
    if rule == "ties":
        return {"name": "ties", "density": density, "vote": _VOTES[vote]}
    if rule == "magnitude_prune":
        return {"name": "magnitude", "density": density}
    if rule == "dare_ties" and vote != "total":
        raise BadRecipe("majority_sign_method", "dare elects signs by total alone here")
    return {"name": "dare", "density": density, "elect": rule == "dare_ties"}


def _rank(kind: str, document: dict[str, Any], found: list[Named]) -> int:
    """Of the result: what svd_rank says, or PEFT's default, the largest of the adapters."""
    said = document.get("svd_rank")
    if said is not None and (kind == "svd" or kind.endswith("_svd")):
        if type(said) is not int or said < 1:
            raise BadRecipe("svd_rank", f"{said!r} is no rank")
        return said
    ranks = [its.rank for its in found if its.rank is not None]
    if len(ranks) < len(found):
        raise BadRecipe(
            "svd_rank", "say one: not all adapters are at hand, so the largest is unknown"
        )
    return max(ranks)


def _number(value: Any, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecipe(param, f"{value!r} is no number")
    return float(value)
