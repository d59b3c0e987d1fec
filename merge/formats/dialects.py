"""Writing: the keys of every dialect, and the configuration its readers want beside them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from merge.families import FAMILIES, Family
from merge.families.family import TEXT_MODEL

_ROLE_SUFFIXES = {
    "kohya": {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"},
    "comfy": {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"},
    "diffusers": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
    "peft": {"down": ".lora_A.weight", "up": ".lora_B.weight"},
}
WRITABLE_DIALECTS = tuple(_ROLE_SUFFIXES)
_COMFY_TEXT = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}


def write_keys(
    modules: Iterable[tuple[str, str]], dialect: str, family: str
) -> dict[tuple[str, str], dict[str, str]]:
    """(component, module) -> {role: key} in a dialect of WRITABLE_DIALECTS.

    Only kohya and comfy hold `alpha` in the file. diffusers wants `diffusers_config` in the
    metadata beside its keys, PEFT wants `peft_config` beside the file; a PEFT file is of one
    component.
    """
    suffixes = _ROLE_SUFFIXES[dialect]
    return {
        (component, module): {
            role: _stem(component, module, dialect, FAMILIES[family]) + suffix
            for role, suffix in suffixes.items()
        }
        for component, module in modules
    }


def _stem(component: str, module: str, dialect: str, family: Family) -> str:
    original = family.original.get(component, {}).get(module, module)
    if dialect == "kohya":
        path = original if family.kohya_names == "ldm" else module
        return f"{family.kohya[component][0]}_{path.replace('.', '_')}"
    if dialect == "comfy":
        prefix = _COMFY_TEXT.get(component, "diffusion_model.")
        return prefix + original
    if dialect == "peft":
        # PEFT wants the paths of the model in memory, and only CLIPTextModel is flattened there.
        path = module.removeprefix(TEXT_MODEL) if component == "text_encoder" else module
        return f"base_model.model.{path}"
    return f"{component}.{module}"


def peft_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base: str | None = None
) -> dict[str, Any]:
    """adapter_config.json for modules of one component with these ranks and alphas.

    Targets are without `text_model.`, which transformers dropped from CLIPTextModel in 5.6: PEFT
    compares the ends of paths, so that they fit models of either kind.
    """
    modules = sorted(ranks)
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [module.removeprefix(TEXT_MODEL) for module in modules],
        "rank_pattern": {_exactly(m): ranks[m] for m in modules if ranks[m] != rank},
        "alpha_pattern": {_exactly(m): alphas[m] for m in modules if alphas[m] != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def diffusers_config(
    ranks: Mapping[tuple[str, str], int], alphas: Mapping[tuple[str, str], float]
) -> str:
    """The value of `lora_adapter_metadata`: one PEFT configuration per component, flattened."""
    flat: dict[str, Any] = {}
    for component in sorted({component for component, _ in ranks}):
        config = peft_config(
            {m: rank for (c, m), rank in ranks.items() if c == component},
            {m: alpha for (c, m), alpha in alphas.items() if c == component},
        )
        flat |= {f"{component}.{field}": value for field, value in config.items()}
    return json.dumps(flat, sort_keys=True)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values[key] for key in sorted(values)).most_common(1)[0][0]


def _exactly(module: str) -> str:
    """A pattern that matches this path alone: PEFT would let `conv1` match every `…conv1`."""
    anchor = "" if module.startswith(TEXT_MODEL) else "^"
    return anchor + module.removeprefix(TEXT_MODEL).replace(".", r"\.")
