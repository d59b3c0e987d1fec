"""Makes data/*.json from diffusers' and transformers' classes: python -m merge.families.generate

The models are built on the meta device, so this needs neither weights nor memory. The tables are
committed; a test generates them again and compares.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from merge.families.layers import CONV, EMBEDDING, LINEAR, NORM, ORIGINAL, PARAMETER
from merge.families.packing import LDM
from merge.families.sources import SOURCES, Source
from merge.families.tables import DATA, TEXT_MODEL, as_tree

TINY_PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"


def sources() -> dict[str, Source]:
    """Model -> its class: those that are published, and the tiny ones of this project."""
    return SOURCES | {
        "tiny-sd": Source(
            "diffusers",
            "UNet2DConditionModel",
            _config(TINY_PIPELINE / "unet"),
            namings={ORIGINAL: LDM},
        ),
        "tiny-sd-clip": Source(
            "transformers",
            "CLIPTextModel",
            _config(TINY_PIPELINE / "text_encoder"),
            config="CLIPTextConfig",
        ),
    }


def table(source: Source) -> dict[str, Any]:
    """{"namings": …, "modules": our path -> [kind, weight shape, has bias]}."""
    return {"namings": source.namings, "modules": describe(build(source))}


def build(source: Source) -> Any:
    """The model on the meta device."""
    import torch

    library = importlib.import_module(source.library)
    kind = getattr(library, source.kind)
    with torch.device("meta"), warnings.catch_warnings():
        # diffusers 0.42.1 builds Chroma from a class that it calls deprecated itself.
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        if source.config is not None:
            return kind(getattr(library, source.config)(**source.arguments))
        return kind.from_config(source.arguments)


def describe(model: Any) -> dict[str, list[Any]]:
    """Every module of `model` that holds parameters, in the model's order.

    CLIPTextModel lost its `text_model.` in transformers 5.6; our paths keep it.
    """
    modules: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if parameters and parameters.keys() <= {"weight", "bias"} and "weight" in parameters:
            shape = list(parameters["weight"].shape)
            modules[path] = [_kind(module), shape, "bias" in parameters]
            continue
        for name, parameter in parameters.items():
            modules[f"{path}.{name}".lstrip(".")] = [PARAMETER, list(parameter.shape), False]
    if type(model).__name__ == "CLIPTextModel":
        return {_with_text_model(path): module for path, module in modules.items()}
    return modules


def _kind(module: Any) -> str:
    from torch import nn

    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return CONV
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    assert "Norm" in type(module).__name__, f"{type(module)} is of no kind we know"
    return NORM


def _with_text_model(path: str) -> str:
    return path if path.startswith(TEXT_MODEL) else TEXT_MODEL + path


def write(folder: Path = DATA) -> None:
    folder.mkdir(exist_ok=True)
    for model, source in sources().items():
        (folder / f"{model}.json").write_text(as_text(table(source)), "utf-8")


def as_text(table: dict[str, Any]) -> str:
    """The table folded, one line per layer, so that a change of a model shows as few lines."""
    return _as_text(table | {"modules": as_tree(table["modules"])}, "") + "\n"


def _as_text(node: Any, indent: str) -> str:
    if not isinstance(node, dict) or not node:
        return json.dumps(node)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(name)}: {_as_text(part, inner)}" for name, part in node.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA)
