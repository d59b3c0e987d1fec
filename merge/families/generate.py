"""Write data/*.json, the module tables, from the model classes: python -m merge.families.generate

diffusers and transformers build the models on the meta device, so this needs neither weights nor
memory. The tables are committed; a test generates them again and compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

from merge.families.tables import DATA, TEXT_MODEL, as_tree

TINY_PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"

# The configurations published with the models.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def tables() -> dict[str, dict[str, Any]]:
    """Model -> its table: "modules" and, where code before diffusers named them, "original"."""
    found: dict[str, dict[str, Any]] = {
        "sd15": {"modules": unet(SD15_UNET), "original": "ldm"},
        "sdxl": {"modules": unet(SDXL_UNET), "original": "ldm"},
        "clip-l": {"modules": clip(CLIP_L)},
        "clip-g": {"modules": clip(CLIP_G, has_projection=True)},
    }
    if TINY_PIPELINE.is_dir():
        found["tiny-sd"] = {
            "modules": unet(_config(TINY_PIPELINE / "unet")),
            "original": "ldm",
        }
        found["tiny-sd-clip"] = {"modules": clip(_config(TINY_PIPELINE / "text_encoder"))}
    return found


def unet(config: dict[str, Any]) -> dict[str, list[Any]]:
    """The modules of a UNet2DConditionModel."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return describe(UNet2DConditionModel.from_config(config))


def clip(config: dict[str, Any], *, has_projection: bool = False) -> dict[str, list[Any]]:
    """The modules of a CLIP text encoder, named with `text_model.` whatever the library does."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if has_projection else CLIPTextModel
    with torch.device("meta"):
        modules = describe(kind(CLIPTextConfig(**config)))
    return {_with_text_model(path): module for path, module in modules.items()}


def _with_text_model(path: str) -> str:
    is_outside = path.startswith(TEXT_MODEL) or path == "text_projection"
    return path if is_outside else TEXT_MODEL + path


def describe(model: Any) -> dict[str, list[Any]]:
    """Every module of `model` that holds parameters, in the model's order."""
    from torch import nn

    kinds = {
        nn.Linear: "linear",
        nn.Conv2d: "conv",
        nn.GroupNorm: "norm",
        nn.LayerNorm: "norm",
        nn.Embedding: "embedding",
    }
    modules = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        has_bias = getattr(module, "bias", None) is not None
        modules[path] = [kinds[type(module)], list(module.weight.shape), has_bias]
    return modules


def write(folder: Path = DATA) -> None:
    folder.mkdir(exist_ok=True)
    for model, table in tables().items():
        (folder / f"{model}.json").write_text(as_text(table), "utf-8")


def as_text(table: dict[str, Any]) -> str:
    """The table folded, one line per layer, so that a change of a model shows as few lines."""
    folded = {
        name: leaves if isinstance(leaves, str) else as_tree(leaves)
        for name, leaves in table.items()
    }
    return _as_text(folded, "") + "\n"


def _as_text(node: Any, indent: str) -> str:
    if not isinstance(node, dict):
        return json.dumps(node)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(name)}: {_as_text(part, inner)}" for name, part in node.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
