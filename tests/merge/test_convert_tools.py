"""Converted files load in diffusers, peft and LyCORIS, which then change a model as the source does."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from lycoris.modules import get_module, make_module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from merge.convert import convert
from merge.families import FAMILIES
from tests.fixtures import adapters
from tests.fixtures.engine import run
from tests.fixtures.families import make_models, tiny_family
from tests.fixtures.packed import write

# transformers' own deprecation, reached through peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
WIDE = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.1.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"
LAYERS = [LINEAR, WIDE, CONV, POINT]


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "sd15-tiny", tiny_family("sd15-tiny"))


def their_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, PeftModel):
            yield path.removeprefix("base_model.model."), layer


def assert_alike(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 1e-6
        torch.testing.assert_close(
            found[name].double().flatten(1),
            delta.double().flatten(1),
            rtol=1e-4,
            atol=1e-6,
            msg=name,
        )


def randomised(model: Any) -> Any:
    """Every factor, so that no product is zero; magnitudes of DoRA become other ones."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = values.abs() + 0.5 if "magnitude" in name else values
    return model


def pipeline_of(models: dict[str, Any]) -> Any:
    return StableDiffusionPipeline(
        **models,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("home", ["kohya", "comfy"])
def test_diffusers_loads_what_we_write(home: str, tmp_path: Path) -> None:
    made = adapters.make_adapter(
        tmp_path / "f.safetensors",
        family="sd15-tiny",
        dialect=home,
        modules="blocks",
        components=["unet", "text_encoder"],
        ranks=[2, 1, 3],
        alphas=[2.0, 1.0, 0.5],
        size=0.3,
    )
    convert(made.path, tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    models = make_models("sd15-tiny")
    pipeline = pipeline_of(models)
    pipeline.load_lora_weights(tmp_path)
    found = {
        f"{component}.{path}".replace("encoder.text_model.", "encoder."): layer.get_delta_weight(
            layer.active_adapters[0]
        )
        for component, model in models.items()
        for path, layer in their_layers(model)
    }
    expected = {
        f"{component}.{path}".replace("encoder.text_model.", "encoder."): torch.from_numpy(delta)
        for (component, path), delta in made.deltas.items()
    }
    assert_alike(found, expected)


def lycoris_file(path: Path, unet: nn.Module, make: Any) -> dict[str, torch.Tensor]:
    """What LyCORIS' modules save for a few layers of the UNet, and what they add to each weight."""
    generator = torch.Generator().manual_seed(5)
    tensors, deltas = {}, {}
    for name in LAYERS:
        layer = unet.get_submodule(name)
        module = make(f"lycoris_{name.replace('.', '_')}", layer).eval()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        stem = f"lycoris_{name.replace('.', '_')}"
        tensors |= {f"{stem}.{key}": tensor for key, tensor in module.state_dict().items()}
        deltas[name] = seen_by(module, layer)
    write(path, {key: tensor.float() for key, tensor in tensors.items()})
    return deltas


def seen_by(module: nn.Module, layer: nn.Module) -> torch.Tensor:
    """The weight that a module adds, from its outputs for every unit input: forward is right, where
    LyCORIS' own merge of LoHa and LoKr applies the scale twice.
    """
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        if weight.ndim == 2:
            eye = torch.eye(weight.shape[1])
            return (module(eye) - layer(eye)).mT
        channels, kernel = weight.shape[1], weight.shape[2]
        eye = torch.eye(channels * kernel * kernel).reshape(-1, channels, kernel, kernel)
        # The image is one kernel large; its middle sees all of it through the padding.
        at = kernel // 2
        return (module(eye) - layer(eye))[:, :, at, at].mT


OPTIONS: dict[str, tuple[Any, str | None]] = {
    "loha": (lambda name, layer: LohaModule(name, layer, 1.0, 3, 2.0), None),
    "loha tucker": (
        lambda name, layer: LohaModule(name, layer, 1.0, 3, 2.0, use_tucker=True),
        None,
    ),
    "lokr": (lambda name, layer: LokrModule(name, layer, 1.0, 2, 1.0), None),
    "loha as lora": (lambda name, layer: LohaModule(name, layer, 1.0, 2, 2.0), "lora"),
    "lokr as lora": (lambda name, layer: LokrModule(name, layer, 1.0, 2, 1.0), "lora"),
    "locon": (lambda name, layer: LoConModule(name, layer, 1.0, 3, 1.0), None),
    "tucker as lora": (
        lambda name, layer: LoConModule(name, layer, 1.0, 3, 1.0, use_tucker=True),
        "lora",
    ),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_peft_loads_what_lycoris_wrote(kind: str, tmp_path: Path) -> None:
    make, algorithm = OPTIONS[kind]
    unet = make_models("sd15-tiny")["unet"]
    expected = lycoris_file(tmp_path / "f.safetensors", unet, make)
    convert(tmp_path / "f.safetensors", tmp_path / "peft", "peft", algorithm=algorithm)
    wrapped = PeftModel.from_pretrained(unet, tmp_path / "peft")
    found = {
        path: layer.get_delta_weight("default").detach() for path, layer in their_layers(wrapped)
    }
    assert_alike(found, expected)


CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=LAYERS),
    "dora": LoraConfig(r=3, lora_alpha=2, use_dora=True, target_modules=LAYERS),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=LAYERS),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=LAYERS),
    "lokr whole": LoKrConfig(r=64, alpha=16, target_modules=LAYERS),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_lycoris_loads_what_peft_wrote(kind: str, tmp_path: Path) -> None:
    unet = make_models("sd15-tiny")["unet"]
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in LAYERS}
    wrapped = randomised(get_peft_model(unet, CONFIGS[kind]))
    wrapped.save_pretrained(tmp_path)
    convert(tmp_path / "adapter_model.safetensors", tmp_path / "f.safetensors", "kohya")
    merged = wrapped.merge_and_unload()
    expected = {name: merged.get_submodule(name).weight.detach() - before[name] for name in LAYERS}
    tensors = load_file(tmp_path / "f.safetensors")
    fresh = make_models("sd15-tiny")["unet"]
    found = {}
    for name in LAYERS:
        layer = fresh.get_submodule(name)
        stem = f"lora_unet_{name.replace('.', '_')}"
        module = make_module(*get_module(tensors, stem), stem, layer).eval()
        found[name] = seen_by(module, layer)
    assert_alike(found, expected)


