"""The configurations of the tiny pipeline's networks, in the block structure of Stable Diffusion 1."""

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from train.tiny.render import SIZE
from train.tiny.tokenizer import MAX_TOKENS

LATENT_SIZE = SIZE // 8
TEXT_WIDTH = 64
TRAIN_TIMESTEPS = 1000


def make_vae() -> AutoencoderKL:
    """64 x 64 x 3 -> 8 x 8 x 4."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """As in Stable Diffusion 1, `attention_head_dim` is the number of heads."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token embeddings start wide, so that words never seen in a caption stay far apart.

    With CLIP's initial 0.02 an unseen trigger word is nearly silent and gates nothing.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    encoder.get_input_embeddings().weight.data.normal_(std=0.3)
    return encoder


def make_noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise levels, with v-prediction (Salimans and Ho 2022, arXiv:2202.00512)."""
    return DDPMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
    )


def make_sampler() -> DDIMScheduler:
    """Same noise levels, for generation."""
    return DDIMScheduler.from_config(
        make_noise_scheduler().config, set_alpha_to_one=False, steps_offset=1
    )
