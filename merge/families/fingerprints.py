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
    Fingerprint("llm", "a mixture of experts", (r"(^|_)(block_sparse_moe|mlp)_experts",)),
    Fingerprint(
        "llm", "a Llama-like language model",
        (r"(^|_)layers_\d+_(self_attn_[qkvo]_proj|mlp_(gate|up|down)_)",),
        (r"^encoder_layers", r"^text_model", r"encoder_attn"),
    ),
    Fingerprint("llm", "Phi-3", (r"layers_\d+_(self_attn_qkv_proj|mlp_gate_up_proj)$",)),
    Fingerprint("llm", "GPT-2", (r"(^|_)h_\d+_(attn_c_attn|attn_c_proj|mlp_c_fc|mlp_c_proj)$",)),
    Fingerprint("llm", "GPT-NeoX", (r"layers_\d+_attention_query_key_value$",)),
    Fingerprint("llm", "Falcon or BLOOM", (r"h_\d+_self_attention_query_key_value$",)),
    Fingerprint("t5", "T5", (r"block_\d+_layer_\d+_(SelfAttention|EncDecAttention|Dense)",)),
    Fingerprint("bert", "BERT", (r"encoder_layer_\d+_attention_self_(query|key|value)$",)),
    Fingerprint("whisper", "Whisper", (r"decoder_layers_\d+_encoder_attn_",)),
    Fingerprint("clip-vision", "a CLIP vision encoder", (r"^vision_model_encoder_layers_\d",)),
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
