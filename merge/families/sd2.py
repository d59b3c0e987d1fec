"""Stable Diffusion 2.x: the names of 1.5, OpenCLIP's ViT-H, cross-attention width 1024."""

from merge.families.family import (
    COMFY_DENOISER,
    OPENCLIP,
    ORIGINAL,
    Family,
    comfy_encoder,
)

SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2",
    architecture="stable-diffusion-v2-768-v",
    base_versions=("sd_v2", "sd_v2_v", "sd_2.1"),
    models={"unet": "sd2", "text_encoder": "clip-h"},
    kohya={"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
    comfy={"unet": COMFY_DENOISER, "text_encoder": comfy_encoder("clip_h")},
    single_file={
        "unet": (("model.diffusion_model.", ORIGINAL),),
        "text_encoder": (("cond_stage_model.model.", OPENCLIP),),
    },
    comfy_naming={"unet": ORIGINAL},
    widths={"conv_in": (4, 5, 8, 9)},  # 5 with a depth map
    hints=("sd_v2", "sd_2", "sd2", "stable-diffusion-v2", "stable-diffusion-2"),
)
