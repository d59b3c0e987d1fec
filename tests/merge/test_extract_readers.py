"""Extracted adapters as other tools read them: diffusers on a pipeline, peft on language models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from merge.execute import execute
from merge.plan import plan
from tests.fixtures.checkpoints import extraction
from tests.fixtures.families import tiny_llama

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
PIPELINE = Path(__file__).parents[2] / "train" / "tiny" / "pipeline"
IDS = torch.arange(10)[None] * 7 % 90


def change(model: torch.nn.Module, ends: tuple[str, ...]) -> None:
    """Add a random matrix of rank 4 to the weights of these layers, and something to biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(ends):
                out, inner = parameter.shape[0], parameter[0].numel()
                up = torch.randn(out, 4, generator=generator)
                down = torch.randn(4, inner, generator=generator)
                parameter.add_((up @ down).view(parameter.shape), alpha=0.02)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_pipeline_with_the_adapter_is_the_tuned_pipeline(dialect: str, tmp_path: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(PIPELINE, dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "base")
    ends = ("to_q.weight", "to_out.0.weight", "ff.net.2.weight", "proj_in.weight", "conv1.weight")
    change(pipe.unet, ends)
    change(pipe.text_encoder, ("q_proj.weight", "fc1.weight"))
    pipe.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    outcome = execute(
        plan(*extraction(tmp_path / "base", tmp_path / "tuned", output={"dialect": dialect})), out
    )
    assert outcome.certificate["error"] < 1e-5
    fresh: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "base", dtype=torch.float32)
    fresh.load_lora_weights(tmp_path, weight_name=out.name)
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    both = [(fresh.unet, pipe.unet), (fresh.text_encoder, pipe.text_encoder)]
    # diffusers 0.42 looks for kohya's text encoder under names that transformers 5.6 dropped.
    for ours, theirs in both[: 1 if dialect == "kohya" else 2]:
        state = ours.state_dict()
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=2e-6, msg=key)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    )


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (tiny_llama, ("q_proj.weight", "down_proj.weight", "lm_head.weight")),
        (gpt2, ("c_attn.weight", "c_fc.weight", "c_attn.bias")),
    ],
    ids=["llama", "gpt2"],
)
def test_a_language_model_with_the_adapter_is_the_tuned_one(
    make: Callable[[], Any], ends: tuple[str, ...], tmp_path: Path
) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    change(model, ends)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    outcome = execute(
        plan(*extraction(tmp_path / "base", tmp_path / "tuned", rank={"energy": 1.0})),
        tmp_path / "out",
    )
    assert outcome.certificate["error"] < 1e-6
    adapted = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    with torch.no_grad():
        found = adapted(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
