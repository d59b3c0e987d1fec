"""Recipes of ComfyUI-Lora-Manager: `<id>.recipe.json`, or "Recipe metadata: {…}" in a picture's text.

Read from its 2025-2026 sources (py/services/recipes, py/recipes): `loras` is a list of objects with
`file_name` (the stem), `hash` (SHA-256 in hex), `strength` (`weight` where it was taken from a
picture), `exclude`, `isDeleted` (from Civitai), and names for people. Its prompt syntax is in
`loras_stack`, and what is in `loras` is the same.
"""

import json
import re
from typing import Any

from merge.errors import BadRecipe
from merge.imports.naming import Imported, Resolve, Wanted, merged
from merge.imports.prompts import at_strengths

_MARKED = re.compile(r"Recipe metadata: (\{.*\})", re.IGNORECASE | re.DOTALL)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def embedded(text: str) -> dict[str, Any] | None:
    """The recipe in the text of a picture, if there is one."""
    found = _MARKED.search(text)
    if found is None:
        return None
    try:
        document = json.JSONDecoder().raw_decode(found[1])[0]
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) and "loras" in document else None


def read(document: dict[str, Any], resolve: Resolve) -> Imported:
    """The sum of all adapters that are not excluded, at their strengths."""
    loras = document["loras"]
    if not isinstance(loras, list):
        raise BadRecipe("loras", "is not a list")
    inputs, notes = [], []
    for index, its in enumerate(loras):
        param = f"loras[{index}]"
        if not isinstance(its, dict):
            raise BadRecipe(param, "is not an object")
        name = str(its.get("file_name") or its.get("name") or its.get("modelName") or "")
        if its.get("exclude") or its.get("active") is False:
            notes.append(f"{param} ({name}) is excluded there and left out")
            continue
        strength = _number(its, ("strength", "weight"), 1.0, param)
        te = _number(its, ("clipStrength", "clip_strength"), strength, param)
        digest = str(its.get("hash") or its.get("sha256") or "")
        sha256 = digest.lower() if _SHA256.fullmatch(digest) else None
        if sha256 is None:
            said = f"has {digest!r} for a SHA-256" if digest else "has no hash"
            notes.append(f"{param} {said}: {name} is found by its name alone")
        inputs.append(at_strengths(resolve(Wanted(name, param, sha256)), strength, te))
    if not inputs:
        raise BadRecipe("loras", "names no adapter that takes part")
    if document.get("checkpoint"):
        notes.append("the checkpoint takes no part: a merge needs none, and a bake can name it")
    return Imported(merged(inputs), "ComfyUI-Lora-Manager", tuple(notes))


def _number(its: dict[str, Any], fields: tuple[str, ...], default: float, param: str) -> float:
    for field in fields:
        value = its.get(field)
        if value is None:
            continue
        try:
            return float(value)
        except (TypeError, ValueError):
            raise BadRecipe(f"{param}.{field}", f"{value!r} is no number") from None
    return default