def test_dora_becomes_that_of_peft(tmp_path: Path) -> None:
    """LyCORIS' magnitudes of outputs, (out, 1): PEFT merges the same weights."""
    unet = make_models("sd15-tiny")["unet"]
    expected = lycoris_file(
        tmp_path / "f.safetensors",
        unet,
        lambda name, layer: LoConModule(name, layer, 1.0, 3, 1.0, weight_decompose=True),
    )
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in LAYERS}
    convert(tmp_path / "f.safetensors", tmp_path / "peft", "peft")
    merged = PeftModel.from_pretrained(unet, tmp_path / "peft").merge_and_unload()
    found = {name: merged.get_submodule(name).weight.detach() - before[name] for name in LAYERS}
    assert_alike(found, expected)


def test_diffusers_fuses_dora(tmp_path: Path) -> None:
    """Its pipelines drop dora_scale of a kohya file; under PEFT's name it is read."""
    models = make_models("sd15-tiny")
    unet = models["unet"]
    expected = lycoris_file(
        tmp_path / "f.safetensors",
        unet,
        lambda name, layer: LoConModule(name, layer, 1.0, 3, 1.0, weight_decompose=True),
    )
    before = {name: unet.get_submodule(name).weight.detach().clone() for name in LAYERS}
    convert(tmp_path / "f.safetensors", tmp_path / "pytorch_lora_weights.safetensors", "diffusers")
    pipeline = pipeline_of(models)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora()
    found = {
        name: unet.get_submodule(name).base_layer.weight.detach() - before[name] for name in LAYERS
    }
    assert_alike(found, expected)


def test_lycoris_and_peft_read_one_merge_alike(tmp_path: Path) -> None:
    """LoHa and LoKr of LyCORIS, merged: their forward passes add up to what both readers see."""
    unet = make_models("sd15-tiny")["unet"]
    loha = lycoris_file(tmp_path / "loha.safetensors", unet, OPTIONS["loha as lora"][0])
    lokr = lycoris_file(tmp_path / "lokr.safetensors", unet, OPTIONS["lokr as lora"][0])
    inputs = [(tmp_path / "loha.safetensors", 0.7), (tmp_path / "lokr.safetensors", -0.4)]
    expected = {name: 0.7 * loha[name] - 0.4 * lokr[name] for name in LAYERS}
    run(tmp_path / "out.safetensors", inputs, output={"dialect": "kohya"})
    tensors = load_file(tmp_path / "out.safetensors")
    found = {}
    for name in LAYERS:
        stem = f"lora_unet_{name.replace('.', '_')}"
        layer = unet.get_submodule(name)
        found[name] = seen_by(make_module(*get_module(tensors, stem), stem, layer).eval(), layer)
    assert_alike(found, expected)
    run(tmp_path / "peft", inputs, output={"dialect": "peft"})
    wrapped = PeftModel.from_pretrained(unet, tmp_path / "peft")
    theirs = {path: its.get_delta_weight("default").detach() for path, its in their_layers(wrapped)}
    assert_alike(theirs, expected)
