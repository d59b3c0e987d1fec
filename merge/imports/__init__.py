"""Recipes of other tools as recipes of ours: text in, recipe and notes out.

mergekit's YAML, the arguments of PEFT's add_weighted_adapter, recipes of ComfyUI-Lora-Manager, and
prompts of the Stable Diffusion web UIs. What means something else here is said in a note; what
cannot be said in our terms is refused by name. Where names lead is asked of the caller: no file is
opened here.
"""

import json
from typing import Any

import yaml

from merge.errors import BadRecipe
from merge.imports import lora_manager, mergekit, peft, prompts
from merge.imports.naming import Imported, Named, Resolve, Wanted

__all__ = ["Imported", "Named", "Resolve", "Wanted", "import_recipe"]


def import_recipe(text: str, resolve: Resolve) -> Imported:
    """A recipe of whichever tool wrote `text`; BadRecipe where none did, or where one cannot be said."""
    document = _parsed(text)
    if isinstance(document, dict):
        if "merge_method" in document:
            return mergekit.read(document, resolve)
        if "adapters" in document and document.keys() <= peft.ARGUMENTS:
            return peft.read(document, resolve)
        if "loras" in document:
            return lora_manager.read(document, resolve)
    if (embedded := lora_manager.embedded(text)) is not None:
        return lora_manager.read(embedded, resolve)
    if prompts.TAG.search(text):
        return prompts.read(text, resolve)
    raise BadRecipe(
        "",
        "is nothing that can be imported: no merge_method as in mergekit's, no adapters and weights "
        "as of add_weighted_adapter, no loras as of ComfyUI-Lora-Manager, no <lora:name:1> of a prompt",
    )


def _parsed(text: str) -> Any:
    """The JSON or YAML that the text is; None of any other text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return None
    except RecursionError as error:
        raise BadRecipe("", "is nested too deeply") from error
