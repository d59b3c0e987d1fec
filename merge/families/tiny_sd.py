"""The tiny Stable Diffusion pipeline that comes with this project (`train/tiny/pipeline`)."""

from merge.families.family import Family

TINY_SD = Family(
    name="tiny-sd",
    title="Tiny SD (built in)",
    architecture="graft-tiny-sd",
    base_versions=("graft_tiny_sd",),
    kohya={"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1")},
    kohya_names="diffusers",
    single_file={
        "unet": ("model.diffusion_model.", "ldm"),
        "text_encoder": ("cond_stage_model.transformer.", "hf"),
    },
)
