"""The trained factors under the key names of a dialect, with what each needs beside the tensors."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module path in the UNet -> (down, up)."""

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def file_name(name: str, dialect: str) -> str:
    """peft looks for one fixed name; the others take any."""
    return PEFT_WEIGHTS if dialect == "peft" else f"{name}.safetensors"


def keyed(factors: Factors, alpha: float, dialect: str) -> dict[str, Tensor]:
    """kohya also stores alpha as a tensor per module; the others keep it outside the tensors."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in factors.items():
        if dialect == "kohya":
            key = f"lora_unet_{module.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            # float32, because float16 would round an alpha such as 0.1.
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        else:
            prefix = "unet" if dialect == "diffusers" else "base_model.model"
            tensors[f"{prefix}.{module}.lora_A.weight"] = down
            tensors[f"{prefix}.{module}.lora_B.weight"] = up
    return tensors


def diffusers_metadata(modules: list[str], rank: int, alpha: float) -> str:
    """`lora_adapter_metadata`: the peft configuration of each component, from which diffusers
    rebuilds it. A kohya file must not carry it: diffusers refuses alphas given twice.
    """
    packed = {f"unet.{key}": value for key, value in peft_config(modules, rank, alpha).items()}
    return json.dumps(packed, sort_keys=True)


def peft_config(
    modules: list[str], rank: int, alpha: float, base: str | None = None
) -> dict[str, Any]:
    """What peft writes as adapter_config.json for these modules."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        lora_dropout=0.0,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    plain = config.to_dict()
    plain["target_modules"] = sorted(modules)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}
