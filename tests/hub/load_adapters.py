"""Run by test_hf_loaders.py in a process of its own, with HF_ENDPOINT pointing at a hub.

Makes adapters with diffusers, peft and transformers, uploads them, and loads each one back by the
repo's name alone, anonymously and without the hub being named in any call.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def upload(folder: Path, repo: str) -> None:
    api = HfApi(token=sys.argv[1])
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def load_with_diffusers(folder: Path) -> None:
    tuned = make_unet()
    tuned.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]))
    randomize(tuned)
    layers = get_peft_model_state_dict(tuned)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    upload(folder, "admin/for-diffusers")

    pipeline = StableDiffusionPipeline(
        unet=make_unet(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights("admin/for-diffusers")
    loaded = get_peft_model_state_dict(
        pipeline.unet, adapter_name=pipeline.get_active_adapters()[0]
    )
    assert layers.keys() == loaded.keys()
    assert all(torch.equal(layers[key], loaded[key]) for key in layers)


def load_with_peft(folder: Path) -> None:
    def make_base() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))

    tuned = get_peft_model(make_base(), LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"]))
    randomize(tuned)
    tuned.save_pretrained(folder)
    upload(folder, "admin/for-peft")
    x = torch.randn(5, 8)
    plain = make_base()
    before = plain(x)
    loaded = PeftModel.from_pretrained(plain, "admin/for-peft")
    assert torch.equal(loaded(x), tuned(x))
    assert not torch.equal(loaded(x), before)


def load_with_transformers(folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder)
    upload(folder, "admin/for-transformers")
    loaded = AutoModelForCausalLM.from_pretrained("admin/for-transformers")
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded(tokens).logits, base(tokens).logits)


for load in (load_with_diffusers, load_with_peft, load_with_transformers):
    with tempfile.TemporaryDirectory() as made:
        load(Path(made))
    print(load.__name__)  # noqa: T201 - read by the test
