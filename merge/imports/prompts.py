"""Prompts with <lora:name:0.8>, as the Stable Diffusion web UIs read them.

AUTOMATIC1111 1.10, extensions-builtin/Lora/extra_networks_lora.py: the first number is for text
encoders, the second for the denoiser and by default the same; `te=`, `unet=` and `dyn=` name them;
without a number both are 1. `lyco` is another name of `lora`.
"""

import re
from typing import Any

from merge.errors import BadRecipe
from merge.imports.naming import Imported, Named, Resolve, Wanted, merged

TAG = re.compile(r"<(\w+):([^<>]+)>")
_ADAPTERS = ("lora", "lyco")
_NAMED = ("te", "unet", "dyn")


def read(text: str, resolve: Resolve) -> Imported:
    """The sum of all adapters that a prompt names, at its strengths."""
    inputs, notes, seen = [], [], set()
    for tag in TAG.finditer(text):
        kind, whole = tag[1], tag[0]
        if kind not in _ADAPTERS:
            notes.append(f"{whole} names no adapter and is left out")
            continue
        name, numbers = _arguments(tag[2], whole)
        if "dyn" in numbers:
            detail = "cuts the rank while images are made; resize the adapter, then merge it"
            raise BadRecipe(whole, detail)
        if name in seen:
            notes.append(f"{name} is named more than once: its strengths add up")
        seen.add(name)
        te = numbers.get("te", 1.0)
        inputs.append(at_strengths(resolve(Wanted(name, whole)), numbers.get("unet", te), te))
    if not inputs:
        raise BadRecipe("", "names no adapter, as <lora:name:1> does")
    return Imported(merged(inputs), "a prompt", tuple(notes))


def at_strengths(named: Named, unet: float, te: float) -> dict[str, Any]:
    """An input with a strength of its own for text encoders, where it has any."""
    found = {**named.source(), "strength": unet}
    encoders = sorted(c for c in named.components if c.startswith("text_encoder"))
    if te != unet and named.modules is None:
        detail = "its text encoders are only known from the file, which is not at hand"
        raise BadRecipe(named.ref or named.sha256 or "", detail)
    return found | ({"components": dict.fromkeys(encoders, te)} if te != unet and encoders else {})


def _arguments(text: str, whole: str) -> tuple[str, dict[str, float]]:
    """(name, numbers by `te`, `unet`, `dyn`) of what stands in a tag."""
    name, *words = text.split(":")
    numbers: dict[str, float] = {}
    places = iter(_NAMED)
    for word in words:
        key, equals, value = word.rpartition("=")
        key = key if equals else next(places, "")
        if key not in _NAMED:
            what = f"{key} is no argument" if key else "there is one argument too many"
            raise BadRecipe(whole, f"{what}; write <lora:name:te:unet>")
        try:
            numbers[key] = float(value)
        except ValueError:
            raise BadRecipe(whole, f"{value!r} is no number") from None
    return name.strip(), numbers
