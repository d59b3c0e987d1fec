"""FLUX.1, Chroma and FLUX.2.

FLUX.1 dev, schnell, Kontext, Fill and the control models are one family: schnell lacks the embedder
of the guidance, Fill and the control models have a wider input. Chroma is FLUX.1 without modulation,
so that an adapter of its attention alone fits both.
"""

from merge.families.dit import Encoder, dit

# T5 is te3 in sd-scripts and te2 in OneTrainer; it is told by its paths.
FLUX1 = dit(
    "flux1",
    "FLUX.1",
    "flux-1-dev",
    ("flux1",),
    encoders={
        "text_encoder": Encoder("clip-l", "clip_l", ("lora_te1", "lora_te")),
        "text_encoder_2": Encoder("t5-xxl", "t5xxl", ("lora_te3", "lora_te2")),
    },
    widths={"x_embedder": (64, 128, 384)},  # control; Fill
    optional=("time_text_embed.guidance_embedder.",),
    hints=("flux1", "flux.1", "flux-1", "flux_1", "flux_kontext"),
    alike="dev, schnell, Kontext and Krea",
)
CHROMA = dit(
    "chroma",
    "Chroma",
    "chroma",
    encoders={"text_encoder": Encoder("t5-xxl", "t5xxl", ("lora_te3", "lora_te2", "lora_te"))},
    hints=("chroma",),
)
FLUX2_DEV = dit(
    "flux2-dev",
    "FLUX.2 dev",
    "Flux.2-dev",
    ("flux_2_dev", "flux2"),
    hints=("flux2", "flux_2", "flux.2", "flux-2", "flux.2-dev"),
)
FLUX2_KLEIN_9B = dit(
    "flux2-klein-9b",
    "FLUX.2 klein 9B",
    "Flux.2-klein-9b",
    ("flux_2_klein_9b", "flux2_klein_9b"),
    hints=("flux2_klein_9b", "flux_2_klein_9b", "flux.2-klein-9b"),
)
FLUX2_KLEIN_4B = dit(
    "flux2-klein-4b",
    "FLUX.2 klein 4B",
    "Flux.2-klein-4b",
    ("flux_2_klein_4b", "flux2_klein_4b"),
    hints=("flux2_klein_4b", "flux_2_klein_4b", "flux.2-klein-4b"),
)
