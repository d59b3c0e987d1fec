"""The classes and published configurations that the tables are generated from.

Arguments that are not given are the class's defaults, which are those of the model it was written
for. `generate` builds the models on the meta device.
"""

from dataclasses import dataclass, field
from typing import Any

from merge.families.layers import ORIGINAL
from merge.families.originals import Rules
from merge.families.packing import LDM

COMFY = "comfy"  # a second spelling of the original names


@dataclass(frozen=True, slots=True)
class Source:
    """`library` holds `kind`, which takes `arguments`, or a `config` made of them."""

    library: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    namings: dict[str, str | Rules] = field(default_factory=dict)


def _dit(kind: str, rules: str | None = None, **arguments: Any) -> Source:
    return Source("diffusers", kind, arguments, namings={ORIGINAL: rules} if rules else {})


def _unet(**arguments: Any) -> Source:
    return Source("diffusers", "UNet2DConditionModel", arguments, namings={ORIGINAL: LDM})


def _clip(kind: str = "CLIPTextModel", **arguments: Any) -> Source:
    return Source("transformers", kind, arguments, config="CLIPTextConfig")


_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_DUAL = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
_WAN = ("WanTransformer3DModel", "wan")
_FLUX2 = ("Flux2Transformer2DModel", "flux2")

SOURCES: dict[str, Source] = {
    "sd15": _unet(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd2": _unet(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    ),
    "sdxl": _unet(
        **_SDXL_UNET,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=2816,
    ),
    "sdxl-refiner": _unet(
        **_SDXL_UNET,
        block_out_channels=(384, 768, 1536, 1536),
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=4,
        attention_head_dim=[6, 12, 24, 24],
        cross_attention_dim=1280,
        projection_class_embeddings_input_dim=2560,
    ),
    "sd3-medium": _dit("SD3Transformer2DModel", "sd3", **_SD3),
    "sd35-medium": _dit("SD3Transformer2DModel", "sd3", **_SD3 | _DUAL, qk_norm="rms_norm"),
    "sd35-large": _dit("SD3Transformer2DModel", "sd3", **_SD3 | _LARGE, qk_norm="rms_norm"),
    "flux1": _dit("FluxTransformer2DModel", "flux", guidance_embeds=True),
    "chroma": _dit("ChromaTransformer2DModel", "chroma"),
    "flux2-dev": _dit(*_FLUX2),
    "flux2-klein-9b": _dit(
        *_FLUX2,
        num_single_layers=24,
        num_attention_heads=32,
        joint_attention_dim=12288,
        guidance_embeds=False,
    ),
    "flux2-klein-4b": _dit(
        *_FLUX2,
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    ),
    "pixart": _dit("PixArtTransformer2DModel", "pixart", caption_channels=4096),
    "lumina2": _dit("Lumina2Transformer2DModel", "lumina2", cap_feat_dim=2304),
    "wan-1.3b": _dit(*_WAN, num_attention_heads=12, num_layers=30, ffn_dim=8960),
    "wan-14b": _dit(*_WAN),
    "wan-i2v-14b": _dit(*_WAN, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "wan-5b": _dit(
        *_WAN, num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48
    ),
    "hunyuan-video": Source(
        "diffusers",
        "HunyuanVideoTransformer3DModel",
        namings={ORIGINAL: "hunyuan-video", COMFY: "hunyuan-video-comfy"},
    ),
    "qwen-image": _dit("QwenImageTransformer2DModel"),
    "z-image": _dit("ZImageTransformer2DModel", "z-image"),
    "auraflow": _dit("AuraFlowTransformer2DModel", "auraflow"),
    "sana": _dit("SanaTransformer2DModel", "sana"),
    "ltx-2b": _dit("LTXVideoTransformer3DModel", "ltx"),
    "ltx-13b": _dit(
        "LTXVideoTransformer3DModel",
        "ltx",
        num_layers=48,
        attention_head_dim=128,
        cross_attention_dim=4096,
    ),
    "cogvideox-2b": _dit("CogVideoXTransformer3DModel"),
    "cogvideox-5b": _dit("CogVideoXTransformer3DModel", num_layers=42, num_attention_heads=48),
    "mochi": _dit("MochiTransformer3DModel", "mochi"),
    "clip-l": _clip(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "clip-h": _clip(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    ),
    "clip-g": _clip(
        "CLIPTextModelWithProjection",
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
    ),
    "t5-xxl": Source(
        "transformers",
        "T5EncoderModel",
        {
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
        config="T5Config",
    ),
}
