"""Stable Diffusion 3 and 3.5: two CLIPs and T5-XXL.

3.5 medium has a second attention in its first thirteen blocks, 3.5 large is wider and deeper.
"""

from merge.families.dit import Encoder, dit

# sd-scripts and OneTrainer agree here: te1 is CLIP-L, te2 CLIP-G, te3 T5.
_ENCODERS = {
    "text_encoder": Encoder("clip-l", "clip_l", ("lora_te1", "lora_te")),
    "text_encoder_2": Encoder("clip-g", "clip_g", ("lora_te2",)),
    "text_encoder_3": Encoder("t5-xxl", "t5xxl", ("lora_te3",)),
}
# sd-scripts writes the bare type of the model as ss_base_model_version.
SD3_MEDIUM = dit(
    "sd3-medium",
    "Stable Diffusion 3 medium",
    "stable-diffusion-3-m",
    ("m", "sd3", "sd3_m"),
    encoders=_ENCODERS,
    hints=("sd3", "stable-diffusion-3", "stable-diffusion-3-m"),
)
SD35_MEDIUM = dit(
    "sd35-medium",
    "Stable Diffusion 3.5 medium",
    "stable-diffusion-3-5-medium",
    ("5-medium",),
    encoders=_ENCODERS,
    hints=("sd3", "stable-diffusion-3", "stable-diffusion-3-5-medium", "stable-diffusion-3.5-m"),
)
SD35_LARGE = dit(
    "sd35-large",
    "Stable Diffusion 3.5 large",
    "stable-diffusion-3-5-large",
    ("5-large",),
    encoders=_ENCODERS,
    hints=("sd3", "stable-diffusion-3", "stable-diffusion-3-5-large", "stable-diffusion-3.5-l"),
)
