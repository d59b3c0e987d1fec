"""Scales that a configuration states: adapter_config.json, or diffusers' copy of it in metadata.

A configuration may also say that a file means more than its tensors show; that is refused here.
"""

import json
from collections.abc import Mapping
from math import isfinite, sqrt
from typing import Any

from merge.errors import Unsupported
from merge.formats.header import Header
from merge.formats.keys import Location
from merge.formats.metadata import DIFFUSERS_CONFIG
from merge.formats.patterns import Patterns


class Scales:
    """alpha / rank from a configuration: adapter_config.json, or diffusers' copy in metadata."""

    def __init__(self, header: Header, config: Mapping[str, Any] | None, name: str) -> None:
        self._name = name
        self.source = "assumed"
        configs: Mapping[str | None, Mapping[str, Any]] = {}
        if config is not None:
            configs = {None: config}
            self.source = "config"
        elif DIFFUSERS_CONFIG in header.metadata:
            configs = _by_component(header.metadata[DIFFUSERS_CONFIG], name)
            self.source = "metadata"
        self._configs = {
            component: (its, Patterns(_mapping(its.get("alpha_pattern")), name))
            for component, its in configs.items()
        }

    def of(self, location: Location, component: str, rank: int) -> float | None:
        found = self._configs.get(component, self._configs.get(None))
        if found is None:
            return None
        config, patterns = found
        alpha = patterns.first(location.path, config.get("lora_alpha", 8))  # PEFT's default
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha):
            raise Unsupported(self._name, f"its configuration has the alpha {alpha!r}")
        return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)


def _by_component(text: str, name: str) -> dict[str | None, Mapping[str, Any]]:
    """{"unet.r": 4, "unet.lora_alpha": 8} -> {"unet": {"r": 4, "lora_alpha": 8}}.

    UNet2DConditionModel.save_lora_adapter writes the keys without a component.
    """
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsupported(name, f"its metadata {DIFFUSERS_CONFIG} is not JSON") from error
    configs: dict[str | None, dict[str, Any]] = {}
    for key, value in _mapping(flat).items():
        component, dot, field = key.partition(".")
        configs.setdefault(component if dot else None, {})[field if dot else key] = value
    for config in configs.values():
        check_config(config, name)
    return dict(configs)


# Initialisations that change the base, so that the file alone is not the difference.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_NOT_PLAIN = {
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
    "arrow_config": "it routes among several adapters (Arrow)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "layer_replication": "it repeats layers of the base",
    "fan_in_fan_out": "its weights are stored transposed (fan_in_fan_out)",
    "target_parameters": "it targets parameters and not modules",
    "megatron_config": "it was trained in Megatron's parallel layers",
}


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse what a configuration says about a file and its tensors do not show."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Unsupported(name, f"its configuration says {kind}; only LoRA can be merged so far")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGED_BASE):
        why = f"it was initialised with {initial}, which changes the base it belongs to"
        raise Unsupported(name, why)
    for field, why in _NOT_PLAIN.items():
        if config.get(field):
            raise Unsupported(name, why)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
