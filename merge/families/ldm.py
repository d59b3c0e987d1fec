"""Names of the UNet in the original LDM (sgm) code.

They follow from our own list of modules alone; diffusers' converter proves them in the tests.
"""

import re
from collections.abc import Iterable

TOPS = frozenset(
    {"input_blocks", "middle_block", "output_blocks", "out", "time_embed", "label_emb"}
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK_PART = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:\.|$)")


def names(modules: Iterable[str]) -> dict[str, str]:
    """diffusers UNet module path -> the path in the original code."""
    paths = list(modules)
    parts = _parts(paths)
    return {path: _name(path, parts) for path in paths}


def _name(path: str, parts: dict[str, str]) -> str:
    if path in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[path]
    pieces = path.split(".")
    n = 3 if pieces[0] == "mid_block" else 4
    part, inner = ".".join(pieces[:n]), ".".join(pieces[n:])
    if pieces[n - 2] == "resnets":
        inner = _RESNET[inner]
    elif pieces[n - 2] == "downsamplers":
        inner = "op"  # diffusers: conv; an upsampler's conv keeps its name
    return f"{parts[part]}.{inner}"


def _parts(paths: Iterable[str]) -> dict[str, str]:
    """down_blocks.1.resnets.0 -> input_blocks.4.0, for each part of each block.

    The original numbers one list of stages: every resnet is a stage, an attention shares the
    stage of its resnet, a downsampler is a stage of its own, an upsampler joins the last one.
    """
    found = {match[0].rstrip(".") for path in paths if (match := _BLOCK_PART.match(path))}
    parts = {f"mid_block.{ours}": f"middle_block.{theirs}" for ours, theirs in _MIDDLE.items()}
    for side, stages, stage in (("down", "input_blocks", 0), ("up", "output_blocks", -1)):
        block = 0
        while f"{side}_blocks.{block}.resnets.0" in found:
            prefix = f"{side}_blocks.{block}"
            layer = 0
            while f"{prefix}.resnets.{layer}" in found:
                stage += 1
                parts[f"{prefix}.resnets.{layer}"] = f"{stages}.{stage}.0"
                parts[f"{prefix}.attentions.{layer}"] = f"{stages}.{stage}.1"
                layer += 1
            if f"{prefix}.downsamplers.0" in found:
                stage += 1
                parts[f"{prefix}.downsamplers.0"] = f"{stages}.{stage}.0"
            if f"{prefix}.upsamplers.0" in found:
                after = 2 if f"{prefix}.attentions.0" in found else 1
                parts[f"{prefix}.upsamplers.0"] = f"{stages}.{stage}.{after}"
            block += 1
    return parts
