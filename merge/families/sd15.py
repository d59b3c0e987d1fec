"""Stable Diffusion 1.x: one CLIP-L text encoder, cross-attention width 768."""

from merge.families.family import COMFY_DENOISER, ORIGINAL, OWN, UNET_WIDTHS, Family, comfy_encoder

SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    architecture="stable-diffusion-v1",
    base_versions=("sd_v1", "sd_v1_v", "sd_1.5", "sd1"),
    models={"unet": "sd15", "text_encoder": "clip-l"},
    kohya={"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
    comfy={"unet": COMFY_DENOISER, "text_encoder": comfy_encoder("clip_l")},
    single_file={
        "unet": (("model.diffusion_model.", ORIGINAL),),
        "text_encoder": (("cond_stage_model.transformer.", OWN),),
    },
    comfy_naming={"unet": ORIGINAL},
    widths=UNET_WIDTHS,
    hints=("sd_v1", "sd_1", "sd1", "stable-diffusion-v1"),
)
