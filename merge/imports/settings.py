"""mergekit's parameters: a number, a gradient over layers, or a list of these with filters.

mergekit/config.py, evaluate_setting: of a list with filters the first counts whose filter is part of
the tensor's name; a gradient is interpolated at t = layer / (layers - 1).
"""

import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

from merge.errors import BadRecipe
from merge.recipe import Input

Setting = Any
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def is_constant(setting: Setting) -> bool:
    return isinstance(setting, int | float | bool | str)


def constant(setting: Setting, param: str) -> float:
    """A setting that is one number."""
    try:
        value = float(setting) if is_constant(setting) else float("nan")
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise BadRecipe(param, f"one number can be said here, not {setting!r}")
    return value


def strength_table(
    settings: Sequence[tuple[Setting, str]], modules: Sequence[str], notes: list[str]
) -> list[dict[str, float]]:
    """Every setting in every module (`component.module`)."""
    layers = [int(found[1]) for module in modules if (found := _LAYER.search(module))]
    count = max(layers, default=0) + 1
    if any(_has_gradient(setting) for setting, _ in settings):
        notes.append(f"gradients are spread over {count} layers, as many as the adapters reach")
    return [
        {module: _value(setting, module, count, param) for module in modules}
        for setting, param in settings
    ]


def _has_gradient(setting: Setting) -> bool:
    if isinstance(setting, list):
        return any(
            not isinstance(its, dict) or isinstance(its.get("value"), list) for its in setting
        )
    return isinstance(setting, dict) and isinstance(setting.get("value"), list)


def _value(setting: Setting, module: str, layers: int, param: str) -> float:
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return constant(setting, param)
    if not setting:
        raise BadRecipe(param, "is an empty list")
    if all(isinstance(its, int | float) for its in setting):
        return _interpolated(setting, _place(module, layers))
    for its in setting:
        if not isinstance(its, dict) or "value" not in its:
            raise BadRecipe(param, f"{its!r} is neither a number nor an object with a value")
        wanted = its.get("filter")
        # mergekit's names are those of weights, without our component.
        if wanted in (None, "*") or str(wanted) in f"{module.partition('.')[2]}.weight":
            return _value(its["value"], module, layers, param)
    raise BadRecipe(param, f"no filter matches {module}, and there is no value without a filter")


def _interpolated(values: Sequence[float], t: float) -> float:
    at = t * (len(values) - 1)
    low = int(at)
    high = min(len(values) - 1, low + 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


def _place(module: str, layers: int) -> float:
    """Where a module is between the first layer, 0, and the last, 1."""
    found = _LAYER.search(module)
    if found is None:  # what comes before all layers or after them
        return 0.0 if "embed" in module else 1.0
    return int(found[1]) / max(layers - 1, 1)


def as_blocks(strengths: dict[str, float], modules: Sequence[str] | None) -> dict[str, Any]:
    """Fields of an input that has these strengths: one number, or factors for groups of modules.

    Groups are by the last parts of a name or by layer where that says it, else single modules.
    """
    if set(strengths) == {""} or len(set(strengths.values())) == 1:
        return {"strength": next(iter(strengths.values()))}
    own = {module: strengths[module] for module in modules or ()}
    for group in (_kind, _part, _layer):
        values: dict[str, set[float]] = {}
        for module, value in own.items():
            values.setdefault(group(module), set()).add(value)
        if all(len(its) == 1 for its in values.values()):
            blocks = {glob: its.pop() for glob, its in values.items()}
            fields = {"strength": 1.0, "blocks": {k: v for k, v in blocks.items() if v != 1.0}}
            if _says(fields, own):
                return fields
    return {"strength": 1.0, "blocks": {k: v for k, v in own.items() if v != 1.0}}


def _says(fields: dict[str, Any], wanted: dict[str, float]) -> bool:
    its = Input.model_validate({"ref": "x", **fields})
    return all(its.strength_at(*module.split(".", 1)) == value for module, value in wanted.items())


def _kind(module: str) -> str:
    """`*.self_attn.*`: the name before the last one."""
    return f"*.{module.split('.')[-2]}.*"


def _part(module: str) -> str:
    """`*.q_proj`: the last name."""
    return f"*.{module.split('.')[-1]}"


def _layer(module: str) -> str:
    """`*.layers.3.*`: all of one layer."""
    found = _LAYER.search(module)
    if found is None:
        return module
    before = module[: found.start()].split(".")[-1]
    return f"*.{before}.{found[1]}.*"
