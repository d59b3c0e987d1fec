"""The tiny Stable Diffusion pipeline that comes with this project (`train/tiny/pipeline`)."""

from merge.families.family import COMFY_DENOISER, ORIGINAL, OWN, UNET_WIDTHS, Family, comfy_encoder

TINY_SD = Family(
    name="tiny-sd",
    title="Tiny SD (built in)",
    architecture="graft-tiny-sd",
    base_versions=("graft_tiny_sd",),
    models={"unet": "tiny-sd", "text_encoder": "tiny-sd-clip"},
    kohya={"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
    comfy={"unet": COMFY_DENOISER, "text_encoder": comfy_encoder("clip_l")},
    single_file={
        "unet": (("model.diffusion_model.", ORIGINAL),),
        "text_encoder": (("cond_stage_model.transformer.", OWN),),
    },
    comfy_naming={"unet": ORIGINAL},
    widths=UNET_WIDTHS,
    hints=("graft_tiny_sd", "graft-tiny-sd"),
)
