"""Image models with a family of their own each: PixArt, Qwen-Image, AuraFlow, Sana."""

from merge.families.dit import Encoder, dit
from merge.families.layers import OWN

# PixArt-alpha at 1024 pixels is told its resolution; Sigma is not.
PIXART = dit(
    "pixart",
    "PixArt",
    "pixart",
    encoders={"text_encoder": Encoder("t5-xxl", "t5xxl", ("lora_te", "lora_te1", "lora_te3"))},
    optional=("adaln_single.emb.resolution_embedder.", "adaln_single.emb.aspect_ratio_embedder."),
    hints=("pixart",),
)
QWEN_IMAGE = dit(
    "qwen-image",
    "Qwen-Image",
    "Qwen-Image",
    ("qwen_image", "qwen_image_edit", "qwen_image_layered"),
    naming=OWN,
    hints=("qwen",),
    alike="Qwen-Image-Edit",
)
AURAFLOW = dit("auraflow", "AuraFlow", "auraflow", hints=("auraflow",))
SANA = dit("sana", "Sana", "sana", hints=("sana",))
