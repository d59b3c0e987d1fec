"""A complete Stable Diffusion pipeline small enough for one CPU core, with its data and its metrics.

Every part is the real class of diffusers and transformers: AutoencoderKL, UNet2DConditionModel,
CLIPTextModel, CLIPTokenizer. It paints one coloured shape on a plain background, 64 x 64 pixels.

render.py     what the world looks like: scenes, styles and concepts drawn with numpy
tokenizer.py  a CLIPTokenizer whose words are the world's words
models.py     the configurations of VAE, UNet, text encoder and scheduler
pretrain.py   the seeded script that made the committed weights
load.py       the committed weights as a StableDiffusionPipeline
generate.py   prompts and a seed -> images
metrics.py    style, concept, content, leak and forgetting, measured on pixels alone

This file imports nothing heavy, so that a process without torch can find the folder.
"""

from pathlib import Path

PIPELINE_DIR: Path = Path(__file__).parent / "pipeline"
"""The committed pipeline: a diffusers folder in float16."""
