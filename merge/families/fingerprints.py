"""What a file of a family outside our tables probably is: names of modules and a few widths.

A fingerprint is evidence for people, never enough to merge. The first that fits wins, so that
narrow ones stand before the wide ones they would also satisfy.
Names and widths are those of the models' published configurations.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Extent = tuple[int, int]  # (out, in) of a module's weight


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`has` and `lacks` are expressions over flattened module paths; `width` is (expression, in)."""

    name: str
    title: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    width: tuple[str, tuple[int, ...]] | None = None


_DOUBLE = r"^(double_blocks|transformer_blocks)_\d"
_SINGLE = r"^single_(transformer_)?blocks_\d"
_UNET = r"^(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_"
_LAYERS = r"^layers_\d+_attention_"

FINGERPRINTS = (
    Fingerprint("chroma", "Chroma", (r"^distilled_guidance_layer",)),
    Fingerprint("hunyuan-video", "HunyuanVideo", (_DOUBLE, r"img_mlp_fc1|img_mod_linear|refiner")),
    Fingerprint("flux2", "FLUX.2", (r"to_qkv_mlp_proj|_ff_linear_in",)),
    Fingerprint("flux2", "FLUX.2", (_DOUBLE, _SINGLE), (), (r"_qkv$|_to_q$", (4096, 6144))),
    Fingerprint(
        "flux2", "FLUX.2", (_DOUBLE, _SINGLE), (), (r"^(txt_in|context_emb)", (7680, 12288, 15360))
    ),
    Fingerprint("flux1", "FLUX.1", (_DOUBLE, _SINGLE)),
    Fingerprint("flux1", "FLUX.1", (r"^double_blocks_\d",)),
    Fingerprint("flux1", "FLUX.1", (_SINGLE,)),
    Fingerprint("qwen-image", "Qwen-Image", (r"^transformer_blocks_\d+_(img|txt)_(mlp|mod)",)),
    Fingerprint("auraflow", "AuraFlow", (r"^(double_layers|joint_transformer_blocks)_\d",)),
    Fingerprint("sd3", "Stable Diffusion 3", (r"^joint_blocks_\d",)),
    Fingerprint("sd3", "Stable Diffusion 3", (r"^transformer_blocks_\d+_attn_add_[qkv]_proj",)),
    Fingerprint("hidream", "HiDream", (r"^(double|single)_stream_blocks_\d",)),
    Fingerprint("anima", "Cosmos / Anima", (r"^blocks_\d+_(self|cross)_attn_[qkv]_proj",)),
    Fingerprint("wan", "Wan", (r"^blocks_\d+_(self|cross)_attn_([qkvo]|k_img|v_img)$",)),
    Fingerprint("wan", "Wan", (r"^blocks_\d+_(attn[12]_to_|ffn_)",)),
    Fingerprint("lumina2", "Lumina 2", (_LAYERS,), (), (_LAYERS, (2304,))),
    Fingerprint("z-image", "Z-Image", (r"^layers_\d+_attention_|^(noise|context)_refiner",)),
    Fingerprint("pixart", "PixArt", (), (), (r"^(transformer_)?blocks_\d+_(attn1|cross)", (1152,))),
    Fingerprint("cascade", "Stable Cascade", (r"^down_blocks_\d+_\d+_attention_attn",)),
    Fingerprint(
        "sdxl-refiner", "SDXL refiner", (_UNET,), (), (r"attn2_to_k$", (1280,))
    ),
    Fingerprint("sd2", "Stable Diffusion 2", (_UNET,), (), (r"attn2_to_k$", (1024,))),
    Fingerprint("sd15", "Stable Diffusion 1.5", (_UNET,), (), (r"attn2_to_k$", (768,))),
    Fingerprint("sdxl", "Stable Diffusion XL", (_UNET,), (), (r"attn2_to_k$", (2048,))),
    Fingerprint(
        "llm", "a language model", (r"(^|_)layers_\d+_(self_attn_[qkvo]_proj|mlp_(gate|up|down)_)",),
        (r"^encoder_layers", r"^text_model"),
    ),
)  # fmt: skip


def recognise(extents: Mapping[str, Extent | None]) -> Fingerprint | None:
    """The first fingerprint that fits flattened module paths with their extents, where known."""
    for fingerprint in FINGERPRINTS:
        if _fits(fingerprint, extents):
            return fingerprint
    return None


def _fits(fingerprint: Fingerprint, extents: Mapping[str, Extent | None]) -> bool:
    if not all(_any(expression, extents) for expression in fingerprint.has):
        return False
    if any(_any(expression, extents) for expression in fingerprint.lacks):
        return False
    if fingerprint.width is None:
        return True
    expression, widths = fingerprint.width
    found = (e for path, e in extents.items() if e and re.search(expression, path))
    return any(extent[1] in widths for extent in found)


def _any(expression: str, paths: Mapping[str, Extent | None]) -> bool:
    pattern = re.compile(expression)
    return any(pattern.search(path) for path in paths)


# ss_base_model_version and modelspec.architecture, lower case; the longest prefix counts.
_STATED = {
    "sd_v1": "sd15",
    "sd_1.5": "sd15",
    "sd1": "sd15",
    "stable-diffusion-v1": "sd15",
    "sd_v2": "sd2",
    "sd_2.1": "sd2",
    "stable-diffusion-v2": "sd2",
    "sdxl": "sdxl",
    "stable-diffusion-xl": "sdxl",
    "sd3": "sd3",
    "stable-diffusion-3": "sd3",
    "flux1": "flux1",
    "flux.1": "flux1",
    "flux-1": "flux1",
    "flux_kontext": "flux1",
    "flux2": "flux2",
    "flux_2": "flux2",
    "flux.2": "flux2",
    "chroma": "chroma",
    "lumina": "lumina2",
    "hunyuan": "hunyuan-video",
    "framepack": "hunyuan-video",
    "wan": "wan",
    "qwen": "qwen-image",
    "zimage": "z-image",
    "z_image": "z-image",
    "z-image": "z-image",
    "hidream": "hidream",
    "anima": "anima",
    "graft_tiny_sd": "tiny-sd",
    "graft-tiny-sd": "tiny-sd",
}


def stated_family(value: str) -> str | None:
    """The family a trainer's metadata names, or None for a value we do not know."""
    value = value.strip().lower()
    prefixes = [prefix for prefix in _STATED if value.startswith(prefix)]
    return _STATED[max(prefixes, key=len)] if prefixes else None
