"""The refiner of Stable Diffusion XL: CLIP-G alone, cross-attention width 1280."""

from merge.families.family import (
    COMFY_DENOISER,
    OPENCLIP,
    ORIGINAL,
    UNET_WIDTHS,
    Family,
    comfy_encoder,
)

SDXL_REFINER = Family(
    name="sdxl-refiner",
    title="SDXL refiner",
    architecture="stable-diffusion-xl-v1-refiner",
    base_versions=("sdxl_refiner_v1-0",),
    models={"unet": "sdxl-refiner", "text_encoder_2": "clip-g"},
    kohya={"unet": ("lora_unet",), "text_encoder_2": ("lora_te2", "lora_te")},
    comfy={"unet": COMFY_DENOISER, "text_encoder_2": comfy_encoder("clip_g")},
    single_file={
        "unet": (("model.diffusion_model.", ORIGINAL),),
        "text_encoder_2": (("conditioner.embedders.0.model.", OPENCLIP),),
    },
    kohya_naming={"unet": ORIGINAL},
    comfy_naming={"unet": ORIGINAL},
    widths=UNET_WIDTHS,
    hints=("sdxl_refiner", "stable-diffusion-xl-v1-refiner"),
)
