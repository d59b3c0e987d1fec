"""Stable Diffusion XL: CLIP-L and CLIP-G, cross-attention width 2048.

Pony, Illustrious, NoobAI and other descendants have the same keys and shapes.
"""

from merge.families.family import (
    COMFY_DENOISER,
    OPENCLIP,
    ORIGINAL,
    OWN,
    UNET_WIDTHS,
    Family,
    comfy_encoder,
)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    architecture="stable-diffusion-xl-v1-base",
    base_versions=("sdxl_base_v1-0", "sdxl_1.0", "sdxl"),
    models={"unet": "sdxl", "text_encoder": "clip-l", "text_encoder_2": "clip-g"},
    kohya={
        "unet": ("lora_unet",),
        "text_encoder": ("lora_te1", "lora_te"),
        "text_encoder_2": ("lora_te2",),
    },
    comfy={
        "unet": COMFY_DENOISER,
        "text_encoder": comfy_encoder("clip_l"),
        "text_encoder_2": comfy_encoder("clip_g"),
    },
    single_file={
        "unet": (("model.diffusion_model.", ORIGINAL),),
        "text_encoder": (("conditioner.embedders.0.transformer.", OWN),),
        "text_encoder_2": (("conditioner.embedders.1.model.", OPENCLIP),),
    },
    kohya_naming={"unet": ORIGINAL},
    comfy_naming={"unet": ORIGINAL},
    widths=UNET_WIDTHS,
    hints=("sdxl", "stable-diffusion-xl"),
    alike="Pony, Illustrious, NoobAI and other descendants",
)
